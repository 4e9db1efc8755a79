"""A checkpoint that is to be quantized: recognised, and decided what becomes of each of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from packager.checkpoint.source import CONFIG_NAME, Checkpoint
from packager.layouts import Decisions, Do, Model, PredictionLayers, decide, recognise
from packager.quantize.dialects import refuse_quantized
from packager.recipe import Prediction, TensorRule


@dataclass(frozen=True)
class DecidedCheckpoint:
    """A checkpoint of a known architecture that is not quantized yet."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    """config.json as it stands."""
    model: Model
    decisions: Decisions

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        rules: Sequence[TensorRule] = (),
        mtp: Prediction = "drop",
    ) -> Self:
        """Decide all tensors, from headers and config alone.

        Args:
            checkpoint: opened.
            rules: decisions on single tensors.
            mtp: what becomes of multi-token prediction layers.

        Raises:
            BadInput: an unknown architecture, tensors that do not fit the config or the rules, quantized
                already.
        """
        raw, origin = checkpoint.config(), checkpoint.name
        model = recognise(raw, checkpoint.folder.where(CONFIG_NAME))
        refuse_quantized(raw, checkpoint.tensors.values(), origin)
        expected = model.tensors_in(checkpoint.tensors)
        decisions = decide(expected, checkpoint.tensors, rules=rules, mtp=mtp, origin=origin)
        return cls(checkpoint, raw, model, decisions)

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Names of the weights that are to be quantized."""
        return frozenset(want.name for want in self.decisions.those(Do.QUANTIZE))

    @cached_property
    def prediction(self) -> PredictionLayers:
        """What becomes of multi-token prediction layers."""
        return PredictionLayers.of(self.model, self.decisions)

    def output_config(self, quantization_config: dict[str, Any]) -> dict[str, Any]:
        """The config.json of the output: that of the source, with what has changed."""
        # Code is never shipped, so nothing may point to it.
        config = {key: value for key, value in self.raw_config.items() if key != "auto_map"}
        if self.prediction.found or config.get("num_nextn_predict_layers"):
            config["num_nextn_predict_layers"] = self.prediction.written
        config["quantization_config"] = quantization_config
        return config
