"""Items: a conversation and the one right answer, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from validation.document import Document, digest_of
from validation.endpoint import Message, Request
from validation.errors import MeasurementError

_REMEDY = "Give JSONL: one {id, task, language, messages, answer, meta} a line."


class Item(Document):
    """A question whose answer is known."""

    id: str
    task: str
    language: str
    messages: tuple[Message, ...] = Field(min_length=1)
    answer: str = Field(min_length=1)
    meta: dict[str, Any] = Field(default_factory=dict)
    """Of long-record items: `context_tokens`, `depth` (0 start, 1 end), `multiple` of the trained length."""

    @property
    def request(self) -> Request:
        """The item as a question for an endpoint."""
        return Request(id=self.id, messages=self.messages)


def items_from(rows: Iterable[Mapping[str, Any]], source: str = "items") -> list[Item]:
    """Items from plain mappings.

    Raises:
        MeasurementError: a row is malformed, an id occurs twice, or there is no row at all.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        try:
            item = Item.model_validate(row)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(map(str, first["loc"])) or "(row)"
            raise MeasurementError(
                f"{source}, row {number}: {where}: {first['msg']}",
                'A row is {"id", "task", "language", "messages": [{"role", "content"}], "answer", "meta"}.',
            ) from None
        if item.id in seen:
            raise MeasurementError(f"{source}, row {number}: the id {item.id!r} occurs twice")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise MeasurementError(f"{source} holds no items")
    return items


def load_items(path: Path) -> list[Item]:
    """Items from a JSONL file; blank lines are skipped.

    Raises:
        MeasurementError: the file is missing, not JSONL, or a row is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise MeasurementError(f"cannot read items from {path}: {err}", _REMEDY) from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise MeasurementError(f"{path}, line {number} is not JSON: {err}", _REMEDY) from None
        if not isinstance(row, dict):
            raise MeasurementError(f"{path}, line {number} is not a JSON object", _REMEDY)
        rows.append(row)
    return items_from(rows, str(path))


def items_digest(items: Sequence[Item]) -> str:
    """Digest of the items in their order: two runs are paired only if these agree."""
    return digest_of([item.model_dump(mode="json") for item in items])
