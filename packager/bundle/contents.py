"""What may lie in a bundle: data in known formats, plain paths, no code, no pickles."""

from __future__ import annotations

import hashlib
import pickletools
import re
from pathlib import Path, PurePosixPath
from typing import Any

from packager.artifact import MANIFEST_NAME, file_sha256
from packager.artifact.strict_json import strict_json
from packager.bundle.lock import LOCK_NAME
from packager.bundle.names import name_problem
from packager.bundle.plugin_wheel import is_wheel_path, wheel_problem
from packager.bundle.secret_strings import secret_in
from packager.bundle.signature import SIGNATURE_NAME
from packager.checkpoint.folder import MAX_JSON_BYTES, MAX_WHOLE_BYTES
from packager.checkpoint.header import header_length, header_of

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
_BINARY = {".png": b"\x89PNG\r\n\x1a\n", ".model": b""}
"""What is no text, and how it begins: a picture; a tokenizer of sentencepiece, which has no magic number."""
_INTERNALS = re.compile(
    rb"__(class|base|bases|mro|subclasses|globals|builtins|import|init|dict|code|getattribute|reduce)__"
)
_REACHES_IN = "its template reaches for Python's internals"
_PIECE = 1 << 20
"""Bytes: what a core's cache holds, so that hashing finds there what reading has brought."""
_MAX_YAML_BYTES = 1 << 18


def path_problem(path: str) -> str | None:
    """Why a path may not stand in a bundle, or None."""
    reason = name_problem(path)
    if reason:
        return reason
    name = PurePosixPath(path).name
    if path == MANIFEST_NAME or _BARE_NAMES.fullmatch(name) or is_wheel_path(path):
        return None
    if _ACTIVE.search(name):
        return "code, pickles and archives may not be in a bundle"
    if PurePosixPath(path).suffix.lower() not in (*_WEIGHTS_AND_TEXT, *_REPORTS):
        return "not a kind of file that a bundle holds"
    return None


def examine(file: Path, path: str) -> tuple[str, str | None]:
    """SHA-256 (bare hexadecimal) of a file, and why its content may not stand in a bundle as `path`, or None.

    One pass: what is hashed is what is looked at. Weights are read in pieces and judged
    by their header; every other file is small and held whole.
    """
    if PurePosixPath(path).suffix == ".safetensors":
        return _examine_weights(file, path)
    if file.stat().st_size > MAX_WHOLE_BYTES:
        return file_sha256(file), f"larger than {MAX_WHOLE_BYTES} bytes: only weights are"
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest(), content_problem(path, data)


def content_problem(path: str, data: bytes) -> str | None:
    """Why the content of a file that is not weights disagrees with its harmless name, or None."""
    if is_wheel_path(path):
        return wheel_problem(path, data)
    suffix = PurePosixPath(path).suffix.lower()
    reason = next((f"it is {what}" for magic, what in _MAGIC.items() if data.startswith(magic)), None)
    if reason is None and _is_old_pickle(data):
        reason = "it is a pickle"
    elif reason is None and suffix in _BINARY:
        reason = _binary_problem(suffix, data)
    elif reason is None:
        reason = _text_problem(path, suffix, data)
    return reason or secret_in(data)


def _examine_weights(file: Path, path: str) -> tuple[str, str | None]:
    digest = hashlib.sha256()
    view = memoryview(bytearray(_PIECE))
    head, wanted = bytearray(), 8
    size = file.stat().st_size
    reason: str | None = None
    with file.open("rb", buffering=0) as stream:
        while got := stream.readinto(view):
            digest.update(view[:got])
            begin = 0
            while begin < got and len(head) < wanted and reason is None:
                more = view[begin : min(got, begin + wanted - len(head))]
                head += more
                begin += len(more)
                if len(head) == wanted == 8:
                    try:
                        wanted = 8 + header_length(bytes(head), size)
                    except ValueError as err:
                        reason = str(err)
    if reason is None:
        try:
            # A file shorter than 8 bytes has no length yet.
            header_of(bytes(head[8 : 8 + header_length(bytes(head), size)]), size, PurePosixPath(path).name)
        except ValueError as err:
            reason = str(err)
    if reason is not None:
        return digest.hexdigest(), f"it is no safetensors file: {reason}"
    return digest.hexdigest(), secret_in(bytes(head[8:]))


def _binary_problem(suffix: str, data: bytes) -> str | None:
    if not data.startswith(_BINARY[suffix]):
        return f"it is no {suffix} file"
    # Readers of zip archives, torch's among them, look for the directory at a file's end.
    if b"PK\x05\x06" in data[-(1 << 16) - 22 :]:
        return "it is a zip archive behind another beginning"
    return None


def _text_problem(path: str, suffix: str, data: bytes) -> str | None:
    if b"\0" in data:
        return "it is no text"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as err:
        return f"it is no text in UTF-8 (byte {err.start})"
    if suffix == ".json" or path == LOCK_NAME:
        return _json_problem(data, settings=not path.startswith("evidence/"))
    if suffix in (".yaml", ".yml"):
        return _yaml_problem(data)
    if suffix == ".jinja" and _INTERNALS.search(data):
        return _REACHES_IN
    if suffix == ".svg" and re.search(rb"<script|\bon[a-z]+\s*=\s*[\"']", data, re.IGNORECASE):
        return "it holds a script"
    return None


def _json_problem(data: bytes, *, settings: bool) -> str | None:
    if len(data) > MAX_JSON_BYTES and settings:
        return f"larger than {MAX_JSON_BYTES} bytes: no settings are"
    named: list[str] = []

    def look(found: dict[str, Any]) -> None:
        if "auto_map" in found or "custom_pipelines" in found or found.get("trust_remote_code"):
            named.append(next(n for n in ("auto_map", "custom_pipelines", "trust_remote_code") if n in found))
        for template in (found.get("chat_template"), found.get("template")):
            if isinstance(template, str) and _INTERNALS.search(template.encode("utf-8", "replace")):
                named.append("chat_template")

    try:
        strict_json(data, look if settings else None)
    except ValueError as err:
        return f"it is not sound JSON: {err}"
    if "chat_template" in named:
        return _REACHES_IN
    return f"it names code to run ({named[0]})" if named else None


def _yaml_problem(data: bytes) -> str | None:
    """A key twice, a tag that makes Python objects, or more than settings need."""
    import yaml

    if len(data) > _MAX_YAML_BYTES:
        return f"larger than {_MAX_YAML_BYTES} bytes: no settings are"
    try:
        # Composed, not constructed: nothing is made of it, and an alias costs nothing.
        open_nodes = [node for node in yaml.compose_all(data, Loader=yaml.SafeLoader) if node]
    except (yaml.YAMLError, RecursionError) as err:
        return f"it is not sound YAML: {str(err).splitlines()[0] if str(err) else 'nested too deeply'}"
    seen: set[int] = set()
    while open_nodes:
        node = open_nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if "python" in node.tag:
            return f"it names code to run ({node.tag})"
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) != len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                return f"it is not sound YAML: the key {twice[:200]!r} occurs twice"
            open_nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            open_nodes += node.value
    return None


def _is_old_pickle(data: bytes) -> bool:
    """Whether it begins with a whole pickle, of a protocol without a magic number, that calls something.

    It may be plain ASCII. The opcodes are read, never run.
    """
    try:
        names = {code.name for code, _, _ in pickletools.genops(data)}
    except (ValueError, IndexError, KeyError, OverflowError):
        return False
    return not names.isdisjoint(("GLOBAL", "INST", "REDUCE", "OBJ", "BUILD"))
