"""What a report shows of measured drafts: one draft by itself, several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packager.errors import BadInput
from packager.release.draft_record import (
    Cell,
    Drafted,
    DraftRecord,
    differing_settings,
    labels,
    read_record,
    require_alike,
)
from validation.panel import Cell as Value
from validation.panel import Column, Panel, Table
from validation.report import Subject

_ERRORS = (
    "Standard errors are of the spread over drafts. Drafts of one answer are alike, so the truth is wider."
)


def draft_panel(record: DraftRecord, key: str = "draft-evaluation") -> Panel:
    """One draft: by draft length and concurrency, by group, by context."""
    runs = record.with_draft
    tables = [_by_concurrency(record), _findings(record), _by_group(runs)]
    if record.without_draft.by_context:
        tables.append(_by_context([record], [record.draft]))
    low = record.concurrency[0]
    said = "; ".join(
        f"K={run.num_speculative_tokens}: acceptance length {_length(run.by_concurrency[low])}, "
        f"{run.speedup[low]:.2f} times as fast"
        for run in runs
    )
    alarms = [run for run in runs if run.predicted and run.predicted.alarm]
    notes = [
        f"{record.prompts} prompts, answers up to {record.max_response_tokens} tokens, the fastest of "
        f"{record.repeats} passes on either side; speeds include reading the prompts.",
        *(f"The draft's files have a problem: {one}." for one in record.problems),
        *(
            f"K={run.num_speculative_tokens}: served and predicted acceptance are more than 5 % apart. Layer "
            "ids, positions or weights differ in serving, or the prompts do."
            for run in alarms
        ),
    ]
    return Panel(
        key=key,
        title=f"Draft {record.draft}",
        summary=f"At concurrency {low}, against no draft. {said}.",
        tables=tuple(tables),
        notes=tuple(notes),
        subjects=(record.subject,),
    )


def comparison_panel(records: Sequence[DraftRecord]) -> Panel:
    """Several drafts on one target; differences are to the first.

    Raises:
        BadInput: fewer than two, or they were not measured alike.
    """
    if len(records) < 2:
        raise BadInput("one draft is no comparison", "Give two evaluations or more.")
    require_alike(records)
    names = labels(records)
    low = max(one.concurrency[0] for one in records)
    rows: list[tuple[Value, ...]] = []
    said: list[str] = []
    first = {run.num_speculative_tokens: run for run in records[0].with_draft}
    for record, name in zip(records, names, strict=True):
        for run in record.with_draft:
            cell, other = run.by_concurrency.get(low), first.get(run.num_speculative_tokens)
            if cell is None or cell.acceptance is None:
                continue
            error = cell.acceptance.standard_error(record.repeats)
            base = other.by_concurrency.get(low) if other is not None and record is not records[0] else None
            difference = spread = None
            if base is not None and base.acceptance is not None:
                difference = cell.acceptance.length - base.acceptance.length
                spread = (error**2 + base.acceptance.standard_error(records[0].repeats) ** 2) ** 0.5
                said.append(
                    f"{name} against {names[0]} at K={run.num_speculative_tokens}: {difference:+.3f} "
                    f"(standard error {spread:.3f})"
                )
            rows.append(
                (
                    name,
                    run.num_speculative_tokens,
                    cell.acceptance.length,
                    error,
                    difference,
                    spread,
                    run.predicted.predicted if run.predicted else None,
                    run.speedup.get(low),
                )
            )
    columns = (
        Column(name="draft", kind="text"),
        Column(name="K", digits=0),
        Column(name="length", unit="tokens", digits=3),
        Column(name="standard error", unit="tokens", digits=3),
        Column(name="difference", unit="tokens", digits=3),
        Column(name="its standard error", unit="tokens", digits=3),
        Column(name="predicted", unit="tokens", digits=3),
        Column(name="speed", unit="x", digits=2),
    )
    tables = [
        Table(
            caption=f"Acceptance at concurrency {low}, by the engine's counters; differences to {names[0]}",
            columns=columns,
            rows=tuple(rows),
        ),
        _what_differs(records, names),
    ]
    if any(one.without_draft.by_context for one in records):
        tables.append(_by_context(records, names))
    machines = {one.measured.environment.content_digest for one in records}
    return Panel(
        key="drafts-compared",
        title="Drafts compared",
        summary=f"Acceptance length on one target. {'; '.join(said)}."
        if said
        else "No draft length in common.",
        tables=tuple(tables),
        notes=(
            _ERRORS,
            *(
                ["Not all were measured on the same machine: speeds do not compare."]
                if len(machines) > 1
                else []
            ),
        ),
        subjects=tuple(dict.fromkeys(one.subject for one in records)),
    )


def records_for(files: Sequence[Path], *, target: str) -> list[DraftRecord]:
    """The evaluations in `files`, written by `draft evaluate --out`, for a release whose extended checkpoint
    has the digest `target`.

    Raises:
        BadInput: a file is no evaluation, or was not measured on that checkpoint or a dequantized copy of it.
    """
    records = [read_record(path) for path in files]
    for path, record in zip(files, records, strict=True):
        if target not in (record.measured.target, *record.measured.target_made_from):
            raise BadInput(
                f"{path} was measured on {record.measured.target}, not on this release's {target}",
                "Evaluate on the release's context/ folder, or on a dequantized copy of it.",
            )
    return records


def draft_panels(
    records: Sequence[DraftRecord], *, draft: str
) -> tuple[tuple[Subject, ...], tuple[Panel, ...]]:
    """The panels of a release's report, and the subjects that they are bound to: each evaluation of the
    release's draft, whose digest is `draft`, and its comparison with the other drafts, if there are any.

    Raises:
        BadInput: none is of the release's draft, or they were not measured alike.
    """
    if not records:
        return (), ()
    own = [one for one in records if one.measured.draft == draft]
    if not own:
        raise BadInput(
            f"no file of validate.draft_evaluations was measured with this release's draft {draft}",
            "Evaluate the release's draft/ folder: packager draft evaluate TARGET DRAFT --out FILE.",
        )
    panels = [draft_panel(one, "draft-evaluation" + (f"-{at}" if at else "")) for at, one in enumerate(own)]
    if others := [one for one in records if one.measured.draft != draft]:
        # The release may have measured its draft on other prompts than the files were measured on.
        alike = (one for one in own if one.measured.prompts == others[0].measured.prompts)
        panels.append(comparison_panel([next(alike, own[0]), *others]))
    subjects = {
        one.subject: Subject(
            name=f"{one.target} with draft {name}", digest=one.subject, note="by draft evaluate"
        )
        for one, name in zip(records, labels(records), strict=True)
    }
    return tuple(subjects.values()), tuple(panels)


def _length(cell: Cell) -> str:
    return f"{cell.acceptance.length:.2f}" if cell.acceptance else "not measured"


def _by_concurrency(record: DraftRecord) -> Table:
    rows: list[tuple[Value, ...]] = []
    for level, cell in record.without_draft.by_concurrency.items():
        rows.append((0, level, cell.tokens_per_s, 1.0, None, None, None, None, None))
    for run in record.with_draft:
        for level, cell in run.by_concurrency.items():
            accepted, same = cell.acceptance, cell.identity
            rows.append(
                (
                    run.num_speculative_tokens,
                    level,
                    cell.tokens_per_s,
                    run.speedup.get(level),
                    accepted.length if accepted else None,
                    accepted.standard_error(record.repeats) if accepted else None,
                    " ".join(f"{rate:.2f}" for rate in accepted.per_position) if accepted else None,
                    f"{same.identical} of {same.of}" if same else None,
                    same.before_any_near_tie if same else None,
                )
            )
    return Table(
        caption="By draft length (0: no draft) and concurrency",
        columns=(
            Column(name="K", digits=0),
            Column(name="concurrency", digits=0),
            Column(name="output", unit="tokens/s", digits=0),
            Column(name="speed", unit="x", digits=2),
            Column(name="acceptance length", unit="tokens", digits=2),
            Column(name="standard error", unit="tokens", digits=3),
            Column(name="accepted by position", kind="text"),
            Column(name="same answer", kind="text"),
            Column(name="differ before a near tie", digits=0),
        ),
        rows=tuple(rows),
    )


def _findings(record: DraftRecord) -> Table:
    return Table(
        caption="Predicted in training for these tasks, against served; where speculation stops to pay",
        columns=(
            Column(name="K", digits=0),
            Column(name="predicted", unit="tokens", digits=2),
            Column(name="served", unit="tokens", digits=2),
            Column(name="difference", unit="%", digits=1),
            Column(name="verdict", kind="text"),
            Column(name="break-even concurrency", kind="text"),
        ),
        rows=tuple(
            (
                run.num_speculative_tokens,
                run.predicted.predicted if run.predicted else None,
                run.predicted.served if run.predicted else None,
                100 * run.predicted.difference if run.predicted else None,
                ("alarm" if run.predicted.alarm else "agree") if run.predicted else "not predicted",
                run.break_even.text,
            )
            for run in record.with_draft
        ),
    )


def _by_group(runs: Sequence[Drafted]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for kind, name in (("by_task", "task"), ("by_language", "language")):
        for group in getattr(runs[0], kind):
            found = [getattr(run, kind).get(group) for run in runs]
            rows.append((f"{name} {group}", *(one.length if one else None for one in found)))
    return Table(
        caption="Acceptance length by task and language",
        columns=(
            Column(name="prompts", kind="text"),
            *(Column(name=f"K={run.num_speculative_tokens}", unit="tokens", digits=2) for run in runs),
        ),
        rows=tuple(rows),
    )


def _by_context(records: Sequence[DraftRecord], names: Sequence[str]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for record, name in zip(records, names, strict=True):
        for run in record.with_draft:
            for length, cell in run.by_context.items():
                rows.append(
                    (
                        name,
                        run.num_speculative_tokens,
                        length,
                        cell.prompt_tokens,
                        cell.acceptance.length if cell.acceptance else None,
                        cell.acceptance.standard_error(record.repeats) if cell.acceptance else None,
                        run.context_speedup.get(length),
                    )
                )
    return Table(
        caption="By length of the prompt, at the lowest concurrency; reading the prompt is not timed",
        columns=(
            Column(name="draft", kind="text"),
            Column(name="K", digits=0),
            Column(name="up to", unit="tokens", digits=0),
            Column(name="median prompt", unit="tokens", digits=0),
            Column(name="acceptance length", unit="tokens", digits=2),
            Column(name="standard error", unit="tokens", digits=3),
            Column(name="speed", unit="x", digits=2),
        ),
        rows=tuple(rows),
    )


def _what_differs(records: Sequence[DraftRecord], names: Sequence[str]) -> Table:
    return Table(
        caption="What differs in how the drafts were made",
        columns=(Column(name="setting", kind="text"), *(Column(name=name, kind="text") for name in names)),
        rows=tuple((name, *values) for name, values in differing_settings(records).items()),
    )
