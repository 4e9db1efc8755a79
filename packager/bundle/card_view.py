"""What a card says, before it is said in a language: figures with their places, and names of messages.

Everything follows from the lock and the report. The English and the Chinese card are the same view in two
sets of words, so no figure is written twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.bundle.card_losses import losing
from packager.bundle.card_parts import (
    PAGE,
    Table,
    Term,
    Words,
    number,
    panels_of,
    percent,
    points,
    said,
    scope,
    scopes,
    share,
    share_of,
)
from packager.bundle.card_settings import CardSettings
from packager.bundle.figures import LOCK
from packager.bundle.lock import Lock

if TYPE_CHECKING:
    from validation.longcontext import ContextClaim
    from validation.report import Report


@dataclass(frozen=True)
class PanelTable:
    """A table that a measurement brought along."""

    title: Term
    target: str
    table: Table


@dataclass(frozen=True)
class CardView:
    """One card."""

    settings: CardSettings
    lock: Lock
    report: Report
    has_draft: bool
    weights_bytes: int
    claim: ContextClaim
    reports: tuple[str, ...]
    """Names of the report's files in `evidence/`."""
    gates: Table | None
    variants: Table | None
    tasks: Table | None
    steps: Table | None
    long: Table | None
    speed: Table | None
    rounding: Table | None
    panels: tuple[PanelTable, ...]
    losing: tuple[Words, ...]
    unmeasured: tuple[Words, ...]
    sections: tuple[tuple[Words, str], ...]
    """What else the report has: title and link target."""


def build_view(lock: Lock, settings: CardSettings, report: Report) -> CardView:
    """Lay out a card."""
    from validation.longcontext import context_claim

    context = lock.stages["context"].manifest
    return CardView(
        settings=settings,
        lock=lock,
        report=report,
        has_draft="draft" in lock.stages,
        weights_bytes=sum(e.size for e in context.files if e.path.endswith(".safetensors")),
        claim=context_claim(settings.context_length, report.long_context, settings.min_long_accuracy),
        reports=tuple(e.path for e in lock.stages["evidence"].manifest.files if e.path.startswith("report.")),
        gates=_gates(report),
        variants=_variants(report),
        tasks=_tasks(report),
        steps=_steps(report),
        long=_long(report),
        speed=_speed(report),
        rounding=_rounding(lock),
        panels=tuple(_panels(report)),
        losing=tuple(losing(report, settings)),
        unmeasured=tuple(_unmeasured(report, settings)),
        sections=tuple(_sections(report)),
    )


def _gates(report: Report) -> Table | None:
    rows = []
    for at, gate in enumerate(report.gates):
        measured = number(gate.measured, "gates", at, "measured", anchor="gates", unit=gate.unit)
        bound: Words = said("no_bound")
        if gate.bound is not None:
            bound = said(
                gate.comparison.replace(" ", "_"),
                bound=number(gate.bound, "gates", at, "bound", anchor="gates", unit=gate.unit),
            )
        rows.append((Term(gate.name), measured, bound, said("outcome_" + gate.outcome.replace(" ", "_"))))
    columns = (said("figure"), said("measured"), said("bound"), said("outcome"))
    return Table(columns, tuple(rows)) if rows else None


def _variants(report: Report) -> Table | None:
    rows = tuple(
        (
            Term(run.label),
            number(run.overall.n, "accuracy", at, "overall", "n", anchor="accuracy", digits=0),
            share(("accuracy", at, "overall"), run.overall, "accuracy"),
        )
        for at, run in enumerate(report.accuracy)
    )
    return Table((said("variant"), said("items"), said("exact_match")), rows) if rows else None


def _paired(report: Report, candidate: int, kind: str, name: str) -> tuple[tuple[str | int, ...], Any] | None:
    """Where the first run is compared with another one: the place and the paired figures of one scope."""
    if kind not in ("overall", "by_task"):
        return None
    first, run = report.accuracy[0], report.accuracy[candidate]
    for at, comparison in enumerate(report.comparisons):
        if (comparison.reference, comparison.candidate) == (first.label, run.label):
            if kind == "overall":
                return ("comparisons", at, "overall"), comparison.overall
            for row, paired in enumerate(comparison.by_task):
                if paired.scope == name:
                    return ("comparisons", at, "by_task", row), paired
    return None


