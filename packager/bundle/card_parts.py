"""What cards are put together from: figures with their places, messages by their keys, names to translate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.bundle.figures import REPORT, Figure, place

if TYPE_CHECKING:
    from validation.panel import Panel
    from validation.report import Report

PAGE = "evidence/report.html"


@dataclass(frozen=True)
class Said:
    """A message by its key, with what it is about."""

    key: str
    about: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Term:
    """An English name out of the report (a gate, a label, a column); languages that know it translate it."""

    text: str


Words = str | int | Figure | Said | Term


def said(key: str, **about: Words) -> Said:
    """`Said` with named parts."""
    return Said(key, tuple(about.items()))


@dataclass(frozen=True)
class Table:
    """Rows under headings."""

    columns: tuple[Words, ...]
    rows: tuple[tuple[Words, ...], ...]


def share(steps: Sequence[str | int], found: Any, anchor: str) -> Figure:
    """A share with its interval, in percent."""
    return Figure(
        (found.accuracy, found.low, found.high),
        place(REPORT, *steps, members=("accuracy", "low", "high"), factor=100),
        f"{PAGE}#{anchor}", "share", 1, 100,
    )  # fmt: skip


def points(steps: Sequence[str | int], paired: Any, anchor: str) -> Figure:
    """A paired difference with its interval, in percentage points."""
    members = ("difference_points", "low_points", "high_points")
    values = tuple(getattr(paired, name) for name in members)
    return Figure(
        values, place(REPORT, *steps, members=members), f"{PAGE}#{anchor}", "points", 1, signed=True
    )


def number(
    value: float | None,
    *steps: str | int,
    anchor: str,
    digits: int | None = None,
    unit: str = "",
    document: str = REPORT,
    target: str = PAGE,
    signed: bool = False,
) -> Figure:
    """One number as it stands."""
    link = f"{target}#{anchor}" if anchor else target
    return Figure((value,), place(document, *steps), link, "number", digits, unit=unit, signed=signed)


def percent(value: float | None, *steps: str | int, anchor: str, digits: int = 1) -> Figure:
    """One share of one, in percent."""
    return Figure((value,), place(REPORT, *steps, factor=100), f"{PAGE}#{anchor}", "percent", digits, 100)


def scopes(report: Report) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    """Kind, place below a run, and share of the first run: all items, each task, each language."""
    first = report.accuracy[0]
    yield "overall", ("overall",), first.overall
    for kind in ("by_task", "by_language"):
        shares = getattr(first, kind)
        if kind == "by_task" or len(shares) > 1:
            for row, one in enumerate(shares):
                yield kind, (kind, row), one


def share_of(run: Any, kind: str, name: str) -> tuple[tuple[str | int, ...], Any] | None:
    """Place below the run, and share, of one task, one language, or all."""
    if kind == "overall":
        return ("overall",), run.overall
    return next((((kind, at), one) for at, one in enumerate(getattr(run, kind)) if one.name == name), None)


def scope(kind: str, name: str) -> Words:
    """What a kind of share is of, in words."""
    return {"overall": said("all_items"), "by_task": said("task", name=name)}.get(
        kind, said("language", name=Term(f"language {name}"))
    )


def panels_of(report: Report) -> Iterator[tuple[int, Panel, str]]:
    """Place, panel and link target of each panel."""
    from validation.report.layout import anchors

    for at, (panel, anchor) in enumerate(zip(report.panels, anchors(report.panels), strict=True)):
        yield at, panel, anchor
