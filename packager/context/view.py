"""An extended checkpoint at its trained length without a copy: a folder of links around two small files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from packager.artifact import MANIFEST_NAME
from packager.checkpoint.source import CONFIG_NAME, SIDE_SUFFIXES, read_json_object
from packager.context.extend import TOKENIZER_CONFIG, trained_files

_WRITTEN = (CONFIG_NAME, TOKENIZER_CONFIG)


def trained_view(source: Path, out: Path) -> Path:
    """Make `out` the extended checkpoint (or draft) `source` as it was at its trained length; returns `out`.

    Static YaRN rotates short contexts otherwise than training did, so these are served better without it.
    Engines take the weights of a folder beside its config.json and nowhere else, and overrides on their
    command line do not reach a draft: hence links. They are symbolic, so `source` has to stay. Called again,
    it brings `out` up to date without a moment in which a file is missing.

    Raises:
        BadInput: `source` is not extended through YaRN, see `undo_patch`.
    """
    source = source.resolve()
    tokenizer_path = source / TOKENIZER_CONFIG
    config, tokenizer = trained_files(
        read_json_object(source / CONFIG_NAME),
        read_json_object(tokenizer_path) if tokenizer_path.is_file() else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    wanted = {CONFIG_NAME, *([TOKENIZER_CONFIG] if tokenizer is not None else [])}
    for file in source.iterdir():
        served = file.suffix in (".safetensors", *SIDE_SUFFIXES) and not file.name.startswith(".")
        if served and file.name not in (*_WRITTEN, MANIFEST_NAME):
            wanted.add(file.name)
            part = _part(out, file.name)
            part.symlink_to(file)
            part.replace(out / file.name)
    for name, document in ((CONFIG_NAME, config), (TOKENIZER_CONFIG, tokenizer)):
        if document is not None:
            part = _part(out, name)
            part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(out / name)
    for file in out.iterdir():
        if file.name not in wanted and not file.name.startswith("."):  # a dot: of a process that makes it now
            file.unlink(missing_ok=True)
    return out


def _part(out: Path, name: str) -> Path:
    """Where a file is made before it takes its name."""
    part = out / f".{name}.{os.getpid()}"
    part.unlink(missing_ok=True)
    return part
