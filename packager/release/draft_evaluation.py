"""A draft measured on its target: acceptance, identity of the output, speed against no draft, what to serve.

One server without a draft, then one for each draft length K; never two at once, because on one machine they
spoil each other's speed. Every server answers the same prompts in the same order:

    without   answers with log-probabilities at each concurrency (the reference), then timed
    with K    untimed and group by group (acceptance by task and language), then timed at each concurrency

The untimed pass comes first everywhere, so that both sides decode from equally warm prefix caches. A timed
pass may be repeated; the fastest counts, on both sides.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.draft.acceptance import (
    AcceptanceReport,
    Answers,
    Evaluation,
    acceptance_from_metrics,
    ask,
    evaluate,
)
from packager.draft.speedup import (
    Agreement,
    BreakEven,
    agreement,
    best_tokens,
    break_even,
    paying_context,
    schedule,
)
from packager.errors import BadInput
from packager.serving import Server, ServeSpec

if TYPE_CHECKING:
    from validation.identity import Difference, TokenSequence

Say = Callable[[str], None]
Prompts = Sequence[Mapping[str, Any]]
_TOP_LOGPROBS = 5


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    serve: ServeSpec
    """The target; its draft and draft length are set here for each server."""
    draft: Path
    prompts: Prompts
    """With `id`, `messages`, `task`, `language`."""
    tokens: tuple[int, ...]
    """Draft lengths K."""
    concurrency: tuple[int, ...]
    max_tokens: int
    """Longest answer."""
    repeats: int = 1
    contexts: tuple[int, ...] = ()
    """Upper ends of the prompt lengths (tokens) by which acceptance and decoding speed are measured."""
    long_prompts: Prompts = ()
    """Long prompts for `contexts`; none: `prompts` are sorted by their own length."""


@dataclass(frozen=True)
class Identity:
    """Greedy answers against the reference answers at the same concurrency."""

    of: int
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> int:
        """Answers that are the same token by token."""
        return self.of - len(self.differences)

    @property
    def unexplained(self) -> int:
        """Differences that do not start at a near tie of the target."""
        return sum(not one.near_tie for one in self.differences)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "of": self.of,
            "identical": self.identical,
            "share": self.identical / self.of,
            "before_any_near_tie": self.unexplained,
            "differences": [
                one.model_dump(include={"id", "position", "gap_nats", "gap_at_least_nats", "near_tie"})
                for one in self.differences
            ],
        }


@dataclass(frozen=True)
class Cell:
    """One server at one concurrency, or at one context length."""

    output_tokens: int
    seconds: float
    acceptance: AcceptanceReport | None = None
    identity: Identity | None = None
    prompt_tokens: int = 0
    """Median over the prompts."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second, all requests together."""
        return self.output_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "tokens_per_s": self.tokens_per_s,
            "output_tokens": self.output_tokens,
            "seconds": self.seconds,
            "prompt_tokens": self.prompt_tokens,
        }
        if self.acceptance is not None:
            found["acceptance"] = self.acceptance.as_dict()
        if self.identity is not None:
            found["identity"] = self.identity.as_dict()
        return found


@dataclass(frozen=True)
class ServerRun:
    """What one server did; `tokens` 0: it had no draft."""

    tokens: int
    cells: dict[int, Cell]
    """By concurrency."""
    contexts: dict[int, Cell]
    """By upper end of the prompt length, at the lowest concurrency."""
    groups: Evaluation | None
    """Acceptance by task and language; None without a draft."""


@dataclass(frozen=True)
class DraftEvaluation:
    """All servers."""

    plan: Plan
    without: ServerRun
    runs: tuple[ServerRun, ...]
    batch_noise: Identity
    """Without a draft: the highest concurrency against the lowest. What batching alone changes."""
    predictions: dict[int, Agreement]

    @cached_property
    def speedups(self) -> dict[int, dict[int, float]]:
        """Output tokens/s with over without, by K and concurrency."""
        return {run.tokens: _ratios(run.cells, self.without.cells) for run in self.runs}

    @cached_property
    def context_speedups(self) -> dict[int, dict[int, float]]:
        """The same by K and context."""
        return {run.tokens: _ratios(run.contexts, self.without.contexts) for run in self.runs}

    @property
    def break_even(self) -> dict[int, BreakEven]:
        """By K."""
        return {tokens: break_even(ratios) for tokens, ratios in self.speedups.items()}

    @property
    def best(self) -> dict[int, tuple[int, float]]:
        """Fastest K and its speed-up by concurrency; K = 0 where none pays."""
        return best_tokens(self.speedups)

    def serve_settings(self) -> dict[str, Any]:
        """The `serve` section of a recipe, or of a profile in serve.yaml, that these figures ask for."""
        ranges = schedule({level: tokens for level, (tokens, _) in self.best.items()})
        found: dict[str, Any] = {"speculation": [one.model_dump(exclude_none=True) for one in ranges]}
        longest = max(one.num_speculative_tokens for one in ranges)
        if longest and self.plan.contexts:
            limit = paying_context(self.context_speedups[longest])
            if limit:
                found["speculation_max_context"] = limit
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan = self.plan
        return {
            "prompts": len(plan.prompts),
            "max_response_tokens": plan.max_tokens,
            "repeats": plan.repeats,
            "concurrency": list(plan.concurrency),
            "without_draft": _run_dict(self.without),
            "with_draft": [
                {
                    **_run_dict(run),
                    "speedup": {str(level): ratio for level, ratio in self.speedups[run.tokens].items()},
                    "context_speedup": {
                        str(length): ratio for length, ratio in self.context_speedups[run.tokens].items()
                    },
                    "break_even": self.break_even[run.tokens].as_dict(),
                    "predicted": (
                        self.predictions[run.tokens].as_dict() if run.tokens in self.predictions else None
                    ),
                }
                for run in self.runs
            ],
            "batch_noise": self.batch_noise.as_dict(),
            "best": [
                {"concurrency": level, "num_speculative_tokens": tokens, "speedup": ratio}
                for level, (tokens, ratio) in self.best.items()
            ],
            "serve": self.serve_settings(),
        }


