"""The exported draft: complete, and a validator that names each fault of a draft, ours or another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from draft_data import HIDDEN, SPEC, TARGET, VOCAB, YARN, write_data, write_target

from packager.artifact import check
from packager.draft.config import tensor_shapes
from packager.draft.prepare import target_digest
from packager.draft.stage import export, train
from packager.draft.validator import validate_draft

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported draft; a few steps of training do for its form."""
    root = tmp_path_factory.mktemp("draft")
    target = write_target(root / "target")
    spec = SPEC.model_copy(update={"steps": 4})
    trained = train(target, spec, write_data(root / "work", target), lambda _: None)
    export(
        root / "draft", trained, target, recipe_digest="sha256:0", inputs={"target": target_digest(target)}
    )
    return root / "draft"


# ---- the head ---------------------------------------------------------------------------------------------


def test_export_is_sealed_and_complete(exported: Path) -> None:
    manifest = check(exported)
    assert {entry.path for entry in manifest.files} == {
        "config.json",
        "model.safetensors",
        "training.json",
        "training.jsonl",
        "training.svg",
    }
    tensors = load_file(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(config)
    assert manifest.metrics["predicted_acceptance"]["length"] >= 1


def test_export_passes_the_validator(exported: Path) -> None:
    assert validate_draft(exported, TARGET) == []


def test_draft_config_states_yarn_and_both_engines_layers(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["max_position_embeddings"] == 2048
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert "partial_rotary_factor" not in config["rope_parameters"]


_CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"eos_token_id": VOCAB}, "eos_token_id 96 is beyond"),
    ({"bos_token_id": 151643}, "bos_token_id 151643 is beyond"),
    ({"bos_token_id": 5}, "the target's is 0"),
    ({"rope_theta": None, "rope_parameters": None, "rope_scaling": None}, "no rope_theta"),
    ({"rope_parameters": None, "rope_scaling": None}, "rope factor is None"),
    ({"rope_scaling": {**YARN, "factor": 2.0}}, "contradict"),
    ({"rope_scaling": {**YARN, "type": "linear"}}, "two types"),
    ({"max_position_embeddings": 512}, "the target reaches 2048"),
    ({"vocab_size": 100}, "vocab_size is 100"),
    ({"draft_vocab_size": 47}, "expected [47"),
    ({"norm_before_residual": True}, "SGLang does not know"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}, "different layers"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}, "not ascending layers"),
    ({"eagle_config": None}, "missing from eagle_config"),
    ({"eagle_config": None, "eagle_aux_hidden_state_layer_ids": None}, "no aux layer ids"),
    ({"intermediate_size": None}, "has no intermediate_size"),
]


@pytest.mark.parametrize(("change", "fault"), _CONFIG_FAULTS)
def test_validator_finds_faults_of_the_config(
    exported: Path, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    copy = shutil.copytree(exported, tmp_path / "draft")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    assert any(fault in problem for problem in validate_draft(copy, TARGET)), validate_draft(copy, TARGET)


def _rename(tensors: dict[str, Any]) -> None:
    tensors["layers.0.hidden_norm.weight"] = tensors.pop("midlayer.hidden_norm.weight")


def _beyond(tensors: dict[str, Any]) -> None:
    tensors["d2t"][-1] = VOCAB


def _twice(tensors: dict[str, Any]) -> None:
    tensors["d2t"][1] = tensors["d2t"][0] - 1


def _wrong_mark(tensors: dict[str, Any]) -> None:
    tensors["t2d"][0] = ~tensors["t2d"][0]


def _narrow_ids(tensors: dict[str, Any]) -> None:
    tensors["d2t"] = tensors["d2t"].int()


def _short_fc(tensors: dict[str, Any]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"][:, : 2 * HIDDEN].contiguous()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_rename, "midlayer.hidden_norm.weight is missing"),
        (_rename, "older SGLang knows midlayer"),
        (_beyond, "beyond the vocabulary"),
        (_twice, "not injective"),
        (_wrong_mark, "t2d marks other tokens"),
        (_narrow_ids, "d2t is I32"),
        (_short_fc, "fc.weight has shape"),
    ],
)
def test_validator_finds_faults_of_the_tensors(
    exported: Path, tmp_path: Path, change: Any, fault: str
) -> None:
    copy = shutil.copytree(exported, tmp_path / "draft")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    assert any(fault in problem for problem in validate_draft(copy, TARGET)), validate_draft(copy, TARGET)


@pytest.mark.parametrize("name", ["training_state.pt", "optimizer.bin"])
def test_validator_finds_left_over_files(exported: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(exported, tmp_path / "draft")
    (copy / name).touch()
    assert validate_draft(copy, TARGET) == [f"{name} does not belong into a published draft"]


# ---- prompts and preparation ------------------------------------------------------------------------------
