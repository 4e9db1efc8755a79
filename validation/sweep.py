"""Throughput of several served models, measured in turn over concurrency x input length x output length.

Whoever has something to measure brings it as a `ServedVariant`: a description, its tokenizer, and a way to
start it. The sweep knows no engine and no checkpoint.

What makes two figures comparable:

- *Order.* Every repeat visits every variant (A B C A B C …) before the next begins, so that what drifts with
  time falls on all alike; a ratio is taken between cells of the same repeat.
- *Prompts* are real conversations, other ones in every cell and repeat, the same for all variants. So the
  spread between repeats holds what the choice of prompts does, and no prompt is met a second time in a
  prefix cache. Servers of our own run without one: a deployment's hits depend on its traffic, not on the
  model.
- *Equal work.* The first variant, the candidate, answers greedily up to its own end; the others then give
  exactly as many tokens to the same prompt, past an end of their own. To force the full length on all would
  be equal too, but a draft would be judged on text after the end, which nobody reads; to let each end by
  itself would compare a talkative model with a terse one. Tokens are each model's own: with another
  tokenizer the same text has another count, of prompts too, and cells hold the true ones.
  Weights that mean nothing (`dummy`) end nowhere: then every answer has the full length.

Finished (variant, cell, repeat) are kept in the cache folder, each written whole when it is done. Failures
are not: the same command tries them again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from validation.bench_client import BenchClient, BenchFailed, BenchTimeout
from validation.document import digest_of, resolve_url
from validation.engines import acceptance_length, forget_acceptance, generated_tokens
from validation.environment import collect_environment
from validation.errors import MeasurementError
from validation.power import PowerMeter
from validation.sweep_model import (
    Failure,
    FailureKind,
    Limits,
    ServingFailed,
    Sweep,
    SweepCell,
    Variant,
    all_ratios,
    conclude_cell,
    ran_out_of_memory,
)
from validation.sweep_prompts import PromptMaker
from validation.sweep_served import ServedVariant, Serving, require_model, running_variant
from validation.sweep_warmup import warm_up
from validation.throughput_cell import Cell, Prompt, RequestsFailed, read_cell, run_cell, write_json

__all__ = ["Plan", "ServedVariant", "Serving", "ServingFailed", "measure_sweep", "running_variant"]

NO_PREFIX_CACHE = ("--no-enable-prefix-caching", "--disable-radix-cache")
"""vLLM's and SGLang's option."""
GIVE_UP_AFTER = 2
"""Failed cells in a row after which a variant is not tried any more."""
_DEATH_S = 2.0
"""Connections of a dying process break off this long before it is gone, at most."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Plan:
    """What is swept, and how."""

    concurrency: Sequence[int]
    input_tokens: Sequence[int]
    """Tokens of a prompt, about, by the first variant's tokenizer; the chat template is not counted."""
    output_tokens: Sequence[int]
    """Most tokens of an answer."""
    repeats: int = 3
    requests: int = 16
    """A cell and repeat; at least twice the concurrency."""
    residency: Literal["together", "alternate"] = "together"
    lengths: Literal["matched", "fixed"] | None = None
    """None: fixed if any weights are dummy, else matched."""
    limits: Limits | None = None
    seed: int = 0
    stall_s: float = 300.0
    """Seconds without a token after which a server has stalled."""
    cell_timeout_s: float = 3600.0
    """Seconds that a cell may take in all; of a server without a counter of tokens, the only limit."""


class _Place(NamedTuple):
    concurrency: int
    input_tokens: int
    output_tokens: int


