"""How fast weights become block FP8, as ratios to peers and physical limits taken in the same run.

    python benchmarks/quantize.py [--gigabytes 3.0] [--folder DIR] [--llmcompressor]

The checkpoint has expert matrices of the true shapes (1024 x 4096 and 4096 x 1024), made from a seed, in one
file. Throughput is bytes of BF16 source a second; source and output are hashed, the ledger is kept.
"Steady" leaves out the start of the process: imports, and the loading of the compiled kernel. The peers are
`cp` of the source followed by `sha256sum` of the copy, and, with --llmcompressor, `model_free_ptq` of
llm-compressor with the scheme FP8_BLOCK (minutes). The full run is --gigabytes 12.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from packager.bailing.config import BailingConfig
from packager.bailing.layout import Role, expected_tensors
from packager.checkpoint.header import build_header

EXPERT_BYTES = 3 * 1024 * 4096 * 2

PEAK = """
def peak():
    # Of this program: ru_maxrss would begin with what its parent held when it forked.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""

OURS = (
    PEAK
    + """
import json, sys, threading, time
began = time.monotonic()
from pathlib import Path
from packager.quantize import quantize
from packager.quantize.stream import Stream
from packager.recipe import QuantizeSpec

real, moments = Stream.run, {}
def timed(self, *arguments, **options):
    moments["ready"], moments["stream"] = time.monotonic(), self
    real(self, *arguments, **options)
Stream.run = timed
lines, samples, over = [], [], threading.Event()
def watch():
    # Bytes of source done by the second, and what is resident then.
    while not over.wait(1.0):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        done = moments["stream"]._bytes_done if "stream" in moments else 0
        samples.append((time.monotonic(), done, pages * 4096))
threading.Thread(target=watch, daemon=True).start()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeSpec(), recipe_digest="sha256:bench",
         progress=lines.append, workers=int(sys.argv[3]), kernel=sys.argv[4])
ended = time.monotonic()
over.set()
inside = [s for s in samples if s[0] > moments["ready"]]
print(json.dumps({
    "start": moments["ready"] - began, "steady": ended - moments["ready"],
    "rss": peak(), "samples": [(t - moments["ready"], done, rss) for t, done, rss in inside],
    "kernel": [line for line in lines if line.startswith("kernel: ")][0].removeprefix("kernel: "),
}))
"""
)

THEIRS = (
    PEAK
    + """
import json, sys, time
from llmcompressor import model_free_ptq
began = time.monotonic()
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_BLOCK",
               ignore=["lm_head", "re:.*word_embeddings$", "re:.*gate$"], max_workers=2, device="cpu")
print(json.dumps({"steady": time.monotonic() - began,
                  "rss": peak()}))
"""
)


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a one-MoE-layer checkpoint of about that size, tensor by tensor; bytes of its tensors."""
    experts = max(8, round(gigabytes * 1e9 / EXPERT_BYTES / 8) * 8)
    config = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "vocab_size": 256,
        "hidden_size": 4096,
        "intermediate_size": 1024,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "use_qk_norm": True,
        "moe_router_enable_expert_bias": True,
        "max_position_embeddings": 32768,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(4096 * 5120, generator=generator).mul_(0.02).to(torch.bfloat16)
    layout = expected_tensors(BailingConfig.load(folder))
    total = 0
    with (folder / "model.safetensors").open("wb") as handle:
        dtypes = ["F32" if want.role is Role.EXPERT_BIAS else "BF16" for want in layout]
        handle.write(build_header((w.name, d, w.shape) for w, d in zip(layout, dtypes, strict=True)))
        for want in layout:
            if want.role is Role.EXPERT_BIAS:
                data = bytes(4 * want.count)
            else:
                data = block[: want.count].view(torch.uint8).numpy().tobytes()
            total += handle.write(data)
    return total


def command(*arguments: str | Path) -> float:
    """Seconds of a command."""
    began = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def script(text: str, *arguments: str | Path) -> dict[str, Any]:
    """The last line of a Python process's output, with the seconds of the whole process as `whole`."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "whole": time.perf_counter() - began}


