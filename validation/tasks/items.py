"""Items: a conversation and what counts as its right answer, one JSON object a line.

{"id", "task", "language", "messages": [{"role", "content"}], "answer"}            exact text
… "kind": "choice", "answer": "B"                                                   or "A, C"
… "kind": "numeric", "answer": "0.5 mg", "scoring": {"tolerance": "5%"}             any unit that converts
… "kind": "rubric", "scoring": {"rubrics": [{"criterion", "points", "tags"}]}       for a judge
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from validation.document import Document, digest_of
from validation.endpoint import Message, Request
from validation.errors import MeasurementError
from validation.jsonl import read_jsonl
from validation.tasks.scoring import Kind, Scoring, check_scorable

_REMEDY = "Give JSONL: one {id, task, language, messages, answer, meta} a line."


class Item(Document):
    """A question whose answer is known."""

    id: str
    task: str
    language: str
    messages: tuple[Message, ...] = Field(min_length=1)
    answer: str = ""
    """The right answer; only a rubric item has none."""
    meta: dict[str, Any] = Field(default_factory=dict)
    """Of long-record items: `context_tokens`, `depth` (0 start, 1 end), `multiple` of the trained length."""
    kind: Kind = "exact"
    scoring: Scoring | None = None

    @model_validator(mode="after")
    def _scorable(self) -> Item:
        if not self.answer and self.kind != "rubric":
            raise ValueError("an item needs its right answer")
        check_scorable(self.kind, self.answer, self.scoring or Scoring())
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what an exact item does not say, so that its digest is what it was before kinds."""
        data: dict[str, Any] = plain(self)
        if self.kind == "exact":
            del data["kind"]
        if self.scoring is None:
            del data["scoring"]
        return data

    @property
    def request(self) -> Request:
        """The item as a question for an endpoint."""
        return Request(id=self.id, messages=self.messages)


def items_from(rows: Iterable[Mapping[str, Any]], source: str = "items") -> list[Item]:
    """Items from plain mappings.

    Raises:
        MeasurementError: a row is malformed, an id occurs twice, or there is no row at all.
    """
    return _items([(f"{source}, row {number}", row) for number, row in enumerate(rows, 1)], source)


def load_items(path: Path) -> list[Item]:
    """Items from a JSONL file; blank lines are skipped.

    Raises:
        MeasurementError: the file is missing, not JSONL, or a row is malformed; the line is named.
    """
    rows = read_jsonl(path, _REMEDY)
    return _items([(f"{path}, line {number}", row) for number, row in rows], str(path))


def _items(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str) -> list[Item]:
    items: list[Item] = []
    seen: set[str] = set()
    for place, row in rows:
        try:
            item = Item.model_validate(row)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(map(str, first["loc"])) or "(row)"
            raise MeasurementError(
                f"{place}: {where}: {first['msg'].removeprefix('Value error, ')}",
                'A row is {"id", "task", "language", "messages": [{"role", "content"}], "answer", "meta"}.',
            ) from None
        if item.id in seen:
            raise MeasurementError(f"{place}: the id {item.id!r} occurs twice")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise MeasurementError(f"{source} holds no items")
    return items


def items_digest(items: Sequence[Item]) -> str:
    """Digest of the items in their order: two runs are paired only if these agree."""
    return digest_of([item.model_dump(mode="json") for item in items])
