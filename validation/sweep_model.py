"""What an interleaved sweep records: variants, cells with their repeats, and the ratios between variants.

A cell is one variant at one concurrency, input length and output length. Its repeats are whole runs of
`vllm bench serve`, on other prompts each; the variants share the prompts of a repeat, and it is those pairs
that a ratio's interval comes from.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from validation.document import Document
from validation.environment import Environment
from validation.errors import ServerUnreachable
from validation.throughput_cell import Cell

Role = Literal["candidate", "candidate without draft", "baseline", "other"]
FailureKind = Literal[
    "will not start",
    "out of memory",
    "stalled",
    "died",
    "other model",
    "requests failed",
    "not tried",
]
"""`stalled`: no token for the seconds allowed. `died`: the process ended under load, and not for want of
memory. `not tried`: the variant was given up before this cell."""
CONFIDENCE = 0.95
_MEMORY = re.compile(
    # Python, torch on GPUs and processors, C++, the kernel; then vLLM and SGLang, which count beforehand.
    r"OutOfMemory|out of memory|MemoryError|not enough memory|std::bad_alloc|Cannot allocate memory|oom-kill"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|less than desired GPU memory utilization|Not enough memory",
    re.IGNORECASE,
)


def ran_out_of_memory(log: str) -> bool:
    """Whether lines of an engine's log say that memory ran out, or would not suffice."""
    return _MEMORY.search(log) is not None


class Variant(Document):
    """One served model of a sweep."""

    name: str
    """What tables call it; one of a kind within a sweep."""
    role: Role
    subject: str
    """Digest of what is served, and how."""
    engine: Literal["vllm", "sglang", "unknown"] = "unknown"
    engine_version: str | None = None
    command: tuple[str, ...] = ()
    """As it was started, without host and port, folders by their names; empty: it ran already."""
    devices: int = Field(default=1, ge=1)
    """GPUs it is spread over; 1 for a processor."""
    weights: Literal["real", "dummy"] = "real"
    acceptance: Literal["measured", "synthetic"] | None = None
    """How draft tokens are accepted; None: no draft, or it is not known."""
    synthetic_acceptance_length: float | None = None
    simulated: tuple[str, ...] = ()
    """What else is not as in service, each in a few words; part of the mark."""
    notes: tuple[str, ...] = ()
    """What a reader must know of this variant, in sentences."""

    @property
    def mark(self) -> str | None:
        """What every output says beside its figures; None: real weights, real acceptance."""
        said = []
        if self.weights == "dummy":
            said.append("dummy weights")
        if self.acceptance == "synthetic":
            length = self.synthetic_acceptance_length
            said.append("synthetic acceptance" + ("" if length is None else f" {length:g}"))
        said += self.simulated
        return f"{self.name}: {', '.join(said)}" if said else None


class Limits(Document):
    """A request is good if it keeps every limit that is given, in milliseconds."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2el_ms: float | None = Field(default=None, gt=0)

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2el_ms))

    def good(self, cell: Cell) -> int | None:
        """Good requests of a cell, counted as `vllm bench serve --goodput` counts them; a single token has a
        TPOT of 0. None: no limits, or the cell has no times of single requests.
        """
        if not self.given or len(cell.request_e2el_ms) != len(cell.output_lengths):
            return None
        found = 0
        for first, whole, tokens in zip(
            cell.request_ttft_ms, cell.request_e2el_ms, cell.output_lengths, strict=True
        ):
            each = (whole - first) / (tokens - 1) if tokens > 1 else 0.0
            pairs = ((first, self.ttft_ms), (each, self.tpot_ms), (whole, self.e2el_ms))
            found += all(limit is None or value <= limit for value, limit in pairs)
        return found


class Failure(Document):
    """Why a cell was not measured."""

    kind: FailureKind
    message: str
    log_tail: tuple[str, ...] = ()
    """Last lines of the server's log, where the server is ours."""


class ServingFailed(ServerUnreachable):
    """A variant cannot be served, or not any more."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure


class Spanned(Document):
    """A figure over the repeats of a cell."""

    median: float
    low: float
    high: float
    """Lowest and highest repeat: a spread, not an interval."""


class SweepCell(Document):
    """One variant at one concurrency, input length and output length."""

    variant: str
    concurrency: int
    input_tokens: int
    """Asked for. What the prompts had is `prompt_tokens`."""
    output_tokens: int
    """Most tokens of an answer."""
    repeats: tuple[Cell, ...] = ()
    failure: Failure | None = None
    """Set if a repeat failed; the repeats before it are kept, but nothing is concluded from them."""
    prompt_tokens: float | None = None
    """Mean over all requests, by the server's count, chat template included."""
    answer_tokens: float | None = None
    """Mean over all requests."""
    output_tokens_per_s: Spanned | None = None
    per_device: Spanned | None = None
    """Output tokens/s by GPU."""
    per_user: Spanned | None = None
    """Tokens/s that one request sees while it decodes: 1000 / median TPOT in milliseconds."""
    ttft_ms: Spanned | None = None
    """Of the repeats' medians."""
    goodput: Spanned | None = None
    """Good requests/s under the sweep's limits; None: no limits."""
    acceptance_length: Spanned | None = None
    power_w: Spanned | None = None

    @property
    def measured(self) -> bool:
        """Whether its figures count."""
        return self.failure is None and bool(self.repeats)


class CellRatio(Document):
    """Output tokens/s of one variant over another's in the same cell; above 1 the candidate is faster."""

    candidate: str
    baseline: str
    concurrency: int
    input_tokens: int
    output_tokens: int
    ratio: float
    """Geometric mean over the paired repeats."""
    low: float | None
    high: float | None
    """95 % interval (t, on the logarithms of the paired ratios); None: one repeat shows no spread. With two
    or three repeats it is wide, as it has to be."""
    repeats: int


