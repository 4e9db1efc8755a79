"""What a sweep's cells are at most on their hardware, and its cells as evidence for fits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median

from validation.environment import Environment
from validation.errors import MeasurementError
from validation.hardware import Hardware, hardware_file, measure_here
from validation.predict import Cell
from validation.roofline import Draft, Rate, Setting, decode_rate
from validation.sweep_model import Sweep, SweepCell, Variant

_NAMES = {"H20": "h20", "H100": "h100", "H200": "h200", "A100": "a100", "L40S": "l40s", "B200": "b200"}


def known_hardware(environment: Environment) -> Hardware | None:
    """The GPUs of a machine as cards.yaml has them; None: none, several kinds, or one that is not listed."""
    kinds = set()
    for line in environment.gpus:
        words, memory = set(re.split(r"[\s,-]+", line)), re.search(r"(\d+) MiB", line)
        mebibytes = int(memory[1]) if memory else 0
        key = next((key for name, key in _NAMES.items() if name in words), None)
        # An A100 of 40 GB and an H100 of another form are other cards than those listed.
        if key == "h20" and mebibytes > 110_000:
            key = "h20-141"
        if key is not None and mebibytes and mebibytes < 930 * hardware_file().cards[key].memory_gb:
            key = None
        kinds.add(key)
    key = kinds.pop() if len(kinds) == 1 else None
    if key is None:
        return None
    return Hardware(key=key, count=len(environment.gpus), card=hardware_file().cards[key])


def hardware_here(environment: Environment, seconds: float = 1.0) -> Hardware | None:
    """The present machine: its GPUs by their data sheets, or its processor measured, `seconds` for each rate.

    None: GPUs that are not known. Nothing else may run meanwhile.
    """
    if environment.gpus:
        return known_hardware(environment)
    return Hardware(key="here", count=1, card=measure_here(seconds))


def context_of(cell: SweepCell) -> float:
    """Mean cached tokens of a request while it decodes: its prompt and half of its answer."""
    prompt = cell.input_tokens if cell.prompt_tokens is None else cell.prompt_tokens
    answer = cell.output_tokens if cell.answer_tokens is None else cell.answer_tokens
    return prompt + answer / 2


def setting_of(variant: Variant, acceptance_length: float | None) -> Setting | None:
    """How a variant is served, split over its devices; None: its model is not known, or a draft's acceptance.

    Args:
        acceptance_length: that of the cell; of no matter without a draft.
    """
    served = variant.model
    if served is None:
        return None
    draft = None
    if served.draft_tokens is not None:
        if acceptance_length is None:
            return None
        draft = Draft(
            weight_bytes=served.draft_weight_bytes,
            kv_bytes=served.draft_kv_bytes,
            tokens=served.draft_tokens,
            acceptance_length=acceptance_length,
        )
    return Setting(
        precision=served.precision,
        kv_value_bytes=served.kv_value_bytes,
        tensor=variant.devices,
        draft=draft,
    )


def bound_of(sweep: Sweep, cell: SweepCell, concurrency: int | None = None) -> Rate | None:
    """The roofline of a cell, or of its context and acceptance at another concurrency.

    None: model, hardware or acceptance is not known.
    """
    variant = sweep.variant(cell.variant)
    length = cell.acceptance_length.median if cell.acceptance_length else None
    setting = setting_of(variant, length)
    if setting is None or variant.model is None or sweep.hardware is None:
        return None
    return decode_rate(
        variant.model.shape,
        sweep.hardware.with_count(variant.devices),
        setting,
        concurrency=cell.concurrency if concurrency is None else concurrency,
        context=round(context_of(cell)),
    )


def step_cells(sweep: Sweep) -> list[Cell]:
    """Every measured cell as a step's time: median TPOT over the repeats, times the acceptance length.

    Raises:
        MeasurementError: the sweep does not say what it ran on, or nothing of it can be used.
    """
    if sweep.hardware is None:
        raise MeasurementError(
            "the sweep does not say what hardware it ran on",
            "Say it: --on CARDS, such as 1xh200, or --on here on the machine that was measured.",
        )
    found = []
    for cell in _measured(sweep.cells):
        variant = sweep.variant(cell.variant)
        length = cell.acceptance_length.median if cell.acceptance_length else None
        setting = setting_of(variant, length)
        if setting is None or variant.model is None:
            continue
        each = median(one.tpot_ms.median for one in cell.repeats) / 1000
        if each <= 0:
            continue
        where = f"{cell.concurrency} at once, {cell.input_tokens} in, {cell.output_tokens} out"
        found.append(
            Cell(
                label=f"{cell.variant}, {where}",
                model=variant.model.shape,
                card=sweep.hardware.card,
                setting=setting,
                concurrency=cell.concurrency,
                context=context_of(cell),
                seconds=each * (setting.draft.acceptance_length if setting.draft else 1.0),
            )
        )
    if not found:
        raise MeasurementError(
            "no cell of the sweep can be used: none was measured, or no variant's model is known",
            "Name the models: --model VARIANT=SHAPE or a folder with its config.json.",
        )
    return found


def _measured(cells: Iterable[SweepCell]) -> Iterable[SweepCell]:
    return (cell for cell in cells if cell.measured)
