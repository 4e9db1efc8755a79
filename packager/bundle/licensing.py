"""Under what licence the source says it is, everywhere it says so; and what this release decides.

A model repository states its licence in up to three places that nobody keeps in step: the metadata at the
head of its README, the prose below, and a licence file. Each is read, and where they disagree (or the recipe
disagrees with them) the recipe must say why it decides as it does; the card shows all of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from packager.errors import BadInput
from packager.recipe import Recipe

_LICENSE_FILES = re.compile(r"(LICENSE|LICENCE|COPYING)([-.](md|txt))?", re.IGNORECASE)
_TITLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE | re.DOTALL))
    for name, pattern in (
        ("apache-2.0", r"Apache License,?\s+Version\s+2\.0"),
        ("mit", r"\bMIT License\b|Permission is hereby granted, free of charge, to any person obtaining"),
        ("bsd-3-clause", r"Redistribution and use in source and binary forms.*Neither the name"),
        ("agpl-3.0", r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3"),
        ("lgpl-3.0", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3"),
        ("gpl-3.0", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
        ("cc-by-nc-sa-4.0", r"Attribution-NonCommercial-ShareAlike 4\.0"),
        ("cc-by-nc-4.0", r"Attribution-NonCommercial 4\.0"),
        ("cc-by-sa-4.0", r"Attribution-ShareAlike 4\.0"),
        ("cc-by-4.0", r"Attribution 4\.0 International"),
        ("llama3", r"LLAMA 3[.\d]* COMMUNITY LICENSE"),
    )
)
"""What the text of a licence begins with, or holds."""
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("apache-2.0", r"\bApache[- ]?(License)?,?[- ]?(Version )?2(\.0)?\b|\bApache License\b"),
        ("mit", r"\bMIT\b"),
        ("bsd-3-clause", r"\bBSD[- ]3\b"),
        ("gpl-3.0", r"\bGPL[- ]?v?3"),
        ("cc-by-nc-sa-4.0", r"\bCC[- ]BY[- ]NC[- ]SA[- ]4"),
        ("cc-by-nc-4.0", r"\bCC[- ]BY[- ]NC[- ]4"),
        ("cc-by-sa-4.0", r"\bCC[- ]BY[- ]SA[- ]4"),
        ("cc-by-4.0", r"\bCC[- ]BY[- ]4"),
        ("llama3", r"\bLlama 3[.\d]* Community License"),
    )
)
_LICENSE_LINE = re.compile(r"licen[cs]e|许可|协议|授权", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)(.*)", re.DOTALL)


class Statement(BaseModel):
    """One place where the source names a licence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    license: str
    """The hub's identifier where it has one."""


def licence_statements(source: Path) -> tuple[Statement, ...]:
    """What the README's metadata, its prose and the licence files of a checkpoint's folder say."""
    found: list[Statement] = []
    readme = source / "README.md"
    if readme.is_file():
        found += _readme_statements(readme.read_text(encoding="utf-8", errors="replace"))
    for file in sorted(source.iterdir()):
        if file.is_file() and _LICENSE_FILES.fullmatch(file.name):
            text = file.read_text(encoding="utf-8", errors="replace")
            title = next((name for name, pattern in _TITLES if pattern.search(text)), None)
            found.append(Statement(where=file.name, license=title or "a text of its own"))
    return tuple(found)


def _readme_statements(text: str) -> list[Statement]:
    found = []
    prose = text
    if match := _FRONT_MATTER.match(text):
        prose = match[3]
        try:
            metadata = yaml.safe_load(match[1])
        except yaml.YAMLError:
            metadata = None
        if isinstance(metadata, dict) and metadata.get("license"):
            name = metadata.get("license_name") if metadata["license"] == "other" else None
            stated = str(name or metadata["license"]).lower()
            found.append(Statement(where="README.md, metadata", license=stated))
    named: dict[str, None] = {}
    under_heading = False
    for line in prose.splitlines():
        if line.startswith("#"):
            under_heading = bool(_LICENSE_LINE.search(line))
        if under_heading or _LICENSE_LINE.search(line):
            named |= {name: None for name, pattern in _NAMES if pattern.search(line)}
    found += [Statement(where="README.md, text", license=name) for name in named]
    return found


def disagree_on(decided: str | None, statements: Sequence[Statement]) -> bool:
    """Whether the source's statements differ from one another, or from what the recipe decides."""
    named = {one.license for one in statements}
    return len(named) > 1 or bool(named and decided and decided.lower() not in named)


def require_decided(recipe: Recipe, statements: Sequence[Statement]) -> None:
    """Refuse to go on where licences disagree and the recipe does not say which holds, and why.

    Raises:
        BadInput: lists what was found where.
    """
    spec = recipe.bundle
    if not disagree_on(spec.license, statements) or (spec.license and spec.license_reason.strip()):
        return
    said = "; ".join(f"{one.where}: {one.license}" for one in statements)
    missing = "bundle.license" if spec.license is None else "bundle.license_reason"
    raise BadInput(
        f"the licence of {recipe.source.repo or recipe.source.path} is contradictory ({said}"
        + (f"; this recipe: {spec.license}" if spec.license else "")
        + f"), and the recipe does not give {missing}",
        "Ask upstream, then decide in the recipe: bundle.license (which one), bundle.license_reason (why). "
        "The card shows both beside what upstream says.",
    )
