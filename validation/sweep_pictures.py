"""What a sweep looks like: throughput over interactivity, ratios over concurrency, context against speed."""

from __future__ import annotations

from collections.abc import Iterable

from validation.picture import Line, Picture, Point
from validation.sweep_bound import bound_of
from validation.sweep_model import CellRatio, Role, Sweep, SweepCell, Variant

CLAIMED_RATIO = 3.0
"""What the model line claims over a dense model of 36B; a line in every picture of such a ratio."""
_STYLES: dict[Role, int] = {"baseline": 0, "candidate": 1, "candidate without draft": 2, "other": 3}


def pictures(sweep: Sweep) -> list[Picture]:
    """All pictures that the sweep has cells for; bounds in them where model and hardware are known."""
    found = [_interactivity(sweep, *lengths) for lengths in _lengths(sweep)]
    pairs = dict.fromkeys((one.candidate, one.baseline) for one in sweep.ratios)
    found += [_ratio(sweep, number, *pair) for number, pair in enumerate(pairs, 1)]
    found += list(_contexts(sweep))
    return [one for one in found if any(line.points and not line.bound for line in one.lines)]


def said_lengths(input_tokens: int, output_tokens: int) -> str:
    """Input and output length, as captions and legends have them."""
    return f"{input_tokens:,} tokens in, {output_tokens:,} out"


def _lengths(sweep: Sweep) -> list[tuple[int, int]]:
    return sorted({(cell.input_tokens, cell.output_tokens) for cell in sweep.cells})


def _of(sweep: Sweep, variant: Variant, lengths: tuple[int, int]) -> list[SweepCell]:
    cells = (c for c in sweep.cells if c.variant == variant.name)
    return sorted(
        (c for c in cells if (c.input_tokens, c.output_tokens) == lengths), key=lambda c: c.concurrency
    )


def _marks(sweep: Sweep, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """What is not real about the variants of a picture; without names about any."""
    kept = set(names) if names is not None else {one.name for one in sweep.variants}
    own = [one.mark for one in sweep.variants if one.mark is not None and one.name in kept]
    return tuple(dict.fromkeys(own))


def _interactivity(sweep: Sweep, input_tokens: int, output_tokens: int) -> Picture:
    lines, bounds = [], []
    for variant in sweep.variants:
        style = _STYLES[variant.role]
        points, limit = [], []
        for cell in _of(sweep, variant, (input_tokens, output_tokens)):
            if cell.measured and cell.per_user is not None and cell.per_device is not None:
                user, device = cell.per_user.median, cell.per_device.median
                points.append(
                    Point(
                        x=user,
                        y=device,
                        label=str(cell.concurrency),
                        says=f"{cell.concurrency} at once, {user:,.1f} of a user, {device:,.1f} of a device",
                    )
                )
            rate = bound_of(sweep, cell)
            if rate is not None:
                limit.append(Point(x=rate.each, y=rate.tokens_per_s / variant.devices))
        lines.append(Line(variant.name, tuple(points), style))
        bounds.append(Line(f"{variant.name}, roofline", tuple(limit), style, bound=True))
    lengths = said_lengths(input_tokens, output_tokens)
    roofline = "Dashed: what the hardware allows at most." if any(b.points for b in bounds) else ""
    return Picture(
        key=f"interactivity-{input_tokens}-{output_tokens}",
        title=f"Throughput over interactivity, {lengths}",
        caption=f"Throughput over interactivity, {lengths}. Numbers are requests at once; up and right is "
        f"better. {roofline}".rstrip(),
        x_name="tokens/s of a user",
        y_name="output tokens/s of a device",
        lines=(*lines, *bounds),
        marks=_marks(sweep),
    )


def _ratio(sweep: Sweep, number: int, candidate: str, baseline: str) -> Picture:
    lines, middle = [], (len(_lengths(sweep)) - 1) / 2
    for index, lengths in enumerate(_lengths(sweep)):
        ratios = sorted(
            (
                one
                for one in sweep.ratios
                if (one.candidate, one.baseline) == (candidate, baseline)
                and (one.input_tokens, one.output_tokens) == lengths
            ),
            key=lambda one: one.concurrency,
        )
        points = tuple(
            # A little beside each other: intervals at one concurrency would hide one another.
            Point(one.concurrency * 1.05 ** (index - middle), one.ratio, one.low, one.high, says=_said(one))
            for one in ratios
        )
        lines.append(Line(said_lengths(*lengths), points, (index + 1) % 4))
    drafted = sweep.variant(baseline).role == "candidate without draft"
    levels = ((1.0, "1x"),) if drafted else ((1.0, "1x"), (CLAIMED_RATIO, f"{CLAIMED_RATIO:g}x"))
    return Picture(
        key=f"ratio-{number}",
        title=f"{candidate} over {baseline}: ratio of output tokens/s",
        caption=f"{candidate} over {baseline}: ratio of output tokens/s by concurrency; bars are 95 % "
        "intervals over paired repeats.",
        x_name="requests at once",
        y_name="ratio of output tokens/s",
        lines=tuple(lines),
        levels=levels,
        x_ticks=tuple(float(c) for c in sorted({cell.concurrency for cell in sweep.cells})),
        marks=_marks(sweep, (candidate, baseline)),
    )


def _said(one: CellRatio) -> str:
    interval = "" if one.low is None or one.high is None else f" ({one.low:.2f} to {one.high:.2f})"
    return f"{one.concurrency} at once, {one.ratio:.2f}{interval}"


def _contexts(sweep: Sweep) -> Iterable[Picture]:
    """Speed over the prompt's length, at the fewest and at the most requests at once."""
    levels = sorted({cell.concurrency for cell in sweep.cells})
    for output_tokens in sorted({cell.output_tokens for cell in sweep.cells}):
        inputs = {c.input_tokens for c in sweep.cells if c.output_tokens == output_tokens}
        if len(inputs) < 2:
            continue
        for level in dict.fromkeys((levels[0], levels[-1])):
            lines, bounds = [], []
            for variant in sweep.variants:
                points, limit = [], []
                for length in sorted(inputs):
                    cell = sweep.at(variant.name, level, length, output_tokens)
                    if cell is None:
                        continue
                    x = cell.prompt_tokens or float(length)
                    if cell.measured and cell.per_user is not None:
                        user = cell.per_user
                        points.append(
                            Point(
                                x,
                                user.median,
                                user.low,
                                user.high,
                                says=f"{x:,.0f} tokens, {user.median:,.0f}/s",
                            )
                        )
                    rate = bound_of(sweep, cell)
                    if rate is not None:
                        limit.append(Point(x=x, y=rate.each))
                style = _STYLES[variant.role]
                lines.append(Line(variant.name, tuple(points), style))
                bounds.append(Line(f"{variant.name}, roofline", tuple(limit), style, bound=True))
            title = f"Speed by context, {level} at once, {output_tokens:,} tokens out"
            yield Picture(
                key=f"context-{level}-{output_tokens}",
                title=title,
                caption=f"{title}. Bars: lowest and highest repeat.",
                x_name="tokens of the prompt",
                y_name="tokens/s of a user",
                lines=(*lines, *bounds),
                marks=_marks(sweep),
            )
