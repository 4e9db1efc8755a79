"""`packager quantize`: BF16 weights to FP8, INT4 or INT8."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from packager.cli import options
from packager.cli.executor import executor_options
from packager.cli.output import print_sealed_json, progress
from packager.cli.source import opened
from packager.quantize.convert import Executor
from packager.quantize.kernel import Choice
from packager.recipe import (
    SCALE_ROUNDINGS,
    Dialect,
    Prediction,
    QuantizeSpec,
    ScaleRounding,
    SchemeName,
    TensorRule,
)

if TYPE_CHECKING:
    from packager.quantize.dry_run import DryRun

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", value)
    if found is None or found[2] not in _UNITS:
        raise click.BadParameter(f"{value!r} is no size such as 1500MB, 1.5GB or 1GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _rules(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[TensorRule, ...]:
    rules = []
    for value in values:
        tensors, _, do = value.rpartition("=")
        try:
            rules.append(TensorRule.model_validate({"tensors": tensors, "do": do}))
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is no pattern and decision such as 'model.layers.*.mlp.shared_experts.*=keep'; "
                "decisions are keep, drop and quantize"
            ) from None
    return tuple(rules)


@click.command(name="quantize")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--scheme",
    type=click.Choice([*SCALE_ROUNDINGS, "bf16"]),
    default="fp8-block",
    show_default=True,
    help="fp8-block: a scale for each 128x128 weights. fp8-channel: a scale a row. int4-g128: a scale for "
    "each 128 columns of a row, activations stay BF16. w8a8: INT8, a scale a row. bf16: see `packager "
    "dequantize`.",
)
@click.option(
    "--dialect",
    type=click.Choice(get_args(Dialect)),
    default="compressed-tensors",
    show_default=True,
    help="How the config and the scales are named; the data is the same. deepseek: fp8-block only.",
)
@click.option(
    "--scale-rounding",
    type=click.Choice(get_args(ScaleRounding)),
    default=None,
    help="Default: power-of-two for fp8-block, where such scales survive Hopper's DeepGEMM unchanged; "
    "float32 for fp8-channel and w8a8; bfloat16 for int4-g128.",
)
@options.shard_bytes
@click.option(
    "--mtp",
    type=click.Choice(get_args(Prediction)),
    default="drop",
    show_default=True,
    help="Multi-token prediction layers: left out, as they are, or quantized as the others are.",
)
@click.option(
    "--rule",
    "rules",
    metavar="PATTERN=DO",
    multiple=True,
    callback=_rules,
    help="What becomes of the tensors whose names match: keep, drop or quantize. PATTERN is a glob over "
    "whole names, or a regular expression after `re:`. May be given several times.",
)
@click.option("--dry-run", "only_plan", is_flag=True, help="Print what would be done, from headers alone.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Threads. Default: one for each processor. With Ray: tasks at once, by default two for each "
    "processor. The output does not depend on it.",
)
@click.option(
    "--max-memory",
    callback=_bytes,
    default=None,
    help="Resident memory to stay within: 1500MB, 1.5GB, 1GiB or bytes. Default: what the workers "
    "have use for, half a GB for two.",
)
@click.option(
    "--kernel",
    type=click.Choice(get_args(Choice)),
    default="auto",
    show_default=True,
    help="auto: the compiled kernel where there is one, or the checkpoint is large enough to pay for it.",
)
@click.option(
    "--min-snr-db",
    type=float,
    default=None,
    help="The gate: a weight with a lower signal-to-noise ratio ends in exit code 4. Default: 30; 15 for "
    "int4-g128.",
)
@executor_options
@options.as_json
def command(
    source: str,
    out: Path | None,
    scheme: SchemeName | Literal["bf16"],
    dialect: Dialect,
    scale_rounding: ScaleRounding | None,
    shard_bytes: int,
    mtp: Prediction,
    rules: tuple[TensorRule, ...],
    only_plan: bool,
    workers: int | None,
    max_memory: int | None,
    kernel: Choice,
    min_snr_db: float | None,
    executor: Executor,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Write the BF16 checkpoint SOURCE, quantized, into the new folder OUT.

    SOURCE is a folder or hf://org/name@revision, which is read by byte ranges: nothing but OUT is stored.
    Memory stays the same whatever the size of the shards. Interrupted at any moment, the same command goes on
    with the first unfinished tensor and ends in the same bytes. OUT/fidelity.jsonl has the figures of each
    quantized weight.
    """
    from packager.errors import UsageProblem
    from packager.quantize import dry_run, quantize

    if scheme == "bf16":
        raise UsageProblem(
            "bf16 is no quantization",
            f"For BF16 weights out of a quantized checkpoint: packager dequantize {source} {out or 'OUT'}",
        )
    settings: dict[str, Any] = {
        "scheme": scheme,
        "dialect": dialect,
        "shard_bytes": shard_bytes,
        "mtp": mtp,
        "rules": rules,
    }
    if scale_rounding is not None:
        settings["scale_rounding"] = scale_rounding
    spec = _spec(settings)
    folder = opened(source)
    if only_plan:
        planned = dry_run(folder, spec)
        click.echo(json.dumps(asdict(planned))) if as_json else _print_plan(planned)
        return
    if out is None:
        raise UsageProblem("OUT is not given", "Name a new folder for the output, or add --dry-run.")
    manifest = quantize(
        folder,
        out,
        spec,
        recipe_digest=spec.digest,
        progress=progress,
        workers=workers,
        max_memory=max_memory,
        kernel=kernel,
        min_snr_db="default" if min_snr_db is None else min_snr_db,
        executor=executor,
        ray_address=ray_address,
    )
    if as_json:
        print_sealed_json(out, manifest, source=folder.name)
        return
    _print(out, manifest.digest, manifest.metrics)