def _ratios(cells: Mapping[int, Cell], base: Mapping[int, Cell]) -> dict[int, float]:
    return {key: cell.tokens_per_s / base[key].tokens_per_s for key, cell in cells.items() if key in base}


def _run_dict(run: ServerRun) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_speculative_tokens": run.tokens,
        "by_concurrency": {str(level): cell.as_dict() for level, cell in run.cells.items()},
        "by_context": {str(length): cell.as_dict() for length, cell in run.contexts.items()},
    }
    return found | (run.groups.as_dict() if run.groups else {})


def evaluate_draft(plan: Plan, metrics: Mapping[str, Any], say: Say) -> DraftEvaluation:
    """Serve and measure.

    Args:
        metrics: of the draft's manifest, where it has one: the acceptance that training predicted.
        say: called with a line of progress at a time.

    Raises:
        BadInput: no prompts; the draft proposes nothing.
        RemoteFailure: the engine does not start or does not answer, e.g. because it cannot load the draft.
    """
    if not plan.prompts:
        raise BadInput("no prompts to evaluate the draft on")
    logs = Path(tempfile.mkdtemp(prefix="draft-evaluate-"))
    reference, without, by_context, noise = _without_draft(plan, logs, say)
    runs = tuple(_with_draft(plan, tokens, reference, by_context, logs, say) for tokens in plan.tokens)
    shutil.rmtree(logs)  # after a failure the engine's log is what the error points to
    found = {}
    for run in runs:
        served = run.cells[plan.concurrency[0]].acceptance
        tasks = {task: one.drafts for task, one in run.groups.by_task.items()} if run.groups else {}
        if served and (one := agreement(metrics, run.tokens, served.length, tasks)):
            found[run.tokens] = one
    return DraftEvaluation(plan, without, runs, noise, found)


def _without_draft(
    plan: Plan, logs: Path, say: Say
) -> tuple[dict[int, list[TokenSequence]], ServerRun, dict[int, list[Mapping[str, Any]]], Identity]:
    with Server(replace(plan.serve, draft=None), logs / "without.log") as server:
        say(f"without a draft: served after {server.startup_s:.0f} s")
        reference = {level: _reference(server, plan, level, logs) for level in plan.concurrency}
        cells = {}
        for level in plan.concurrency:
            answers = _fastest(server, plan, level)
            cells[level] = Cell(answers.output_tokens, answers.seconds, prompt_tokens=_prompt_length(answers))
            say(f"without a draft, concurrency {level}: {cells[level].tokens_per_s:.0f} tokens/s")
        by_context = _by_context(server, plan)
        contexts = _contexts(server, plan, by_context, say)
    low, high = reference[plan.concurrency[0]], reference[plan.concurrency[-1]]
    noise = _identity(low, [([t.token for t in one.tokens], one.text) for one in high])
    return reference, ServerRun(0, cells, contexts, None), by_context, noise


def _with_draft(
    plan: Plan,
    tokens: int,
    reference: Mapping[int, list[TokenSequence]],
    by_context: Mapping[int, Prompts],
    logs: Path,
    say: Say,
) -> ServerRun:
    spec = replace(plan.serve, draft=plan.draft, num_speculative_tokens=tokens)
    with Server(spec, logs / f"with-{tokens}.log") as server:
        say(f"{tokens} draft tokens: served after {server.startup_s:.0f} s")
        groups = evaluate(
            server.url,
            spec.served_name,
            server.metrics,
            plan.prompts,
            max_tokens=plan.max_tokens,
            concurrency=plan.concurrency[-1],
        )
        cells = {}
        for level in plan.concurrency:
            before = server.metrics()
            answers = _fastest(server, plan, level)
            accepted = acceptance_from_metrics(before, server.metrics())
            if not all(answer.token_ids for answer in answers.answers):
                raise BadInput("the engine gives no token ids, so outputs cannot be compared")
            given = [([f"token_id:{i}" for i in one.token_ids], one.text) for one in answers.answers]
            cells[level] = Cell(
                answers.output_tokens,
                answers.seconds,
                accepted,
                _identity(reference[level], given),
                _prompt_length(answers),
            )
            say(
                f"{tokens} draft tokens, concurrency {level}: {cells[level].tokens_per_s:.0f} tokens/s, "
                f"acceptance length {accepted.length:.2f}"
            )
        contexts = _contexts(server, plan, by_context, say)
    return ServerRun(tokens, cells, contexts, groups)


