"""The cells of an interleaved sweep as figures that claims are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping

from validation.claims import HERE, Conditions, Measured
from validation.hardware import hardware_file
from validation.models import ModelShape
from validation.sweep_bound import context_of
from validation.sweep_model import CellRatio, Sweep, SweepCell, Variant, geometric_mean


def figures_of(sweep: Sweep) -> list[Measured]:
    """Output tokens/s of every measured cell, ratios of candidate to baseline, and gains of the draft.

    A variant whose model is not known gives none; neither does a cell that failed.
    """
    found = [figure for cell in sweep.cells if (figure := _speed(sweep, cell)) is not None]
    return found + [figure for ratio in sweep.ratios if (figure := _ratio(sweep, ratio)) is not None]


def models_of(sweep: Sweep) -> Mapping[str, ModelShape]:
    """The sweep's models by the names that claims about it use."""
    served = (one.model for one in sweep.variants if one.model is not None)
    return {one.name: one.shape.model_copy(update={"name": one.name}) for one in served}


def _speed(sweep: Sweep, cell: SweepCell) -> Measured | None:
    variant = sweep.variant(cell.variant)
    if variant.model is None or cell.output_tokens_per_s is None:
        return None
    logs = [math.log(one.output_tokens_per_s) for one in cell.repeats if one.output_tokens_per_s > 0]
    if not logs:
        return None
    mean = geometric_mean(logs)
    return Measured(
        quantity="output tokens/s",
        value=mean.value,
        low=mean.low,
        high=mean.high,
        repeats=len(logs),
        model=variant.model.name,
        conditions=_conditions(sweep, variant, cell),
        source=_source(cell.variant, cell.concurrency, cell.input_tokens, cell.output_tokens),
        mark=_mark(variant),
    )


def _ratio(sweep: Sweep, ratio: CellRatio) -> Measured | None:
    candidate, baseline = sweep.variant(ratio.candidate), sweep.variant(ratio.baseline)
    cell = sweep.at(ratio.candidate, ratio.concurrency, ratio.input_tokens, ratio.output_tokens)
    if candidate.model is None or baseline.model is None or cell is None:
        return None
    gain = baseline.role == "candidate without draft"
    conditions = _conditions(sweep, candidate, cell)
    if not gain:
        # One number of cards stands for both: where they differ, the ratio is of no claim's conditions.
        same = candidate.devices == baseline.devices
        conditions = conditions.model_copy(
            update={
                "baseline_precision": baseline.model.precision,
                "count": conditions.count if same else None,
            }
        )
    return Measured(
        quantity="gain of a draft" if gain else "ratio of output tokens/s",
        value=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        repeats=ratio.repeats,
        model=candidate.model.name,
        baseline=None if gain else baseline.model.name,
        conditions=conditions,
        source=_source(
            f"{ratio.candidate} over {ratio.baseline}",
            ratio.concurrency,
            ratio.input_tokens,
            ratio.output_tokens,
        ),
        mark=" and ".join(dict.fromkeys(m for m in (_mark(candidate), _mark(baseline)) if m)) or None,
    )


def _conditions(sweep: Sweep, variant: Variant, cell: SweepCell) -> Conditions:
    assert variant.model is not None, "asked only of variants with a model"
    key = sweep.hardware.key if sweep.hardware is not None else None
    return Conditions(
        card=key if key in hardware_file().cards or key == HERE else None,
        count=variant.devices,
        concurrency=cell.concurrency,
        precision=variant.model.precision,
        context=round(context_of(cell)),
        draft_tokens=variant.model.draft_tokens,
        acceptance_length=cell.acceptance_length.median if cell.acceptance_length else None,
    )


def _source(what: str, concurrency: int, input_tokens: int, output_tokens: int) -> str:
    return f"{what}, {concurrency} at once, {input_tokens} tokens in, {output_tokens} out"


def _mark(variant: Variant) -> str | None:
    """What is not real about a figure of this variant."""
    return variant.mark.removeprefix(f"{variant.name}: ") if variant.mark else None
