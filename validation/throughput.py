"""Speed of a served model: `vllm bench serve` on real prompts, and a plain streaming client of our own.

Candidates are measured one after another, not interleaved: one small machine holds one server at a time.
What drifts between two visits (temperature, other load) is therefore part of a ratio; run on an idle
machine. Prompts recur from one concurrency to the next, so an engine's prefix cache may shorten the time to
the first token.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import ValidationError

from validation.bench_client import BenchClient
from validation.document import Document, canonical_json, digest_of, resolve_url
from validation.endpoint import Message, Target
from validation.environment import collect_environment
from validation.errors import MeasurementError
from validation.streaming import stream_chat
from validation.tasks.items import Item

Prompt = Item | Sequence[Message | Mapping[str, Any]]
"""A conversation: an item, or its messages."""


class Spread(Document):
    """A time over the requests of a cell, in milliseconds."""

    median: float
    mean: float
    p99: float


class Acceptance(Document):
    """Speculative decoding during a cell, from the engine's own counters."""

    length: float
    """Tokens out of one verification step: 1 + accepted / drafts."""
    per_position: tuple[float, ...]
    """Share of drafts whose token at this position was accepted; falls with position (unconditional)."""
    drafts: int
    draft_tokens: int
    accepted_tokens: int


class Cell(Document):
    """One concurrency."""

    concurrency: int
    requests: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    duration_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Spread
    """Time to the first token."""
    tpot_ms: Spread
    """Time per output token after the first."""
    itl_ms: Spread
    """Time between two arrivals; with a draft one arrival may hold several tokens."""
    acceptance: Acceptance | None
    """None: the server reports no speculative decoding."""
    output_lengths: tuple[int, ...]
    """Tokens of each answer, in the order of the prompts."""


class ThroughputRun(Document):
    """One served model over a sweep of concurrencies."""

    schema_version: int = 1
    label: str
    subject: str
    tool: str = "vllm bench serve"
    order: Literal["sequential"] = "sequential"
    """Candidates one after another; see the module's text."""
    prompts: int
    prompts_digest: str
    output_tokens: int
    """Most tokens of an answer."""
    lengths: Literal["natural", "matched"]
    """Natural: answers end by themselves. Matched: each has exactly as many tokens as in `matched_to`."""
    matched_to: str | None
    cells: tuple[Cell, ...]

    def at(self, concurrency: int) -> Cell | None:
        """The cell of one concurrency, if it was measured."""
        return next((c for c in self.cells if c.concurrency == concurrency), None)


class Ratio(Document):
    """Candidate over baseline at one concurrency; above 1 the candidate is faster."""

    concurrency: int
    candidate: str
    baseline: str
    candidate_tokens_per_s: float
    baseline_tokens_per_s: float
    ratio: float
    """Of output tokens/s."""
    tpot_ratio: float
    """Baseline TPOT over candidate TPOT (medians)."""


class DecodeSpeed(Document):
    """Decoding of one answer at a time, by our own streaming client."""

    schema_version: int = 1
    label: str
    subject: str
    prompts: int
    repeats: int
    output_tokens: int
    tokens_per_s: float
    """Median over repeats of (tokens after the first) / (time after the first)."""
    low: float
    high: float
    """Slowest and fastest repeat."""
    ttft_ms: float
    """Median time to the first token."""


