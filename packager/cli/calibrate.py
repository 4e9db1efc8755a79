"""`packager calibrate`: BF16 weights to four bits, with calibration data."""

from __future__ import annotations

from pathlib import Path

import click

from packager.cli import options
from packager.cli.output import print_sealed_json, progress
from packager.quantize.calibration_run import CALIBRATED_SCHEMES, CalibratedScheme


@click.command(name="calibrate")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(CALIBRATED_SCHEMES), required=True)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    default=None,
    help="JSONL: a line has `messages`, `prompt` or `text`. Not for mxfp4, which looks at no data.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Lines that are used; of more, so many are drawn by --seed.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of each line that are used; no more than the checkpoint was trained for.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@options.shard_bytes
@options.as_json
def command(
    source: str,
    out: Path,
    scheme: CalibratedScheme,
    calibration: Path | None,
    samples: int,
    sequence_length: int,
    seed: int,
    shard_bytes: int,
    as_json: bool,
) -> None:
    """Write the BF16 BailingMoeV2 checkpoint SOURCE in four bits into the new folder OUT.

    The work is llm-compressor's, on a model of this package: no code inside SOURCE is run. Every expert is
    calibrated on every token, whatever the router chooses. The whole model is held in main memory; how much
    that takes is said beforehand, and refused where there is less.
    """
    from packager.checkpoint.header import readable_bytes
    from packager.quantize.calibrated import CalibrationSpec, calibrate

    spec = CalibrationSpec(
        scheme=scheme, samples=samples, sequence_length=sequence_length, seed=seed, shard_bytes=shard_bytes
    )
    manifest = calibrate(
        source,
        out,
        spec,
        calibration=calibration,
        recipe_digest=spec.digest,
        progress=progress,
    )
    metrics = manifest.metrics
    if as_json:
        print_sealed_json(out, manifest, source=str(source))
        return
    tensors, data = metrics["tensors"], metrics["calibration"]
    before, after = (readable_bytes(metrics["bytes"][key]) for key in ("source", "written"))
    seen = (
        f", calibrated on {data['tokens']} tokens of {data['sequences']} sequences" if data["tokens"] else ""
    )
    click.echo(
        f"{tensors['quantized']} weights in {scheme}{seen}; {tensors['kept']} tensors kept; "
        f"{before} became {after}\n{out}  {manifest.digest}"
    )