def _fastest(server: Server, plan: Plan, concurrency: int) -> Answers:
    passes = [
        ask(
            server.url,
            server.spec.served_name,
            plan.prompts,
            max_tokens=plan.max_tokens,
            concurrency=concurrency,
        )
        for _ in range(plan.repeats)
    ]
    return min(passes, key=lambda one: one.seconds)


def _reference(server: Server, plan: Plan, concurrency: int, cache: Path) -> list[TokenSequence]:
    """Greedy answers with the log-probabilities that tell a near tie; greedy, so asked once."""
    from validation.endpoint import Message, Request, Sampling, Target
    from validation.identity import TokenSequence

    target = Target(
        server.url, server.spec.served_name, "this server", "without a draft", cache / str(concurrency)
    )
    requests = [
        Request(id=str(one["id"]), messages=tuple(Message.model_validate(m) for m in one["messages"]))
        for one in plan.prompts
    ]
    sampling = Sampling(max_tokens=plan.max_tokens, top_logprobs=_TOP_LOGPROBS, seed=None)
    answers = target.ask(requests, sampling, concurrency=concurrency, timeout_s=600)
    if any(one.tokens is None for one in answers):
        raise BadInput("the engine gives no log-probabilities, so outputs cannot be compared")
    return [
        TokenSequence(id=one.id, text=one.text, finish_reason=one.finish_reason, tokens=one.tokens or ())
        for one in answers
    ]


def _identity(reference: Sequence[TokenSequence], given: Sequence[tuple[list[str], str]]) -> Identity:
    from validation.identity import first_difference

    found = [
        first_difference(one, tokens, text) for one, (tokens, text) in zip(reference, given, strict=True)
    ]
    return Identity(len(reference), tuple(one for one in found if one is not None))


def _prompt_length(answers: Answers) -> int:
    return round(statistics.median(one.prompt_tokens for one in answers.answers))


def _by_context(server: Server, plan: Plan) -> dict[int, list[Mapping[str, Any]]]:
    """The long prompts, or else the prompts, by the smallest of `plan.contexts` that their tokens fit in."""
    if not plan.contexts:
        return {}
    prompts = plan.long_prompts or plan.prompts
    lengths = [
        one.prompt_tokens
        for one in ask(server.url, server.spec.served_name, prompts, max_tokens=1, concurrency=4).answers
    ]
    found: dict[int, list[Mapping[str, Any]]] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        end = next((end for end in sorted(plan.contexts) if length <= end), None)
        if end is not None:
            found.setdefault(end, []).append(prompt)
    return dict(sorted(found.items()))


def _contexts(server: Server, plan: Plan, by_context: Mapping[int, Prompts], say: Say) -> dict[int, Cell]:
    found = {}
    for length, prompts in by_context.items():
        cell = _context_cell(server, plan, prompts)
        if cell is None:
            say(f"answers to {len(prompts)} prompts up to {length} tokens are too short to time")
        else:
            found[length] = cell
    return found


def _context_cell(server: Server, plan: Plan, prompts: Prompts) -> Cell | None:
    """Decoding behind prompts of one length, the first token of each answer left out.

    The prompts are read once before. Still the first token takes part of a prompt's time, with a draft more
    of it (vLLM reads the last cached block again), and answers from long records are short: so the time of a
    pass that ends after the first token is taken off. None: nothing is left.
    """
    name, level = server.spec.served_name, plan.concurrency[0]

    def passes(tokens: int) -> Answers:
        done = [
            ask(server.url, name, prompts, max_tokens=tokens, concurrency=level) for _ in range(plan.repeats)
        ]
        return min(done, key=lambda one: one.seconds)

    ask(server.url, name, prompts, max_tokens=2, concurrency=level)
    first = passes(1)
    before = server.metrics()
    whole = passes(plan.max_tokens)
    accepted = acceptance_from_metrics(before, server.metrics()) if server.spec.draft else None
    if whole.seconds <= first.seconds or whole.output_tokens <= len(prompts):
        return None
    return Cell(
        whole.output_tokens - len(prompts),
        whole.seconds - first.seconds,
        accepted,
        prompt_tokens=_prompt_length(whole),
    )
