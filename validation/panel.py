"""What a measurement shows in a report: a title, what it found in one sentence, tables, and how to read them.

Measurements make their own panels and the report lays them out: a new measurement changes no template.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from validation.document import Document

Cell = str | int | float | None
"""None: not measured. Numbers are kept as numbers, so that tables sort by value and JSON keeps all digits."""


class Column(Document):
    """A column of a table."""

    name: str
    unit: str = ""
    digits: int | None = None
    """Decimal places shown; None: as the value is written."""
    kind: Literal["text", "number"] = "number"


class Table(Document):
    """Rows under named columns."""

    caption: str = ""
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[tuple[Cell, ...], ...]
    brief: bool = False
    """Stands in the summary for continuous integration too; if no table of a panel does, its first one is."""

    @field_validator("rows")
    @classmethod
    def _finite(cls, rows: tuple[tuple[Cell, ...], ...]) -> tuple[tuple[Cell, ...], ...]:
        """A number that is not finite was not measured, as with gates; JSON has no word for it either."""
        return tuple(
            tuple(None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row)
            for row in rows
        )

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns: {row!r}")
        return self


class Unfolding(Document):
    """A line that unfolds to a longer text: an answer that changed, a criterion with its judgement."""

    line: str
    text: tuple[tuple[str, str], ...]
    """(heading, text) pairs."""


class Panel(Document):
    """One measurement as a reader meets it."""

    key: str
    """Stable name for links and for programs, such as `fidelity` or `healthbench`."""
    title: str
    summary: str
    """What was found, in a sentence or two."""
    tables: tuple[Table, ...] = ()
    unfoldings: tuple[Unfolding, ...] = ()
    plots: tuple[tuple[str, str], ...] = ()
    """(caption, SVG text) pairs: `str` of what `validation.report.plots` draws, or other SVG. Known shapes are
    shown; anything that could run or load (scripts, links, images) is not."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the figures rightly."""
    conditions: tuple[tuple[str, str], ...] = ()
    """(name, value) pairs of how it was measured: data and their digest, sampling, seconds."""
    subjects: tuple[str, ...] = ()
    """Digests of what was measured; each must be among the report's subjects."""
