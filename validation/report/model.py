"""The report: every figure, bound to the digest of what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from validation.conduct import Conduct
from validation.document import Document
from validation.endpoint import Sampling
from validation.environment import Environment
from validation.errors import MeasurementError
from validation.gates import Gate, overall
from validation.identity import IdentityResult
from validation.longcontext import LongComparison, LongRun
from validation.panel import Panel
from validation.tasks.accuracy import AccuracyRun
from validation.tasks.comparison import AccuracyComparison
from validation.throughput import DecodeSpeed, Ratio, ThroughputRun, compare_throughput

SCHEMA_VERSION = 2
"""Of report.json. It goes up when a field is taken away or changes its meaning, not when one is added."""


class Subject(Document):
    """Something that was served and measured."""

    name: str
    digest: str
    """Digest of its sealed artifact, or of several joined by "+" (weights and draft)."""
    note: str = ""


class StageFigures(Document):
    """What a stage of the release made, and its figures."""

    stage: str
    digest: str | None = None
    seconds: float | None = None
    figures: dict[str, str | int | float] = Field(default_factory=dict)


class Headline(Document):
    """One figure worth reading first."""

    label: str
    value: str
    detail: str


class ReportInputs(Document):
    """All that was measured; what is left out is reported as not measured."""

    title: str
    subjects: tuple[Subject, ...]
    weights_served: Literal["native", "dequantized"]
    """Dequantized: quantized weights were expanded to BF16 before serving, for want of a kernel here."""
    weights_note: str = ""
    environment: Environment
    accuracy: tuple[AccuracyRun, ...] = ()
    """The first is the reference."""
    comparisons: tuple[AccuracyComparison, ...] = ()
    identity: tuple[IdentityResult, ...] = ()
    long_context: tuple[LongRun, ...] = ()
    long_comparison: LongComparison | None = None
    throughput: tuple[ThroughputRun, ...] = ()
    throughput_baseline: str | None = None
    """Label of the run that ratios are taken to."""
    decode: tuple[DecodeSpeed, ...] = ()
    """The first is the reference of the speed-up."""
    gates: tuple[Gate, ...] = ()
    panels: tuple[Panel, ...] = ()
    """Measurements that bring their own tables."""
    conduct: Conduct | None = None
    """When it ran and how long each part took; None: not recorded."""
    stages: tuple[StageFigures, ...] = ()
    notes: tuple[str, ...] = ()


class Report(ReportInputs):
    """The inputs and what follows from them."""

    schema_version: Literal[2] = SCHEMA_VERSION
    outcome: Literal["pass", "fail", "not measured"]
    headlines: tuple[Headline, ...]
    ratios: tuple[Ratio, ...]

    @property
    def digest(self) -> str:
        """Digest of the whole report."""
        return self.content_digest

    def subject_name(self, digest: str) -> str:
        """The name of a measured subject."""
        return next(s.name for s in self.subjects if s.digest == digest)

    def asked(self) -> Iterator[Asked]:
        """The data sets that models were asked, each once, with the sampling of the answers."""
        seen: set[tuple[str, str]] = set()
        runs: list[tuple[str, AccuracyRun | LongRun]] = [("Items with known answers", r) for r in self.accuracy]
        runs += [("Long records", r) for r in self.long_context]
        for name, run in runs:
            key = (run.items_digest, run.sampling.model_dump_json())
            if key not in seen:
                seen.add(key)
                yield Asked(name, run.items_digest, len(run.results), run.sampling)
        prompts = {(r.prompts_digest, r.prompts) for r in self.throughput}
        for digest, count in sorted(prompts):
            yield Asked("Prompts of the speed", digest, count, None)


class Asked(NamedTuple):
    """A data set as it was put to models."""

    name: str
    digest: str
    count: int
    sampling: Sampling | None
    """None: greedy, as the load generator has it."""


def build_report(inputs: ReportInputs) -> Report:
    """Judge and summarise what was measured.

    Raises:
        MeasurementError: a measurement is bound to a digest that is not among the subjects, or the
            baseline of the throughput ratios was not measured.
    """
    known = {s.digest for s in inputs.subjects}
    bound: list[tuple[str, str]] = []
    bound += [(r.label, r.subject) for r in inputs.accuracy]
    bound += [(r.label, r.subject) for r in inputs.long_context]
    bound += [(r.label, r.subject) for r in inputs.throughput]
    bound += [(r.label, r.subject) for r in inputs.decode]
    pairs: list[IdentityResult | AccuracyComparison] = [*inputs.identity, *inputs.comparisons]
    for pair in pairs:
        bound += [(pair.reference, pair.reference_subject), (pair.candidate, pair.candidate_subject)]
    if inputs.long_comparison is not None:
        long = inputs.long_comparison
        bound += [(long.before, long.before_subject), (long.after, long.after_subject)]
    bound += [(panel.title, digest) for panel in inputs.panels for digest in panel.subjects]
    for label, digest in bound:
        if digest not in known:
            raise MeasurementError(
                f"{label} was measured on {digest}, which is not among the report's subjects",
                "Evidence counts only for the bytes it was measured on: name the subject or measure again.",
            )
    ratios: list[Ratio] = []
    if inputs.throughput_baseline is not None:
        baseline = next((r for r in inputs.throughput if r.label == inputs.throughput_baseline), None)
        if baseline is None:
            raise MeasurementError(f"no throughput run is called {inputs.throughput_baseline!r}")
        for run in inputs.throughput:
            if run is not baseline:
                ratios += compare_throughput(baseline, run)
    fields = {name: getattr(inputs, name) for name in ReportInputs.model_fields}
    return Report(
        **fields,
        outcome=overall(inputs.gates),
        headlines=tuple(_headlines(inputs, ratios)),
        ratios=tuple(ratios),
    )


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        MeasurementError: missing, malformed, of another schema version, or with a gate that contradicts its
            own figures.
    """
    try:
        written = path.read_bytes()
        document: Any = json.loads(written)
    except OSError as err:
        raise MeasurementError(f"cannot read the report {path}: {err.strerror}") from None
    except ValueError as err:
        raise MeasurementError(f"{path} is not a validation report: {err}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise MeasurementError(
            f"the report {path} has schema version {version}; this release reads version {SCHEMA_VERSION}",
            "Validate again: answers that were kept are not asked again."
            if version < SCHEMA_VERSION
            else "Read it with the release of this software that wrote it, or a later one.",
        )
    try:
        return Report.model_validate_json(written)
    except ValidationError as err:
        first = err.errors()[0]
        raise MeasurementError(
            f"{path} is not a validation report: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; a true minus, and no sign on what rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def _headlines(inputs: ReportInputs, ratios: list[Ratio]) -> list[Headline]:
    lines = []
    for comparison in inputs.comparisons:
        paired = comparison.overall
        lines.append(
            Headline(
                label=f"{comparison.candidate} against {comparison.reference}",
                value=f"{signed(paired.difference_points)} points",
                detail=f"95 % interval {signed(paired.low_points)} to {signed(paired.high_points)}, "
                f"{paired.n} items; {paired.verdict} at a margin of {paired.margin_points:g}",
            )
        )
    for identity in inputs.identity:
        if not identity.differences:
            ties = "no difference to explain"
        elif identity.all_near_ties:
            ties = "every difference starts at a near tie"
        else:
            far = sum(not d.near_tie for d in identity.differences)
            ties = f"{far} of {len(identity.differences)} differences do not start at a near tie"
        lines.append(
            Headline(
                label=f"Same output, {identity.candidate} and {identity.reference}",
                value=f"{identity.identical} of {identity.n}",
                detail=f"greedy answers, token for token; {ties}",
            )
        )
    for sweep in inputs.throughput:
        cells = [c for c in sweep.cells if c.acceptance is not None]
        if cells and cells[0].acceptance is not None:
            acceptance = cells[0].acceptance
            lines.append(
                Headline(
                    label="Acceptance length",
                    value=f"{acceptance.length:.2f} tokens",
                    detail=f"per verification step of {sweep.label}, {acceptance.drafts:,} drafts of "
                    f"{len(acceptance.per_position)} tokens",
                )
            )
    if len(inputs.decode) > 1:
        first, last = inputs.decode[0], inputs.decode[-1]
        lines.append(
            Headline(
                label="Decoding, one request at a time",
                value=f"{last.tokens_per_s / first.tokens_per_s:.2f}×",
                detail=f"{last.label} {last.tokens_per_s:.0f} tokens/s, "
                f"{first.label} {first.tokens_per_s:.0f} tokens/s",
            )
        )
    if ratios:
        best = max(ratios, key=lambda r: r.ratio)
        lines.append(
            Headline(
                label=f"Against {best.baseline}",
                value=f"{best.ratio:.2f}×",
                detail=f"output tokens/s of {best.candidate} at concurrency {best.concurrency}, the best of "
                f"{len(ratios)} cells; lowest {min(r.ratio for r in ratios):.2f}×",
            )
        )
    if inputs.long_context:
        records = inputs.long_context[-1]
        longest = records.by_multiple[-1]
        lines.append(
            Headline(
                label=f"Retrieval at {longest.multiple:g}× the trained length",
                value=f"{100 * longest.accuracy:.0f} %",
                detail=f"{records.label}, {longest.correct} of {longest.n} records; 95 % interval "
                f"{100 * longest.low:.0f} to {100 * longest.high:.0f} %",
            )
        )
    return lines
