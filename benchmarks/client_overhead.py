"""Throughput through our client against `vllm bench serve`, on one server, one load, in one run.

    python benchmarks/client_overhead.py [--prompts 200] [--concurrency 8] [--repeats 3] [--json FILE]

The nano answers the same prompts, greedily and to their natural end, for both clients in turn; a pass of each
goes before and is not counted, so that the prefix cache is as warm for one as for the other. The ratio is of
the medians of output tokens a second; 0.95 or more is asked for. Ours keeps every answer on disk while it
measures, as it does in a validation, and does not stream, which spares the server some work; in a third row
it asks for log-probabilities, which cost the server too. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from packager.nano import CHECKPOINT, language
from packager.serving import Server, ServeSpec
from validation.bench_client import BenchClient
from validation.endpoint import Sampling, Target
from validation.tasks import Item, items_from
from validation.throughput import measure_throughput

OUTPUT_TOKENS = 64
LEAST_RATIO = 0.95


def ours(target: Target, items: list[Item], concurrency: int, cache: Path, top: int | None) -> float:
    """Output tokens a second."""
    fresh = Target(target.url, target.model, target.subject, target.label, cache)
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, top_logprobs=top)
    began = time.perf_counter()
    answers = fresh.ask([item.request for item in items], sampling, concurrency=concurrency)
    return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - began)


def theirs(target: Target, items: list[Item], concurrency: int, cache: Path, bench: BenchClient) -> float:
    """Output tokens a second, as `vllm bench serve` counts them."""
    fresh = Target(target.url, target.model, target.subject, target.label, cache)
    run = measure_throughput(
        fresh,
        tokenizer=CHECKPOINT,
        prompts=items,
        concurrency=[concurrency],
        output_tokens=OUTPUT_TOKENS,
        bench=bench,
    )
    return run.cells[0].output_tokens_per_s


def main() -> int:
    """Print the table; 1 if our client is slower than asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    items = items_from(language.heldout_items(-(-options.prompts // 6), 11))[: options.prompts]
    rows: dict[str, list[float]] = {"vllm bench serve": [], "our client": [], "our client, logprobs": []}
    with tempfile.TemporaryDirectory() as temporary, BenchClient() as bench:
        work = Path(temporary)
        with Server(ServeSpec(model=CHECKPOINT), work / "serve.log") as server:
            target = Target(server.url, "model", "nano", "nano", work)
            for number in range(options.repeats + 1):
                cache = work / str(number)
                found = {
                    "vllm bench serve": theirs(target, items, options.concurrency, cache, bench),
                    "our client": ours(target, items, options.concurrency, cache, None),
                    "our client, logprobs": ours(target, items, options.concurrency, cache, 5),
                }
                for name, speed in found.items() if number else ():
                    rows[name].append(speed)
    median = {name: statistics.median(speeds) for name, speeds in rows.items()}
    base = median["vllm bench serve"]
    print(f"{len(items)} prompts, {options.concurrency} at once, {options.repeats} runs of each in turn\n")
    for name, speeds in rows.items():
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        print(f"{name:<24} {median[name]:8.0f} tokens/s ({spread}), ratio {median[name] / base:.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows))
    return 0 if median["our client"] >= LEAST_RATIO * base else 1


if __name__ == "__main__":
    sys.exit(main())
