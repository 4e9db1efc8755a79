"""How well calibrated bounds say what was not measured: the nano and its dense sibling on this machine.

    python benchmarks/prediction.py [--json FILE]

Both are served by vLLM in BF16 and decode 64 tokens for 1, 2, 4, 8 and 16 requests at once, after short and
after long prompts: twenty cells. Each is then predicted by a fit on the nineteen others, and the dense
model's by a fit on the mixture's alone, which is how one card or model is predicted from another. A step's
time is the mean inter-token latency of vLLM's own counters; prompts are in its prefix cache by then. Three
minutes; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from packager.layouts import recognise
from packager.nano import CHECKPOINT, language
from packager.nano.dense import write_dense
from packager.serving import Server, ServeSpec
from packager.serving.plan import shape_of
from validation.hardware import Card, measure_here
from validation.predict import Cell, calibrate, predict
from validation.roofline import Setting

LENGTH = 2048
OUTPUT_TOKENS = 64
CONCURRENCY = (1, 2, 4, 8, 16)
REPEATS = 2


def latency(client: httpx.Client) -> tuple[float, float]:
    """Sum (seconds) and number of the gaps between tokens that the server has seen."""
    sums = {"sum": 0.0, "count": 0.0}
    for line in client.get("/metrics").text.splitlines():
        for what in sums:
            if line.startswith(f"vllm:inter_token_latency_seconds_{what}"):
                sums[what] += float(line.rsplit(" ", 1)[1])
    return sums["sum"], sums["count"]


def ask(client: httpx.Client, messages: list[dict[str, str]]) -> int:
    """Have one answer of exactly `OUTPUT_TOKENS` tokens made; tokens of its prompt."""
    body = {
        "model": "model",
        "messages": messages,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "temperature": 0.0,
    }
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return int(answer["usage"]["prompt_tokens"])


def cells(name: str, model: Path, card: Card, prompts: dict[str, list[Any]], log: Path) -> list[Cell]:
    """Measure one model at every concurrency and prompt length."""
    shape = shape_of(recognise(json.loads((model / "config.json").read_text())), name)
    found = []
    # The position limit changes no rotation: the nano takes long prompts without reading them well.
    spec = ServeSpec(model=model, max_model_len=LENGTH, hf_overrides={"max_position_embeddings": LENGTH})
    with (
        Server(spec, log) as server,
        httpx.Client(
            base_url=server.url, timeout=300, trust_env=False, limits=httpx.Limits(max_connections=32)
        ) as client,
    ):
        for kind, conversations in prompts.items():
            for batch in CONCURRENCY:
                with ThreadPoolExecutor(batch) as pool:
                    asked = conversations[:batch]
                    lengths = list(pool.map(lambda messages: ask(client, messages), asked))
                    times = []
                    for _ in range(REPEATS):
                        before = latency(client)
                        list(pool.map(lambda messages: ask(client, messages), asked))
                        after = latency(client)
                        times.append((after[0] - before[0]) / (after[1] - before[1]))
                found.append(
                    Cell(
                        label=f"{name}, {batch} at once, {kind} prompts",
                        model=shape,
                        card=card,
                        setting=Setting(),
                        concurrency=batch,
                        context=sum(lengths) / batch + OUTPUT_TOKENS / 2,
                        seconds=min(times),
                    )
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write cells and predictions")
    options = parser.parse_args()
    card = measure_here()
    print(f"this machine: {1e3 * card.bandwidth_tb_s:.1f} GB/s, {1e3 * card.bf16_tflops:.1f} GFLOP/s")
    most = max(CONCURRENCY)
    prompts = {
        "short": [item["messages"] for item in language.heldout_items(most, 0)][:most],
        "long": [item["messages"] for item in language.long_items(3, most, 0)],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dense(folder / "dense", 0, tokenizer=CHECKPOINT, length=LENGTH)
        mixture = cells("nano", CHECKPOINT, card, prompts, folder / "nano.log")
        dense = cells("dense", folder / "dense", card, prompts, folder / "dense.log")
    both = calibrate([*mixture, *dense])
    alone = calibrate(mixture)
    print(f"\n{'cell':<38} {'measured':>9} {'held out':>9} {'off':>7} {'of bound':>9}")
    for cell, held in zip([*mixture, *dense], both.held_out, strict=True):
        print(
            f"{cell.label:<38} {1e3 * held.measured_s:>6.2f} ms {1e3 * held.predicted_s:>6.2f} ms "
            f"{held.error:>+7.1%} {cell.bound.seconds / cell.seconds:>9.0%}"
        )
    print(f"\nmedian error of held-out cells: {both.median_error:.1%}   (goal 15 % or less)")
    crossed = []
    for cell in dense:
        said = predict(
            alone, cell.model, card, cell.setting, concurrency=cell.concurrency, context=cell.context
        )
        crossed.append(abs(said.seconds / cell.seconds - 1))
    print(f"median error of the dense model, predicted from the mixture alone: {median(crossed):.1%}")
    for feature in ("weights", "cache", "arithmetic"):
        share = both.efficiency(feature)
        seen = share is not None and share < 2  # beyond it the cells are not limited by it at all
        print(f"{feature}: {f'{share:.0%} of the measured rate' if seen else 'not seen'}")
    print(f"host: {1e3 * both.coefficients[4]:.2f} ms a step, {1e3 * both.coefficients[5]:.3f} a sequence")
    if options.json:
        document = {
            "card": card.model_dump(),
            "cells": [cell.model_dump() for cell in [*mixture, *dense]],
            "calibration": both.model_dump(),
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
