"""Short texts in many languages: articles of the Universal Declaration of Human Rights.

Every language has about 1,500 characters, chosen by the makers of the wheel to show a
typeface. They are not the same articles everywhere, so compare rates and not totals.
"""

import re
from dataclasses import dataclass

from mptbook import wheels


@dataclass(frozen=True)
class Sample:
    language: str  # its English name
    text: str  # one passage a line


def samples() -> dict[str, Sample]:
    """The texts by language and script, such as `en_Latn`, `ru_Cyrl`, `zh_Hans`.

    Raises:
        WheelUnavailable: if the wheel is neither in the cache nor on the package index.
    """
    files = wheels.members("gflanguages", r"gflanguages/data/languages/\w+\.textproto")
    found = {}
    for path, data in files.items():
        entry = data.decode()
        passages = re.findall(r'^  specimen_\d+: "(.*)"$', entry, re.MULTILINE)
        if passages:
            code = path.rpartition("/")[2].removesuffix(".textproto")
            name = re.search(r'^name: "(.*)"$', entry, re.MULTILINE)[1]
            found[code] = Sample(name, "\n".join(map(_unescape, passages)))
    return found


def _unescape(quoted: str) -> str:
    """Text as it was before it was quoted: backslash n for a newline, backslash for others."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), quoted)