def measure_sweep(
    served: Sequence[ServedVariant],
    conversations: Sequence[Prompt],
    plan: Plan,
    *,
    cache: Path,
    bench: BenchClient | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Measure every cell of every variant, or read it from the cache.

    A variant that fails is recorded so in its cells, with the reason, and the others go on.

    Args:
        served: the first one leads: prompts are counted by its tokenizer, and answers get its lengths.
        cache: folder of the finished cells.
        bench: a running benchmark process to use; None starts one and ends it.
        say: told a line a cell.

    Raises:
        MeasurementError: nothing to measure, names that are not one of a kind, or no benchmark here.
    """
    names = [one.variant.name for one in served]
    if not names or len(set(names)) != len(names):
        raise MeasurementError(f"a sweep needs variants with names of their own; it got {names}")
    if not (plan.concurrency and plan.input_tokens and plan.output_tokens and plan.repeats > 0):
        raise MeasurementError("a sweep needs a concurrency, an input length, an output length and a repeat")
    cache.mkdir(parents=True, exist_ok=True)
    own = bench or BenchClient()
    try:
        with contextlib.ExitStack() as servers:
            return _Sweeper(served, conversations, plan, cache, own, say, servers).run()
    finally:
        if bench is None:
            own.close()


class _Sweeper:
    def __init__(
        self,
        served: Sequence[ServedVariant],
        conversations: Sequence[Prompt],
        plan: Plan,
        cache: Path,
        bench: BenchClient,
        say: Callable[[str], None],
        servers: contextlib.ExitStack,
    ) -> None:
        self.served, self.plan, self.cache, self.bench, self.say = served, plan, cache, bench, say
        self.maker = PromptMaker(conversations, served[0].tokenizer, seed=plan.seed)
        dummy = any(one.variant.weights == "dummy" for one in served)
        self.lengths = plan.lengths or ("fixed" if dummy else "matched")
        self.environment = collect_environment()
        self.places = [
            _Place(c, i, o) for i in plan.input_tokens for o in plan.output_tokens for c in plan.concurrency
        ]
        self.cells: dict[tuple[str, _Place], list[Cell]] = {}
        self.failures: dict[tuple[str, _Place], Failure] = {}
        self.led: dict[tuple[_Place, int], tuple[int, ...]] = {}
        """Tokens of each answer of the first variant that gave some."""
        self.given_up: dict[str, Failure] = {}
        self.in_a_row: dict[str, int] = {}
        self.up: dict[str, tuple[Serving, contextlib.ExitStack]] = {}
        self.warm: set[tuple[str, _Place]] = set()
        for one in served:
            servers.callback(self._stop, one)

    def run(self) -> Sweep:
        for repeat in range(self.plan.repeats):
            if self.plan.residency == "together":
                for place in self.places:
                    for one in self.served:
                        self._visit(one, place, repeat)
            else:
                for one in self.served:
                    for place in self.places:
                        self._visit(one, place, repeat)
                    self._stop(one)
        variants = tuple(self._described(one.variant) for one in self.served)
        cells = tuple(self._concluded(variant, place) for place in self.places for variant in variants)
        uncached = all(set(NO_PREFIX_CACHE) & set(variant.command) for variant in variants)
        return Sweep(
            residency=self.plan.residency,
            repeats=self.plan.repeats,
            lengths=self.lengths,
            prefix_caching="off" if uncached else "as served",
            variants=variants,
            cells=cells,
            ratios=all_ratios(variants, cells),
            limits=self.plan.limits,
            prompts_digest=digest_of([self.maker.texts, self.plan.seed]),
            environment=self.environment,
            marks=tuple(variant.mark for variant in variants if variant.mark is not None),
        )

    def _described(self, variant: Variant) -> Variant:
        """With what only its answers tell: whether a server that ran already uses a draft."""
        cells = [cell for key, found in self.cells.items() if key[0] == variant.name for cell in found]
        if variant.acceptance is None and any(cell.acceptance_length is not None for cell in cells):
            return variant.model_copy(update={"acceptance": "measured"})
        return variant

    def _concluded(self, variant: Variant, place: _Place) -> SweepCell:
        key = (variant.name, place)
        return conclude_cell(
            variant, *place, self.cells.get(key, ()), self.plan.limits, self.failures.get(key)
        )

    def _visit(self, one: ServedVariant, place: _Place, repeat: int) -> None:
        """One (variant, cell, repeat), from the cache or measured."""
        name, key = one.variant.name, (one.variant.name, place)
        if key in self.failures:
            return
        count = max(self.plan.requests, 2 * place.concurrency)
        texts = self.maker.prompts(place.input_tokens, count, *place, repeat)
        lengths = (place.output_tokens,) * count if self.lengths == "fixed" else self.led.get((place, repeat))
        path = self.cache / f"sweep-{self._key(one.variant, place, repeat, texts, lengths)}.json"
        cell = read_cell(path)
        if cell is None:
            if (before := self.given_up.get(name)) is not None:
                said = f"given up after: {before.kind}: {before.message}"
                self.failures[key] = before.model_copy(update={"kind": "not tried", "message": said})
                return
            self.say(f"repeat {repeat + 1} of {self.plan.repeats}, {_said(place)}: {name}")
            try:
                cell = self._measure(one, place, texts, lengths, path)
            except ServingFailed as err:
                self._failed(one, key, err.failure)
                return
            write_json(path, cell.model_dump(mode="json"))
        self.in_a_row[name] = 0
        self.cells.setdefault(key, []).append(cell)
        # Servers refuse to give no token at all.
        self.led.setdefault((place, repeat), tuple(max(1, n) for n in cell.output_lengths))

    def _key(
        self,
        variant: Variant,
        place: _Place,
        repeat: int,
        texts: Sequence[str],
        lengths: Sequence[int] | None,
    ) -> str:
        identity = {
            "tool": "vllm bench serve, interleaved",
            "variant": variant.model_dump(mode="json", exclude={"name", "role"}),
            "place": list(place),
            "repeat": repeat,
            "texts": digest_of(list(texts)),
            "lengths": None if lengths is None else list(lengths),
            "machine": self.environment.machine,
        }
        return digest_of(identity).removeprefix("sha256:")[:20]

    def _failed(self, one: ServedVariant, key: tuple[str, _Place], failure: Failure) -> None:
        name = one.variant.name
        self.say(f"  {name}: {failure.kind}: {failure.message}")
        started = name in self.up
        self.failures[key] = failure
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
        if not started or failure.kind == "other model" or self.in_a_row[name] >= GIVE_UP_AFTER:
            self.given_up[name] = failure
        # The next cell gets a server that has not failed yet.
        self._stop(one)

    def _measure(
        self,
        one: ServedVariant,
        place: _Place,
        texts: Sequence[str],
        lengths: Sequence[int] | None,
        path: Path,
    ) -> Cell:
        serving = self._serving(one)
        url, engine = resolve_url(serving.target.url), one.variant.engine
        watch = _Watch(serving, url, self.plan.stall_s)
        meter = PowerMeter() if urlsplit(url).hostname in _LOOPBACK else None
        try:
            self._warm_up(one.variant.name, serving, place)
            forgotten = forget_acceptance(url, engine)
            with meter or contextlib.nullcontext():
                cell = run_cell(
                    serving.target,
                    one.tokenizer,
                    [[{"role": "user", "content": text}] for text in texts],
                    lengths or [place.output_tokens] * len(texts),
                    exact=lengths is not None,
                    concurrency=place.concurrency,
                    warmups=0,
                    seed=self.plan.seed,
                    files=path,
                    bench=self.bench,
                    timeout_s=self.plan.cell_timeout_s,
                    watch=watch,
                )
        except BenchTimeout:
            said = f"not done after {self.plan.cell_timeout_s:.0f} s, at {_said(place)}"
            raise ServingFailed(Failure(kind="stalled", message=said, log_tail=serving.log_tail())) from None
        except (RequestsFailed, BenchFailed) as err:
            _await_death(serving)
            tail = serving.log_tail()
            # An engine may refuse requests for want of memory and live on.
            kind: FailureKind = "out of memory" if ran_out_of_memory("\n".join(tail)) else "requests failed"
            raise ServingFailed(Failure(kind=kind, message=err.message, log_tail=tail)) from None
        finally:
            for leftover in (".prompts.jsonl", ".raw.json"):
                path.with_suffix(leftover).unlink(missing_ok=True)
        power = meter.power if meter is not None else None
        return cell.model_copy(
            update={
                "reported_acceptance_length": acceptance_length(url, engine, forgotten=forgotten),
                "power_w": power and power.watts,
                "power_of": power and power.of,
            }
        )

    def _serving(self, one: ServedVariant) -> Serving:
        name = one.variant.name
        if name not in self.up:
            self.bench.warm()
            stack = contextlib.ExitStack()
            with stack:
                serving = stack.enter_context(one.serve())
                require_model(serving)
                self.up[name] = (serving, stack.pop_all())
        return self.up[name][0]

    def _stop(self, one: ServedVariant) -> None:
        found = self.up.pop(one.variant.name, None)
        self.warm = {key for key in self.warm if key[0] != one.variant.name}
        if found is not None:
            found[1].close()

    def _warm_up(self, name: str, serving: Serving, place: _Place) -> None:
        """A full batch when a server first meets this cell, one request when it comes back to it; with
        prompts that are measured nowhere."""
        first = (name, place) not in self.warm
        texts = self.maker.prompts(place.input_tokens, place.concurrency if first else 1, *place, -1)
        try:
            warm_up(serving.target, texts, stall_s=self.plan.stall_s, log_tail=serving.log_tail)
        except ServingFailed as err:
            if err.failure.kind != "stalled":
                _await_death(serving)
            raise
        self.warm.add((name, place))


class _Watch:
    """Raises once a server is dead, or has given no token for `stall_s`."""

    def __init__(self, serving: Serving, url: str, stall_s: float) -> None:
        self.serving, self.url, self.stall_s = serving, url, stall_s
        self.tokens: float | None = None
        self.moved = time.monotonic()
        # A cell that is over by then is never disturbed.
        self.next = self.moved + stall_s / 4

    def __call__(self) -> None:
        self.serving.check_alive()
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + self.stall_s / 4
        tokens = generated_tokens(self.url)
        if tokens is not None and tokens != self.tokens:
            self.tokens, self.moved = tokens, now
        elif self.tokens is not None and now - self.moved >= self.stall_s:
            said = f"no token for {now - self.moved:.0f} s, after {self.tokens:.0f} since its start"
            raise ServingFailed(Failure(kind="stalled", message=said, log_tail=self.serving.log_tail()))


def _await_death(serving: Serving) -> None:
    """Raise what `check_alive` raises, if the process ends within `_DEATH_S`."""
    deadline = time.monotonic() + _DEATH_S
    while True:
        serving.check_alive()
        if time.monotonic() >= deadline:
            return
        time.sleep(0.05)


def _said(place: _Place) -> str:
    return f"{place.input_tokens} tokens in, {place.output_tokens} out, {place.concurrency} at once"
