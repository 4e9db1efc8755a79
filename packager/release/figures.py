"""The few figures of each stage that a release prints at its end and the report shows beside the stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from packager.release.pipeline import StageResult

Metrics = dict[str, Any]


def stage_figures(stage: StageResult) -> dict[str, str | int | float]:
    """Name and value of each figure of one stage; a figure that is missing is left out."""
    describe = _DESCRIBE.get(stage.name)
    return describe(stage.metrics) if describe else {}


def _quantize(metrics: Metrics) -> dict[str, str | int | float]:
    size = metrics["bytes"]
    worst = min(role["worst_snr_db"] for role in metrics["fidelity"].values())
    return {
        "tensors quantized": metrics["tensors"]["quantized"],
        "size": f"{size['source'] / 1e6:.1f} to {size['written'] / 1e6:.1f} MB",
        "lowest SNR": f"{worst:.1f} dB",
    }


def _extend(metrics: Metrics) -> dict[str, str | int | float]:
    return {
        "context": f"{metrics['original_length']} to {metrics['length']} tokens",
        "YaRN factor": metrics["factor"],
    }


def _draft(metrics: Metrics) -> dict[str, str | int | float]:
    predicted = metrics["predicted_acceptance"]["length"]
    figures: dict[str, str | int | float] = {
        "parameters": f"{metrics['parameters'] / 1e6:.2f} M",
        "steps": metrics["steps"],
    }
    if predicted is not None:
        figures["acceptance predicted"] = f"{predicted:.2f}"
    return figures


def _validate(metrics: Metrics) -> dict[str, str | int | float]:
    difference, low, high = metrics["fp8_difference_points"]
    figures: dict[str, str | int | float] = {
        "gates": metrics["outcome"],
        f"{metrics['weights']} - BF16": f"{difference:+.1f} points ({low:+.1f} to {high:+.1f})",
    }
    if metrics["identical"]:
        figures["identical with draft"] = "{} of {}".format(*metrics["identical"])
    if metrics["acceptance_length"] is not None:
        figures["acceptance measured"] = f"{metrics['acceptance_length']:.2f}"
    for label, shares in metrics["long_records"].items():
        figures[f"long records, {label}"] = ", ".join(
            f"{right}/{count} at {multiple}x" for multiple, (right, count) in shares.items()
        )
    speed = metrics["tokens_per_s"]
    if speed["dense"]:
        figures["against dense"] = f"{speed['with_draft'] / speed['dense']:.2f}x"
    return figures


def _bundle(metrics: Metrics) -> dict[str, str | int | float]:
    return {"gates": metrics["gates"], "linked": f"{metrics['linked_bytes'] / 1e6:.1f} MB"}


def _publish(metrics: Metrics) -> dict[str, str | int | float]:
    return {
        "rehearsed as": f"{metrics['repo_id']}@{metrics['tag']}",
        "files back and verified": metrics["files"],
        "size": f"{metrics['bytes'] / 1e6:.1f} MB",
    }


_DESCRIBE: dict[str, Callable[[Metrics], dict[str, str | int | float]]] = {
    "quantize": _quantize,
    "extend-context": _extend,
    "draft": _draft,
    "validate": _validate,
    "bundle": _bundle,
    "publish": _publish,
}
