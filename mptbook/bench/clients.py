"""A real server of random weights in a process of its own, and clients that time its answers.

The clients are plain HTTP and a thread each: on a machine with few cores they and the server
share those, so they do next to nothing.
"""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mptbook.directory import save_model
from mptbook.infer.text import HALF
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.serve.command import KEY
from mptbook.tokenizer.tokenizer import Tokenizer

MODEL = "random"  # the name that requests give


@dataclass
class Answer:
    """When a request was sent, and when each token of its answer came; in seconds."""

    sent: float
    came: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.came[0] - self.sent

    @property
    def between(self) -> float:
        """The mean from token to token."""
        return (self.came[-1] - self.came[0]) / (len(self.came) - 1)


def write_random(config: MPTConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """A model directory of random bfloat16 weights, in which every answer is as long as it may be.

    The model chooses no token that ends a text, or that is no text of its own: their rows of the
    head are a thousandth of what they were, and so are their logits. So each token is an event of
    a stream. (Rows of zeros are embeddings, too: a prompt of such tokens would make all logits
    equal.)
    """
    torch.manual_seed(0)
    model = MPT(config)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    silent = [token for token, text in enumerate(texts) if not text or HALF in text]
    with torch.no_grad():
        model.head[[tokenizer.end_of_text, *silent]] *= 1e-3
    save_model(model.bfloat16(), folder, tokenizer)


def new_prompts(n_ids: int) -> Callable[[int], list[int]]:
    """A function that gives a prompt of n random tokens; no two begin alike, so none is reused."""
    chance = np.random.default_rng(0)
    firsts = iter(chance.permutation(n_ids).tolist())
    return lambda n: [next(firsts), *chance.integers(0, n_ids, n - 1).tolist()]


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[int]:
    """The port of `mptbook serve FOLDER`, which runs in a process of its own.

    Raises:
        RuntimeError: if it ends before it serves; it has said why.
    """
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mptbook", "serve", str(folder), "--name", MODEL]
    command += ["--port", "0", *words]
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()  # NAME at http://127.0.0.1:PORT: ...
            if not line:
                raise RuntimeError(f"mptbook serve ended with exit code {process.wait()}")
            yield int(line.split()[2].rstrip(":").rpartition(":")[2])
        finally:
            process.terminate()


def ask(port: int, prompt: Sequence[int], new_tokens: int) -> Answer:
    """One streaming request, read to its end.

    Raises:
        RuntimeError: if the answer is not so many tokens.
    """
    answer = Answer(0.0)
    for _ in stream(port, prompt, new_tokens, answer):
        pass
    if len(answer.came) != new_tokens:
        raise RuntimeError(f"{new_tokens} tokens were asked for, and {len(answer.came)} came")
    return answer


def stream(port: int, prompt: Sequence[int], new_tokens: int, answer: Answer) -> Iterator[None]:
    """Yields after each token, whose time is noted in `answer`.

    Raises:
        RuntimeError: if the request is refused, or the answer breaks off.
    """
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
    body = json.dumps(asked | {"stream": True})
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        answer.sent = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"refused: {response.read().decode()}")
        for line in response:
            if line == b"data: [DONE]\n":
                return
            if line.startswith(b'data: {"error"'):
                raise RuntimeError(f"the answer broke off: {line.decode()}")
            if line != b"\n":
                answer.came.append(time.perf_counter())
                yield
        raise RuntimeError("the answer broke off, as the server may have said")


@contextmanager
def written(port: int, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[None]:
    """Requests that are all being written until the end of the context, and then given up.

    Raises:
        RuntimeError: if one of them was finished before.
    """
    answers = [Answer(0.0) for _ in prompts]
    over = False

    def read(prompt: Sequence[int], answer: Answer) -> bool:
        with closing(stream(port, prompt, new_tokens, answer)) as events:
            return any(over for _ in events)

    with ThreadPoolExecutor(len(prompts)) as pool:
        left = [pool.submit(read, *pair) for pair in zip(prompts, answers, strict=True)]
        try:
            while not all(answer.came for answer in answers):
                if failed := [each for each in left if each.done()]:
                    failed[0].result()
                    break
                time.sleep(0.005)
            yield
        finally:
            over = True
    if not all(each.result() for each in left):
        raise RuntimeError(f"{new_tokens} tokens were written before others had been answered")
