"""Names that every file system, shell and reader takes for the same file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

_PLAIN = re.compile(r"[A-Za-z0-9_.+=@,()\[\] -]")
_LONGEST_PART = 200
"""Characters; file systems end at 255, and hub clients append to names."""
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[0-9]|LPT[0-9])", re.IGNORECASE)
"""Names that Windows gives to devices, whatever their suffix."""


def name_problem(path: str) -> str | None:
    """Why no file may have this path in a bundle, or None.

    Characters beyond ASCII are refused, letters too: `сonfig.json` with a Cyrillic letter is another file
    than it looks, and `é` has two spellings, which one file system keeps apart and another does not.
    """
    if not path or path != str(PurePosixPath(path)) or path.startswith("/") or "\\" in path:
        return "not a plain relative path"
    for character in path.replace("/", ""):
        if not _PLAIN.fullmatch(character):
            return f"its name holds {_called(character)}"
    for part in path.split("/"):
        if part == "..":
            return "it leads out of the bundle"
        if part[0] in " -" or part[-1] in " .":
            return "its name begins or ends with a character that shells or file systems drop"
        if _DEVICES.fullmatch(part.split(".")[0].rstrip()):
            return "its name is that of a device on Windows"
        if len(part) > _LONGEST_PART:
            return f"its name is longer than {_LONGEST_PART} characters"
    return None


def clashes(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of paths (files or folders) that macOS or Windows take for one: `README.md` and `readme.md`."""
    seen: dict[str, str] = {}
    found: dict[tuple[str, str], None] = {}
    for path in sorted(paths):
        whole = PurePosixPath(path)
        for part in (*reversed(whole.parents[:-1]), whole):
            name = str(part)
            first = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if first != name:
                found[first, name] = None
    return list(found)


def shown(path: str) -> str:
    """A path as messages print it: what is not plain ASCII is escaped, so that a look-alike is seen."""
    return path if path.isascii() and path.isprintable() else ascii(path)[1:-1]


def _called(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '(no name)')}"
