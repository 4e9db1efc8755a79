"""What `packager validate accuracy` concludes: a comparison with a reference, safety items, noise floor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from packager.errors import GateFailed
from packager.recipe import VerdictRule

if TYPE_CHECKING:
    from validation.gates import Gate
    from validation.noise import NoiseFloor
    from validation.safety import SafetyCheck
    from validation.tasks import AccuracyComparison, AccuracyRun
    from validation.tasks.comparison import Paired

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Asked:
    """What the options say."""

    reference: Path | None
    margin_points: float
    task_margins: dict[str, float]
    rule: VerdictRule
    safety_tasks: tuple[str, ...]
    max_safety_flips: int | None
    again: Path | None
    noise: Path | None


@dataclass(frozen=True)
class Found:
    """What was concluded."""

    comparison: AccuracyComparison
    safety: SafetyCheck | None
    gates: tuple[Gate, ...]


def _margins(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    margins = {}
    for value in values:
        task, _, points = value.rpartition("=")
        try:
            margins[task] = float(points)
        except ValueError:
            margins[task] = 0.0
        if not task or not margins[task] > 0:
            raise click.UsageError(f"--task-margin takes TASK=POINTS, such as allergy=1; got {value!r}")
    return margins


def options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a comparison, handed over as one `Asked`."""

    @functools.wraps(function)
    def packed(
        *arguments: Any,
        reference: Path | None,
        margin_points: float,
        task_margins: dict[str, float],
        rule: VerdictRule,
        safety_tasks: tuple[str, ...],
        max_safety_flips: int | None,
        again: Path | None,
        noise: Path | None,
        **own: Any,
    ) -> None:
        asked = Asked(
            reference, margin_points, task_margins, rule, safety_tasks, max_safety_flips, again, noise
        )
        if reference is None and (task_margins or max_safety_flips is not None or noise is not None):
            raise click.UsageError("--task-margin, --max-safety-flips and --noise need --reference")
        function(*arguments, asked=asked, **own)

    points = click.FloatRange(min=0, min_open=True)
    declared = [
        click.option("--reference", type=_FILE, help="Run of the original (its --out) to compare with."),
        click.option(
            "--margin-points",
            type=points,
            default=2.0,
            show_default=True,
            help="Loss in percentage points that still counts as non-inferior.",
        ),
        click.option(
            "--task-margin",
            "task_margins",
            multiple=True,
            callback=_margins,
            metavar="TASK=POINTS",
            help="A margin of one task, which then gates by itself; may be repeated.",
        ),
        click.option(
            "--rule",
            type=click.Choice(get_args(VerdictRule)),
            default="not inferior",
            show_default=True,
            help="What passes: a loss beyond the margin is ruled out; is not shown; no loss at all is shown.",
        ),
        click.option(
            "--safety-task",
            "safety_tasks",
            multiple=True,
            help="A task of safety items, besides items whose meta says so; may be repeated.",
        ),
        click.option(
            "--max-safety-flips",
            type=click.IntRange(min=0),
            help="Safety items that may turn from right to wrong beyond noise.  [default: reported only]",
        ),
        click.option(
            "--again",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Ask this server everything again in another order, and write the noise floor here.",
        ),
        click.option("--noise", type=_FILE, help="Noise floor of the reference (written by --again)."),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(declared), packed)


def conclude(asked: Asked, before: AccuracyRun, run: AccuracyRun, noise: NoiseFloor | None) -> Found:
    """Compare `run` with `before` by the rule and the margins asked for."""
    from validation.safety import check_safety, safety_gate
    from validation.tasks import compare_accuracy
    from validation.verdict import verdict_gates

    margin = asked.margin_points
    comparison = compare_accuracy(before, run, margin_points=margin, task_margins=asked.task_margins)
    safety = check_safety(before, run, margin_points=margin, tasks=asked.safety_tasks, noise=noise)
    gates = verdict_gates(asked.rule, comparison, asked.task_margins)
    return Found(comparison, safety, (*gates, safety_gate(safety, asked.max_safety_flips, run.label)))


def require(found: Found) -> None:
    """Raise GateFailed if a gate was missed, or has a bound and nothing to measure it on."""
    wrong = [gate for gate in found.gates if gate.outcome in ("fail", "not measured")]
    if not wrong:
        return
    compared = found.comparison
    said = (
        f"{compared.candidate} is inferior to {compared.reference}: "
        if compared.overall.verdict == "inferior"
        else ""
    )
    lines = []
    for gate in wrong:
        figure = "not measured" if gate.measured is None else f"{gate.measured:.4g} {gate.unit}".strip()
        lines.append(f"{gate.name} {figure}, bound {gate.bound:g} ({gate.note})")
    raise GateFailed(said + "; ".join(lines), "Read the flips in the JSON document (--json).")


def show(found: Found) -> None:
    """Print the comparison in 80 columns, then the verdicts that more items would decide, then safety."""
    compared, margin = found.comparison, found.comparison.overall.margin_points
    click.echo(f"\n{compared.candidate} against {compared.reference}, margin {margin:g} points")
    rows = (compared.overall, *compared.by_task)
    _print_rows(rows)
    click.echo("p: exact McNemar, of tasks after Holm. finds: the loss, in points, that so many")
    click.echo("items find with 80 % power (one-sided 5 % test) at the discordance observed.")
    for row in rows:
        if row.verdict == "inconclusive":
            needed = "no number of" if row.n_to_decide is None else f"about {row.n_to_decide:,}"
            click.echo(f"{row.scope}: inconclusive; {needed} items would decide")
    if found.safety is not None:
        check = found.safety
        beyond = "" if check.in_noise is None else f", {check.beyond_noise} of them beyond noise"
        click.echo(f"safety: {len(check.right_to_wrong)} of {check.paired.n} turned right to wrong{beyond}")
        for flip in check.right_to_wrong:
            click.echo(f"  {flip.id}: expected {flip.expected}, got {flip.candidate_answer or 'no answer'}")
    for gate in found.gates:
        if gate.outcome != "not gated":
            click.echo(f"{gate.outcome}: {gate.name}")


def show_noise(noise: NoiseFloor) -> None:
    """Print the noise floor in one line."""
    n = noise.comparison.overall.n
    click.echo(
        f"asked again: {noise.flips} of {n} items flip ({100 * noise.share:.1f} %, 95 % interval "
        f"{100 * noise.low:.1f} – {100 * noise.high:.1f}), {noise.texts_changed} texts change"
    )


def _print_rows(rows: Sequence[Paired]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "items", "points", "95 % interval", "lost", "won", "p", "finds", "verdict"):
        table.add_column(name, justify="left" if name in ("task", "verdict") else "right", overflow="fold")
    for row in rows:
        p = row.p_value if row.p_holm is None else row.p_holm
        table.add_row(
            escape(row.scope),
            str(row.n),
            f"{row.difference_points:+.1f}",
            f"{row.low_points:+.1f} to {row.high_points:+.1f}",
            str(row.only_reference),
            str(row.only_candidate),
            f"{p:.3f}" if p >= 0.001 else "<0.001",
            "–" if row.detectable_points is None else f"{row.detectable_points:.1f}",
            row.verdict,
        )
    Console(highlight=False).print(table)
