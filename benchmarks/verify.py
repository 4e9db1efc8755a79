"""How fast `packager verify` reads a bundle, as ratios to `sha256sum` over the same files, in one run.

    python benchmarks/verify.py [--gigabytes 3.2] [--folder DIR]

The bundle is sealed, locked and signed: shards of random bytes under true headers, a tokenizer of 150,000
words, evidence. Peers run as many processes as verify has threads, a file each, largest first: `sha256sum`,
and `openssl dgst -sha256`, which uses the processor's SHA instructions where a distribution's sha256sum does
not. Each is run in turns, the best time counts; files are in the page cache, so that nobody waits for a disk.
"Reading" is the pass over the bytes alone, "whole" the process from its start. The second bundle has half of
its bytes in one shard: SHA-256 of one file cannot be split, so cores idle for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_bundle import PASSED, SOURCE_DIGEST, make_evidence, recipe

from packager.artifact import ArtifactWriter
from packager.bundle import signature
from packager.bundle.assemble import assemble
from packager.checkpoint.header import build_header

BLOCK = 1 << 26
CORES = len(os.sched_getaffinity(0))
READING = """
import sys, time
from pathlib import Path
from packager.artifact import read_manifest
from packager.bundle import structure, verify
path = Path(sys.argv[1])
manifest = read_manifest(path)
began = time.monotonic()
assert verify._byte_faults(path, manifest) == []
print(time.monotonic() - began)
"""


def make_bundle(root: Path, sizes: list[int]) -> Path:
    """A bundle with a shard of each size (bytes)."""
    random = np.random.default_rng(0)
    block = random.bytes(BLOCK)
    fp8 = root / "fp8"
    weight_map = {}
    with ArtifactWriter(fp8, stage="fp8", recipe_digest="sha256:r", inputs={"source": SOURCE_DIGEST}) as out:
        for number, size in enumerate(sizes, 1):
            name = f"model-{number:05d}-of-{len(sizes):05d}.safetensors"
            rows = max(1, size // 4096)
            weight_map[f"w{number}"] = name
            with out.create(name) as file:
                file.write(build_header([(f"w{number}", "F8_E4M3", (rows, 4096))]))
                left = rows * 4096
                while left:
                    begin = int(random.integers(BLOCK // 2))
                    piece = block[begin : begin + min(left, BLOCK // 2)]
                    file.write(piece)
                    left -= len(piece)
        out.write_json("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        out.write_json("config.json", {"architectures": ["BailingMoeV2ForCausalLM"]})
        words = {f"Ġ{number:x}词{number * 7919 % 1000003}": number for number in range(150_000)}
        pairs = [[f"{number:x}", f"词{number}"] for number in range(150_000)]
        out.write_json("tokenizer.json", {"model": {"vocab": words, "merges": pairs}})
        sealed = out.seal({"fidelity": {}})
    context = root / "context"
    with ArtifactWriter(
        context, stage="context", recipe_digest="sha256:r", inputs={"fp8": sealed.digest}
    ) as out:
        for entry in sealed.files:
            out.link(entry.path, fp8 / entry.path, entry.sha256)
        extended = out.seal({"original_length": 512, "length": 2048})
    draft = root / "draft"
    inputs = {"target": extended.digest}
    with ArtifactWriter(draft, stage="draft", recipe_digest="sha256:r", inputs=inputs) as out:
        out.write_bytes(
            "model.safetensors", build_header([("fc", "F32", (64, 64))]) + random.bytes(4 * 64 * 64)
        )
        out.write_json("config.json", {"architectures": ["LlamaForCausalLMEagle3"]})
        drafted = out.seal({})
    make_evidence(root / "evidence", extended.digest, drafted.digest, PASSED)
    signature.generate_keys(root / "key.pem")
    assemble(
        root / "bundle", recipe=recipe(), recipe_digest="sha256:r", fp8=fp8, context=context, draft=draft,
        evidence=root / "evidence", signing_key=root / "key.pem", progress=lambda _: None,
    )  # fmt: skip
    return root / "bundle"


def timed(command: list[str], stdin: bytes | None = None) -> float:
    """Seconds that a command ran."""
    began = time.monotonic()
    subprocess.run(command, input=stdin, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def measure(bundle: Path, rounds: int) -> dict[str, float]:
    """Best seconds of each contender."""
    files = sorted((p for p in bundle.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    listed = b"\0".join(os.fsencode(path) for path in files)
    each = ["xargs", "-0", "-n1", f"-P{CORES}"]
    key = str(bundle.parent / "key.pub")
    whole = [sys.executable, "-m", "packager", "verify", str(bundle), "--key", key]

    def reading() -> float:
        done = subprocess.run(
            [sys.executable, "-c", READING, str(bundle)], check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    contenders: dict[str, Callable[[], float]] = {
        "whole": lambda: timed(whole),
        "sha256sum": lambda: timed([*each, "sha256sum"], listed),
        "reading": reading,
        "openssl": lambda: timed([*each, "openssl", "dgst", "-sha256"], listed),
    }
    if shutil.which("openssl") is None:
        del contenders["openssl"]
    timed(["cat", *map(str, files)])  # into the page cache
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(contender())
    return {name: min(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument(
        "--folder", type=Path, help="Where the bundles are made [default: the temporary one]."
    )
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    total = int(asked.gigabytes * 1e9)
    even = [total // 8] * 8
    skewed = [total // 2, *[total // 16] * 8]
    for name, sizes in (("even shards", even), ("half in one shard", skewed)):
        with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
            bundle = make_bundle(Path(scratch), sizes)
            nbytes = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file())
            found = measure(bundle, asked.rounds)
        speed = {key: nbytes / seconds / 1e9 for key, seconds in found.items()}
        print(f"{name}: {nbytes / 1e9:.2f} GB in {len(sizes)} shards, {CORES} cores; GB/s of the best run")
        for key, what in (
            ("whole", "packager verify, whole process"), ("reading", "packager verify, reading"),
            ("sha256sum", f"xargs -P{CORES} sha256sum"), ("openssl", f"xargs -P{CORES} openssl dgst -sha256"),
        ):  # fmt: skip
            if key in speed:
                print(f"  {what:<36} {speed[key]:6.2f}")
        ratios = {
            f"{ours}/{peer}": round(speed[ours] / speed[peer], 2)
            for ours in ("whole", "reading")
            for peer in ("sha256sum", "openssl")
            if peer in speed
        }
        print("  " + json.dumps(ratios), flush=True)


if __name__ == "__main__":
    main()
