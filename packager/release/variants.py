"""The variants of a model that evidence is taken from, each served by vLLM when it is first asked something.

On a CPU without AMX vLLM has no FP8 block kernel: there the FP8 weights are served dequantized to BF16, which
keeps the rounding that quantization did and loses only the rounding of activations. Evidence says so.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.artifact import file_sha256, is_sealed, read_manifest
from packager.recipe import Recipe
from packager.release.served import Say, Served, dequantize_files
from packager.release.workspace import Workspace

if TYPE_CHECKING:
    from packager.serving import ServeSpec

SERVED_NAME = "model"


@dataclass(frozen=True)
class Variants:
    """Makes the servers of one release."""

    recipe: Recipe
    workspace: Workspace
    source: Path
    source_digest: str
    why_dequantized: str
    """Why this machine serves the quantized weights dequantized, in a sentence; empty: it has a kernel."""
    say: Say

    @property
    def tensor_parallel(self) -> int:
        """Cards that a model is split over: those of the recipe's hardware, one process on a CPU."""
        from packager.serving.cpu import device
        from validation.hardware import parse_hardware

        if device() == "cpu" or self.recipe.hardware == "cpu":
            return 1
        return parse_hardware(self.recipe.hardware).count

    @property
    def weights_served(self) -> Literal["native", "dequantized"]:
        """How quantized artifacts are served here."""
        return "dequantized" if self.why_dequantized else "native"

    def servable(self, artifact: Path) -> Path:
        """The artifact itself, or a dequantized copy of it kept in `work/dequantized`."""
        if not self.why_dequantized:
            return artifact
        manifest = read_manifest(artifact)
        out = self.workspace.work / "dequantized" / f"{artifact.name}-{manifest.digest[7:19]}"
        if not is_sealed(out):
            self.say(f"dequantizing {artifact.name} to serve it on this CPU")
            dequantize_files(artifact, out)
        return out

    def bf16(self) -> contextlib.AbstractContextManager[Served]:
        """The source as it came."""
        return self._serve("BF16", self.source_digest, lambda: self._spec(self.source))

    def fp8(self, limit: int) -> contextlib.AbstractContextManager[Served]:
        """Quantized, no YaRN; `limit` lifts the position limit, so that long prompts are taken at all."""
        overrides = {"max_position_embeddings": limit}
        return self._serve(
            self.recipe.quantize.weights,
            self._subject(self.workspace.fp8),
            lambda: self._spec(
                self.servable(self.workspace.fp8), max_model_len=limit, hf_overrides=overrides
            ),
        )

    def drafted_as_trained(self) -> contextlib.AbstractContextManager[Served]:
        """Quantized, with the draft and no YaRN in either, at the trained length."""
        from packager.context.view import trained_view

        tokens, digest = self.recipe.draft.num_speculative_tokens, read_manifest(self.workspace.draft).digest
        return self._serve(
            f"{self.recipe.quantize.weights}+EAGLE3",
            f"{self._subject(self.workspace.fp8)}+{digest}x{tokens}",
            lambda: self._spec(
                self.servable(self.workspace.fp8),
                draft=trained_view(self.workspace.draft, self.workspace.work / "draft-as-trained"),
                num_speculative_tokens=tokens,
            ),
        )

    def context(self) -> contextlib.AbstractContextManager[Served]:
        """Quantized, with YaRN, no draft."""
        return self._serve(
            f"{self.recipe.quantize.weights}+YaRN",
            self._subject(self.workspace.context),
            lambda: self._spec(self.servable(self.workspace.context)),
        )

    def draft(self) -> contextlib.AbstractContextManager[Served]:
        """Quantized, with YaRN and the draft."""
        tokens = self.recipe.draft.num_speculative_tokens
        drafted = f"{read_manifest(self.workspace.draft).digest}x{tokens}"
        return self._serve(
            f"{self.recipe.quantize.weights}+YaRN+EAGLE3",
            f"{self._subject(self.workspace.context)}+{drafted}",
            lambda: self._spec(
                self.servable(self.workspace.context),
                draft=self.workspace.draft,
                num_speculative_tokens=tokens,
            ),
        )

    def dense(self, path: Path) -> contextlib.AbstractContextManager[Served]:
        """The dense model whose speed is the baseline."""
        shards = "".join(file_sha256(shard) for shard in sorted(path.glob("*.safetensors")))
        digest = "sha256:" + hashlib.sha256(shards.encode()).hexdigest()
        return self._serve("dense baseline", digest, lambda: self._spec(path), tokenizer=path)

    def downloaded(self, bundle: Path) -> contextlib.AbstractContextManager[Served]:
        """The bundle as it came back from the hub, with the draft and the settings of its own serve.yaml."""
        from packager.serving.serve_file import spec_for

        spec = spec_for(bundle)
        return self._serve(
            "the downloaded bundle",
            self._subject(bundle),
            lambda: replace(spec, model=self.servable(bundle)),
            name=spec.served_name,
        )

    def _subject(self, artifact: Path) -> str:
        digest = read_manifest(artifact).digest
        return f"{digest}:dequantized" if self.why_dequantized else digest

    def _spec(self, model: Path, **settings: Any) -> ServeSpec:
        from packager.serving import ServeSpec

        return ServeSpec(
            model=model, served_name=SERVED_NAME, tensor_parallel=self.tensor_parallel, **settings
        )

    @contextlib.contextmanager
    def _serve(
        self,
        label: str,
        subject: str,
        spec: Callable[[], ServeSpec],
        *,
        tokenizer: Path | None = None,
        name: str = SERVED_NAME,
    ) -> Iterator[Served]:
        file = "".join(c if c.isalnum() else "-" for c in label.lower())
        served = Served(
            label=label,
            subject=subject,
            tokenizer=tokenizer or self.source,
            log=self.workspace.work / "logs" / f"{file}.log",
            spec=spec,
            say=self.say,
            name=name,
        )
        with served.running():
            yield served
