"""Safety items gate by themselves: every one that a candidate turns from right to wrong is listed.

A share hides a single fatal answer, so what is counted here is items. Those that the reference itself does
not answer the same way twice (the noise floor) are told apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from validation.document import Document
from validation.errors import MeasurementError
from validation.gates import Gate, at_most
from validation.noise import NoiseFloor, flip_unfolding
from validation.panel import Column, Panel, Table
from validation.tasks.accuracy import AccuracyRun
from validation.tasks.comparison import Flip, Paired, compare_accuracy, paired_outcomes


class SafetyCheck(Document):
    """A candidate against a reference on safety items alone."""

    schema_version: int = 1
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    tasks: tuple[str, ...]
    """Tasks that have safety items."""
    paired: Paired
    right_to_wrong: tuple[Flip, ...]
    in_noise: tuple[str, ...] | None
    """Ids among these that the reference itself flips when asked twice; None: noise was not measured."""
    noise_flips: int | None
    """Safety items that the reference flips, either way, when asked twice."""

    @property
    def beyond_noise(self) -> int:
        """Items turned from right to wrong that the noise floor does not show."""
        return len(self.right_to_wrong) - len(self.in_noise or ())


def check_safety(
    reference: AccuracyRun,
    candidate: AccuracyRun,
    *,
    margin_points: float,
    tasks: Iterable[str] = (),
    noise: NoiseFloor | None = None,
) -> SafetyCheck | None:
    """Compare two runs on their safety items, those marked so and all of the named tasks; None: has none.

    Raises:
        MeasurementError: a named task has no items; the runs do not pair; the noise is another model's.
    """
    named = set(tasks)
    if unknown := sorted(named - {r.task for r in reference.results}):
        raise MeasurementError(
            f"{', '.join(unknown)} is named as a safety task, of which there are no items",
            f"The tasks are {', '.join(share.name for share in reference.by_task)}.",
        )
    if noise is not None and (noise.subject, noise.comparison.items_digest) != (
        reference.subject,
        reference.items_digest,
    ):
        raise MeasurementError(f"the noise floor is not that of {reference.label} on these items")
    flips = compare_accuracy(reference, candidate, margin_points=margin_points).flips
    pairs = [
        (a, b)
        for a, b in zip(reference.results, candidate.results, strict=True)
        if a.safety or a.task in named
    ]
    if not pairs:
        return None
    ids = {a.id for a, _ in pairs}
    harmed = tuple(flip for flip in flips if flip.id in ids and flip.direction == "right to wrong")
    return SafetyCheck(
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        tasks=tuple(sorted({a.task for a, _ in pairs})),
        paired=paired_outcomes("safety", [(a.correct, b.correct) for a, b in pairs], margin_points),
        right_to_wrong=harmed,
        in_noise=None if noise is None else tuple(f.id for f in harmed if f.id in noise.unstable),
        noise_flips=None if noise is None else len(ids & noise.unstable),
    )


def safety_gate(check: SafetyCheck | None, bound: int | None, candidate: str) -> Gate:
    """The number of safety items lost beyond noise against a bound; not measured where there are none."""
    if check is None:
        return at_most(f"safety items lost by {candidate}", None, bound, "items", "no item is one of safety")
    noise = "noise not measured" if check.noise_flips is None else f"noise alone flips {check.noise_flips}"
    return at_most(
        f"safety items lost by {candidate}",
        check.beyond_noise,
        bound,
        "items",
        f"of {check.paired.n}; {len(check.right_to_wrong)} turned from right to wrong, {noise}",
    )


def safety_panel(checks: Iterable[SafetyCheck]) -> Panel:
    """Safety items of each candidate, and every one turned from right to wrong with both texts."""
    checks = list(checks)
    if not checks:
        raise ValueError("no safety check to show")
    return Panel(
        key="safety",
        title="Safety items",
        summary="; ".join(
            f"{c.candidate} turns {len(c.right_to_wrong)} of {c.paired.n} safety items from right to wrong"
            + ("" if c.in_noise is None else f", {c.beyond_noise} of them beyond noise")
            for c in checks
        )
        + ".",
        tables=(
            Table(
                caption=f"Tasks: {', '.join(dict.fromkeys(t for c in checks for t in c.tasks))}",
                columns=(
                    Column(name="Candidate", kind="text"),
                    Column(name="Safety items", digits=0),
                    Column(name="Right to wrong", digits=0),
                    Column(name="Wrong to right", digits=0),
                    Column(name="Beyond noise", digits=0),
                    Column(name="Flips in noise", digits=0),
                    Column(name="Difference", unit="points", digits=2),
                    Column(name="Low", unit="points", digits=2),
                    Column(name="High", unit="points", digits=2),
                ),
                rows=tuple(
                    (
                        c.candidate,
                        c.paired.n,
                        c.paired.only_reference,
                        c.paired.only_candidate,
                        None if c.in_noise is None else c.beyond_noise,
                        c.noise_flips,
                        c.paired.difference_points,
                        c.paired.low_points,
                        c.paired.high_points,
                    )
                    for c in checks
                ),
            ),
        ),
        unfoldings=tuple(
            flip_unfolding(
                flip, c.reference, c.candidate, " (also in noise)" if flip.id in (c.in_noise or ()) else ""
            )
            for c in checks
            for flip in c.right_to_wrong
        ),
        notes=(
            "Beyond noise: right to wrong, and not among the items that the reference itself answers right "
            "once and wrong once. Counted as items; a share would hide a single one.",
        ),
        subjects=tuple(dict.fromkeys(s for c in checks for s in (c.reference_subject, c.candidate_subject))),
    )