def measure_throughput(
    target: Target,
    *,
    tokenizer: Path,
    prompts: Sequence[Prompt],
    concurrency: Sequence[int],
    output_tokens: int,
    bench: BenchClient | None = None,
    match: ThroughputRun | None = None,
    warmups: int = 2,
    seed: int = 0,
    timeout_s: float = 1800.0,
) -> ThroughputRun:
    """Drive a server with `vllm bench serve` at each concurrency; finished cells are read from its cache.

    Args:
        tokenizer: directory with the model's tokenizer, to count tokens and to apply the chat template.
        prompts: all of them are sent at each concurrency, greedy.
        output_tokens: most tokens of an answer.
        bench: a running benchmark process to use; None starts one and ends it.
        match: give each answer exactly as many tokens as in this run, ignoring the end of the answer, so that
            a baseline whose answers mean nothing does the same work.

    Raises:
        MeasurementError: a run failed or had failed requests, or `match` has other prompts.
    """
    if not prompts or not concurrency:
        raise MeasurementError("throughput needs at least one prompt and one concurrency")
    conversations = [_messages(p) for p in prompts]
    prompts_digest = digest_of(conversations)
    if match is not None and match.prompts_digest != prompts_digest:
        raise MeasurementError(f"{match.label} was measured on other prompts; lengths cannot be matched")
    machine = collect_environment().machine
    target.cache.mkdir(parents=True, exist_ok=True)
    own = bench or BenchClient()
    try:
        cells = []
        for level in concurrency:
            lengths = _matched_lengths(match, level)
            key = digest_of(
                {
                    "tool": "vllm bench serve",
                    "subject": target.subject,
                    "prompts": prompts_digest,
                    "concurrency": level,
                    "output_tokens": output_tokens,
                    "lengths": lengths,
                    "warmups": warmups,
                    "seed": seed,
                    "machine": machine,
                }
            ).removeprefix("sha256:")[:20]
            path = target.cache / f"throughput-{key}.json"
            cell = _read_cell(path)
            if cell is None:
                cell = _run_cell(
                    target,
                    tokenizer,
                    conversations,
                    lengths or [output_tokens] * len(conversations),
                    lengths is not None,
                    level,
                    warmups,
                    seed,
                    path,
                    own,
                    timeout_s,
                )
            cells.append(cell)
    finally:
        if bench is None:
            own.close()
    return ThroughputRun(
        label=target.label,
        subject=target.subject,
        prompts=len(conversations),
        prompts_digest=prompts_digest,
        output_tokens=output_tokens,
        lengths="natural" if match is None else "matched",
        matched_to=None if match is None else match.label,
        cells=tuple(cells),
    )


def compare_throughput(baseline: ThroughputRun, candidate: ThroughputRun) -> list[Ratio]:
    """The ratio at each concurrency that both runs have."""
    ratios = []
    for cell in candidate.cells:
        base = baseline.at(cell.concurrency)
        if base is None:
            continue
        ratios.append(
            Ratio(
                concurrency=cell.concurrency,
                candidate=candidate.label,
                baseline=baseline.label,
                candidate_tokens_per_s=cell.output_tokens_per_s,
                baseline_tokens_per_s=base.output_tokens_per_s,
                ratio=cell.output_tokens_per_s / base.output_tokens_per_s,
                tpot_ratio=base.tpot_ms.median / cell.tpot_ms.median if cell.tpot_ms.median else 0.0,
            )
        )
    return ratios


def measure_decode_speed(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    output_tokens: int = 128,
    repeats: int = 3,
    timeout_s: float = 120.0,
) -> DecodeSpeed:
    """Greedy answers one at a time, streamed; each prompt `repeats` times after one unmeasured answer.

    Raises:
        ServerUnreachable: the server stopped answering. MeasurementError: no answer had two tokens.
    """
    conversations = [_messages(p) for p in prompts]
    settings = {
        "subject": target.subject,
        "prompts": digest_of(conversations),
        "output_tokens": output_tokens,
        "repeats": repeats,
        "machine": collect_environment().machine,
    }
    path = target.cache / f"decode-{digest_of(settings).removeprefix('sha256:')[:20]}.json"
    try:
        return DecodeSpeed.model_validate_json(path.read_bytes()).model_copy(update={"label": target.label})
    except (OSError, ValidationError):
        pass
    speeds, firsts = [], []
    with httpx.Client(base_url=resolve_url(target.url), timeout=timeout_s, trust_env=False) as client:
        stream_chat(client, target.model, conversations[0], max_tokens=output_tokens)
        for _ in range(repeats):
            tokens, seconds = 0, 0.0
            for conversation in conversations:
                answer = stream_chat(client, target.model, conversation, max_tokens=output_tokens)
                firsts.append(1000 * answer.first_s)
                tokens, seconds = tokens + max(0, answer.completion_tokens - 1), seconds + answer.rest_s
            if tokens == 0 or seconds <= 0:
                raise MeasurementError(
                    f"{target.label}: no answer had two tokens; decode speed cannot be measured"
                )
            speeds.append(tokens / seconds)
    result = DecodeSpeed(
        label=target.label,
        subject=target.subject,
        prompts=len(conversations),
        repeats=repeats,
        output_tokens=output_tokens,
        tokens_per_s=statistics.median(speeds),
        low=min(speeds),
        high=max(speeds),
        ttft_ms=statistics.median(firsts),
    )
    _write(path, result.model_dump(mode="json"))
    return result


