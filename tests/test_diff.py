"""`diff`: checkpoints of any dialect, one code or one scale apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_checkpoint
from test_structure import rewrite
from tiny_architectures import random_tensors, tiny_config, write_tensors

from packager.cli import run
from packager.layouts import recognise
from packager.quantize import dequantize, diff, quantize, relabel
from packager.quantize.compare import Comparison
from packager.recipe import QuantizeSpec

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as BF16, FP8 in both dialects, dequantized, and FP8 with float32 scales; none sealed."""
    base = tmp_path_factory.mktemp("diff")
    write_checkpoint(base / "bf16", shards=2)
    for name, rounding in (("ct", "power-of-two"), ("float32", "float32")):
        spec = QuantizeSpec(shard_bytes=60_000, scale_rounding=rounding)
        quantize(base / "bf16", base / name, spec, recipe_digest=spec.digest, progress=lambda _: None)
    relabel(base / "ct", base / "ds", "deepseek")
    dequantize(base / "ds", base / "back")
    for manifest in base.glob("*/manifest.json"):
        manifest.unlink()
    return {path.name: path for path in base.iterdir()}


def changed(checkpoint: Path, tmp_path: Path, name: str, place: tuple[int, int], change: Any) -> Comparison:
    """`checkpoint` against a copy in which one value (of a code: its byte) is another."""
    import torch

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def edit(tensors: dict[str, Any]) -> None:
        tensor = tensors[name]
        target = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        target[place] = change(target[place])

    rewrite(copy, edit)
    return diff(checkpoint, copy)


def test_a_difference_in_the_last_expert_of_joined_ones_is_found(tmp_path: Path) -> None:
    raw = tiny_config("Qwen3MoeForCausalLM")
    layout = [want for want in recognise(raw).tensors(fused=True) if not want.optional]
    tensors = random_tensors(layout)
    one = write_tensors(tmp_path / "one", raw, tensors)
    assert diff(one, one).equal
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name][-1, -1, -1] += 1
    found = diff(one, write_tensors(tmp_path / "other", raw, tensors))
    last = tuple(size - 1 for size in tensors[name].shape)
    assert [(row.name, row.elements, row.first) for row in found.differing] == [(name, 1, last)]


def test_a_relabelled_and_a_dequantized_checkpoint_are_equal(checkpoints: dict[str, Path]) -> None:
    relabelled = diff(checkpoints["ct"], checkpoints["ds"])
    assert relabelled.equal and relabelled.identical == 35
    assert (relabelled.scales.differing, relabelled.scales.largest_ratio) == (0, None)
    assert relabelled.scales.compared > 22
    back = diff(checkpoints["ct"], checkpoints["back"])
    assert back.equal and back.scales.compared == 0


def test_fp8_against_bf16_says_how_many_decibels_by_role_and_layer(checkpoints: dict[str, Path]) -> None:
    found = diff(checkpoints["bf16"], checkpoints["ds"])
    assert not found.equal and (found.identical, len(found.differing)) == (13, 22)
    assert set(found.roles) == {
        *("query_key_value", "attention_output", "dense_mlp", "shared_expert", "routed_expert")
    }
    assert all(30 < row["snr_db"] < 33 for row in (*found.roles.values(), *found.layers.values()))
    assert {layer: row["tensors"] for layer, row in found.layers.items()} == {"0": 5, "1": 17}
    assert found.scales.compared == 0


@pytest.mark.parametrize("name", ["ct", "ds", "float32"])
def test_one_flipped_code_is_found_and_named(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    found = changed(checkpoints[name], tmp_path, DOWN, (100, 7), lambda code: code ^ 1)
    (row,) = found.differing
    assert (row.name, row.elements, row.first) == (DOWN, 1, (100, 7))
    assert row.snr_db is not None and row.snr_db > 30
    assert found.scales.differing == 0 and list(found.layers) == ["0"] and found.identical == 34


def test_a_nan_code_is_a_difference_without_a_finite_ratio(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    found = changed(checkpoints["ds"], tmp_path, DOWN, (0, 0), lambda code: code * 0 + 0x7F)
    (row,) = found.differing
    assert (row.snr_db, row.max_abs, row.first) == (None, None, (0, 0))
    assert found.roles == {}


@pytest.mark.parametrize("name", ["ct", "ds"])
def test_one_changed_scale_is_found_with_its_ratio(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    scale = DOWN + {"ct": "_scale", "ds": "_scale_inv"}[name]
    found = changed(checkpoints[name], tmp_path, scale, (0, 1), lambda value: value * 0.5)
    assert (found.scales.differing, found.scales.weights, found.scales.largest_ratio) == (1, 1, 2.0)
    assert found.scales.where == f"{DOWN} [0, 1]"
    (row,) = found.differing
    assert row.name == DOWN and row.first == (0, 128)


def test_both_roundings_of_scales_are_at_most_a_factor_of_two_apart(checkpoints: dict[str, Path]) -> None:
    scales = diff(checkpoints["ct"], checkpoints["float32"]).scales
    assert scales.differing > scales.compared // 2
    assert scales.largest_ratio is not None and 1 < scales.largest_ratio < 2


def test_slabs_give_what_whole_tensors_give(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.quantize import quantized

    whole = diff(checkpoints["bf16"], checkpoints["ds"])
    monkeypatch.setattr(quantized, "_SLAB_ELEMENTS", 1)
    pieces = diff(checkpoints["bf16"], checkpoints["ds"])
    assert [(row.name, row.snr_db, row.elements, row.first) for row in whole.differing] == [
        (row.name, row.snr_db, row.elements, row.first) for row in pieces.differing
    ]
    assert np.isclose(whole.differing[0].max_abs or 0, pieces.differing[0].max_abs or 1)


def test_the_verb_prints_80_columns_and_one_sound_document(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(checkpoints["ds"], tmp_path, DOWN, (0, 0), lambda code: code * 0 + 0x7F)
    arguments = ["diff", str(checkpoints["float32"]), str(tmp_path / "copy")]
    assert run([*arguments, "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert not found["equal"] and found["scales"]["differing"] > 0
    assert run([*arguments, "--by-layer"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert found["differing"][0]["name"] == DOWN
    for part in (
        f"{DOWN} ",
        "F8_E4M3, first at [0, 0]",
        "role",
        "layer",
        "SNR dB",
        "not finite",
        "scales: ",
        "13 weights equal, 22 differ",
    ):
        assert part in table
