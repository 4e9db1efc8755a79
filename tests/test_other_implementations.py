"""Our FP8 files through the code of others: compressed-tensors decompresses them, llm-compressor competes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_capacity
from conftest import write_checkpoint

from packager.proof.dialect import scale_of
from packager.proof.files import WeightFiles
from packager.proof.recompute import verify_against
from packager.proof.reference import VALUES, widen
from packager.proof.structure import check_structure
from packager.quantize import dequantize, diff, quantize, relabel
from packager.quantize.dialects import Quantization
from packager.recipe import Dialect, QuantizeSpec

NANO = Path(__file__).parents[1] / "packager/nano/checkpoint"
ODD = {"hidden_size": 136, "moe_intermediate_size": 72, "head_dim": 72, "intermediate_size": 264}
"""No dimension is a multiple of 128."""
SKIPS = ["lm_head", r"re:.*word_embeddings$", r"re:.*\.mlp\.gate$"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    write_checkpoint(base / "tiny", shards=2)
    write_checkpoint(base / "odd", shards=2, **ODD)
    return {"nano": NANO, "tiny": base / "tiny", "odd": base / "odd"}


def convert(source: Path, base: Path, dialect: Dialect, rounding: Any) -> Path:
    spec = QuantizeSpec(scale_rounding=rounding)
    quantize(source, base / "fp8", spec, recipe_digest=spec.digest, progress=lambda _: None)
    if dialect == "compressed-tensors":
        return base / "fp8"
    relabel(base / "fp8", base / "relabelled", dialect)
    return base / "relabelled"


def their_weights(path: Path, dialect: Dialect) -> dict[str, Any]:
    """All tensors of a checkpoint through the converters of compressed-tensors, FP8 weights as float32."""
    import torch
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        Converter,
        FP8BlockDequantizer,
    )
    from safetensors.torch import load_file

    converter: Converter
    if dialect == "compressed-tensors":
        converter = CompressedTensorsDequantizer(str(path), dtype=torch.float32)
    else:
        projections = [r"re:.*_proj$", r"re:.*\.attention\.(query_key_value|dense)$"]
        converter = FP8BlockDequantizer(targets=projections, dtype=torch.float32)
    stored = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return dict(converter.validate(stored))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["compressed-tensors", "deepseek"])
@pytest.mark.parametrize("rounding", ["power-of-two", "float32"])
@pytest.mark.parametrize("model", ["nano", "tiny", "odd"])
def test_compressed_tensors_decompresses_our_files_to_the_same_numbers(
    model: str, rounding: str, dialect: Dialect, models: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    path = convert(models[model], tmp_path, dialect, rounding)
    theirs = their_weights(path, dialect)
    dequantize(path, tmp_path / "bf16")
    scale = Quantization(dialect, ()).scale_of("weight")
    compared = 0
    with WeightFiles.open(path) as fp8, WeightFiles.open(tmp_path / "bf16") as bf16:
        for name, tensor in fp8.tensors.items():
            if tensor.dtype != "F8_E4M3":
                continue
            rows, columns = tensor.shape
            codes = fp8.read(tensor, 0, tensor.nbytes).reshape(rows, columns)
            stored = fp8.tensors[scale_of(name, scale)]
            scales = widen(fp8.read(stored, 0, stored.nbytes), stored.dtype).reshape(stored.shape)
            spread = np.kron(scales, np.ones((128, 128), np.float32))[:rows, :columns]
            assert np.array_equal(theirs[name].numpy(), VALUES[codes] * spread), name
            ours = bf16.read(bf16.tensors[name], 0, bf16.tensors[name].nbytes)
            rounded = theirs[name].to(torch.bfloat16).view(torch.uint8).numpy()
            assert np.array_equal(ours, rounded.reshape(-1)), name
            compared += tensor.count
    assert compared > 300_000
    assert set(theirs) == set(bf16.tensors)


@pytest.fixture(scope="module")
def llmcompressor_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmcompressor import model_free_ptq

    out = tmp_path_factory.mktemp("llmcompressor") / "fp8"
    model_free_ptq(str(NANO), out, scheme="FP8_BLOCK", ignore=SKIPS, max_workers=1, device="cpu")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["power-of-two", "float32"])
def test_our_noise_is_no_larger_than_that_of_llmcompressor(
    rounding: str, llmcompressor_output: Path, tmp_path: Path
) -> None:
    ours = diff(NANO, convert(NANO, tmp_path, "compressed-tensors", rounding)).differing
    theirs = {row.name: row.snr_db for row in diff(NANO, llmcompressor_output).differing}
    assert {row.name for row in ours} == set(theirs) and len(theirs) == 164
    means = [
        np.mean([ratio or 0.0 for ratio in part]) for part in ([r.snr_db for r in ours], theirs.values())
    ]
    assert means[0] >= means[1], means


@pytest.mark.slow
def test_llmcompressor_output_is_sound_and_its_codes_are_rounded_twice(
    llmcompressor_output: Path, tmp_path: Path
) -> None:
    """Their quotients are rounded to BF16 before they become FP8; scales are ours, rounded to BF16."""
    copy = tmp_path / "copy"
    shutil.copytree(llmcompressor_output, copy)
    found = check_structure(copy, source=NANO)
    assert found.sound, list(map(str, found.problems))
    proof = verify_against(copy, NANO, sample=None)
    assert not proof.problems and proof.kept == 25
    assert {mismatch.kind for mismatch in proof.mismatches} == {"code"}
    for mismatch in proof.mismatches:
        assert abs(int(mismatch.found, 16) - int(mismatch.expected, 16)) == 1


@pytest.mark.slow
def test_power_of_two_scales_survive_what_vllm_does_to_weights_on_hopper(tmp_path: Path) -> None:
    """vLLM's own code that prepares weights for DeepGEMM. It is why such scales are the default: weights with
    other ones are rounded a second time."""
    import torch
    from safetensors.torch import load_file
    from vllm.model_executor.layers.quantization.utils.fp8_utils import requant_weight_ue8m0_inplace

    source = load_file(NANO / "model.safetensors")
    noise: dict[str, list[float]] = {}
    for rounding in ("power-of-two", "float32"):
        fp8 = convert(NANO, tmp_path / rounding, "compressed-tensors", rounding)
        stored = {name: part for file in fp8.glob("*.safetensors") for name, part in load_file(file).items()}
        before, after, signal = 0.0, 0.0, 0.0
        for name, codes in stored.items():
            if codes.dtype != torch.float8_e4m3fn:
                continue
            scale, was = stored[f"{name}_scale"], source[name].double()

            def values(codes: torch.Tensor = codes, scale: torch.Tensor = scale) -> torch.Tensor:
                spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                return codes.double() * spread[: codes.shape[0], : codes.shape[1]]

            signal += float((was**2).sum())
            before += float(((values() - was) ** 2).sum())
            requant_weight_ue8m0_inplace(codes, scale)
            after += float(((values() - was) ** 2).sum())
        noise[rounding] = [10 * np.log10(signal / part) for part in (before, after)]
    print(noise)
    assert noise["power-of-two"][0] == noise["power-of-two"][1]
    assert noise["float32"][1] < noise["float32"][0] - 2
    assert noise["power-of-two"][1] > noise["float32"][1] + 2


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_answers_from_our_file_as_well_as_from_llmcompressors(
    llmcompressor_output: Path, tmp_path: Path
) -> None:
    """The nano's held-out questions; where the processor has no FP8 kernel, from the dequantized weights."""
    from packager.nano.language import heldout_items
    from packager.serving import Server, ServeSpec, fp8_runs_here
    from validation.endpoint import Target
    from validation.tasks import compare_accuracy, items_from, measure_accuracy

    items = items_from(heldout_items(20, 3))
    ours = convert(NANO, tmp_path, "compressed-tensors", "power-of-two")
    runs = []
    for label, fp8 in (("llm-compressor", llmcompressor_output), ("ours", ours)):
        served = fp8
        if not fp8_runs_here()[0]:
            served = tmp_path / f"{label}-bf16"
            dequantize(fp8, served)
        with Server(ServeSpec(served), tmp_path / f"{label}.log") as server:
            target = Target(server.url, "model", label, label, tmp_path / "answers")
            runs.append(measure_accuracy(target, items))
        assert served_capacity.reported(tmp_path / f"{label}.log") == pytest.approx(
            served_capacity.planned(served), rel=0.05
        )
    difference = compare_accuracy(*runs, margin_points=2.0).overall
    assert runs[1].overall.accuracy > 0.9
    assert abs(difference.difference_points) <= 2.0, difference