def _tasks(report: Report) -> Table | None:
    """The reference against all that is served, by task and language."""
    if not report.accuracy:
        return None
    last = len(report.accuracy) - 1
    first, served = report.accuracy[0], report.accuracy[last]
    rows: list[tuple[Words, ...]] = []
    for kind, below, one in scopes(report):
        where = ("accuracy", 0, *below)
        row: list[Words] = [
            scope(kind, one.name),
            number(one.n, *where, "n", anchor="accuracy", digits=0),
            share(where, one, "accuracy"),
        ]
        if last:
            found = share_of(served, kind, one.name)
            row.append(share(("accuracy", last, *found[0]), found[1], "accuracy") if found else "–")
            paired = _paired(report, last, kind, one.name)
            row.append(points(*paired, "accuracy") if paired else "–")
        row.append(percent(one.majority_share, *where, "majority_share", anchor="accuracy"))
        rows.append(tuple(row))
    columns: list[Words] = [said("items_of"), said("items"), Term(first.label)]
    if last:
        columns += [Term(served.label), said("difference")]
    return Table((*columns, said("majority")), tuple(rows))


def _steps(report: Report) -> Table | None:
    rows = tuple(
        (
            said("against", candidate=Term(one.candidate), reference=Term(one.reference)),
            points(("comparisons", at, "overall"), one.overall, "accuracy"),
            number(one.overall.margin_points, "comparisons", at, "overall", "margin_points",
                   anchor="accuracy", unit="points"),
            said("verdict_" + one.overall.verdict.replace("-", "_")),
            number(one.overall.n_to_decide, "comparisons", at, "overall", "n_to_decide",
                   anchor="accuracy", digits=0) if one.overall.n_to_decide else "–",
        )
        for at, one in enumerate(report.comparisons)
    )  # fmt: skip
    columns = (said("compared"), said("difference"), said("margin"), said("verdict"), said("to_decide"))
    return Table(columns, rows) if rows else None


def _long(report: Report) -> Table | None:
    rows = []
    for at, run in enumerate(report.long_context):
        for row, one in enumerate(run.by_multiple):
            where = ("long_context", at, "by_multiple", row)
            rows.append(
                (
                    Term(run.label),
                    number(one.multiple, *where, "multiple", anchor="long-records", unit="×"),
                    number(one.context_tokens, *where, "context_tokens", anchor="long-records", digits=0),
                    number(one.n, *where, "n", anchor="long-records", digits=0),
                    share(where, one, "long-records"),
                )
            )
    columns = (said("variant"), said("multiple"), said("tokens"), said("records"), said("found"))
    return Table(columns, tuple(rows)) if rows else None


def _speed(report: Report) -> Table | None:
    rows = []
    for at, run in enumerate(report.throughput):
        for row, c in enumerate(run.cells):
            where = ("throughput", at, "cells", row)
            speed = number(c.output_tokens_per_s, *where, "output_tokens_per_s", anchor="speed", digits=1)
            ttft = number(c.ttft_ms.median, *where, "ttft_ms", "median", anchor="speed", digits=1)
            tpot = number(c.tpot_ms.median, *where, "tpot_ms", "median", anchor="speed", digits=2)
            length: Words = said("no_draft")
            if c.acceptance:
                steps = (*where, "acceptance", "length")
                length = number(c.acceptance.length, *steps, anchor="speed", digits=2)
            rows.append((Term(run.label), c.concurrency, speed, ttft, tpot, length))
    columns = tuple(
        said(k) for k in ("variant", "concurrency", "output_speed", "ttft", "tpot", "acceptance_length")
    )
    return Table(columns, tuple(rows)) if rows else None