def _spec(settings: dict[str, Any]) -> QuantizeSpec:
    from pydantic import ValidationError

    from packager.errors import UsageProblem

    try:
        return QuantizeSpec.model_validate(settings)
    except ValidationError as err:
        said = "; ".join(error["msg"].removeprefix("Value error, ") for error in err.errors())
        raise UsageProblem(said, "Leave the option out for the scheme's default.") from None


def _print_plan(planned: DryRun) -> None:
    from packager.checkpoint.header import readable_bytes

    row = "{:<17}{:<9}{:<18}{:>7} {:>15} {:>8} {:>8}".format
    click.echo(f"{planned.source}, scheme {planned.scheme}")
    click.echo(row("role", "decision", "stored as", "tensors", "parameters", "from", "to"))
    for role in planned.roles:
        sizes = readable_bytes(role.source_bytes), readable_bytes(role.output_bytes)
        counts = f"{role.tensors:,}", f"{role.parameters:,}"
        click.echo(row(role.role, role.decision, role.stored_as or "-", *counts, *sizes))
    click.echo(
        f"{readable_bytes(planned.source_bytes)} would become {readable_bytes(planned.output_bytes)} "
        f"in {planned.shards} shard(s); peak memory about {readable_bytes(planned.peak_memory_bytes)}"
    )


def _print(out: Path, digest: str, metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from packager.checkpoint.header import readable_bytes

    table = Table(box=None, pad_edge=False)
    table.add_column("weights")
    for title in ("tensors", "SNR dB", "worst dB"):
        table.add_column(title, justify="right")
    for role, row in metrics["fidelity"].items():
        table.add_row(role, str(row["tensors"]), _decibels(row["snr_db"]), _decibels(row["worst_snr_db"]))
    console = Console(highlight=False)
    console.print(table)
    size = metrics["bytes"]
    click.echo(
        f"{metrics['tensors']['kept']} tensors keep their bytes; "
        f"{readable_bytes(size['source'])} became {readable_bytes(size['written'])}\n{out}  {digest}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"
