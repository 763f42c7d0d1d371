"""A small model behind a real socket, in this process."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from mptbook.infer.engine import Engine
from mptbook.infer.slots import Slots
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.serve import server
from mptbook.serve.limits import Limits
from mptbook.serve.metrics import Metrics
from mptbook.serve.served import Served
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import ChatTemplate

TEXTS = ["the cat sat on the mat. A dog ate the hat — olé\n"] * 5
ROOM = 230  # tokens of a slot
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(TEXTS, 290)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(2)
    # more ids than the tokenizer has, as in a padded vocabulary
    model = MPT(MPTConfig(d_model=36, n_heads=3, n_layers=2, max_seq_len=ROOM, vocab_size=300))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2) if weight.dim() > 1 else None
        model.transformer.wte.weight[0] = 0  # end-of-text is not likely, or nothing would be long
    return model.eval()


@dataclass
class Running:
    url: str
    served: Served
    server: Any  # uvicorn's

    def __post_init__(self):
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def ask(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        if body is None:
            return self.client.get(path, **how)
        return self.client.post(path, json=body, **how)

    def complete(self, prompt: Any = "the cat", **fields: Any) -> httpx.Response:
        return self.ask("/v1/completions", {"model": "cat", "prompt": prompt} | fields)

    def chat(self, messages: Any = MESSAGES, **fields: Any) -> httpx.Response:
        return self.ask("/v1/chat/completions", {"model": "cat", "messages": messages} | fields)


@pytest.fixture(scope="session")
def serving(model, tokenizer):
    """`with serving(...) as running:` a server of its own, on a free port."""

    @contextmanager
    def start(*, template="chatml", key=None, n_slots=4, name="cat", **limits):
        metrics = Metrics(name)
        bounds = Limits(**limits)
        slots = Slots(model, n_slots, ROOM)
        engine = Engine(slots, tokenizer, queue=bounds.waiting, observe=metrics.observe)
        metrics.watch(engine)
        template = ChatTemplate.load(template) if template else None
        served = Served(name, engine, tokenizer, template, bounds)
        listener = server.bound("127.0.0.1", 0)
        runs = server.server_of(server.make_app(served, metrics, key), served)
        listener.listen()  # so that who asks before it has started waits
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            one = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", served, runs)
            with one.client:
                yield one
        finally:
            runs.should_exit = True
            thread.join()

    return start


@pytest.fixture(scope="module")
def running(serving):
    with serving() as one:
        yield one
