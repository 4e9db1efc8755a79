"""Speed of a served model: `vllm bench serve` on real prompts, and a plain streaming client of our own.

Candidates are measured one after another, not interleaved: one small machine holds one server at a time.
What drifts between two visits (temperature, other load) is therefore part of a ratio; run on an idle
machine. Prompts recur from one concurrency to the next, so an engine's prefix cache may shorten the time to
the first token.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import httpx
from pydantic import ValidationError

from validation.bench_client import BenchClient
from validation.document import Document, digest_of, resolve_url
from validation.endpoint import Target
from validation.environment import collect_environment
from validation.errors import MeasurementError, ServerUnreachable
from validation.throughput_cell import (
    Acceptance,
    Cell,
    Prompt,
    Spread,
    messages_of,
    read_cell,
    run_cell,
    write_json,
)

__all__ = [
    "Acceptance",
    "Cell",
    "DecodeSpeed",
    "Prompt",
    "Ratio",
    "Spread",
    "ThroughputRun",
    "compare_throughput",
    "measure_decode_speed",
    "measure_throughput",
]


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
    conversations = [messages_of(p) for p in prompts]
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
            cell = read_cell(path)
            if cell is None:
                cell = run_cell(
                    target,
                    tokenizer,
                    conversations,
                    lengths or [output_tokens] * len(conversations),
                    exact=lengths is not None,
                    concurrency=level,
                    warmups=warmups,
                    seed=seed,
                    files=path,
                    bench=own,
                    timeout_s=timeout_s,
                )
                write_json(path, cell.model_dump(mode="json"))
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
    conversations = [messages_of(p) for p in prompts]
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
        _stream(client, target.model, conversations[0], output_tokens)
        for _ in range(repeats):
            tokens, seconds = 0, 0.0
            for conversation in conversations:
                count, first, rest = _stream(client, target.model, conversation, output_tokens)
                firsts.append(1000 * first)
                tokens, seconds = tokens + max(0, count - 1), seconds + rest
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
    write_json(path, result.model_dump(mode="json"))
    return result


def _stream(
    client: httpx.Client, model: str, messages: list[dict[str, str]], output_tokens: int
) -> tuple[int, float, float]:
    """Tokens, seconds to the first piece of text, seconds from the first piece to the last."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens, first, last = 0, None, 0.0
    began = time.perf_counter()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                said = " ".join(response.read().decode(errors="replace").split())[:300]
                raise MeasurementError(f"{client.base_url} answers HTTP {response.status_code}: {said}")
            for line in response.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                piece = json.loads(line.removeprefix("data:"))
                if any(c["delta"].get("content") for c in piece.get("choices", ())):
                    last = time.perf_counter()
                    first = last if first is None else first
                if piece.get("usage"):
                    tokens = piece["usage"]["completion_tokens"]
    except httpx.TransportError as err:
        raise ServerUnreachable(
            f"{client.base_url} broke off a streamed answer: {type(err).__name__}: {err}",
            "See the server's log.",
        ) from None
    if first is None:
        return 0, time.perf_counter() - began, 0.0
    return tokens, first - began, last - first


def _matched_lengths(match: ThroughputRun | None, concurrency: int) -> list[int] | None:
    if match is None:
        return None
    cell = match.at(concurrency) or match.cells[0]
    # A request for no token at all is refused by servers.
    return [max(1, n) for n in cell.output_lengths]
