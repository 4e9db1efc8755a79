"""Panels and flips as a page and a summary show them: what fits, in what words, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from validation.panel import Cell, Column, Panel, Table, Unfolding
from validation.report.drawing import clean_svg
from validation.report.model import Report
from validation.report.room import PAGE_ROWS, PAGE_TEXTS, cut, fitting, shares, weight
from validation.tasks.comparison import Flip

SUMMARY_CHARACTERS = 60_000
"""Longest Markdown summary: a comment on GitHub holds 65,536, a job's summary 1 MiB."""
SUMMARY_ROWS = 30
"""Rows of a panel's table in the summary."""
_MOST_ROWS = 2_000
"""Rows of one table on the page; a browser lays out more of them too slowly to be of use."""
_DRAWINGS = 600_000
"""Characters of all drawings together."""


@dataclass(frozen=True)
class TableView:
    """A table's rows as cells, and how many there are besides."""

    table: Table
    rows: Markup
    left_out: int
    where: str
    """Where in report.json all of them stand."""


@dataclass(frozen=True)
class Texts:
    """Texts that unfold, cut to what fits."""

    shown: tuple[Unfolding, ...]
    left_out: int
    where: str


@dataclass(frozen=True)
class PanelView:
    """A panel as the page shows it."""

    panel: Panel
    anchor: str
    tables: tuple[TableView, ...]
    drawings: tuple[tuple[str, Markup | None], ...]
    texts: Texts


@dataclass(frozen=True)
class PageParts:
    """What the page shows of long lists; the rest is in report.json."""

    flips: tuple[Texts, ...]
    """One of each comparison."""
    panels: tuple[PanelView, ...]


def page_parts(report: Report) -> PageParts:
    """Panels and flips, cut so that the page stays below 3 MB; each has its fair share of the room."""
    groups = [[_flip(flip, c.reference, c.candidate) for flip in _worst_first(c.flips)] for c in report.comparisons]
    groups += [[_shortened(one) for one in panel.unfoldings] for panel in report.panels]
    places = [f"comparisons[{k}].flips" for k in range(len(report.comparisons))]
    places += [f"panels[{k}].unfoldings" for k in range(len(report.panels))]
    sizes = [[_weight(one) for one in group] for group in groups]
    given = shares([sum(one) for one in sizes], PAGE_TEXTS)
    texts = []
    for group, each, room, where in zip(groups, sizes, given, places, strict=True):
        count = fitting(each, room)
        texts.append(Texts(tuple(group[:count]), len(group) - count, where))
    first = len(report.comparisons)
    tables = _tables(report.panels)
    drawn = 0
    views = []
    for index, (panel, anchor) in enumerate(zip(report.panels, anchors(report.panels), strict=True)):
        drawings = []
        for caption, text in panel.plots:
            drawn += len(text)
            drawings.append((caption, clean_svg(text) if drawn <= _DRAWINGS else None))
        views.append(PanelView(panel, anchor, tables[index], tuple(drawings), texts[first + index]))
    return PageParts(tuple(texts[:first]), tuple(views))


def anchors(panels: Sequence[Panel]) -> list[str]:
    """A link target of each panel, from its key; none twice."""
    found: list[str] = []
    for panel in panels:
        plain = "panel-" + (re.sub(r"[^a-z0-9]+", "-", panel.key.lower()).strip("-") or "x")
        anchor, number = plain, 2
        while anchor in found:
            anchor, number = f"{plain}-{number}", number + 1
        found.append(anchor)
    return found


def shown(cell: Cell, column: Column) -> str:
    """A cell as readers see it; None is "not measured"."""
    if cell is None:
        return "not measured"
    if isinstance(cell, str):
        return cell
    if column.digits is not None:
        text = f"{cell:,.{column.digits}f}"
    else:
        text = f"{cell:,}" if isinstance(cell, int) else f"{cell:.6g}"
    if not text.strip("-0.,"):
        text = text.removeprefix("-")  # what rounds to zero has no sign
    return text.replace("-", "\N{MINUS SIGN}")


def heading(column: Column) -> str:
    """A column's name with its unit."""
    return f"{column.name}, {column.unit}" if column.unit else column.name


