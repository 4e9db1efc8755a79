"""`verify --against`: the second implementation agrees with the first, and finds every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from numpy.typing import NDArray
from test_structure import configure, rewrite

from packager.cli import run
from packager.errors import BadInput
from packager.proof import reference
from packager.proof.files import WeightFiles
from packager.proof.recompute import Proof, role_of, verify_against
from packager.proof.structure import check_structure
from packager.quantize import quantize, relabel
from packager.recipe import QuantizeSpec

ODD = {"hidden_size": 136, "moe_intermediate_size": 72, "head_dim": 72, "intermediate_size": 264}
"""No dimension is a multiple of 128, so every weight has cut blocks at its edges."""
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUNDINGS = ("power-of-two", "float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("proof") / "source", shards=2)


@pytest.fixture(scope="module")
def checkpoints(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP8 under both roundings, in compressed-tensors; and `deepseek`, power of two without a word of it."""
    base = tmp_path_factory.mktemp("fp8")
    for rounding in ROUNDINGS:
        convert(source, base / rounding, rounding)
    relabel(base / "power-of-two", base / "deepseek", "deepseek")
    return {path.name: path for path in base.iterdir()}


def convert(source: Path, out: Path, rounding: Any) -> Path:
    spec = QuantizeSpec(shard_bytes=60_000, scale_rounding=rounding)
    quantize(source, out, spec, recipe_digest=spec.digest, progress=lambda _: None)
    return out


def proof_of(path: Path, source: Path, **options: Any) -> Proof:
    return verify_against(path, source, **{"sample": None, **options})


