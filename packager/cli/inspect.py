"""`packager inspect`: what a checkpoint is and what is wrong with it, from headers and config alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import click

from packager.checkpoint.folder import Folder
from packager.checkpoint.header import readable_bytes
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, open_folder
from packager.cli import options
from packager.errors import BadInput, IntegrityFailure
from packager.layouts import QUANTIZABLE, Described, Expected, Role, count_parameters, layout_problems
from packager.quantize.dialects import BLOCK, Quantization, quantized_layout, read_quantization


@dataclass
class Inspection:
    """What was found; None where it could not be told."""

    path: str
    architecture: str
    model_type: str
    shape: dict[str, int]
    parameters: dict[str, int]
    """Counted from the configuration: total, active, float32, mtp."""
    context: dict[str, Any]
    quantization: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    """Shards, tensors, bytes, and per dtype the number of tensors, elements and bytes."""
    artifact: dict[str, str] | None = None
    """Stage and digest of a sealed artifact."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    altered: bool = False
    """A sealed artifact is not what was sealed."""


def examine(source: str) -> Inspection:
    """Inspect a checkpoint, in a directory or on a hub, without reading tensor data.

    Of a sealed artifact, sizes are compared and small files hashed; `packager verify` hashes the weights.

    Raises:
        BadInput: no directory, no config.json, or another architecture. Everything else is a problem listed
            in the result.
        UsageProblem: a malformed hub name. RemoteFailure: the hub does not answer.
    """
    folder = open_folder(source)
    if CONFIG_NAME not in folder.sizes():
        raise BadInput(
            f"{folder.name} is not a checkpoint: it has no {CONFIG_NAME}",
            "Give the folder that holds config.json and *.safetensors.",
        )
    raw = folder.json(CONFIG_NAME)
    config = Described.parse(raw, folder.where(CONFIG_NAME))
    found = Inspection(
        path=folder.name,
        architecture=config.model.architecture.name,
        model_type=config.model_type,
        shape=config.model.shape,
        parameters={},
        context=_context(config),
    )
    found.problems.extend(_rope_problems(raw, config))
    quantization = _quantization(config, found)
    layout = _weights(folder, config, quantization, found)
    found.notes.extend(_notes(folder, raw, config, layout))
    _artifact(folder, found)
    return found


def _context(config: Described) -> dict[str, Any]:
    rope = config.rope
    kind = rope.get("rope_type", rope.get("type", "default")) if rope else "default"
    return {
        "length": config.max_position_embeddings,
        "trained_length": rope.get("original_max_position_embeddings", config.max_position_embeddings),
        "rope_type": kind,
        "factor": rope.get("factor", 1.0),
        "rope_theta": config.rope_theta,
        "rotary_dim": config.rotary_dim,
    }


def _rope_problems(raw: dict[str, Any], config: Described) -> Iterator[str]:
    scaling, parameters = config.rope_scaling or {}, config.rope_parameters or {}
    for name, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if len({rope[key] for key in ("type", "rope_type") if key in rope}) > 1:
            yield f"{name}: type and rope_type disagree; vLLM refuses that"
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in (scaling, parameters) if rope]
    if len(set(kinds)) > 1:
        yield f"rope_scaling is {kinds[0]}, rope_parameters {kinds[1]}: readers will differ"
    for key in ("factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor"):
        stated = {place[key] for place in (raw, scaling, parameters) if place.get(key) is not None}
        if len(stated) > 1:
            yield f"config.json gives {key} more than once, differently: {sorted(stated)}"
    found = _context(config)
    if found["rope_type"] == "yarn":
        if "original_max_position_embeddings" not in config.rope:
            yield "yarn without original_max_position_embeddings: engines take the extended length for it"
        elif found["length"] != found["trained_length"] * found["factor"]:
            yield (
                f"max_position_embeddings {found['length']} is not "
                f"{found['factor']:g} x {found['trained_length']}"
            )


def _quantization(config: Described, found: Inspection) -> Quantization | None:
    raw = config.quantization_config
    if not raw:
        return None
    try:
        quantization = read_quantization(raw)
    except BadInput as err:
        found.quantization = {"scheme": "other", "quant_method": raw.get("quant_method")}
        found.problems.append(err.message)
        return None
    if quantization is not None:
        found.quantization = {
            "scheme": quantization.scheme,
            "dialect": quantization.dialect,
        }
        if quantization.scheme == "fp8-block":
            found.quantization["block"] = [BLOCK, BLOCK]
        elif quantization.group:
            found.quantization["group"] = quantization.group
    return quantization


