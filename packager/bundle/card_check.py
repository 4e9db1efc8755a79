"""Does a bundle's card say what its evidence says?

Two checks. Every figure that names its place is held against the evidence, whichever release wrote the card.
And where this very release wrote it, the card is written again from the lock and the evidence: then no word
may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from packager.artifact import Manifest
from packager.bundle.card import CARDS, RESULTS_FOLDER, card_files, license_note
from packager.bundle.card_settings import renderer_digest
from packager.bundle.figures import LOCK, PLACE, REPORT, differs, linked_figures
from packager.bundle.lock import LOCK_NAME, REPORT_NAME, Lock

NOTE = "LICENSE-NOTE.md"


def is_card(path: str) -> bool:
    """Whether a file of a bundle is written with the card, and checked here."""
    return path in (*CARDS.values(), NOTE) or path.startswith(f"{RESULTS_FOLDER}/")


def card_problems(root: Path, lock: Lock, manifest: Manifest) -> list[str]:
    """What on the card is not what lock and evidence say, one sentence each, by file; empty: nothing.

    Raises:
        BadInput: the evidence is no report of this version.
    """
    if lock.card is None:
        return [f"{LOCK_NAME}: it does not hold what the card was written from"]
    try:
        report = json.loads((root / "evidence" / REPORT_NAME).read_bytes())
    except (OSError, ValueError) as err:
        return [f"evidence/{REPORT_NAME}: cannot be read ({err})"]
    documents = {REPORT: report, LOCK: lock.model_dump(mode="json")}
    found = {entry.path for entry in manifest.files if is_card(entry.path)}
    problems: list[str] = []
    for name in sorted(found | {*CARDS.values()}):
        if name not in found:
            problems.append(f"{name}: missing")
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
            problems += [f"{name}: {problem}" for problem in _wrong_figures(name, text, documents)]
        except (UnicodeDecodeError, yaml.YAMLError) as err:
            problems.append(f"{name}: cannot be read ({err})")
    if problems or lock.card.renderer != renderer_digest():
        return problems
    return _rewritten(root, lock, manifest, found)


def _rewritten(root: Path, lock: Lock, manifest: Manifest, found: set[str]) -> list[str]:
    """Where the card differs from the one that follows from lock and evidence."""
    assert lock.card is not None
    expected = card_files(lock, root / "evidence")
    expected[NOTE] = license_note(lock.card, lock.source.name)
    problems = []
    label = lock.card.signer
    # A key stands in the manifest by its fingerprint, an identity by the digest of its name.
    allowed = {label and f"sha256:{label}", label and f"sha256:{hashlib.sha256(label.encode()).hexdigest()}"}
    if manifest.inputs.get("signer") not in allowed:
        problems.append(f"{LOCK_NAME}: its card names another signer than the bundle was sealed for")
    for name in sorted(found | expected.keys()):
        if name not in found:
            problems.append(f"{name}: missing; it follows from the evidence")
        elif name not in expected:
            problems.append(f"{name}: stray; it does not follow from the evidence")
        elif line := _first_difference(name, (root / name).read_text(encoding="utf-8"), expected[name]):
            problems.append(f"{name}: it does not follow from {LOCK_NAME} and the evidence: {line}")
    return problems


def _first_difference(name: str, text: str, expected: str) -> str | None:
    """The first line that differs. Metadata is compared as values: libraries lay YAML out in several ways."""
    (head, body), (expected_head, expected_body) = _parts(name, text), _parts(name, expected)
    if head != expected_head:
        return "its metadata differs"
    lines, wanted = body.splitlines(), expected_body.splitlines()
    for number, line in enumerate(lines):
        if number >= len(wanted) or line != wanted[number]:
            return f"{line.strip()[:160]!r}"
    return None if len(lines) == len(wanted) else f"a line is missing: {wanted[len(lines)].strip()[:160]!r}"


def _parts(name: str, text: str) -> tuple[Any, str]:
    if name.startswith(f"{RESULTS_FOLDER}/"):
        return yaml.safe_load(text), ""
    if text.startswith("---\n"):
        head, _, body = text.removeprefix("---\n").partition("\n---\n")
        return yaml.safe_load(head), body
    return None, text


def _wrong_figures(name: str, text: str, documents: dict[str, Any]) -> Iterator[str]:
    head, body = _parts(name, text)
    for shown, named in linked_figures(body):
        if wrong := differs(shown, named, documents):
            yield f"the figure {shown!r} ({named}) is not that of the evidence: {wrong}"
    for what, value, where in _metadata_figures(name, head):
        if where is None:
            yield f"the figure {value!r} ({what}) names no place in the evidence"
        elif wrong := differs(str(value), where, documents):
            yield f"the figure {value!r} ({what}; {where}) is not that of the evidence: {wrong}"


def _metadata_figures(name: str, head: Any) -> Iterator[tuple[str, Any, str | None]]:
    """What is measured, value and place of every result in the metadata or a results file.

    Metadata of another form than a card's own has no figures that could be trusted: they name no place.
    """
    if name.startswith(f"{RESULTS_FOLDER}/"):
        for entry in head if isinstance(head, list) else []:
            match = PLACE.search(str(_dict(entry).get("notes")))
            task = str(_dict(_dict(entry).get("dataset")).get("task_id"))
            yield task, _dict(entry).get("value"), match[0] if match else None
        return
    for model in _list(_dict(head).get("model-index")):
        for result in _list(_dict(model).get("results")):
            dataset = str(_dict(_dict(result).get("dataset")).get("name"))
            for metric in _list(_dict(result).get("metrics")):
                named = _dict(_dict(metric).get("args")).get("evidence")
                yield dataset, _dict(metric).get("value"), named if isinstance(named, str) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
