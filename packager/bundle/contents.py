"""What may lie in a bundle: data in known formats, plain paths, no code, no pickles."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from packager.artifact import MANIFEST_NAME
from packager.bundle.plugin_wheel import is_wheel_path, wheel_problem
from packager.bundle.signature import SIGNATURE_NAME

TOLERATED = (SIGNATURE_NAME, ".gitattributes", ".cache/huggingface/*")
"""Glob patterns of files that lie beside the sealed ones: the signature, and what hub and client add."""

_WEIGHTS_AND_TEXT = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".md", ".yaml", ".lock", ".model")
_REPORTS = (".html", ".xml", ".csv", ".svg", ".png")
_BARE_NAMES = re.compile(r"(LICENSE|LICENCE|NOTICE|COPYING)([-.].*)?|Containerfile", re.IGNORECASE)
_ACTIVE = re.compile(
    r"\.(py|sh|js|so|dll|exe|pkl|pickle|pt|pth|bin|ckpt|h5|whl|zip|tar|gz)(\.|$)", re.IGNORECASE
)
_MAGIC = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive (a torch pickle is one)",
    b"\x7fELF": "an executable",
    b"MZ": "an executable",
    b"#!": "a script",
    b"\x1f\x8b": "a compressed archive",
}


def path_problem(path: str) -> str | None:
    """Why a path may not stand in a bundle, or None."""
    name = PurePosixPath(path).name
    if any(ord(c) < 32 or 0x200B <= ord(c) <= 0x200F or 0x202A <= ord(c) <= 0x202E for c in path):
        return "its name holds invisible characters"
    if path == MANIFEST_NAME or _BARE_NAMES.fullmatch(name) or is_wheel_path(path):
        return None
    if _ACTIVE.search(name):
        return "code, pickles and archives may not be in a bundle"
    if PurePosixPath(path).suffix.lower() not in (*_WEIGHTS_AND_TEXT, *_REPORTS):
        return "not a kind of file that a bundle holds"
    return None


def content_problem(file: Path) -> str | None:
    """Why a file's first bytes disagree with its harmless name, or None.

    A safetensors file starts with its header's length, which a small header can make look like anything: it
    is judged by its header instead.
    """
    if file.suffix == ".safetensors":
        return _safetensors_problem(file)
    if file.suffix == ".whl":
        return wheel_problem(file.name, file.read_bytes())
    with file.open("rb") as stream:
        start = stream.read(4)
    return next((f"it is {what}" for magic, what in _MAGIC.items() if start.startswith(magic)), None)


def _safetensors_problem(file: Path) -> str | None:
    from packager.checkpoint.header import read_header
    from packager.errors import BadInput

    try:
        read_header(file)
    except BadInput as err:
        return f"it is no safetensors file: {err.message}"
    return None