def damaged(checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    rewrite(copy, change)
    return copy


# ---- the arithmetic -------------------------------------------------------------------------------------


def every_quotient_that_matters() -> NDArray[np.float32]:
    """All E4M3 numbers, the middles between them, the float32 numbers next to each, and random ones."""
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    points = np.concatenate([grid, (grid[:-1] + grid[1:]) / 2, [np.float32(0.0), np.float32(-0.0)]])
    near = [np.nextafter(points, np.float32(sign * np.inf)) for sign in (1, -1)]
    chance = np.random.default_rng(3)
    some = (chance.standard_normal(20000) * 2.0 ** chance.integers(-12, 9, 20000)).astype(np.float32)
    return np.clip(np.concatenate([points, *near, some]), -448, 448).astype(np.float32)


def test_the_judgement_of_codes_agrees_with_two_casts_on_every_boundary() -> None:
    import torch

    quotients = every_quotient_that_matters()[None, :]
    one = np.ones((1, 1), np.float32)
    theirs = torch.from_numpy(quotients).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(reference.nearest_codes(quotients, one), theirs)
    assert not reference.wrong_codes(quotients, one, theirs).any()
    for other in range(1, 256):
        wrong = reference.wrong_codes(quotients, one, theirs ^ np.uint8(other))
        assert wrong.all(), f"a code changed by 0x{other:02X} is accepted"


def test_what_is_too_large_must_become_448_and_no_nan_code_is_ever_right() -> None:
    weights = np.array([[464.0, 500.0, 1e30, -1e30]], np.float32)
    one = np.ones((1, 1), np.float32)
    largest = np.array([[0x7E, 0x7E, 0x7E, 0xFE]], np.uint8)
    assert not reference.wrong_codes(weights, one, largest).any()
    assert reference.wrong_codes(weights, one, largest | np.uint8(1)).all()


def test_the_values_of_the_codes_are_those_of_ml_dtypes() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(reference.VALUES, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(reference.VALUES[:255]), np.signbit(theirs[:255]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_both_implementations_choose_the_same_scales(rounding: Any) -> None:
    import torch

    from packager.quantize.fp8_block import block_scales

    chance = np.random.default_rng(5)
    powers = 2.0 ** np.arange(-126, 120, dtype=np.float64)
    edges = np.concatenate([448 * powers, 1.75 * powers]).astype(np.float32)
    edges = edges[np.isfinite(edges)]
    some = np.abs(chance.standard_normal(5000) * 2.0 ** chance.integers(-100, 100, 5000)).astype(np.float32)
    near = [np.nextafter(edges, np.float32(way)) for way in (0, np.inf)]
    largest = np.concatenate([edges, *near, some, np.array([0, 1e-45, 1e-40, 3.4e38], np.float32)])
    largest = largest[np.isfinite(largest)]
    theirs = block_scales(torch.from_numpy(largest), power_of_two=rounding == "power-of-two").numpy()
    assert np.array_equal(reference.expected_scales(largest, rounding, "F32"), theirs)


# ---- whole checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROUNDINGS, "deepseek"])
def test_every_element_is_what_numpy_computes(name: str, source: Path, checkpoints: dict[str, Path]) -> None:
    proof = proof_of(checkpoints[name], source)
    assert proof.sound, [*proof.problems, *proof.mismatches]
    assert (proof.checked, proof.tensors, proof.kept) == (22, 22, 13)
    assert proof.rounding == ("float32" if name == "float32" else "power-of-two")
    assert proof.rounding_from == ("the scales themselves" if name == "deepseek" else "manifest.json")
    with WeightFiles.open(checkpoints[name]) as files:
        assert proof.elements == sum(t.count for t in files.tensors.values() if t.dtype == "F8_E4M3")
    assert 0.05 < proof.worst_relative_error <= 1 / 17 + 1e-6
    stated = json.loads((checkpoints["power-of-two"] / "manifest.json").read_text())["metrics"]["fidelity"]
    if name != "float32":
        assert proof.roles["routed_expert"].snr_db == stated["routed_expert"]["snr_db"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shapes_that_cut_blocks_and_other_dtypes_agree_too(rounding: str, dtype: str, tmp_path: Path) -> None:
    import torch

    source = write_checkpoint(tmp_path / "source", shards=2, **ODD)

    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = (tensors[name].double() * 1.2345).to(getattr(torch, dtype))
        tensors[EXPERT][:, :64] = 0.0
        tensors["model.layers.0.mlp.up_proj.weight"][128:256] = 0.0

    rewrite(source, change)
    proof = proof_of(convert(source, tmp_path / "out", rounding), source, workers=2)
    assert proof.sound, [*proof.problems, *proof.mismatches]
    assert proof.checked == 22


def test_one_scale_a_row_is_proved_too(source: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    originals = their_tensors(source)

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
            wide = originals[name].float()
            scales = wide.abs().amax(dim=1, keepdim=True) / 448
            tensors[name] = (wide / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name + "_scale"] = scales

    def by_channel(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"].update(strategy="channel", block_structure=None)
        group["input_activations"].update(strategy="token", group_size=None)

    path = damaged(checkpoints["float32"], tmp_path, change)
    configure(path, by_channel)
    proof = proof_of(path, source)
    assert proof.sound, [*proof.problems, *proof.mismatches]
    assert (proof.scheme, proof.rounding, proof.checked) == ("fp8-channel", "float32", 22)
    found = check_structure(path)
    assert found.sound, list(map(str, found.problems))
    assert [split.size for split in found.parallel if split.possible] == [1, 2]

    def halve(tensors: dict[str, Any]) -> None:
        tensors[EXPERT + "_scale"][5] *= 0.5

    rewrite(path, halve)
    (scale, code) = proof_of(path, source).mismatches
    assert (scale.tensor, scale.position) == (EXPERT + "_scale", (5, 0))
    assert (code.tensor, code.position[0]) == (EXPERT, 5)


def their_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_sample_is_the_same_each_time_and_spread_over_roles_and_layers(
    source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def checked(**options: Any) -> tuple[dict[str, int], int]:
        proof = proof_of(checkpoints["deepseek"], source, **options)
        return {name: role.checked for name, role in proof.roles.items()}, proof.elements

    first = checked(sample=7, seed=1)
    assert first == checked(sample=7, seed=1, workers=2)
    assert sum(first[0].values()) == 7 and all(first[0].values())
    assert checked(sample=1000)[0] == checked(sample=None)[0]
    # First and last in model order are in each sample: layer 0 and layer 1 come from no other rule here.
    for name in ("model.layers.0.attention.dense.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"):

        def flip(tensors: dict[str, Any], name: str = name) -> None:
            tensors[name].view(dtype_of_codes())[0, 0] ^= 1

        bad = damaged(checkpoints["deepseek"], tmp_path / name, flip)
        assert {proof_of(bad, source, sample=2, seed=seed).sound for seed in range(4)} == {False}


def dtype_of_codes() -> Any:
    import torch

    return torch.uint8


def test_prediction_layers_may_be_left_out_whole_and_only_if_the_config_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", mtp_layers=1, num_nextn_predict_layers=1)
    out = convert(source, tmp_path / "out", "power-of-two")
    proof = proof_of(out, source)
    assert proof.sound and proof.left_out > 10
    configure(out, lambda config: config.update(num_nextn_predict_layers=1))
    assert len(proof_of(out, source).problems) == proof.left_out


# ---- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROUNDINGS, "deepseek"])
@pytest.mark.parametrize("step", [1, -1])
def test_one_code_off_by_one_is_found_and_named(
    name: str, step: int, source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[EXPERT].view(dtype_of_codes())[100, 7] += step

    proof = proof_of(damaged(checkpoints[name], tmp_path, change), source)
    (mismatch,) = proof.mismatches
    assert (mismatch.tensor, mismatch.kind, mismatch.position, mismatch.count) == (
        EXPERT,
        "code",
        (100, 7),
        1,
    )
    assert int(mismatch.found, 16) - int(mismatch.expected, 16) == step
    assert not proof.problems


@pytest.mark.parametrize("name", [*ROUNDINGS, "deepseek"])
def test_one_changed_scale_is_found_and_so_are_the_codes_under_it(
    name: str, source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    scale = "model.layers.0.mlp.down_proj.weight_scale" + ("_inv" if name == "deepseek" else "")

    def change(tensors: dict[str, Any]) -> None:
        tensors[scale][0, 1] *= 1.03125

    proof = proof_of(damaged(checkpoints[name], tmp_path, change), source)
    found = {mismatch.kind: mismatch for mismatch in proof.mismatches}
    assert (found["scale"].tensor, found["scale"].position, found["scale"].count) == (scale, (0, 1), 1)
    assert found["code"].tensor == scale.partition("_scale")[0]
    assert found["code"].position[1] >= 128


def test_swapped_rows_a_changed_kept_tensor_and_codes_of_nan_are_found(
    source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    norm = "model.layers.1.input_layernorm.weight"

    def change(tensors: dict[str, Any]) -> None:
        codes = tensors[EXPERT].view(dtype_of_codes())
        codes[[3, 4]] = codes[[4, 3]]
        tensors["lm_head.weight"][[0, 1]] = tensors["lm_head.weight"][[1, 0]]
        tensors[norm][9] += 1
        tensors["model.layers.0.mlp.down_proj.weight"].view(dtype_of_codes())[5, 6] = 0x7F

    proof = proof_of(damaged(checkpoints["deepseek"], tmp_path, change), source)
    found = {mismatch.tensor: mismatch for mismatch in proof.mismatches}
    assert set(found) == {EXPERT, "lm_head.weight", norm, "model.layers.0.mlp.down_proj.weight"}
    assert found[EXPERT].position[0] == 3 and found[EXPERT].count > 100
    assert found["lm_head.weight"].kind == "kept" and found["lm_head.weight"].position[0] == 0
    assert (found[norm].kind, found[norm].position, found[norm].count) == ("kept", (9,), 1)
    assert found["model.layers.0.mlp.down_proj.weight"].position == (5, 6)


def test_missing_extra_and_misshapen_tensors_are_listed(
    source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.norm.weight"]
        del tensors[EXPERT + "_scale_inv"]
        tensors["model.surprise.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(1, 1)

    proof = proof_of(damaged(checkpoints["deepseek"], tmp_path, change), source)
    text = "\n".join(proof.problems)
    assert len(proof.problems) == 5
    for part in ("missing: model.norm.weight", f"{EXPERT}: FP8 without", "extra: model.surprise.weight",
                 "lm_head.weight: shape [255, 128]", "down_proj.weight_scale_inv: F32 [1, 1]"):  # fmt: skip
        assert part in text


def test_a_source_that_is_not_finite_or_not_the_source_is_found(
    source: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    rewrite(bad, lambda tensors: tensors[EXPERT][100, 7].fill_(float("nan")))
    (mismatch,) = proof_of(checkpoints["deepseek"], bad).mismatches
    assert (mismatch.kind, mismatch.position) == ("source", (100, 7))
    stranger = write_checkpoint(tmp_path / "stranger", seed=1)
    assert len(proof_of(checkpoints["deepseek"], stranger).mismatches) > 22
    with pytest.raises(BadInput, match="quantized itself"):
        proof_of(checkpoints["deepseek"], checkpoints["float32"])


# ---- the verb -------------------------------------------------------------------------------------------


def test_the_verb_reports_and_its_exit_code_judges(
    source: Path, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(checkpoints["deepseek"]), "--against", str(source)]
    assert run([*arguments, "--sample", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] and found["checked"] == 5 and found["tensors"] == 22 and found["seed"] == 0
    assert set(found["roles"]["routed_expert"]) == {
        *("tensors", "checked", "elements", "snr_db", "worst_relative_error")
    }
    assert run(arguments) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert "follows from its source" in table and "22 of 22 weights" in table

    def change(tensors: dict[str, Any]) -> None:
        tensors[EXPERT].view(dtype_of_codes())[100, 7] = 0x7F

    bad = damaged(checkpoints["deepseek"], tmp_path, change)
    assert run(["verify", str(bad), "--against", str(source), "--json"]) == 5
    captured = capsys.readouterr()
    assert f"{EXPERT}[100, 7]: code 0x7F" in captured.err
    found = json.loads(captured.out)
    assert not found["sound"] and found["worst_relative_error"] is None
    assert found["mismatches"][0]["position"] == [100, 7]
    assert run(["verify", str(bad), "--against", str(source)]) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sample", "3"],
        ["--all"],
        ["--against", "{source}", "--all", "--sample", "3"],
        ["--against", "{source}", "--key", "x.pub"],
    ],
)
def test_options_that_contradict_each_other_are_a_usage_problem(
    arguments: list[str], source: Path, checkpoints: dict[str, Path]
) -> None:
    given = [part.format(source=source) for part in arguments]
    assert run(["verify", str(checkpoints["float32"]), *given]) == 2


def test_a_scale_rounding_that_was_asked_for_is_the_measure(
    source: Path, checkpoints: dict[str, Path]
) -> None:
    proof = proof_of(checkpoints["power-of-two"], source, rounding="float32")
    assert proof.rounding_from == "asked for"
    assert {mismatch.kind for mismatch in proof.mismatches} == {"scale"}


def test_roles_are_told_from_the_names_of_several_models() -> None:
    assert role_of("model.layers.3.mlp.experts.17.up_proj.weight") == "routed_expert"
    assert role_of("model.layers.3.mlp.shared_experts.up_proj.weight") == "shared_expert"
    assert role_of("model.layers.3.self_attn.q_proj.weight") == "attention_input"
    assert role_of("model.layers.3.attention.dense.weight") == "attention_output"
    assert role_of("model.layers.0.mlp.down_proj.weight") == "dense_mlp"
