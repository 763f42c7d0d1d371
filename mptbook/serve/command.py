"""`mptbook serve DIR`: a model directory behind HTTP."""

import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory, template_of
from mptbook.infer.engine import Engine
from mptbook.infer.load import BitsSetting, load, weight_bytes
from mptbook.infer.slots import CacheDtype, Slots
from mptbook.infer.text import check_vocabulary
from mptbook.model.mpt import MPT
from mptbook.serve.limits import Limits
from mptbook.settings import RunSettings
from mptbook.tokenizer.chat import ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
KEY = "MPTBOOK_API_KEY"
MOST_TOKENS = 4096  # of a slot, unless more are asked for: a cache of 65,536 is for few machines


class Serve(RunSettings):
    """Answer HTTP requests as OpenAI's servers do: `mptbook serve DIR`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    name: str = Field("", description="of the model in requests; none: that of its folder")
    host: str = Field(
        "127.0.0.1", description="address to listen at; others than loopback take a key"
    )
    port: int = Field(8000, ge=0, le=65535, description="0 takes one that is free")
    api_key_file: Path | None = Field(
        None, description=f"file with the key that requests must bring; or it is in {KEY}"
    )
    template: str = Field(
        "", description="instruct, instruct-card, chatml, or a Jinja file; none: the model's own"
    )
    device: str = Field("", description="cpu or cuda; none: cuda where there is one")
    bits: BitsSetting | None = Field(
        None, description="of a weight: 16, 8 or 4; none: as it is stored"
    )
    slots: PositiveInt = Field(8, description="requests that are written at once")
    tokens: NonNegativeInt = Field(
        0,
        description="of prompt and answer together, that each has room for; 0: as many as the "
        f"model was trained on, at most {MOST_TOKENS}",
    )
    cache_dtype: CacheDtype | None = Field(
        None, description="of keys and values; none: float32 if the weights are, else bfloat16"
    )
    chunk_tokens: PositiveInt = Field(256, description="of a prompt, read between two steps")
    access_log: bool = Field(False, description="a line for each request")
    limits: Limits = Limits()

    def run(self) -> None:
        try:
            from mptbook.serve import server
            from mptbook.serve.metrics import Metrics
            from mptbook.serve.served import Served
        except ModuleNotFoundError as error:
            raise ValueError(
                f"serving needs {error.name}, which is not here; pip install 'mptbook[serve]'"
            ) from None

        key = find_key(self.api_key_file)
        check_host(self.host, key)
        with server.bound(self.host, self.port) as listener:
            folder = find_directory(self.model)
            tokenizer, template = Tokenizer.load(folder), find_template(self.template, folder)
            slots = elsewhere(self._slots, folder, tokenizer)
            name = self.name or name_of(self.model, folder)
            metrics = Metrics(name)
            how = {"chunk_tokens": self.chunk_tokens, "queue": self.limits.waiting}
            engine = Engine(slots, tokenizer, **how, observe=metrics.observe)
            metrics.watch(engine)
            served = Served(name, engine, tokenizer, template, self.limits)
            app = server.make_app(served, metrics, key)
            runs = server.server_of(app, served, self.access_log)

            came: set[int] = set()

            def end(number: int, _: object) -> None:
                came.add(number)
                runs.should_exit = True

            # For a signal before uvicorn listens to them, and for the one that it sends itself
            # again when it has finished what runs.
            previous = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
            listener.listen()  # who reads the line may ask at once
            print(about(name, listener, slots), flush=True)
            try:
                runs.run(sockets=[listener])
            finally:
                for each, handler in previous.items():
                    signal.signal(each, handler)
            if signal.SIGINT in came:
                raise KeyboardInterrupt

    def _slots(self, folder: Path, tokenizer: Tokenizer) -> Slots:
        """The model with its cache, tried out."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(folder, self.bits, device)
        config = model.config
        check_model(model, folder, tokenizer)
        if config.has_positions and self.tokens > config.max_seq_len:
            raise ValueError(
                f"tokens={self.tokens}, but learned positions end at "
                f"max_seq_len={config.max_seq_len}; ask for fewer"
            )
        n_tokens = self.tokens or min(config.max_seq_len, MOST_TOKENS)
        slots = Slots(model, self.slots, n_tokens, self.cache_dtype)
        # Compiles what writing and reading take, so that the first requests need not wait for it.
        slots.decode([0], [tokenizer.end_of_text])
        slots.crop(0, 0)
        slots.read(0, [tokenizer.end_of_text] * min(2, n_tokens))
        slots.crop(0, 0)
        return slots


def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns or raises, called in a thread of its own that ends with it.

    OpenMP keeps a team of worker threads for every thread that computes, as long as it lives. Of
    two teams there are more threads than processors: workers then sleep between any two loops
    instead of waiting awake, and a token takes 10 ms instead of 4 (measured, two cores). So the
    main thread of a server computes nothing, and only the engine's has a team.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:  # raised again where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)  # Ctrl-C need not wait for it
    try:
        thread.start()
        found = outcome.result()
    except KeyboardInterrupt:
        # Python would end below a thread that is inside of a library, which then aborts.
        sys.stdout.flush()
        os._exit(130)
    thread.join()
    return found


def about(name: str, listener: socket.socket, slots: Slots) -> str:
    """The line that says where a model is served, and what memory it takes."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    weights, cache = weight_bytes(slots.model) / 2**30, slots.bytes / 2**30
    return (
        f"{name} at http://{host}:{port}: weights {weights:.2f} GiB, "
        f"{slots.n_slots} slots of {slots.n_tokens} tokens in {cache:.2f} GiB"
    )


def find_key(file: Path | None) -> str | None:
    """The key out of a file, or the environment; None where there is none.

    Raises:
        ValueError: if it is empty, or no single word of printable ASCII.
    """
    key, place = os.environ.get(KEY), KEY
    if file is not None:
        key, place = file.read_text(encoding="utf-8").strip(), str(file)
    if key is None:
        return None
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(
            f"the key in {place} is empty, or no word of letters, digits and signs; make one with: "
            "openssl rand -hex 32"
        )
    return key


def check_host(host: str, key: str | None) -> None:
    """See that only this machine can ask a server without a key.

    Raises:
        ValueError: if others could.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and key is None:
        raise ValueError(
            f"host={host} lets other machines ask, and there is no key; set {KEY} or "
            "--api-key-file, or listen at 127.0.0.1"
        )


def find_template(said: str, folder: Path) -> ChatTemplate | None:
    """The template that is named, or the directory's own; None if it has none."""
    if said:
        return ChatTemplate.load(said)
    return template_of(folder)


def name_of(said: str, folder: Path) -> str:
    """What a model is called after: its name on the hub, its folder, or the run that it is of."""
    if not Path(said).exists():
        return said
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def check_model(model: MPT, folder: Path, tokenizer: Tokenizer) -> None:
    """See that a model can answer.

    Raises:
        ValueError: if a weight is not finite, or the tokenizer has ids that the model lacks.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{folder}: {name} is damaged: not all of its numbers are finite")
