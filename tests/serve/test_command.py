import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from mptbook.__main__ import main
from mptbook.directory import save_model
from mptbook.infer.load import save_packed
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.serve.command import KEY, MOST_TOKENS, Serve, check_host, find_key, name_of
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import ChatTemplate


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(5)
    config = MPTConfig(d_model=128, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300)
    tokenizer = train_bpe(["the cat sat on the mat\n"] * 5, 290)
    save_model(MPT(config), tmp_path / "m", tokenizer, template=ChatTemplate.load("chatml"))
    return tmp_path / "m"


def refusal(capsys, *words):
    """The one line with which the command ends."""
    assert main(["serve", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_command_serves_until_it_is_told_to_end_and_finishes_what_runs(folder):
    words = [sys.executable, "-m", "mptbook", "serve", folder, "--port", "0", "--tokens", "700"]
    environment = os.environ | {KEY: "s3cret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, words)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        assert line.startswith("m at http://127.0.0.1:"), process.stderr.read()
        assert "8 slots of 700 tokens" in line
        url = line.split()[2].rstrip(":")
        headers = {"authorization": "Bearer s3cret"}
        body = {"model": "m", "prompt": "the", "max_tokens": 600, "temperature": 0, "stream": True}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
        ) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


TEAMS = """
import os
import time
from mptbook.infer.load import random_model
from mptbook.infer.slots import Slots
from mptbook.model.config import MPTConfig
from mptbook.serve.command import elsewhere

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    model = random_model(MPTConfig(d_model=64, n_heads=2, n_layers=1, vocab_size=300), 8)
    slots = Slots(model, 1, 90)
    slots.read(0, [7] * 70)
    return slots.decode([0], [7]).shape

def settled():
    time.sleep(1)  # workers that were dismissed take a moment
    return threads()

assert elsewhere(compute) == (1, 300)
before = settled()  # libraries have started what they keep
elsewhere(compute)
assert settled() == before, "workers are left"
compute()
assert settled() > before, "there was nothing to see"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_what_loads_the_model_leaves_no_workers_beside_those_of_the_engine():
    words = [sys.executable, "-c", TEAMS]
    subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "3"}, check=True, timeout=120)


LOADS = """
import signal, sys, torch
from mptbook.__main__ import main
from mptbook.serve.command import Serve

def load(*_):
    print("loading", flush=True)
    while True:
        torch.rand(500, 500) @ torch.rand(500, 500)

# A job that a shell has put into the background is born without.
signal.signal(signal.SIGINT, signal.default_int_handler)
Serve._slots = load
sys.exit(main(["serve", sys.argv[1], "--port", "0"]))
"""


@contextmanager
def ended(words):
    """A process that does not outlive the test, whatever becomes of it."""
    with subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_a_server_that_still_loads(folder):
    words = [sys.executable, "-c", LOADS, str(folder)]
    with ended(words) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""


def test_ctrl_c_once_more_does_not_wait_for_what_runs(folder):
    words = [sys.executable, "-m", "mptbook", "serve", folder, "--port", "0", "--tokens", "9000"]
    with ended(words) as process:
        url = process.stdout.readline().split()[2].rstrip(":")
        body = {"model": "m", "prompt": "the", "max_tokens": 4000, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            with suppress(httpx.RemoteProtocolError):
                *_, last = [line for line in lines if line]
                assert last == "data: [DONE]"
        assert process.wait(30) == 130
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_who_reads_the_line_can_ask_or_end_the_server_at_once(folder, end, code):
    words = [sys.executable, "-m", "mptbook", "serve", str(folder), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    how = {"env": environment | {"OMP_NUM_THREADS": "1"}, "text": True}
    for asks in (True, False):
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
        ) as process:
            url = process.stdout.readline().split()[2].rstrip(":")
            if asks:
                assert httpx.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
            process.send_signal(end)
            assert process.wait(30) == code
            assert process.stderr.read() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_machines_may_not_ask_without_a_key(folder, capsys, monkeypatch, host):
    monkeypatch.delenv(KEY, raising=False)
    assert f"host={host} lets other machines ask" in refusal(capsys, folder, "--host", host)
    check_host(host, "key")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_may(host):
    check_host(host, None)


def test_the_key_comes_out_of_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "one")
    assert find_key(None) == "one"
    (tmp_path / "key").write_text("two\n")
    assert find_key(tmp_path / "key") == "two"
    monkeypatch.delenv(KEY)
    assert find_key(None) is None
    for bad in ("", " \n", "two words", "schlüssel"):
        (tmp_path / "key").write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=r"the key in .* is empty, or no word"):
            find_key(tmp_path / "key")
    monkeypatch.setenv(KEY, "")  # set to nothing by mistake: no open door
    with pytest.raises(ValueError, match=f"the key in {KEY} is empty"):
        find_key(None)


def test_a_taken_port_is_named(folder, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = refusal(capsys, folder, "--port", port)
        assert f"cannot listen at 127.0.0.1, port {port}" in found
    assert "port='99999': input should be less" in refusal(capsys, folder, "--port", 99999)


def damage(folder, name, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name] = change(weights[name].clone())
    save_file(weights, file)


def spoilt(tensor):
    tensor[3, 3] = float("nan")
    return tensor


def test_a_damaged_model_is_refused_at_the_start(folder, tmp_path, capsys):
    name = "transformer.blocks.1.ffn.up_proj.weight"
    good = (folder / "model.safetensors").read_bytes()
    damage(folder, name, spoilt)
    found = refusal(capsys, folder, "--port", 0)
    assert f"{name} is damaged: not all of its numbers are finite" in found
    (folder / "model.safetensors").write_bytes(good)
    damage(folder, name, lambda tensor: tensor[1:])
    assert name in refusal(capsys, folder, "--port", 0)
    (folder / "model.safetensors").write_bytes(good[:-9])
    assert "model.safetensors is damaged" in refusal(capsys, folder, "--port", 0)
    (folder / "model.safetensors").write_bytes(good)
    save_packed(folder, tmp_path / "q", 8)
    file = tmp_path / "q" / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "packed.safetensors is damaged" in refusal(capsys, tmp_path / "q", "--port", 0)


def test_a_folder_that_lacks_something_is_refused(folder, tmp_path, capsys):
    assert "does not exist" in refusal(capsys, tmp_path / "none", "--port", 0)
    train_bpe([f"{n} hares" for n in range(999)], 400).save(folder / "tokenizer.json")
    assert "the tokenizer has" in refusal(capsys, folder, "--port", 0)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer at" in refusal(capsys, folder, "--port", 0)


def test_learned_positions_end(tmp_path, capsys):
    shape = {"d_model": 24, "n_heads": 3, "n_layers": 1, "max_seq_len": 32, "vocab_size": 300}
    config = MPTConfig(**shape)
    config = config.replace(alibi=False)
    save_model(MPT(config), tmp_path / "m", train_bpe(["a cat\n"] * 5, 290))
    found = refusal(capsys, tmp_path / "m", "--tokens", 33, "--port", 0)
    assert "learned positions end at max_seq_len=32" in found


def test_a_model_is_called_after_its_folder_its_run_or_the_hub(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert name_of(str(tmp_path / "run"), tmp_path / "run") == "run"
    assert name_of(str(tmp_path / "run"), tmp_path / "run" / "model") == "run"
    assert name_of("mosaicml/mpt-7b", tmp_path / "snapshots" / "0a1b") == "mosaicml/mpt-7b"


def test_a_long_context_is_not_all_kept_unless_asked_for(tmp_path):
    from mptbook.tokenizer.tokenizer import Tokenizer

    config = MPTConfig(d_model=24, n_heads=3, n_layers=1, max_seq_len=65536, vocab_size=300)
    save_model(MPT(config), tmp_path / "m", train_bpe(["a cat\n"] * 5, 290))
    tokenizer = Tokenizer.load(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "slots": 1}
    assert Serve(**asked)._slots(tmp_path / "m", tokenizer).n_tokens == MOST_TOKENS
    assert Serve(**asked, tokens=9000)._slots(tmp_path / "m", tokenizer).n_tokens == 9000


def test_what_is_missing_is_said(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("mptbook.serve.")]:
        if name != "mptbook.serve.command":
            monkeypatch.delitem(sys.modules, name)
    assert "pip install 'mptbook[serve]'" in refusal(capsys, folder)