def _rounding(lock: Lock) -> Table | None:
    found = lock.stages["fp8"].manifest.metrics.get("fidelity") or {}
    rows = []
    for role, row in sorted(found.items()):
        where = ("stages", "fp8", "manifest", "metrics", "fidelity", role)

        def cell(
            name: str,
            digits: int,
            row: dict[str, Any] = row,
            where: tuple[str, ...] = where,
        ) -> Words:
            if row[name] is None:
                return said("exact")
            return number(row[name], *where, name, anchor="", digits=digits, document=LOCK,
                          target="evidence/fidelity.jsonl")  # fmt: skip

        rows.append((role, cell("tensors", 0), cell("snr_db", 2), cell("worst_snr_db", 2)))
    columns = (said("weights_of"), said("tensors"), said("snr"), said("worst"))
    return Table(columns, tuple(rows)) if rows else None


_PANELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "benchmarks": (0, ("task", "items", "accuracy", "95 % low", "95 % high", "commonest answer")),
    "medbench": (0, ("dimension", "items", "labelled", "score")),
    "rubrics": (0, ("model", "conversations", "score", "lowest possible", "highest possible", "counts")),
    "healthbench": (0, ("model", "conversations", "score", "lowest possible", "highest possible", "counts")),
    "safety": (0, ("Candidate", "Safety items", "Right to wrong", "Wrong to right", "Beyond noise")),
    "draft-evaluation": (0, ("K", "concurrency", "without", "with", "speed", "length")),
}
"""Panels whose figures stand on the card: which of its tables, and which columns; the key is a prefix."""


def _panels(report: Report) -> Iterator[PanelTable]:
    for at, panel, anchor in panels_of(report):
        chosen = next(
            (value for key, value in _PANELS.items() if f"{panel.key}-".startswith(f"{key}-")), None
        )
        if chosen is None or len(panel.tables) <= chosen[0]:
            continue
        index, wanted = chosen
        table = panel.tables[index]
        columns = [c for c, column in enumerate(table.columns) if column.name in wanted]

        def shown(
            r: int, c: int, at: int = at, index: int = index, anchor: str = anchor, table: Any = table
        ) -> Words:
            cell, column = table.rows[r][c], table.columns[c]
            if isinstance(cell, str) or (cell is None and column.kind == "text"):
                return Term(cell or "–")
            where = ("panels", at, "tables", index, "rows", r, c)
            return number(cell, *where, anchor=anchor, digits=column.digits)

        rows = tuple(tuple(shown(r, c) for c in columns) for r in range(len(table.rows)))
        heads = tuple(
            said("with_unit", name=Term(table.columns[c].name), unit=Term(table.columns[c].unit))
            if table.columns[c].unit
            else Term(table.columns[c].name)
            for c in columns
        )
        yield PanelTable(Term(panel.title), f"{PAGE}#{anchor}", Table(heads, rows))


def _unmeasured(report: Report, settings: CardSettings) -> Iterator[Words]:
    """What a reader might take for measured, and is not."""
    keys = {panel.key for panel in report.panels}
    if report.weights_served == "dequantized":
        yield said("unmeasured_kernels", weights=settings.weights)
    if not report.accuracy:
        yield said("unmeasured_accuracy")
    if not report.long_context:
        yield said("unmeasured_long")
    if not report.throughput:
        yield said("unmeasured_speed")
    elif report.throughput_baseline is None:
        yield said("unmeasured_dense")
    if not any(key.startswith(("benchmarks", "medbench", "medaibench")) for key in keys):
        yield said("unmeasured_benchmarks")
    if not keys & {"rubrics", "healthbench"}:
        yield said("unmeasured_rubrics")
    if "fidelity" not in keys:
        yield said("unmeasured_fidelity")
    if "noise-floor" not in keys:
        yield said("unmeasured_noise")
    if "safety" not in keys:
        yield said("unmeasured_safety")
    for command in settings.commands[1:]:
        yield said("unmeasured_profile", profile=command.profile)
    for gate in report.gates:
        if gate.outcome == "not measured":
            yield said("unmeasured_gate", gate=Term(gate.name))


def _sections(report: Report) -> Iterator[tuple[Words, str]]:
    yield said("section_identity"), f"{PAGE}#same-output"
    for _, panel, anchor in panels_of(report):
        yield Term(panel.title), f"{PAGE}#{anchor}"
    yield said("section_measured"), f"{PAGE}#measured"
