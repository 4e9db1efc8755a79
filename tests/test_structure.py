"""`validate structure`: a sound checkpoint passes, and each kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from quantizing import run as make
from tiny_architectures import TINY, tiny_config, write_tiny

from packager.bailing.layout import QUANTIZABLE, Role
from packager.cli import run
from packager.errors import BadInput
from packager.layouts import recognise
from packager.proof.parallel import splits
from packager.proof.structure import Problem, Structure, check_structure
from packager.quantize import dequantize, quantize, relabel
from packager.recipe import QuantizeSpec

SERVABLE: dict[str, Any] = {"num_key_value_heads": 2, "num_nextn_predict_layers": 0}
"""Two KV heads of 64 make one whole block, which engines ask for."""
DENSE = "model.layers.0.attention.dense.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("structure") / "source", shards=2, **SERVABLE)


@pytest.fixture(scope="module")
def checkpoints(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One FP8 checkpoint a dialect, in several shards, without its seal."""
    base = tmp_path_factory.mktemp("fp8")
    spec = QuantizeSpec(shard_bytes=100_000)
    quantize(source, base / "compressed-tensors", spec, recipe_digest="x", progress=lambda _: None)
    relabel(base / "compressed-tensors", base / "deepseek", "deepseek")
    dequantize(base / "deepseek", base / "bf16")
    return {path.name: path for path in base.iterdir()}


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the tensors of all shards at once, by name; the index follows."""
    from safetensors.torch import load_file, save_file

    shards = {file: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    merged = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    change(merged)
    last = max(shards)
    homes = {file: [name for name in tensors if name in merged] for file, tensors in shards.items()}
    known = {name for names in homes.values() for name in names}
    homes[last] += [name for name in merged if name not in known]
    for file, names in homes.items():
        save_file({name: merged[name].contiguous() for name in names}, file)
    weight_map = {name: file.name for file, names in homes.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configure(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def damaged(checkpoint: Path, tmp_path: Path, damage: Damage) -> Structure:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    return check_structure(copy)


def the_one(found: Structure, kind: str) -> Problem:
    """The only problem, of the kind that is expected."""
    assert [problem.kind for problem in found.problems] == [kind], list(map(str, found.problems))
    return found.problems[0]


@pytest.mark.parametrize("dialect", ["compressed-tensors", "deepseek", "bf16"])
def test_what_packager_writes_is_sound(
    dialect: str, checkpoints: dict[str, Path], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints[dialect]
    assert run(["validate", "structure", str(path), "--source", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] and found["data_read"] and found["problems"] == []
    assert found["dialect"] == (None if dialect == "bf16" else dialect)
    assert found["quantized"] == found["scales"] == (0 if dialect == "bf16" else 22)
    assert found["kept"] == (35 if dialect == "bf16" else 13)


def test_the_nano_is_sound_and_says_what_it_can_be_split_over() -> None:
    found = check_structure(Path(__file__).parents[1] / "packager/nano/checkpoint", read_data=False)
    assert found.sound and not found.data_read
    assert [split.size for split in found.parallel if split.possible] == [1, 2, 4]


# ---- scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["compressed-tensors", "deepseek"])
def test_faults_of_a_scale_are_told_apart(dialect: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    suffix = {"compressed-tensors": "_scale", "deepseek": "_scale_inv"}
    mine, other = suffix[dialect], suffix[next(d for d in suffix if d != dialect)]
    cases: list[tuple[str, str, Callable[[dict[str, Any]], None]]] = [
        ("scale-missing", DENSE, lambda t: t.pop(DENSE + mine)),
        ("scale-name", DENSE + other, lambda t: t.update({DENSE + other: t.pop(DENSE + mine)})),
        ("scale-shape", DENSE + mine, lambda t: t.update({DENSE + mine: torch.ones(2, 1)})),
        ("scale-dtype", DENSE + mine, lambda t: t.update({DENSE + mine: torch.ones(1, 1).half()})),
        (
            "orphan",
            "model.norm.weight" + mine,
            lambda t: t.update({"model.norm.weight" + mine: torch.ones(1)}),
        ),
        *(
            ("scale-value", DENSE + mine, lambda t, v=value: t.update({DENSE + mine: torch.full((1, 1), v)}))
            for value in (float("inf"), float("nan"), -1.0, 0.0)
        ),
    ]
    for number, (kind, where, change) in enumerate(cases):
        found = damaged(checkpoints[dialect], tmp_path / str(number), partial(rewrite, change=change))
        assert the_one(found, kind).where == where


def test_a_bf16_scale_as_other_tools_write_it_is_sound(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = DENSE + "_scale"
    change: Callable[[dict[str, Any]], None] = lambda t: t.update({name: t[name].bfloat16()})  # noqa: E731
    assert damaged(checkpoints["compressed-tensors"], tmp_path, lambda p: rewrite(p, change)).sound


# ---- weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.1.mlp.gate.weight", "router"),
        ("model.word_embeddings.weight", "embedding"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.layers.1.mlp.gate.expert_bias", "expert_bias"),
    ],
)
def test_what_engines_keep_must_not_be_quantized(
    name: str, role: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    found = damaged(checkpoints["deepseek"], tmp_path, lambda path: rewrite(path, change))
    kinds = {problem.kind: problem for problem in found.problems}
    assert kinds["quantized"].where == name and role in kinds["quantized"].detail
    assert kinds["scale-missing"].where == name


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_named_with_its_place_unless_only_headers_are_read(
    code: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors[EXPERT].view(torch.uint8)[100, 7] = code

    found = damaged(checkpoints["compressed-tensors"], tmp_path, lambda path: rewrite(path, change))
    problem = the_one(found, "nan-code")
    assert problem.where == EXPERT and "1 NaN code(s), the first at [100, 7]" in problem.detail
    assert check_structure(tmp_path / "copy", read_data=False).sound


def test_missing_unknown_misshapen_and_unquantized_weights_are_found(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.surprise.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors[DENSE] = tensors[DENSE].to(torch.bfloat16)

    found = damaged(checkpoints["deepseek"], tmp_path, lambda path: rewrite(path, change))
    assert {(problem.kind, problem.where) for problem in found.problems} == {
        ("missing", "model.norm.weight"),
        ("unknown", "model.surprise.weight"),
        ("shape", "lm_head.weight"),
        ("not-quantized", DENSE),
        ("orphan", DENSE + "_scale_inv"),
    }


# ---- files and settings ---------------------------------------------------------------------------------


def test_each_fault_of_the_index_is_listed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def damage(path: Path) -> None:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        weight_map = index["weight_map"]
        shards = sorted(set(weight_map.values()))
        weight_map[DENSE] = next(shard for shard in shards if shard != weight_map[DENSE])
        del weight_map["lm_head.weight"]
        weight_map["model.ghost.weight"] = shards[0]
        weight_map["model.norm.weight"] = "model-00099-of-00099.safetensors"
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    found = damaged(checkpoints["deepseek"], tmp_path, damage)
    assert {problem.kind for problem in found.problems} == {"file"}
    text = "\n".join(map(str, found.problems))
    assert len(found.problems) == 4
    assert f"{DENSE}: it is in " in text
    assert "lm_head.weight: it is in " in text and "not in the index" in text
    assert "model.ghost.weight: it is said to be in" in text
    assert "model-00099-of-00099.safetensors, which does not exist" in text


def test_a_shard_cut_short_is_a_fault_and_so_are_its_missing_tensors(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def damage(path: Path) -> None:
        shard = min(path.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])

    found = damaged(checkpoints["deepseek"], tmp_path, damage)
    assert "truncated" in found.problems[0].detail
    assert any(problem.kind == "missing" for problem in found.problems)


@pytest.mark.parametrize(
    ("dialect", "other"), [("deepseek", "compressed-tensors"), ("compressed-tensors", "deepseek")]
)
def test_a_config_of_the_other_dialect_is_one_problem_not_one_a_weight(
    dialect: str, other: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def damage(path: Path) -> None:
        theirs = json.loads((checkpoints[other] / "config.json").read_text())["quantization_config"]
        configure(path, lambda config: config.update(quantization_config=theirs))

    problem = the_one(damaged(checkpoints[dialect], tmp_path, damage), "scale-name")
    assert (
        f"states the {other} dialect" in problem.detail and f"as in the {dialect} dialect" in problem.detail
    )


@pytest.mark.parametrize(
    ("dialect", "key"), [("deepseek", "modules_to_not_convert"), ("compressed-tensors", "ignore")]
)
def test_the_list_of_skips_must_agree_with_what_is_stored(
    dialect: str, key: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def without_head(config: dict[str, Any]) -> None:
        config["quantization_config"][key].remove("lm_head")

    def with_dense(config: dict[str, Any]) -> None:
        config["quantization_config"][key].append(DENSE.removesuffix(".weight"))

    found = damaged(checkpoints[dialect], tmp_path / "a", lambda path: configure(path, without_head))
    assert the_one(found, "skip-list").where == "lm_head"
    found = damaged(checkpoints[dialect], tmp_path / "b", lambda path: configure(path, with_dense))
    assert {(problem.kind, problem.where) for problem in found.problems} == {
        ("skip-list", DENSE),
        ("engine", ""),
    }


@pytest.mark.parametrize(
    ("dialect", "keys", "value"),
    [
        ("deepseek", ["activation_scheme"], "static"),
        ("deepseek", ["weight_block_size"], [64, 64]),
        ("compressed-tensors", ["format"], "int-quantized"),
        ("compressed-tensors", ["config_groups", "group_0", "targets"], ["Embedding"]),
        ("compressed-tensors", ["config_groups", "group_0", "input_activations", "strategy"], "tensor"),
        ("compressed-tensors", ["ignore"], ["lm_head", r"re:.*\.mlp\.gate$", "re:("]),
    ],
)
def test_a_setting_that_engines_do_not_take_is_named(
    dialect: str, keys: list[str], value: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        inner = config["quantization_config"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    found = damaged(checkpoints[dialect], tmp_path, lambda path: configure(path, change))
    assert the_one(found, "config").detail.startswith("quantization_config: ")
    assert keys[-1] in found.problems[0].detail


def test_fp8_without_a_statement_and_a_statement_without_fp8_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    silent = damaged(
        checkpoints["deepseek"],
        tmp_path / "a",
        lambda p: configure(p, lambda c: c.pop("quantization_config")),
    )
    assert any("quantized weights, no quantization_config" in str(problem) for problem in silent.problems)
    stated = json.loads((checkpoints["deepseek"] / "config.json").read_text())["quantization_config"]
    loud = damaged(
        checkpoints["bf16"],
        tmp_path / "b",
        lambda p: configure(p, lambda c: c.update(quantization_config=stated)),
    )
    assert {problem.kind for problem in loud.problems} == {"not-quantized", "engine"}


def test_another_model_than_the_source_is_an_integrity_failure(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", num_experts=6, **SERVABLE)
    assert run(["validate", "structure", str(checkpoints["deepseek"]), "--source", str(other), "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    problems = {(p["kind"], p["where"] or p["detail"]) for p in found["problems"]}
    assert ("source", "num_experts is 4, in the source 6") in problems
    assert ("source", "model.layers.1.mlp.experts.5.up_proj.weight") in problems
    assert {kind for kind, _ in problems} == {"source"}


# ---- engines and GPUs -----------------------------------------------------------------------------------


def test_prediction_layers_are_for_sglang_and_not_for_vllm(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "mtp", mtp_layers=1, **SERVABLE | {"num_nextn_predict_layers": 1})
    assert check_structure(path).sound
    assert check_structure(path, engine="sglang").sound
    assert "MTP layers" in str(the_one(check_structure(path, engine="vllm"), "engine"))
    assert run(["validate", "structure", str(path), "--engine", "vllm"]) == 3
    configure(path, lambda config: config.update(num_nextn_predict_layers=0))
    assert "the config says 0, the weights hold 1" in str(the_one(check_structure(path), "engine"))


def test_a_skip_that_the_two_engines_read_differently_is_told_to_the_one_it_harms(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    skips = ["experts"]  # no module's whole name, but part of many: SGLang takes it, vLLM does not
    found = damaged(
        checkpoints["deepseek"],
        tmp_path,
        lambda path: configure(
            path, lambda config: config["quantization_config"]["modules_to_not_convert"].extend(skips)
        ),
    )
    assert found.sound and check_structure(tmp_path / "copy", engine="vllm").sound
    problem = the_one(check_structure(tmp_path / "copy", engine="sglang"), "engine")
    assert "takes 12 quantized weights for skipped" in problem.detail


def test_experts_of_one_layer_are_all_fp8_or_none(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    def damage(path: Path) -> None:
        def change(tensors: dict[str, Any]) -> None:
            tensors[EXPERT] = tensors[EXPERT].to(torch.bfloat16)
            del tensors[EXPERT + "_scale_inv"]

        rewrite(path, change)
        skips = [EXPERT.removesuffix(".weight")]
        configure(path, lambda c: c["quantization_config"]["modules_to_not_convert"].extend(skips))

    problem = the_one(damaged(checkpoints["deepseek"], tmp_path, damage), "engine")
    assert "model.layers.1.mlp.experts is partly quantized" in problem.detail


def test_the_103b_shape_splits_over_1_2_4_and_8_gpus() -> None:
    raw = json.loads((Path(__file__).parents[1] / "recipes/ling-flash-2.0.json").read_text())
    model = recognise(raw)
    found = {split.size: split for split in splits(model, model.tensors(), (128, 128), QUANTIZABLE)}
    assert [size for size, split in found.items() if split.possible] == [1, 2, 4, 8]
    assert (found[8].heads, found[8].kv_heads, found[8].expert_width) == (4, 1, 128)
    assert "dense width 9216 does not divide by 5" in found[5].reasons
    assert "32 heads do not divide by 3" in found[3].reasons


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_every_declared_architecture_is_checked(architecture: str, tmp_path: Path) -> None:
    """Its odd widths keep block scales from every number of GPUs, a scale a row from none that divides."""
    source = write_tiny(tmp_path / "source", architecture, num_nextn_predict_layers=0)
    assert check_structure(source).sound
    for scheme in ("fp8-channel", "fp8-block"):
        make(source, tmp_path / scheme, QuantizeSpec(scheme=scheme))
    rows = check_structure(tmp_path / "fp8-channel", source=source)
    assert rows.sound and rows.quantized and rows.architecture == architecture
    assert [split.size for split in rows.parallel if split.possible][:2] == [1, 2]
    blocks = check_structure(tmp_path / "fp8-block", source=source)
    assert {problem.kind for problem in blocks.problems} == {"parallel"}
    assert "is no multiple of 128" in str(the_one(blocks, "parallel"))


def test_heads_of_latent_attention_are_split_and_its_latent_vector_is_not() -> None:
    raw = tiny_config("DeepseekV3ForCausalLM", num_attention_heads=128, qk_nope_head_dim=128, v_head_dim=128)
    raw |= {
        "qk_rope_head_dim": 64,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "vocab_size": 129280,
    }
    model = recognise(raw)
    found = {split.size: split for split in splits(model, model.tensors(), (128, 128), QUANTIZABLE)}
    assert [size for size, split in found.items() if split.possible] == [1, 2, 4, 8]
    assert (found[8].heads, found[8].kv_heads, found[8].dense_width) == (16, None, 2304)
    few = recognise(raw | {"num_attention_heads": 2})
    (one,) = splits(few, few.tensors(), (128, 128), QUANTIZABLE, [2])
    assert one.reasons == ("query width 192 a GPU is no multiple of 128",)


@pytest.mark.parametrize(
    ("change", "block", "reason"),
    [
        ({"moe_intermediate_size": 192}, (128, 128), "expert width 192 a GPU is no multiple of 128"),
        ({"num_key_value_heads": 1}, (128, 128), "KV width 64 a GPU is no multiple of 128"),
        ({"moe_intermediate_size": 192}, None, None),
    ],
)
def test_whole_blocks_are_asked_for_only_where_blocks_share_a_scale(
    change: dict[str, Any], block: tuple[int, int] | None, reason: str | None, source: Path
) -> None:
    model = recognise({**json.loads((source / "config.json").read_text()), **change})
    (split,) = splits(model, model.tensors(), block, QUANTIZABLE, [1])
    assert split.reasons == ((reason,) if reason else ())
    assert splits(model, model.tensors(), block, frozenset({Role.DENSE_MLP}), [1])[0].possible


# ---- the verb -------------------------------------------------------------------------------------------


def test_the_report_fits_80_columns_and_needs_no_torch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["compressed-tensors"], copy)
    code = (
        "import sys; from packager.cli import run; code = run(['validate', 'structure', sys.argv[1]])\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, env={"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in ("vLLM", "SGLang", "GPUs", "3: 2 heads do not divide by 3", "sound"):
        assert part in done.stdout


def test_a_folder_that_is_no_checkpoint_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"):
        check_structure(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="no \\*\\.safetensors"):
        check_structure(tmp_path)
