"""Sweeps that verbs read from files: what they ran on and what was served, where they do not say it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from packager.cli.measuring import read_run
from packager.errors import UsageProblem

if TYPE_CHECKING:
    from validation.hardware import Hardware
    from validation.models import ServedModel
    from validation.sweep_model import Sweep


def sweep_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--on` and `--model`, which say of a sweep what it does not say itself."""
    shared = [
        click.option(
            "--on",
            metavar="CARDS",
            help="What a sweep ran on that does not say it, e.g. 1xh200; `here`: this machine, measured now.",
        ),
        click.option(
            "--model",
            "models",
            multiple=True,
            metavar="VARIANT=MODEL[:PRECISION]",
            help="What a variant is that does not say it: a folder with config.json, or a published shape.",
        ),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(shared), function)


def read_sweep(path: Path, on: str | None, models: Sequence[str]) -> Sweep:
    """A sweep from the JSON that `validate throughput --out` wrote, completed by the two options.

    Raises:
        BadInput: it is no sweep. UsageProblem: hardware, variant or model is not known.
    """
    from validation.sweep_model import Sweep

    sweep: Sweep = read_run(Sweep, path)
    given = dict(_model(text) for text in models)
    names = [one.name for one in sweep.variants]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UsageProblem(f"the sweep has no variant {unknown[0]!r}", f"It has: {', '.join(names)}.")
    variants = tuple(
        one.model_copy(update={"model": given[one.name]}) if one.name in given else one
        for one in sweep.variants
    )
    hardware = sweep.hardware if on is None else hardware_named(on)
    return sweep.model_copy(update={"variants": variants, "hardware": hardware})


def hardware_named(text: str) -> Hardware:
    """`2xh20`, or `here`. Raises UsageProblem: not known."""
    from validation.errors import MeasurementError
    from validation.hardware import Hardware, measure_here, parse_hardware

    if text == "here":
        return Hardware(key="here", count=1, card=measure_here())
    try:
        return parse_hardware(text)
    except MeasurementError as err:
        raise UsageProblem(err.message, f"{err.remedy} Or `here`.") from None


def _model(text: str) -> tuple[str, ServedModel]:
    from packager.serving.served_model import model_in
    from validation.models import Precision

    name, _, source = text.partition("=")
    if not name or not source:
        raise UsageProblem(
            f"--model takes VARIANT=MODEL, got {text!r}", "For instance --model baseline=seed-oss-36b:bf16"
        )
    precision: Any = None
    before, _, after = source.rpartition(":")
    if before and after in get_args(Precision):
        source, precision = before, after
    return name, model_in(source, precision=precision)


def write_sweep_report(directory: Path, sweep: Sweep) -> list[Path]:
    """A report of the sweep alone: page, JSON, Markdown, JUnit, and every picture as an SVG file."""
    from validation.report import ReportInputs, Subject, build_report, write_report
    from validation.report.chart import svg_file
    from validation.sweep_panel import sweep_panel
    from validation.sweep_pictures import pictures

    names: dict[str, str] = {}
    for one in sweep.variants:
        names[one.subject] = f"{names[one.subject]}, {one.name}" if one.subject in names else one.name
    expanded = [one.name for one in sweep.variants if one.subject.endswith(":dequantized")]
    inputs = ReportInputs(
        title=f"Throughput, {sweep.variants[0].name}",
        subjects=tuple(Subject(name=name, digest=digest) for digest, name in names.items()),
        weights_served="dequantized" if expanded else "native",
        weights_note=f"Expanded to BF16 before serving: {', '.join(expanded)}." if expanded else "",
        environment=sweep.environment,
        panels=(sweep_panel(sweep),),
        notes=tuple(f"Not real: {mark}." for mark in sweep.marks),
    )
    written = list(write_report(build_report(inputs), directory).values())
    for picture in pictures(sweep):
        path = directory / f"{picture.key}.svg"
        path.write_text(svg_file(picture), encoding="utf-8")
        written.append(path)
    return written


def print_sweep_plots(sweep: Sweep) -> None:
    """Every picture of the sweep, in characters."""
    from packager.cli.terminal_plot import terminal_plot
    from validation.sweep_pictures import pictures

    for picture in pictures(sweep):
        click.echo(f"\n{terminal_plot(picture)}")
