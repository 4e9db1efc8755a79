"""The quantize kernel on a GPU: its rate against a copy's, and its bits against the CPU's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Figures

from packager.quantize.fp8_block import quantize_blocks

BLOCK = 128
TRUE = ((1024, 4096), (4096, 1024))
"""Expert matrices of Ling-flash-2.0: gate and up, down."""


def conversion_cells(device: torch.device, scale: str) -> Iterator[Cell]:
    """Ceilings of the machine, the kernel with both roundings, and the way from the page cache and back."""
    experts = 256 if scale == "true" else 2
    yield Cell("conversion-ceilings", lambda: ceilings(device, scale), 30)
    for power_of_two in (True, False):
        name = "power-of-two" if power_of_two else "float32"
        yield Cell(f"conversion-kernel-{name}", lambda p=power_of_two: kernel(device, experts, p), 120)  # type: ignore[misc]
    yield Cell("conversion-from-page-cache", lambda: from_page_cache(device, experts), 120)


def ceilings(device: torch.device, scale: str) -> Figures:
    """Copy bandwidth (bytes read and written) and BF16 matrix rate, each the median of repeats."""
    size, side = (1 << 33, 8192) if scale == "true" else (1 << 26, 512)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    left = torch.randn(side, side, device=device).bfloat16()
    product = _median(lambda: left @ left, device)
    return {
        "copy_gb_s": 2 * size / copy / 1e9,
        "copied_bytes": size,
        "bf16_tflop_s": 2 * side**3 / product / 1e12,
        "side": side,
    }


def kernel(device: torch.device, experts: int, power_of_two: bool) -> Figures:
    """Rate of the fused kernel over as many expert matrices, against a copy in the same run.

    `of_copy` is the kernel's traffic (2 bytes read, 1 written a weight) over the copy's, both in bytes a
    second. Codes and scales of one matrix of each shape are compared with the CPU's, bit for bit.
    """
    fused = torch.compile(quantize_blocks, dynamic=False)
    generator = torch.Generator(device="cpu").manual_seed(0)
    traffic, seconds, same = 0, 0.0, True
    for rows, columns in TRUE:
        one = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
        blocks = one.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        here = fused(blocks.to(device), power_of_two)
        there = quantize_blocks(blocks, power_of_two)
        same &= torch.equal(here[0].cpu().view(torch.uint8), there[0].view(torch.uint8))
        same &= torch.equal(here[1].cpu(), there[1])
        many = blocks.to(device).repeat(experts, 1, 1, 1)
        seconds += _median(lambda many=many: fused(many, power_of_two), device)  # type: ignore[misc]
        traffic += 3 * many.numel()
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = traffic / _median(lambda: target.copy_(source), device)
    return {
        "weights_gb_s": traffic / 3 * 2 / seconds / 1e9,
        "traffic_gb_s": traffic / seconds / 1e9,
        "copy_gb_s": copy / 1e9,
        "of_copy": traffic / seconds / copy,
        "same_bits_as_cpu": same,
        "experts": experts,
    }


def from_page_cache(device: torch.device, experts: int) -> Figures:
    """BF16 from a file in the page cache to the device, quantized, codes back and into a file: GB/s of BF16.

    Two buffers, so that reading, copying and the kernel overlap on a GPU. Hashing and ledger are left out: it
    bounds what a GPU could add to the conversion, whose own rate `benchmarks/quantize.py` prints.
    """
    rows, columns = TRUE[0]
    fused = torch.compile(quantize_blocks, dynamic=False)
    pinned = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "weights", Path(folder) / "codes"
        weights = (torch.randn(rows, columns) * 0.02).bfloat16()
        raw = weights.view(torch.uint8).numpy().tobytes()
        source.write_bytes(raw * experts)
        buffers = [torch.empty(rows * columns * 2, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        shape = (rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        fused(weights.to(device).view(shape), True)
        began = time.perf_counter()
        with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
            waiting: torch.Tensor | None = None
            for number in range(experts):
                buffer = buffers[number % 2]
                reader.readinto(memoryview(buffer.numpy()))
                blocks = buffer.to(device, non_blocking=True).view(torch.bfloat16).view(shape)
                codes = fused(blocks, True)[0].view(torch.uint8)
                if waiting is not None:
                    writer.write(waiting.cpu().numpy().tobytes())
                waiting = codes
            assert waiting is not None
            writer.write(waiting.cpu().numpy().tobytes())
        seconds = time.perf_counter() - began
    return {"gb_s": experts * len(raw) / seconds / 1e9, "gigabytes": experts * len(raw) / 1e9}


def _median(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Seconds of a call, after two that are not counted."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