def sustained(run: dict[str, Any], size: int) -> None:
    """Print how fast each tenth of a run was, and how much memory it held."""
    steady = run["steady"]
    print(f"{size / 1e9:.1f} GB of BF16, {run['kernel']}: {steady:.1f} s, {size / steady / 1e9:.2f} GB/s")
    print(f"{'done':>6} {'GB/s':>7} {'largest RSS':>13}")
    samples = [(0.0, 0, 0), *run["samples"]]
    for tenth in range(10):
        inside = [s for s in samples if tenth * size <= 10 * s[1] < (tenth + 1) * size]
        before = [s for s in samples if 10 * s[1] < tenth * size]
        first, last = (before or inside)[-1 if before else 0], inside[-1] if inside else None
        if last is None or last[0] <= first[0]:
            continue
        rate = (last[1] - first[1]) / (last[0] - first[0]) / 1e9
        print(f"{10 * (tenth + 1):>5}% {rate:>7.2f} {max(s[2] for s in inside) / 1e6:>10.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's")
    parser.add_argument("--repeats", type=int, default=2, help="each figure is the best of so many")
    parser.add_argument("--kernel", choices=["auto", "compiled", "eager"], default="compiled")
    parser.add_argument("--sustained", action="store_true", help="speed and memory by tenths of one run")
    parser.add_argument("--llmcompressor", action="store_true", help="measure model_free_ptq as well (slow)")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        source, out, copy = root / "source", root / "fp8", root / "copy.safetensors"
        size = make_checkpoint(source, options.gigabytes)
        model = source / "model.safetensors"

        def ours(workers: int) -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)
            return script(OURS, source, out, str(workers), options.kernel)

        if options.sustained:
            sustained(ours(2), size)
            return
        first = ours(2)  # compiles where nothing is in the cache yet
        runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        peers: list[tuple[float, float]] = []
        for _ in range(options.repeats):  # in turn, so that all see the machine in the same state
            copied = command("cp", model, copy)
            peers.append((copied, copied + command("sha256sum", copy)))
            copy.unlink()
            for workers, found in runs.items():
                found.append(ours(workers))
        shutil.rmtree(out, ignore_errors=True)
        theirs = script(THEIRS, source, root / "theirs") if options.llmcompressor else None

    one, two = (min(found, key=lambda run: float(run["steady"])) for found in (runs[1], runs[2]))
    plain, hashed = (min(times) for times in zip(*peers, strict=True))

    def row(what: str, seconds: float, note: str = "") -> None:
        print(f"{what:<34}{seconds:8.2f} s {size / seconds / 1e9:7.2f} GB/s  {note}")

    print(f"{'source':<34}{size / 1e9:8.2f} GB of BF16 in one file, true expert shapes")
    print(f"{'kernel':<34}{two['kernel']:>8}")
    print(f"{'start of the process':<34}{two['start']:8.2f} s  ({first['start']:.2f} s the first time)")
    row("quantize, 2 workers, steady", two["steady"])
    row(
        "quantize, 1 worker, steady",
        one["steady"],
        f"2 workers against 1: {one['steady'] / two['steady']:.2f}x",
    )
    row("quantize, 2 workers, whole process", two["whole"], f"peak RSS {two['rss'] / 1e9:.2f} GB")
    row("cp", plain, f"ours / this: {plain / two['steady']:.2f}")
    row("cp + sha256sum", hashed, f"ours / this: {hashed / two['steady']:.2f}   (goal 0.8)")
    if theirs:
        ratio = theirs["steady"] / two["steady"]
        row("llm-compressor FP8_BLOCK", theirs["steady"], f"ours / this: {ratio:.1f}   (goal 10)")
        ratio = theirs["whole"] / two["whole"]
        row(
            "  whole process",
            theirs["whole"],
            f"ours / this: {ratio:.1f}   peak RSS {theirs['rss'] / 1e9:.2f} GB",
        )


if __name__ == "__main__":
    main()