def _run_cell(
    target: Target,
    tokenizer: Path,
    conversations: list[list[dict[str, str]]],
    lengths: Sequence[int],
    exact: bool,
    concurrency: int,
    warmups: int,
    seed: int,
    path: Path,
    bench: BenchClient,
    timeout_s: float,
) -> Cell:
    base, model = resolve_url(target.url), target.model
    plain = all(len(c) == 1 and c[0]["role"] == "user" for c in conversations)
    texts = [c[0]["content"] for c in conversations] if plain else _rendered(base, model, conversations)
    dataset = path.with_suffix(".prompts.jsonl")
    rows = [{"prompt": t, "output_tokens": n} for t, n in zip(texts, lengths, strict=True)]
    dataset.write_text("".join(canonical_json(r) + "\n" for r in rows), encoding="utf-8")
    raw = path.with_suffix(".raw.json")
    raw.unlink(missing_ok=True)
    arguments = [
        *("--backend", "openai", "--base-url", base, "--endpoint", "/v1/completions"),
        *("--model", model, "--served-model-name", model, "--tokenizer", str(tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(dataset), "--custom-output-len", "-1"),
        *("--num-prompts", str(len(rows)), "--max-concurrency", str(concurrency), "--disable-shuffle"),
        *("--num-warmups", str(warmups), "--seed", str(seed), "--temperature", "0"),
        *("--ready-check-timeout-sec", "0", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl"),
        *("--save-result", "--save-detailed", "--result-dir", str(raw.parent), "--result-filename", raw.name),
    ]
    if not plain:
        arguments.append("--skip-chat-template")
    if exact:
        arguments.append("--ignore-eos")
    bench.run(arguments, timeout_s=timeout_s)
    try:
        result = json.loads(raw.read_bytes())
        cell = _cell(result, concurrency, len(rows))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise MeasurementError(
            f"vllm bench serve left no readable result: {type(err).__name__}: {err}"
        ) from None
    if cell.failed or cell.completed != len(rows):
        errors = next((str(e) for e in result.get("errors", ()) if e), "it gives no reason")
        raise MeasurementError(
            f"{len(rows) - cell.completed} of {len(rows)} requests failed at concurrency {concurrency}: "
            f"{' '.join(errors.split())[-300:]}",
            "See the server's log.",
        )
    _write(path, cell.model_dump(mode="json"))
    return cell


def _cell(result: dict[str, Any], concurrency: int, requests: int) -> Cell:
    def spread(metric: str) -> Spread:
        return Spread(
            median=result[f"median_{metric}_ms"],
            mean=result[f"mean_{metric}_ms"],
            p99=result[f"p99_{metric}_ms"],
        )

    acceptance = None
    if result.get("spec_decode_num_drafts"):
        acceptance = Acceptance(
            length=result["spec_decode_acceptance_length"],
            per_position=tuple(result["spec_decode_per_position_acceptance_rates"]),
            drafts=result["spec_decode_num_drafts"],
            draft_tokens=result["spec_decode_draft_tokens"],
            accepted_tokens=result["spec_decode_accepted_tokens"],
        )
    return Cell(
        concurrency=concurrency,
        requests=requests,
        completed=result["completed"],
        failed=result["failed"],
        input_tokens=result["total_input_tokens"],
        output_tokens=result["total_output_tokens"],
        duration_s=result["duration"],
        output_tokens_per_s=result["output_throughput"],
        total_tokens_per_s=result["total_token_throughput"],
        ttft_ms=spread("ttft"),
        tpot_ms=spread("tpot"),
        itl_ms=spread("itl"),
        acceptance=acceptance,
        output_lengths=tuple(result["output_lens"]),
    )


def _rendered(base: str, model: str, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Conversations of several turns as the server's own chat template writes them.

    The benchmark applies the template to a single user turn only.
    """
    texts = []
    with httpx.Client(base_url=base, timeout=60.0, trust_env=False) as client:
        for messages in conversations:
            try:
                answer = client.post("/tokenize", json={"model": model, "messages": messages})
                tokens = answer.raise_for_status().json()["tokens"]
                text = client.post("/detokenize", json={"model": model, "tokens": tokens})
                texts.append(str(text.raise_for_status().json()["prompt"]))
            except (httpx.HTTPError, ValueError, KeyError) as err:
                raise MeasurementError(
                    f"{base} does not render conversations of several turns: {err}",
                    "Use prompts of one user turn, or a server with /tokenize and /detokenize.",
                ) from None
    return texts


def _matched_lengths(match: ThroughputRun | None, concurrency: int) -> list[int] | None:
    if match is None:
        return None
    cell = match.at(concurrency) or match.cells[0]
    # A request for no token at all is refused by servers.
    return [max(1, n) for n in cell.output_lengths]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    turns = prompt.messages if isinstance(prompt, Item) else prompt
    return [
        t.model_dump() if isinstance(t, Message) else Message.model_validate(t).model_dump() for t in turns
    ]


def _read_cell(path: Path) -> Cell | None:
    try:
        return Cell.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(canonical_json(value))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
