"""What vLLM and SGLang each need of a checkpoint's configuration, beyond sound tensors.

Sources: vLLM 0.32 (`bailing_moe.py`, `quantization/fp8.py`, `compressed_tensors/`); SGLang's counterparts
of the same names and `bailing_moe_nextn.py`, read in 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from packager.layouts import Expected, Model
from packager.proof.dialect import SCALE_DTYPES, Stated

Level = Literal["ok", "note", "problem"]
OURS = frozenset({"BailingMoeV2ForCausalLM"})
"""Architectures that engines know through a plugin of this package."""


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of one matter."""

    level: Level
    text: str


@dataclass(frozen=True)
class Need:
    """One matter, for both engines."""

    matter: str
    vllm: Verdict
    sglang: Verdict


@dataclass(frozen=True)
class Facts:
    """What the engines' verdicts rest on."""

    raw: dict[str, Any]
    """config.json as it stands."""
    model: Model
    stated: Stated | None
    layout: list[Expected]
    quantized: frozenset[str]
    """Weights stored as codes."""
    scale_dtypes: frozenset[str]
    mtp_layers: int
    """Multi-token prediction layers whose tensors are there."""


def needs(facts: Facts) -> list[Need]:
    """Every matter on which an engine could refuse, or misread, the checkpoint."""
    return [
        _dialect(facts),
        _scales(facts),
        _skipped(facts),
        _fused(facts),
        _config_class(facts),
        _prediction(facts),
        _routing(facts),
    ]


def _same(matter: str, level: Level, text: str) -> Need:
    return Need(matter, Verdict(level, text), Verdict(level, text))


def _dialect(facts: Facts) -> Need:
    matter = "quantization"
    if facts.stated is None:
        if facts.quantized:
            return _same(matter, "problem", "quantized weights, no quantization_config")
        return _same(matter, "ok", "none")
    if not facts.quantized:
        return _same(matter, "problem", "quantization_config, no quantized weight")
    text = f"{facts.stated.scheme}, {facts.stated.dialect}"
    if facts.stated.dialect == "compressed-tensors" and facts.stated.scheme == "fp8-block":
        sglang = Verdict("note", "needs a release that knows block scales here; `packager relabel` if not")
        return Need(matter, Verdict("ok", text), sglang)
    return _same(matter, "ok", text)


def _scales(facts: Facts) -> Need:
    matter = "scales"
    if not facts.scale_dtypes:
        return _same(matter, "ok", "none")
    text = ", ".join(sorted(facts.scale_dtypes))
    known = facts.scale_dtypes <= set(SCALE_DTYPES)
    return _same(matter, "ok" if known else "problem", text if known else f"{text}: not loaded")


def _skipped(facts: Facts) -> Need:
    """Each engine matches the list in its own way; what it skips must be what is stored unquantized."""
    stated, verdicts = facts.stated, []
    for skips in (stated.skips, stated.sglang_skips) if stated else ():
        wrong = [
            want.name
            for want in facts.layout
            if want.name in facts.quantized and skips(want.name.removesuffix(".weight"))
        ]
        verdicts.append(
            Verdict("problem", f"takes {len(wrong)} quantized weights for skipped: {wrong[0]}")
            if wrong
            else Verdict("ok", f"{len(stated.skipped) if stated else 0} entries")
        )
    return Need("skip list", *verdicts) if verdicts else _same("skip list", "ok", "none")


def _fused(facts: Facts) -> Need:
    """What engines load as one matrix, or run as one product: all quantized or none."""
    groups: dict[str, set[bool]] = {}
    for want in facts.layout:
        if want.group:
            groups.setdefault(want.group, set()).add(want.name in facts.quantized)
    mixed = [group for group, kinds in groups.items() if len(kinds) > 1]
    if mixed:
        return _same("fused layers", "problem", f"{mixed[0].rstrip('.')} is partly quantized")
    return _same("fused layers", "ok", "each of one kind")


def _config_class(facts: Facts) -> Need:
    kind = str(facts.raw.get("model_type"))
    if facts.raw.get("auto_map"):
        return _same("config class", "note", "auto_map names code; it is never run here")
    if facts.model.architecture.name not in OURS:
        return _same("config class", "ok", f"{kind}, of transformers")
    vllm = Verdict("ok", f"{kind}, known through packager's plugin")
    return Need("config class", vllm, Verdict("note", f"transformers has no {kind}: register a class for it"))


def _prediction(facts: Facts) -> Need:
    matter, there = "MTP layers", facts.mtp_layers
    said = facts.raw.get("num_nextn_predict_layers") or 0
    known = facts.model.architecture.mtp_engines
    if said == there == 0 or not (known or there):
        return _same(matter, "ok", "none")
    if said != there:
        text = f"the config says {said}, the weights hold {there}"
        vllm: Level = "problem" if there or "vllm" in known else "note"
        return Need(matter, Verdict(vllm, text), Verdict("problem", text))
    verdicts = [
        Verdict("problem", "no such class for this model: leave them out")
        if engine not in known
        else Verdict("problem", "takes one layer only")
        if there > 1
        else Verdict("ok", f"1, for speculation ({'MTP' if engine == 'vllm' else 'NEXTN'})")
        for engine in ("vllm", "sglang")
    ]
    return Need(matter, *verdicts)


def _routing(facts: Facts) -> Need:
    """What BailingMoeV2's configuration can say of routing that its model class then misreads."""
    raw = facts.raw
    if facts.model.architecture.name not in OURS:
        return _same("routing", "ok", "as its class has it" if facts.model.experts else "none")
    both, sglang = [], []
    score, bias = raw.get("score_function"), bool(raw.get("moe_router_enable_expert_bias"))
    if score is not None and (score == "sigmoid") != bias:
        both.append(f"score_function {score} {'with' if bias else 'without'} expert_bias")
    key = "moe_shared_expert_intermediate_size"
    if raw.get("num_shared_experts") and key in raw and raw[key] is None:
        both.append(f"{key} is null: leave the key out")
    null = [key for key in ("n_group", "topk_group") if key in raw and raw[key] is None]
    if null:
        sglang.append(f"{' and '.join(null)} null: leave the key out")
    verdicts = [
        Verdict("problem", "; ".join(faults))
        if faults
        else Verdict("ok", f"{score or 'softmax'}, {raw.get('n_group') or 1} groups")
        for faults in (both, both + sglang)
    ]
    return Need("routing", *verdicts)
