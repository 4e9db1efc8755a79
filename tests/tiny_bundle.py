"""Sealed stages of a release with weights of a few kilobytes, for tests where the model does not matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from packager.artifact import MANIFEST_NAME, ArtifactWriter, Manifest, read_manifest
from packager.bundle import signature
from packager.bundle.assemble import assemble
from packager.quantize.fidelity import LEDGER_NAME
from packager.quantize.plot import PLOT_NAME
from packager.recipe import Recipe
from validation.endpoint import Sampling
from validation.gates import Gate, at_least, at_most
from validation.report import Environment, ReportInputs, Subject, build_report
from validation.tasks.accuracy import AccuracyRun, ItemResult, Share

SOURCE_DIGEST = "sha256:" + "5" * 64
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "source": {"repo": "org/base", "revision": "0" * 40},
    "context": {"length": 2048},
    "draft": {"vocab_size": 512, "aux_layers": [1, 2, 3], "prompts": 1, "steps": 1},
    "bundle": {
        "title": "Tiny model",
        "license": "apache-2.0",
        "base_model": "org/base",
        "languages": ["en", "zh"],
        "inherited": [{"name": "fast | very", "value": 62.5, "source": "card of org/base"}],
    },
    "publish": {"target": "hf://rehearsal/tiny"},
}
FIDELITY = {"snr_db": 31.52, "tensors": 4, "worst_snr_db": 31.4, "worst_tensor": "w"}
PASSED = (at_most("accuracy lost", 0.5, 2, "points"), at_least("acceptance length", 2.9, 2.5, "tokens"))


@dataclass(frozen=True)
class Stages:
    """Folders of the sealed stages and what goes with them."""

    root: Path
    recipe: Recipe
    private_key: Path
    public_key: Path

    def bundle(self, out: Path, **changes: Any) -> Manifest:
        """Assemble the stages into `out`."""
        settings: dict[str, Any] = {
            "recipe": self.recipe,
            "recipe_digest": self.recipe.digest,
            "fp8": self.root / "fp8",
            "context": self.root / "context",
            "draft": self.root / "draft",
            "evidence": self.root / "evidence",
            "signing_key": self.private_key,
            "progress": lambda _: None,
        }
        return assemble(out, **(settings | changes))


def recipe(**sections: Any) -> Recipe:
    """The recipe, with some of the bundle section's or other sections' keys replaced."""
    document = json.loads(json.dumps(RECIPE))
    for name, values in sections.items():
        document[name] = document[name] | values if isinstance(values, dict) else values
    return Recipe.model_validate(document)


def make_stages(
    root: Path,
    *,
    seed: int = 0,
    gates: tuple[Gate, ...] = PASSED,
    evidence_metrics: dict[str, Any] | None = None,
    extra: Mapping[str, bytes] | None = None,
    rows: int = 64,
    **sections: Any,
) -> Stages:
    """Seal fp8, context, draft and evidence under `root`, each made from the one before it.

    Files of `extra` stand in place of those of the same name, or beside them, from the first on. `rows`:
    of the one tensor in each of two shards, 128 bytes or so each.
    """
    rng = np.random.default_rng(seed)
    given = dict(extra or {})
    shards = {f"model-0000{i}-of-00002.safetensors": rng.standard_normal((rows, 32 + i)) for i in (1, 2)}
    if "model.safetensors" in given:
        shards = {}
    fp8 = root / "fp8"
    with ArtifactWriter(fp8, stage="fp8", recipe_digest="sha256:r", inputs={"source": SOURCE_DIGEST}) as w:
        for name, tensor in shards.items():
            given.setdefault(name, save({f"w{name[6:11]}": tensor.astype(np.float32)}))
        weight_map = {f"w{name[6:11]}": name for name in shards}
        for name, document in {
            "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
            "config.json": {"architectures": ["BailingMoeV2ForCausalLM"]},
            "tokenizer.json": {"model": {}},
            "generation_config.json": {"eos_token_id": 2},
        }.items():
            if shards or not name.endswith("index.json"):
                given.setdefault(name, json.dumps(document).encode())
        given.setdefault("chat_template.jinja", b"{{ messages }}")
        given.setdefault("README.md", b"the card of somebody else")
        given.setdefault("modeling_bailing.py", b"raise SystemExit")
        for name, data in given.items():
            w.write_bytes(name, data)
        w.write_text(LEDGER_NAME, '{"name":"w"}\n')
        w.write_text(PLOT_NAME, "<svg/>")
        sealed = w.seal({"fidelity": {"routed_expert": FIDELITY}})
    context = root / "context"
    with ArtifactWriter(
        context, stage="context", recipe_digest="sha256:r", inputs={"fp8": sealed.digest}
    ) as w:
        for entry in sealed.files:
            if entry.path not in ("config.json", LEDGER_NAME, PLOT_NAME):
                w.link(entry.path, fp8 / entry.path, entry.sha256)
        config = json.loads(given["config.json"]) | {"rope_scaling": {}}
        w.write_bytes("config.json", (extra or {}).get("config.json") or json.dumps(config).encode())
        extended = w.seal({"original_length": 512, "length": 2048})
    draft = root / "draft"
    with ArtifactWriter(
        draft, stage="draft", recipe_digest="sha256:r", inputs={"target": extended.digest}
    ) as w:
        w.write_bytes("model.safetensors", save({"fc": rng.standard_normal((8, 8)).astype(np.float32)}))
        w.write_json("config.json", {"architectures": ["LlamaForCausalLMEagle3"]})
        drafted = w.seal({})
    make_evidence(root / "evidence", extended.digest, drafted.digest, gates, metrics=evidence_metrics)
    private = root / "key.pem"
    public = signature.generate_keys(private)
    return Stages(root, recipe(**sections), private, public)


def make_evidence(
    out: Path,
    context: str,
    draft: str,
    gates: tuple[Gate, ...],
    measured: str | None = None,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    """Seal a report about `context` with `draft`; `measured`: the digest that it names instead."""
    subject = measured or f"{context}:dequantized+{draft}x3"
    share = Share(
        name="dose",
        n=2,
        correct=1,
        accuracy=0.5,
        low=0.09,
        high=0.91,
        majority_answer="A",
        majority_share=0.5,
    )
    results = tuple(
        ItemResult(
            id=str(i), task="dose", language="en", question="?", expected="A", extracted="A", correct=bool(i),
            text="Answer: A", finish_reason="stop", prompt_tokens=3, completion_tokens=3,
        )
        for i in range(2)
    )  # fmt: skip
    run = AccuracyRun(
        label="FP8+EAGLE3",
        subject=subject,
        model="model",
        items_digest="sha256:" + "7" * 64,
        sampling=Sampling(),
        results=results,
        overall=share.model_copy(update={"name": "all"}),
        by_task=(share,),
        by_language=(share.model_copy(update={"name": "en"}),),
        truncated=0,
        unmarked=0,
        seconds=1.0,
    )
    environment = Environment(
        cpu="a processor", cores=2, memory_gib=8.0, amx=False, gpus=(), system="Linux", python="3.11",
        versions={},
    )  # fmt: skip
    report = build_report(
        ReportInputs(
            title="Tiny",
            subjects=(Subject(name="FP8+EAGLE3", digest=subject),),
            weights_served="dequantized",
            weights_note="This CPU has no AMX.",
            environment=environment,
            accuracy=(run,),
            gates=gates,
        )
    )
    inputs = {"context": context, "draft": draft}
    with ArtifactWriter(out, stage="evidence", recipe_digest="sha256:r", inputs=inputs) as writer:
        writer.write_text("report.json", report.model_dump_json(indent=1))
        writer.write_text("report.md", "# Tiny")
        return writer.seal(metrics or {})


def digest_of(folder: Path) -> str:
    """Digest of a sealed folder."""
    return read_manifest(folder).digest


def reseal(copy: Path, private: Path) -> None:
    """Make manifest and signature agree with the directory again, as an attacker with a key could."""
    old = read_manifest(copy)
    for name in (MANIFEST_NAME, "model.sig"):
        (copy / name).unlink()
    files = [p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file() and not p.is_symlink()]
    scratch = copy.with_name("resealed")
    with ArtifactWriter(
        scratch, stage="bundle", recipe_digest=old.recipe_digest, inputs=old.inputs
    ) as writer:
        for name in files:
            writer.link(name, copy / name, None)
        manifest = writer.seal(old.metrics)
    shutil.rmtree(copy)
    scratch.rename(copy)
    signed = {e.path: e.sha256 for e in manifest.files} | {MANIFEST_NAME: manifest.digest[7:]}
    (copy / "model.sig").write_bytes(signature.sign("tiny", signed, private))
