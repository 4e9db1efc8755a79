"""Speed on hardware one does not have: the bound, with the efficiency that measured cells show.

A step takes the time to read its weights over an efficiency, plus that of its cache over another (attention
reads less evenly than matrix products), plus its arithmetic and its time on the links over theirs, plus what
is the same for every step and every sequence (launches, scheduling, sampling): times of parts that overlap
badly add up, which is what engines show between the corners of the roofline. The coefficients are fitted,
none negative, to the relative error of measured steps. What they say of a cell that was left out of the fit
is the error one must expect; its spread is the interval of every prediction.

Where the cells are too few or too alike for a fit, `transfer` takes each of them to another card by the
ratio of the two bounds alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from pydantic import Field

from validation.document import Document
from validation.errors import MeasurementError
from validation.hardware import Card
from validation.models import ModelShape
from validation.roofline import Limit, Setting, Step, decode_step

FEATURES = ("weights", "cache", "arithmetic", "links", "step", "sequence")
"""Coefficients in their order: four reciprocals of efficiencies, then seconds a step and a sequence."""


_HOST = 4
"""Where those of the host begin."""


class Cell(Document):
    """One measured step: so many sequences decoded together at one context."""

    label: str
    model: ModelShape
    card: Card
    setting: Setting
    concurrency: int = Field(gt=0)
    context: float = Field(ge=0)
    """Cached tokens of a sequence, on average over the measurement."""
    seconds: float = Field(gt=0)
    """Of a step: TPOT where a step yields a token, with a draft TPOT x acceptance length."""

    @property
    def bound(self) -> Step:
        """The roofline of this step."""
        return decode_step(
            self.model, self.card, self.setting, sequences=self.concurrency, context=self.context
        )


class Calibration(Document):
    """What was fitted, and how well it says what it has not seen."""

    coefficients: tuple[float, ...]
    """In the order of `FEATURES`."""
    cells: int
    held_out: tuple[HeldOut, ...]
    """Each cell, said by the others."""

    @property
    def median_error(self) -> float:
        """Median of the relative errors on held-out cells."""
        errors = sorted(abs(one.error) for one in self.held_out)
        middle = len(errors) // 2
        return errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2

    def efficiency(self, feature: str) -> float | None:
        """Share of the hardware's rate that was reached; None: the cells do not show it."""
        value = self.coefficients[FEATURES.index(feature)]
        return 1 / value if value > 0 else None


class HeldOut(Document):
    """A cell and what the fit without it says."""

    label: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative, of the measured time."""
        return self.predicted_s / self.measured_s - 1


class Prediction(Document):
    """A step that was not measured."""

    seconds: float
    low_s: float
    high_s: float
    """Between them lies what held-out cells of the fit were off by, in nine cases of ten."""
    bound: Step
    tokens_per_s: float
    """Of all sequences together."""

    @property
    def share_of_bound(self) -> float:
        """Of the speed that the hardware allows."""
        return self.bound.seconds / self.seconds


def calibrate(cells: Sequence[Cell]) -> Calibration:
    """Fit the coefficients, once with all cells and once without each.

    Raises:
        MeasurementError: fewer than four cells, too few to hold one out.
    """
    if len(cells) < 4:
        raise MeasurementError(
            f"{len(cells)} measured cells are too few to calibrate with",
            "Measure at least four: two concurrencies at two contexts.",
        )
    held = []
    for index, cell in enumerate(cells):
        others = [*cells[:index], *cells[index + 1 :]]
        held.append(
            HeldOut(
                label=cell.label,
                measured_s=cell.seconds,
                predicted_s=_apply(_fit(others), _features(cell.bound, cell.concurrency)),
            )
        )
    return Calibration(coefficients=_fit(cells), cells=len(cells), held_out=tuple(held))


def predict(
    calibration: Calibration,
    model: ModelShape,
    card: Card,
    setting: Setting,
    *,
    concurrency: int,
    context: float,
) -> Prediction:
    """A step on any card, as efficient as the measured ones were on theirs.

    Host time a step and a sequence is taken over as it was; where the other machine's host is faster or
    slower, so is that part. What no cell was limited by has no efficiency of its own: the slow end of the
    interval then counts that part in full, at the worst efficiency that was seen of another.
    """
    bound = decode_step(model, card, setting, sequences=concurrency, context=context)
    parts = _features(bound, concurrency)
    seconds = max(bound.seconds, _apply(calibration.coefficients, parts))
    pairs = list(zip(calibration.coefficients, parts, strict=True))[:_HOST]
    unseen = sum(part for value, part in pairs if value == 0) * max(1.0, *(value for value, _ in pairs))
    spread = sorted(abs(math.log1p(one.error)) for one in calibration.held_out)
    off = math.exp(spread[min(len(spread) - 1, math.ceil(0.9 * (len(spread) + 1)) - 1)])
    gain = setting.draft.acceptance_length if setting.draft else 1.0
    return Prediction(
        seconds=seconds,
        low_s=max(bound.seconds, seconds / off),
        high_s=seconds * off + unseen,
        bound=bound,
        tokens_per_s=gain * concurrency / seconds,
    )


class Transfer(Document):
    """A measured step, said for another card by the ratio of the bounds."""

    label: str
    concurrency: int
    context: float
    measured_s: float
    """On the card it was measured on."""
    bound_ratio: float
    """Bound there over bound here, in time: above 1 the other card is slower."""
    seconds: float
    low_s: float
    high_s: float
    """What the measured cells' efficiencies leave open; never faster than the bound."""
    bound: Step
    """On the other card."""
    tokens_per_s: float
    """Of all sequences together."""