class Sweep(Document):
    """Variants over concurrency x input length x output length, measured in turn."""

    schema_version: int = 1
    tool: str = "vllm bench serve"
    order: Literal["interleaved"] = "interleaved"
    """Every repeat visits all variants before the next repeat begins."""
    residency: Literal["together", "alternate"]
    """`together`: all servers are up, one is asked at a time, variants change from cell to cell. `alternate`:
    one server is up at a time, variants change once a repeat."""
    repeats: int
    lengths: Literal["matched", "fixed"]
    """`matched`: the candidate's answers end by themselves, and the other variants give as many tokens to the
    same prompt. `fixed`: every answer has the full length, past its own end."""
    prefix_caching: Literal["off", "as served"]
    """`as served`: at least one server ran already; its prompts differ from cell to cell and repeat."""
    variants: tuple[Variant, ...]
    cells: tuple[SweepCell, ...]
    ratios: tuple[CellRatio, ...]
    limits: Limits | None = None
    """Of goodput."""
    prompts_digest: str
    """Of the conversations that prompts are made of."""
    environment: Environment
    marks: tuple[str, ...] = ()
    """What is not real about it (dummy weights, synthetic acceptance), one a variant; every output shows
    these."""

    def variant(self, name: str) -> Variant:
        """The variant of that name; KeyError if there is none."""
        return next((v for v in self.variants if v.name == name), None) or _missing(name)

    def at(self, variant: str, concurrency: int, input_tokens: int, output_tokens: int) -> SweepCell | None:
        """One cell, if the sweep has it."""
        wanted = (variant, concurrency, input_tokens, output_tokens)
        return next(
            (c for c in self.cells if (c.variant, c.concurrency, c.input_tokens, c.output_tokens) == wanted),
            None,
        )

    @property
    def failures(self) -> tuple[SweepCell, ...]:
        """Cells that were not measured, or not all of their repeats."""
        return tuple(cell for cell in self.cells if cell.failure is not None)


def _missing(name: str) -> Variant:
    raise KeyError(name)


def conclude_cell(
    variant: Variant,
    concurrency: int,
    input_tokens: int,
    output_tokens: int,
    repeats: Sequence[Cell],
    limits: Limits | None = None,
    failure: Failure | None = None,
) -> SweepCell:
    """The figures of a cell from its repeats; none if it failed."""
    kept = repeats if failure is None else ()
    requests = sum(cell.requests for cell in kept)

    def over(figure: Callable[[Cell], float | None]) -> Spanned | None:
        found = [value for cell in kept if (value := figure(cell)) is not None]
        # A figure that one repeat lacks is not one of the cell.
        if not found or len(found) != len(kept):
            return None
        return Spanned(median=statistics.median(found), low=min(found), high=max(found))

    def goodput(cell: Cell) -> float | None:
        good = limits.good(cell) if limits is not None else None
        return None if good is None or cell.duration_s <= 0 else good / cell.duration_s

    return SweepCell(
        variant=variant.name,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        repeats=tuple(repeats),
        failure=failure,
        prompt_tokens=sum(c.input_tokens for c in kept) / requests if requests else None,
        answer_tokens=sum(c.output_tokens for c in kept) / requests if requests else None,
        output_tokens_per_s=over(lambda c: c.output_tokens_per_s),
        per_device=over(lambda c: c.output_tokens_per_s / variant.devices),
        per_user=over(lambda c: 1000 / c.tpot_ms.median if c.tpot_ms.median > 0 else None),
        ttft_ms=over(lambda c: c.ttft_ms.median),
        goodput=over(goodput),
        acceptance_length=over(lambda c: c.acceptance_length),
        power_w=over(lambda c: c.power_w),
    )


def paired_ratio(candidate: SweepCell, baseline: SweepCell) -> CellRatio | None:
    """Candidate over baseline from the repeats that both have; None if either was not measured."""
    if not (candidate.measured and baseline.measured):
        return None
    logs = [
        math.log(one.output_tokens_per_s / other.output_tokens_per_s)
        for one, other in zip(candidate.repeats, baseline.repeats, strict=False)
        if one.output_tokens_per_s > 0 and other.output_tokens_per_s > 0
    ]
    if not logs:
        return None
    mean, half = statistics.fmean(logs), None
    if len(logs) > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * statistics.stdev(logs) / len(logs) ** 0.5
    return CellRatio(
        candidate=candidate.variant,
        baseline=baseline.variant,
        concurrency=candidate.concurrency,
        input_tokens=candidate.input_tokens,
        output_tokens=candidate.output_tokens,
        ratio=math.exp(mean),
        low=None if half is None else math.exp(mean - half),
        high=None if half is None else math.exp(mean + half),
        repeats=len(logs),
    )


def all_ratios(variants: Sequence[Variant], cells: Sequence[SweepCell]) -> tuple[CellRatio, ...]:
    """Each candidate over each baseline, with and without its draft, and with its draft over without."""
    order: dict[Role, tuple[Role, ...]] = {
        "candidate": ("baseline", "candidate without draft"),
        "candidate without draft": ("baseline",),
    }
    place = {(c.variant, c.concurrency, c.input_tokens, c.output_tokens): c for c in cells}
    found = []
    for one in variants:
        for role in order.get(one.role, ()):
            for other in (v for v in variants if v.role == role):
                for cell in (c for c in cells if c.variant == one.name):
                    key = (other.name, cell.concurrency, cell.input_tokens, cell.output_tokens)
                    ratio = paired_ratio(cell, place[key]) if key in place else None
                    if ratio is not None:
                        found.append(ratio)
    return tuple(found)
