"""One cell of a throughput measurement: one server, one concurrency, one run of `vllm bench serve`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from validation.bench_client import BenchClient
from validation.document import Document, canonical_json, resolve_url
from validation.endpoint import Message, Target
from validation.errors import MeasurementError
from validation.tasks.items import Item

Prompt = Item | Sequence[Message | Mapping[str, Any]]
"""A conversation: an item, or its messages."""


class Spread(Document):
    """A time over the requests of a cell, in milliseconds."""

    median: float
    mean: float
    p90: float | None = None
    """None in runs that older versions measured; so is every field below that may be None."""
    p95: float | None = None
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
    e2el_ms: Spread | None = None
    """Time from sending a request to the last of its answer; waiting for a free slot is not in it."""
    acceptance: Acceptance | None
    """None: the server reports no speculative decoding, or no counters of it."""
    reported_acceptance_length: float | None = None
    """What an engine without such counters says itself (SGLang); see `validation.engines`."""
    output_lengths: tuple[int, ...]
    """Tokens of each answer, in the order of the prompts."""
    request_ttft_ms: tuple[float, ...] = ()
    """Time to the first token of each, in the order of the prompts."""
    request_e2el_ms: tuple[float, ...] = ()
    power_w: float | None = None
    """Mean over the cell; None: nothing here tells it."""
    power_of: str | None = None
    """Whose power that is, and who says so, such as `2 GPUs, nvidia-smi`."""

    @property
    def acceptance_length(self) -> float | None:
        """Tokens out of one verification step, from whichever source there is."""
        return self.acceptance.length if self.acceptance is not None else self.reported_acceptance_length


class RequestsFailed(MeasurementError):
    """Requests of a cell were refused or broken off; nothing of it counts."""


def run_cell(
    target: Target,
    tokenizer: Path,
    conversations: list[list[dict[str, str]]],
    lengths: Sequence[int],
    *,
    exact: bool,
    concurrency: int,
    warmups: int,
    seed: int,
    files: Path,
    bench: BenchClient,
    timeout_s: float,
    watch: Callable[[], None] | None = None,
) -> Cell:
    """Send every conversation once, greedy, `concurrency` at a time.

    Args:
        tokenizer: folder of the tokenizer and chat template.
        lengths: most tokens of each answer; with `exact`, how many it has, past its own end.
        warmups: unmeasured requests before, all with the first conversation.
        files: the prompts and the benchmark's raw result are left beside this path.
        watch: see `BenchClient.run`.

    Raises:
        RequestsFailed: not all requests were answered.
        MeasurementError: see `BenchClient.run`; or the result cannot be read.
    """
    base, model = resolve_url(target.url), target.model
    plain = all(len(c) == 1 and c[0]["role"] == "user" for c in conversations)
    texts = [c[0]["content"] for c in conversations] if plain else _rendered(base, model, conversations)
    dataset = files.with_suffix(".prompts.jsonl")
    rows = [{"prompt": t, "output_tokens": n} for t, n in zip(texts, lengths, strict=True)]
    dataset.write_text("".join(canonical_json(r) + "\n" for r in rows), encoding="utf-8")
    raw = files.with_suffix(".raw.json")
    raw.unlink(missing_ok=True)
    arguments = [
        *("--backend", "openai", "--base-url", base, "--endpoint", "/v1/completions"),
        *("--model", model, "--served-model-name", model, "--tokenizer", str(tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(dataset), "--custom-output-len", "-1"),
        *("--num-prompts", str(len(rows)), "--max-concurrency", str(concurrency), "--disable-shuffle"),
        *("--num-warmups", str(warmups), "--seed", str(seed), "--temperature", "0"),
        *("--ready-check-timeout-sec", "0", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "90,95,99"),
        *("--save-result", "--save-detailed", "--result-dir", str(raw.parent), "--result-filename", raw.name),
    ]
    if not plain:
        arguments.append("--skip-chat-template")
    if exact:
        arguments.append("--ignore-eos")
    bench.run(arguments, timeout_s=timeout_s, watch=watch)
    try:
        result = json.loads(raw.read_bytes())
        cell = _cell(result, concurrency, len(rows))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise MeasurementError(
            f"vllm bench serve left no readable result: {type(err).__name__}: {err}"
        ) from None
    if cell.failed or cell.completed != len(rows):
        errors = next((str(e) for e in result.get("errors", ()) if e), "it gives no reason")
        raise RequestsFailed(
            f"{len(rows) - cell.completed} of {len(rows)} requests failed at concurrency {concurrency}: "
            f"{' '.join(errors.split())[-300:]}",
            "See the server's log.",
        )
    return cell


def _cell(result: dict[str, Any], concurrency: int, requests: int) -> Cell:
    def spread(metric: str) -> Spread:
        return Spread(
            median=result[f"median_{metric}_ms"],
            mean=result[f"mean_{metric}_ms"],
            p90=result.get(f"p90_{metric}_ms"),
            p95=result.get(f"p95_{metric}_ms"),
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
        e2el_ms=spread("e2el") if "median_e2el_ms" in result else None,
        acceptance=acceptance,
        output_lengths=tuple(result["output_lens"]),
        request_ttft_ms=tuple(1000 * seconds for seconds in result.get("ttfts", ())),
        request_e2el_ms=tuple(1000 * seconds for seconds in result.get("latencies", ())),
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


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    turns = prompt.messages if isinstance(prompt, Item) else prompt
    return [
        t.model_dump() if isinstance(t, Message) else Message.model_validate(t).model_dump() for t in turns
    ]


def read_cell(path: Path) -> Cell | None:
    try:
        return Cell.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(canonical_json(value))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