def summaries(report: Report, room: int) -> str:
    """The panels in Markdown: summary, the tables that matter to gates, notes; as many as fit into `room`."""
    parts: list[str] = []
    left_out: list[str] = []
    for panel in report.panels:
        text = _summary(panel)
        if len(text) > room:
            text = f"\n## {_words(panel.title)}\n\n{_words(panel.summary)[:1000]}\n"
            left_out.append(panel.title)
        if len(text) > room - 200:
            continue
        room -= len(text)
        parts.append(text)
    if left_out:
        names = ", ".join(map(_words, left_out))[:150]
        parts.append(f"\nToo long to be shown here in full, see report.html: {names}.\n")
    return "".join(parts)


def _summary(panel: Panel) -> str:
    lines = ["", f"## {_words(panel.title)}", "", _words(panel.summary), ""]
    for table in [t for t in panel.tables if t.brief] or panel.tables[:1]:
        if table.caption:
            lines += [f"{_words(table.caption)}:", ""]
        lines.append("| " + " | ".join(_words(heading(c)) for c in table.columns) + " |")
        lines.append("|" + "|".join("---:" if c.kind == "number" else "---" for c in table.columns) + "|")
        for row in table.rows[:SUMMARY_ROWS]:
            cells = (_words(shown(v, c)) for v, c in zip(row, table.columns, strict=True))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        if len(table.rows) > SUMMARY_ROWS:
            lines += [f"{len(table.rows) - SUMMARY_ROWS} more rows are in report.html and report.json.", ""]
    lines += [f"- {_words(note)}" for note in panel.notes]
    return "\n".join(lines) + "\n"


def _words(text: str) -> str:
    """Text that stays text in Markdown: on one line, no cell's end, no markup."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", plain)


def _worst_first(flips: Sequence[Flip]) -> list[Flip]:
    return sorted(flips, key=lambda flip: flip.direction != "right to wrong")


def _flip(flip: Flip, reference: str, candidate: str) -> Unfolding:
    return Unfolding(
        line=f"{flip.direction} · {flip.task}, {flip.id}: expected {flip.expected[:120]}, "
        f"{reference} {(flip.reference_answer or 'no answer')[:120]}, "
        f"{candidate} {(flip.candidate_answer or 'no answer')[:120]}",
        text=(
            ("Question", cut(flip.question)),
            (reference, cut(flip.reference_text)),
            (candidate, cut(flip.candidate_text)),
        ),
    )


def _shortened(one: Unfolding) -> Unfolding:
    return Unfolding(line=one.line[:400], text=tuple((head, cut(text)) for head, text in one.text))


def _weight(one: Unfolding) -> int:
    return weight(one.line, *(text for _, text in one.text)) + sum(len(head) for head, _ in one.text)


def _tables(panels: Sequence[Panel]) -> list[tuple[TableView, ...]]:
    """Every panel's tables; rows share the page's room."""
    all_tables = [(k, i, table) for k, panel in enumerate(panels) for i, table in enumerate(panel.tables)]
    rows = [[_row(row, table.columns) for row in table.rows[:_MOST_ROWS]] for _, _, table in all_tables]
    sizes = [[len(row.encode()) for row in table] for table in rows]
    given = shares([sum(one) for one in sizes], PAGE_ROWS)
    found: list[list[TableView]] = [[] for _ in panels]
    for (k, i, table), lines, each, room in zip(all_tables, rows, sizes, given, strict=True):
        count = fitting(each, room)
        found[k].append(
            TableView(
                table,
                Markup("\n").join(lines[:count]),
                len(table.rows) - count,
                f"panels[{k}].tables[{i}].rows",
            )
        )
    return [tuple(views) for views in found]


def _row(row: Sequence[Cell], columns: Sequence[Column]) -> Markup:
    cells = []
    for at, (cell, column) in enumerate(zip(row, columns, strict=True)):
        tag = "th" if at == 0 and column.kind == "text" else "td"
        classes = ["n"] if column.kind == "number" else []
        if cell is None:
            classes.append("soft")
        kind = f' class="{" ".join(classes)}"' if classes else ""
        value = "" if cell is None or isinstance(cell, str) else f' data-v="{cell!r}"'
        cells.append(f"<{tag}{kind}{value}>{escape(shown(cell, column))}</{tag}>")
    return Markup(f"<tr>{''.join(cells)}</tr>")  # noqa: S704: every cell was escaped
