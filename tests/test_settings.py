import os
import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from mptbook.__main__ import VERBS, main
from mptbook.settings import RunSettings


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")


class Walk(RunSettings):
    """Walk somewhere."""

    steps: PositiveInt = Field(7, description="how many")
    batch_tokens: int = 64
    optim: Inner = Inner()
    source: dict[str, str] = Field({}, description="NAME=PATH")
    mixture: dict[str, float] = Field({}, description="NAME=WEIGHT")


def read(*arguments):
    return Walk.from_command_line("walk", list(arguments))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "walk.toml"
    path.write_text("steps = 5\n[optim]\nlr = 0.5\n")
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(toml):
    found = read("--config", toml, "--steps", "3")
    assert (found.steps, found.optim.lr, found.batch_tokens) == (3, 0.5, 64)


def test_a_nested_flag_leaves_the_rest_of_the_file_alone(toml):
    found = read(f"--config={toml}", "--optim.lr", "0.25")
    assert (found.steps, found.optim.lr) == (5, 0.25)


def test_a_flag_may_be_written_with_either_dash():
    assert read("--batch-tokens", "8") == read("--batch_tokens", "8") == read("--batch_tokens=8")


def test_the_environment_says_nothing(monkeypatch):
    monkeypatch.setenv("STEPS", "99")
    assert read().steps == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "optim.lrr is not a setting; did you mean optim.lr?"),
        (["--nothing-like-it", "1"], "nothing-like-it is not a setting; --help lists them all"),
        (["--steps", "-1"], "steps='-1': input should be greater than 0"),
        (["--steps", "many"], "steps='many': input should be a valid integer"),
        (["--optim.lr", "0"], "optim.lr='0': input should be greater than 0"),
        (["--config"], "--config needs the path of a TOML file after it"),
        (["--config", "nowhere.toml"], r"nowhere.toml does not exist; the package has .*tiny.toml"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_rule(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace(r"\.*", ".*")):
        read(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 5\n[optim]\nlrr = 1\n", "optim.lrr is not a setting; did you mean optim.lr"),
        ("steps = \n", "is not valid TOML"),
        ("steps = 0\n", "steps=0: input should be greater than 0"),
    ],
)
def test_a_mistake_in_the_file_is_named_too(tmp_path, text, message):
    path = tmp_path / "walk.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read("--config", str(path))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_lists_its_settings(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: mptbook {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_one_line(capsys):
    assert main(["train"]) == 2
    assert (
        capsys.readouterr().err == f"error: train is not a verb; mptbook has {', '.join(VERBS)}\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["corpora", "--help"], ["corpora"]])
def test_nothing_is_said_when_who_reads_the_output_leaves(arguments, unbuffered):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "mptbook", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    found = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    assert found.stderr == b""
    written_by_argparse = arguments[-1] == "--help" and len(arguments) > 1 and unbuffered
    assert found.returncode == (0 if written_by_argparse else 141)  # it does not mind


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError(32, "a worker is gone")

    monkeypatch.setattr("mptbook.data.corpora.Corpora.run", broken)
    assert main(["corpora"]) == 2
    assert "a worker is gone" in capsys.readouterr().err


def test_importing_the_package_imports_no_torch():
    code = "import sys, mptbook; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_all_there():
    import mptbook

    assert all(getattr(mptbook, name).__name__ for name in mptbook.__all__)
    with pytest.raises(AttributeError, match="mptbook has no trainer; it has MPT,"):
        _ = mptbook.trainer


@pytest.mark.parametrize("words", [("--source", "a=x"), ("--source=a=x",)])
def test_two_sources_of_one_name_are_refused(words):
    assert read(*words, "--source", "b=y").source == {"a": "x", "b": "y"}
    with pytest.raises(ValueError, match="--source has a twice; give each name once"):
        read(*words, "--source", "a=y")
    assert read("--mixture", "a=1", "--mixture", "a=2").mixture == {"a": 2.0}


def test_a_source_without_a_name_is_refused():
    with pytest.raises(ValueError, match="--source a/folder: it must be NAME=VALUE"):
        read("--source", "a/folder")


def test_a_value_in_the_place_of_a_table_is_refused_beside_flags_too(tmp_path):
    path = tmp_path / "walk.toml"
    path.write_text('optim = "fast"\n')
    with pytest.raises(ValueError, match=r"optim='fast': it is a table; write \[optim\] in"):
        read("--config", str(path), "--optim.lr", "1e-3")
