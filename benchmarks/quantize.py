"""How fast weights become block FP8, as ratios to `cp` and `cp` + `sha256sum` in one run.

    python benchmarks/quantize.py [--gigabytes 1.0] [--folder DIR]

The checkpoint has expert matrices of the true shapes (1024 x 4096, 4096 x 1024), made from a seed. Each
figure is the best of three; throughput is bytes of BF16 source a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from packager.bailing.config import BailingConfig
from packager.bailing.layout import Role, expected_tensors
from packager.quantize import quantize
from packager.recipe import QuantizeSpec

EXPERT_BYTES = 3 * 1024 * 4096 * 2


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a one-MoE-layer checkpoint of about that size; bytes of its tensors."""
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
    block = torch.randn(4096 * 1024, generator=generator).mul_(0.02).to(torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for want in expected_tensors(BailingConfig.load(folder)):
        if want.role is Role.EXPERT_BIAS:
            tensors[want.name] = torch.zeros(want.shape)
        else:
            repeats = -(-want.count // block.numel())
            tensors[want.name] = block.repeat(repeats)[: want.count].reshape(want.shape).clone()
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def best_of(repeats: int, action: Callable[[], None], clean: Callable[[], None]) -> float:
    """Seconds of the fastest run; `clean` removes what a run leaves."""
    times = []
    for _ in range(repeats):
        clean()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    clean()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        source, out, copy = root / "source", root / "fp8", root / "copy.safetensors"
        size = make_checkpoint(source, options.gigabytes)

        def convert() -> None:
            quantize(source, out, QuantizeSpec(), recipe_digest="sha256:bench", progress=lambda _: None)

        def copying() -> None:
            subprocess.run(["cp", source / "model.safetensors", copy], check=True)

        def copying_and_hashing() -> None:
            copying()
            subprocess.run(["sha256sum", copy], check=True, stdout=subprocess.DEVNULL)

        plain = best_of(3, copying, lambda: copy.unlink(missing_ok=True))
        hashed = best_of(3, copying_and_hashing, lambda: copy.unlink(missing_ok=True))
        ours = best_of(3, convert, lambda: shutil.rmtree(out, ignore_errors=True))
    rate = size / ours / 1e9
    print(f"source                     {size / 1e9:8.2f} GB of BF16, true expert shapes")
    print(f"quantize (digest, convert) {ours:8.2f} s  {rate:6.2f} GB/s")
    print(f"cp                         {plain:8.2f} s  ratio of throughput {plain / ours:.3f}")
    print(f"cp + sha256sum             {hashed:8.2f} s  ratio of throughput {hashed / ours:.3f}")


if __name__ == "__main__":
    main()
