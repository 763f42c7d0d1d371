"""Run settings: typed models, filled from a TOML file and then from command-line flags."""

import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Self, get_origin

import platformdirs
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

CONFIGS = Path(__file__).parent / "configs"


class Ended(Exception):
    """A run that ends before its last step, by no mistake in its settings.

    Attributes:
        code: the exit code of the command.
    """

    code: int


def cache_dir() -> Path:
    """Where downloads and trained runs are kept: `MPTBOOK_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("MPTBOOK_CACHE") or platformdirs.user_cache_dir("mptbook"))


def fast_mode() -> bool:
    """Whether `MPTBOOK_FAST=1` asks chapters for a few seconds instead of a few minutes."""
    return os.environ.get("MPTBOOK_FAST", "0") not in ("", "0")


def check_figures(out: Path) -> None:
    """Raise a ValueError if figures would be written over a file that has none, as JSON."""
    if not out.exists():
        return
    try:
        there = json.loads(out.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{out} is there already and holds no figures; choose another --out")


class RunSettings(BaseSettings):
    """What one verb of the command line can be told.

    A subclass lists its settings as typed fields and does its work in `run`. Flags win over
    the TOML file named by `--config`, the file wins over the defaults, and a key that is not
    a field is an error.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_kebab_case=True,
        nested_model_default_partial_update=True,
    )

    def run(self) -> None:
        raise AssertionError(f"{type(self).__name__} does not say what it runs")

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        return (init_settings,)  # no environment variables: a run is what its file and flags say

    @classmethod
    def from_toml(cls, path: str | Path, **changes) -> Self:
        """The settings of a TOML file; `changes` replace top-level keys."""
        return cls(**(_read_toml(path) | changes))

    @classmethod
    def from_command_line(cls, verb: str, arguments: list[str]) -> Self:
        """The settings of `mptbook VERB ARGUMENTS...`.

        Raises:
            ValueError: one line that names the setting, the value and the rule.
            SystemExit: after `--help`.
        """
        arguments, path = _take_config(arguments)
        _check_pairs(cls, arguments)
        written = _read_toml(path) if path else {}
        for name in set(written) & set(_tables(cls)):
            if not isinstance(written[name], dict):  # a flag of the table would replace it unseen
                raise ValueError(
                    f"{name}={written[name]!r}: it is a table; write [{name}] in {path}"
                )
        try:
            return cls(
                _cli_parse_args=arguments,
                _cli_prog_name=f"mptbook {verb}",
                _cli_exit_on_error=False,
                **written,
            )
        except ValidationError as error:
            raise ValueError(first_mistake(error, cls)) from None
        except SettingsError as error:
            raise ValueError(_unknown_flag(cls, str(error))) from None


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None:
                raise ValueError("--config needs the path of a TOML file after it")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(_kebab(argument))
    return rest, path


def _kebab(argument: str) -> str:
    """`--batch_tokens=8` as `--batch-tokens=8`: both spellings of a flag are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _check_pairs(cls, arguments: list[str]) -> None:
    """See that `--flag key=value` has a key, and that no two sources have the same name.

    Of other values the last counts, which so replaces one of a script.
    """
    fields = cls.model_fields
    kinds = {"--" + name.replace("_", "-"): fields[name].annotation for name in _tables(cls)}
    seen = set()
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if get_origin(kinds.get(flag)) is not dict:
            continue
        if not equals:
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
        if value.startswith("{"):  # JSON
            continue
        key, equals, _ = value.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag} {value}: it must be NAME=VALUE")
        if (flag, key) in seen and kinds[flag] == dict[str, str]:
            raise ValueError(f"{flag} has {key} twice; give each name once")
        seen.add((flag, key))


def _tables(cls) -> list[str]:
    """Settings that have settings or names below them."""
    kinds = {name: field.annotation for name, field in cls.model_fields.items()}
    return [
        name
        for name, kind in kinds.items()
        if get_origin(kind) is dict or (isinstance(kind, type) and hasattr(kind, "model_fields"))
    ]


def _read_toml(path: str | Path) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.toml")))
        raise ValueError(f"{path} does not exist; the package has {known} in {CONFIGS}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def _names(model, prefix="") -> list[str]:
    """Dotted names of all settings below `model`."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and hasattr(inner, "model_fields"):
            found += _names(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _not_a_setting(cls, name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), _names(cls), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists them all"
    return f"{name} is not a setting{hint}"


def _unknown_flag(cls, message: str) -> str:
    unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
    if unknown:
        return _not_a_setting(cls, unknown[1])
    return message.removeprefix("error parsing CLI: ").replace("\n", " ")


def first_mistake(error: ValidationError, cls: type[RunSettings] | None = None) -> str:
    """One line for the first value that does not fit."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and cls is not None:
        return _not_a_setting(cls, name)
    if first["type"] == "missing":
        return f"{name} is missing; give it as --{name.replace('_', '-')} or in the TOML file"
    if not name:  # it is about several values
        return first["msg"].removeprefix("Value error, ")
    return f"{name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
