"""The noise floor: the reference asked a second time, in another order and concurrency.

An engine's sums depend on what else is in the batch, so even the unchanged model answers some items
differently. What a candidate changes has to be read against that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from validation.document import Document
from validation.endpoint import Progress, Target
from validation.errors import MeasurementError
from validation.panel import Column, Panel, Table, Unfolding
from validation.statistics import wilson
from validation.tasks.accuracy import AccuracyRun, measure_accuracy
from validation.tasks.comparison import AccuracyComparison, Flip, compare_accuracy
from validation.tasks.items import Item, items_digest

AGAIN = ":again"
"""Ends the subject under which the second answers are kept, so that the first are not taken for them."""


class NoiseFloor(Document):
    """The same model on the same items, twice."""

    schema_version: int = 1
    label: str
    subject: str
    first_concurrency: int
    again_concurrency: int
    texts_changed: int
    """Answers whose text is not the same, right or wrong."""
    flips: int
    """Items right once and wrong once."""
    share: float
    """Of items that flip; low and high: its 95 % Wilson interval."""
    low: float
    high: float
    comparison: AccuracyComparison

    @property
    def unstable(self) -> frozenset[str]:
        """Ids of the items that flip without any change of the model."""
        return frozenset(flip.id for flip in self.comparison.flips)


def measure_noise(
    target: Target,
    items: Sequence[Item],
    first: AccuracyRun,
    *,
    margin_points: float,
    first_concurrency: int = 8,
    again_concurrency: int | None = None,
    progress: Progress | None = None,
) -> NoiseFloor:
    """Ask every item again: last first, and with another number in flight, so that batches are others.

    Args:
        target: what gave `first`; its cache takes the new answers under a subject of their own.
        items: those of `first`, in their order.
        first: the run to compare with.
        margin_points: margin of the verdict on the two, for comparison with a candidate's.
        first_concurrency: requests in flight in `first`.
        again_concurrency: requests in flight now; None: about half as many, at least another number.
        progress: see `Endpoint.complete`.

    Raises:
        MeasurementError: other items or another subject than in `first`; see also `measure_accuracy`.
    """
    if items_digest(items) != first.items_digest or target.subject != first.subject:
        raise MeasurementError(
            f"{first.label} was asked other items, or is another model: this is not its noise"
        )
    if again_concurrency is None:
        again_concurrency = first_concurrency // 2 + 1 if first_concurrency > 2 else first_concurrency + 1
    again = measure_accuracy(
        replace(target, subject=first.subject + AGAIN, label=f"{first.label} again"),
        items[::-1],
        concurrency=again_concurrency,
        sampling=first.sampling,
        progress=progress,
    )
    again = again.model_copy(
        update={"results": again.results[::-1], "items_digest": first.items_digest, "subject": first.subject}
    )
    comparison = compare_accuracy(first, again, margin_points=margin_points)
    flips, n = len(comparison.flips), len(first.results)
    low, high = wilson(flips, n)
    return NoiseFloor(
        label=first.label,
        subject=first.subject,
        first_concurrency=first_concurrency,
        again_concurrency=again_concurrency,
        texts_changed=sum(a.text != b.text for a, b in zip(first.results, again.results, strict=True)),
        flips=flips,
        share=flips / n,
        low=low,
        high=high,
        comparison=comparison,
    )


def noise_panel(noise: NoiseFloor, candidates: Sequence[AccuracyComparison] = ()) -> Panel:
    """The noise floor beside what each candidate changed."""
    rows = [(f"{noise.label} again", noise.comparison)] + [(each.candidate, each) for each in candidates]
    table = []
    for label, comparison in rows:
        count, n = len(comparison.flips), comparison.overall.n
        low, high = wilson(count, n)
        shared = (
            None if comparison is noise.comparison else len({f.id for f in comparison.flips} & noise.unstable)
        )
        table.append(
            (
                label,
                n,
                comparison.overall.only_reference,
                comparison.overall.only_candidate,
                100 * count / n,
                100 * low,
                100 * high,
                shared,
            )
        )
    n = noise.comparison.overall.n
    return Panel(
        key="noise-floor",
        title="Noise floor",
        summary=f"Asked twice, {noise.label} changes {noise.flips} of {n} items between right and wrong "
        f"({100 * noise.share:.1f} %, 95 % interval {100 * noise.low:.1f} to {100 * noise.high:.1f}) and the "
        f"text of {noise.texts_changed} answers.",
        tables=(
            Table(
                caption="Flips without and with a change of the model",
                columns=(
                    Column(name="Against the first run", kind="text"),
                    Column(name="Items", digits=0),
                    Column(name="Right to wrong", digits=0),
                    Column(name="Wrong to right", digits=0),
                    Column(name="Flips", unit="%", digits=2),
                    Column(name="Low", unit="%", digits=2),
                    Column(name="High", unit="%", digits=2),
                    Column(name="Also in the noise", digits=0),
                ),
                rows=tuple(table),
            ),
        ),
        unfoldings=tuple(
            flip_unfolding(flip, noise.label, f"{noise.label} again") for flip in noise.comparison.flips
        ),
        notes=(
            f"The second time the items were asked last first, {noise.again_concurrency} in flight instead "
            f"of {noise.first_concurrency}; model and sampling were the same.",
        ),
        subjects=(noise.subject,),
    )


def flip_unfolding(flip: Flip, reference: str, candidate: str, remark: str = "") -> Unfolding:
    """A flip as a line that unfolds to question and both answers."""
    return Unfolding(
        line=f"{flip.direction}{remark}: {flip.task}, {flip.id}; expected {flip.expected}, {reference} "
        f"{flip.reference_answer or 'no answer'}, {candidate} {flip.candidate_answer or 'no answer'}",
        text=(
            ("Question", flip.question),
            (reference, flip.reference_text),
            (candidate, flip.candidate_text),
        ),
    )