def _weights(
    folder: Folder, config: Described, quantization: Quantization | None, found: Inspection
) -> list[Expected]:
    """Judge the weights; returns the layout that the config calls for."""
    mtp = 0
    try:
        checkpoint = Checkpoint.open(folder)
    except BadInput as err:
        found.problems.append(err.message)
        layout = config.model.tensors()
    else:
        mtp = config.model.mtp_layers_in(checkpoint.tensors)
        dtypes: dict[str, dict[str, int]] = {}
        for info in checkpoint.tensors.values():
            row = dtypes.setdefault(info.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
            row["tensors"] += 1
            row["elements"] += info.count
            row["bytes"] += info.nbytes
        found.weights = {
            "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.nbytes,
            "dtypes": dict(sorted(dtypes.items())),
        }
        layout = config.model.tensors_in(checkpoint.tensors)
        if quantization is not None or not config.quantization_config:
            stored = quantized_layout(layout, quantization) if quantization else layout
            found.problems.extend(layout_problems(stored, checkpoint.tensors))
        bias = {
            checkpoint.tensors[w.name].dtype
            for w in layout
            if w.role is Role.EXPERT_BIAS and w.name in checkpoint.tensors
        }
        if bias - {"F32"}:
            found.notes.append(f"expert_bias is {', '.join(sorted(bias))}; the line stores it as F32")
    if mtp:
        found.notes.append(
            f"{mtp} multi-token prediction layer(s), loaded by "
            f"{' and '.join(config.model.architecture.mtp_engines)} alone; `packager quantize` leaves them "
            "out unless --mtp, or the recipe's quantize.mtp, keeps them"
        )
    counted = count_parameters(config.model, mtp)
    found.parameters = {
        "total": counted.total,
        "active": counted.active,
        "float32": counted.float32,
        "mtp": counted.mtp,
    }
    return layout


def _notes(folder: Folder, raw: dict[str, Any], config: Described, layout: list[Expected]) -> Iterator[str]:
    odd = sorted(
        {
            f"{list(want.shape)}"
            for want in layout
            if want.role in QUANTIZABLE and not want.mtp and any(size % BLOCK for size in want.shape)
        }
    )
    if odd:
        yield f"matrices with sides that are no multiple of {BLOCK}: {', '.join(odd)}"
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = raw.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= config.vocab_size:
                yield f"{key} {token} lies beyond the vocabulary of {config.vocab_size}"
    files = folder.sizes()
    if "tokenizer.json" not in files:
        yield "no tokenizer.json: it cannot be served as it is"
    if raw.get("auto_map") or any(name.endswith(".py") for name in files):
        yield "brings code (auto_map or *.py), which is never run here and not needed"
    loose = sorted(name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth")))
    if loose:
        yield f"pickled files, never read here: {', '.join(loose)}"


def _artifact(folder: Folder, found: Inspection) -> None:
    try:
        manifest = folder.manifest(deep=False)
    except (BadInput, IntegrityFailure) as err:
        found.problems.append(err.message)
        found.altered = isinstance(err, IntegrityFailure)
    else:
        if manifest is not None:
            found.artifact = {"stage": manifest.stage, "digest": manifest.digest}


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    shape, parameters, context = found.shape, found.parameters, found.context
    yield "checkpoint", found.path
    yield "architecture", f"{found.architecture} ({found.model_type})"
    dense = f", {shape['dense_layers']} of them dense" if shape["experts"] else ""
    yield "layers", f"{shape['layers']}{dense}; hidden size {shape['hidden_size']}"
    yield "attention", f"{shape['heads']} heads, {shape['kv_heads']} KV heads x {shape['head_dim']}"
    if shape["experts"]:
        yield (
            "experts",
            f"{shape['experts']} routed, {shape['experts_per_token']} per token, "
            f"{shape['shared_experts']} shared",
        )
    yield (
        "parameters",
        f"{parameters['total'] - parameters['float32']:,} + {parameters['float32']:,} FP32",
    )
    yield "active", f"{parameters['active']:,} per token"
    if parameters["mtp"]:
        yield "multi-token", f"{parameters['mtp']:,} more in prediction layers"
    if found.weights:
        weights = found.weights
        yield (
            "weights",
            f"{weights['tensors']:,} tensors, {weights['shards']} shard(s), "
            f"{readable_bytes(weights['bytes'])}",
        )
        for dtype, row in weights["dtypes"].items():
            yield f"  {dtype}", f"{row['elements']:,} in {row['tensors']:,} tensors"
    rope = f"RoPE theta {context['rope_theta']:g}, {context['rotary_dim']} of {shape['head_dim']} rotated"
    yield "context", f"{context['length']:,} tokens; {rope}"
    if context["rope_type"] != "default":
        yield (
            "  scaling",
            f"{context['rope_type']}, factor {context['factor']:g} over {context['trained_length']:,}",
        )
    if found.quantization is None:
        yield "quantization", "none"
    else:
        yield "quantization", ", ".join(f"{value}" for value in found.quantization.values())
    if found.artifact:
        yield "sealed", f"stage {found.artifact['stage']}"
        yield "  digest", found.artifact["digest"].removeprefix("sha256:")


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, escape(value))
    console.print(table)
    for title, style, lines in (("problem", "red", found.problems), ("note", "yellow", found.notes)):
        for line in lines[:20]:
            console.print(f"[{style}]{title}[/]: {escape(line)}", soft_wrap=True)
        if len(lines) > 20:
            console.print(f"[{style}]{title}[/]: … and {len(lines) - 20} more", soft_wrap=True)


@click.command(name="inspect")
@click.argument("source")
@options.as_json
def command(source: str, as_json: bool) -> None:
    """Say what the checkpoint SOURCE is, and what is wrong with it.

    SOURCE is a folder or hf://org/name@revision. Reads headers and configuration only, in a second or two at
    any size; of a hub repository, the byte ranges that hold them. Exits 3 if something is wrong, 5 if
    a sealed artifact was altered.
    """
    found = examine(source)
    if as_json:
        click.echo(json.dumps({**asdict(found), "sound": not found.problems}, ensure_ascii=False))
    else:
        _print(found)
    if found.problems:
        failure = IntegrityFailure if found.altered else BadInput
        raise failure(f"{source} has {len(found.problems)} problem(s)", "They are listed in the report.")
