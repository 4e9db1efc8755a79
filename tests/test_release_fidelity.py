"""Fidelity in a release: each step against the one before it, alarms by the recipe's bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat
from test_validation_fidelity import server

from packager.nano import CHECKPOINT
from packager.recipe import FidelityBounds, FidelitySpec
from packager.release.fidelity import Fidelity
from validation.endpoint import Target
from validation.tasks import Item, items_from, measure_accuracy


@dataclass(frozen=True)
class Variant:
    """A variant of the model, served by rule."""

    label: str
    loopback: LoopbackChat

    def target(self, cache: Path) -> Target:
        return Target(self.loopback.url, "model", self.label, self.label, cache)


def items() -> list[Item]:
    rows = [
        {"id": f"q{k}", "task": "t", "language": "en", "answer": "7",
         "messages": [{"role": "user", "content": f"{11 + k} 12"}]}
        for k in range(4)
    ]  # fmt: skip
    return items_from(rows)


def measured(spec: FidelitySpec, folder: Path, sharpness: tuple[float, ...]) -> Fidelity:
    """What a release finds whose three variants are as sharp as this."""
    found = Fidelity(spec, folder, lambda _: None)
    for label, sharp in zip(("BF16", "FP8", "FP8+YaRN"), sharpness, strict=True):
        with server(sharp) as loopback:
            loopback.answer = lambda _: "20 21 22"
            variant = Variant(label, loopback)
            if label == "BF16":
                answers = measure_accuracy(variant.target(folder), items())
                found.reference(variant, answers, items()[: spec.texts])  # type: ignore[arg-type]
            else:
                found.candidate(variant)  # type: ignore[arg-type]
    return found


def test_each_step_is_compared_with_the_one_before_by_its_own_bounds(tmp_path: Path) -> None:
    found = measured(FidelitySpec(texts=3), tmp_path, (4.0, 4.0, 3.0))
    quantized, extended = found.results
    assert (quantized.reference, quantized.candidate) == ("BF16", "FP8")
    assert (extended.reference, extended.candidate) == ("FP8", "FP8+YaRN")
    assert quantized.overall.kl_max == 0 and quantized.noise is not None and quantized.overall.tokens == 9
    assert extended.overall.kl_mean > FidelityBounds().max_mean_kl_nats and extended.noise is None
    # What would alarm after quantization is within what YaRN is known to cost.
    assert found.alarms() == ()
    strict = FidelitySpec(texts=3, context=FidelityBounds(max_mean_kl_nats=1e-4))
    raised = measured(strict, tmp_path, (4.0, 4.0, 3.0)).alarms()
    assert any("FP8+YaRN to FP8: mean KL" in line for line in raised)
    (panel,) = found.panels()
    assert panel.subjects == ("BF16", "FP8", "FP8+YaRN")


@pytest.mark.slow
def test_the_experts_of_the_same_weights_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = measured(FidelitySpec(routing_texts=2), tmp_path, (4.0, 4.0, 4.0))
    found.experts(CHECKPOINT, CHECKPOINT)
    assert found.routing[0].jaccard == 1.0 and found.routing[0].tokens == 10
    (panel,) = found.panels()
    assert [t.caption for t in panel.tables][1] == "Experts that tokens are sent to"


def test_without_texts_nothing_is_scored(tmp_path: Path) -> None:
    found = measured(FidelitySpec(texts=0), tmp_path, (4.0, 4.0, 4.0))
    found.experts(CHECKPOINT, CHECKPOINT)
    assert (found.panels(), found.alarms(), found.results) == ((), (), [])
