"""What became of multi-token prediction layers, and which engines could load them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from packager.layouts.decide import Decisions
from packager.layouts.declaration import Do
from packager.layouts.model import Model

ENGINES = ("vllm", "sglang")


@dataclass(frozen=True)
class PredictionLayers:
    """Multi-token prediction layers before and after a conversion."""

    found: int
    """Layers in the source."""
    written: int
    """Layers in the output; what `num_nextn_predict_layers` must say there."""
    quantized: bool
    """Whether those hold quantized weights."""
    engines: Collection[str]
    """Engines that have a class for them."""

    @classmethod
    def of(cls, model: Model, decisions: Decisions) -> PredictionLayers:
        """Those of a checkpoint whose tensors are decided."""
        return cls(
            found=model.mtp_layers_in(decisions.layout),
            written=model.mtp_layers_in(want.name for want in decisions.written),
            quantized=any(want.mtp for want in decisions.those(Do.QUANTIZE)),
            engines=model.architecture.mtp_engines,
        )

    def __str__(self) -> str:
        """For people: `1 multi-token prediction layer left out (vllm: cannot load it; sglang: can)`."""
        what = f"{self.found} multi-token prediction layer" + ("s" if self.found != 1 else "")
        done = "quantized" if self.quantized else "kept as stored"
        without = [engine for engine in ENGINES if engine not in self.engines]
        support = [f"{', '.join(without)}: cannot load it"] if without else []
        support += [f"{', '.join(self.engines)}: can"] if self.engines else []
        return f"{what} {done if self.written else 'left out'} ({'; '.join(support)})"

    def document(self) -> dict[str, Any]:
        """As plain values, for a manifest."""
        return {
            "found": self.found,
            "written": self.written,
            "quantized": self.quantized,
            "engines": list(self.engines),
        }