def transfer(cells: Sequence[Cell], card: Card, *, ways: int | None = None) -> tuple[Transfer, ...]:
    """Take measured steps to `card`: as far from the bound there as they were here.

    Three things are not known of the other card, and make the interval. Host time does not scale with the
    card: one end has the time above the bound stay as it is, in seconds instead of in proportion. Where
    another limit binds there (an H20 computes seven times slower than an H200 and reads as fast), the
    efficiency is that of another part of the machine: the other ends have the efficiencies of the cells that
    this limit bound here, or of all cells if there is none such. And efficiencies scatter: the factor within
    which nine in ten of them lie of their median widens both sides.

    Args:
        cells: of one card.
        ways: cards that the model is split over there; None: as many as here.

    Raises:
        MeasurementError: no cell, cells of several cards, or a split model and a card without links.
    """
    if not cells:
        raise MeasurementError("no measured cell to predict from")
    if len({cell.card for cell in cells}) > 1:
        raise MeasurementError(
            "the cells were measured on several cards", "Transfer the cells of each card on their own."
        )
    most = ways or max(cell.setting.tensor for cell in cells)
    if most > 1 and not card.link_gb_s:
        raise MeasurementError(f"a model split over cards cannot run on {card.name}: its links are not known")
    efficiencies: dict[Limit, list[float]] = {}
    for cell in cells:
        efficiencies.setdefault(cell.bound.limited_by, []).append(cell.bound.seconds / cell.seconds)
    everything = [value for values in efficiencies.values() for value in values]
    found = []
    for cell in cells:
        setting = cell.setting if ways is None else cell.setting.model_copy(update={"tensor": ways})
        here = cell.bound
        there = decode_step(cell.model, card, setting, sequences=cell.concurrency, context=cell.context)
        ratio = there.seconds / here.seconds
        ends = [cell.seconds * ratio, there.seconds + (cell.seconds - here.seconds)]
        alike = efficiencies.get(there.limited_by, everything)
        if there.limited_by != here.limited_by:
            ends += [there.seconds / value for value in (min(alike), max(alike))]
        off = _spread(alike)
        gain = cell.setting.draft.acceptance_length if cell.setting.draft else 1.0
        seconds = max(there.seconds, cell.seconds * ratio)
        found.append(
            Transfer(
                label=cell.label,
                concurrency=cell.concurrency,
                context=cell.context,
                measured_s=cell.seconds,
                bound_ratio=ratio,
                seconds=seconds,
                low_s=max(there.seconds, min(ends) / off),
                high_s=max(seconds, max(ends) * off),
                bound=there,
                tokens_per_s=gain * cell.concurrency / seconds,
            )
        )
    return tuple(found)


def _spread(efficiencies: Sequence[float]) -> float:
    """The factor within which nine in ten lie of their median."""
    middle = median(efficiencies)
    off = sorted(abs(math.log(value / middle)) for value in efficiencies)
    return math.exp(off[min(len(off) - 1, math.ceil(0.9 * len(off)) - 1)])


def _features(bound: Step, concurrency: int) -> tuple[float, ...]:
    weights = bound.memory_s * bound.weight_bytes / (bound.weight_bytes + bound.kv_bytes)
    cache = bound.memory_s - weights
    return weights, cache, bound.compute_s, bound.link_s, 1.0, float(concurrency)


def _apply(coefficients: Sequence[float], features: Sequence[float]) -> float:
    # Nothing takes no time: a fit on too narrow a range may say so of a cell far outside of it.
    return max(1e-9, math.fsum(a * b for a, b in zip(coefficients, features, strict=True)))


def _fit(cells: Sequence[Cell]) -> tuple[float, ...]:
    import numpy as np
    from scipy.optimize import nnls

    rows = [[value / cell.seconds for value in _features(cell.bound, cell.concurrency)] for cell in cells]
    matrix = np.asarray(rows)
    # Columns differ by many orders of magnitude; without a common scale the solver's tolerance hides some.
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, np.ones(len(cells)))
    return tuple(float(value) for value in found / scale)


Calibration.model_rebuild()
