"""Drafts of others: the faults that were published, the forms they come in, our own in speculators' form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from draft_data import HIDDEN, SPEC, TARGET, VOCAB, write_data, write_target

from packager.cli.draft import command
from packager.draft.forms import flat_config, form_of
from packager.draft.imported import look_at
from packager.draft.prepare import target_digest
from packager.draft.stage import export, train
from packager.draft.validator import validate_draft
from packager.errors import BadInput

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

VERIFIER = "somebody/target"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and its draft, exported in both forms."""
    root = tmp_path_factory.mktemp("forms")
    target = write_target(root / "target")
    spec = SPEC.model_copy(update={"steps": 2})
    trained = train(target, spec, write_data(root / "work", target), lambda _: None)
    for name, verifier in (("draft", None), ("speculators", VERIFIER)):
        inputs = {"target": target_digest(target)}
        export(root / name, trained, target, recipe_digest="sha256:0", inputs=inputs, verifier=verifier)
    return root


def _change(folder: Path, out: Path, **changed: Any) -> Path:
    """A copy whose config.json has these fields changed."""
    copy = shutil.copytree(folder, out)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changed))
    return copy


# ---- published faults -------------------------------------------------------------------------------------


def _ids_beyond_the_vocabulary(draft: Path) -> None:
    """Those of the tokenizer of another model line (151643, 151645)."""
    _edit(draft, bos_token_id=151643, eos_token_id=151645)


def _no_theta(draft: Path) -> None:
    _edit(draft, rope_theta=None, rope_parameters=None, rope_scaling=None)


def _theta_of_another(draft: Path) -> None:
    _edit(draft, rope_theta=500000.0, rope_parameters=None, rope_scaling=None)


def _two_thetas(draft: Path) -> None:
    _edit(draft, rope_theta=500000.0)


def _horizon_of_its_training(draft: Path) -> None:
    """2048 tokens, where the target reaches further."""
    _edit(draft, max_position_embeddings=1024)


def _training_state(draft: Path) -> None:
    torch.save({"step": 1}, draft / "training_state.pt")


def _sglang_reads_one_layer_further(draft: Path) -> None:
    """The same ids for both engines: SGLang adds one to those in a list."""
    _edit(draft, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]})


def _only_vllm_knows_the_layers(draft: Path) -> None:
    _edit(draft, eagle_config=None)


def _list_of_ids(draft: Path) -> None:
    """A list of which one is beyond the vocabulary."""
    _edit(draft, eos_token_id=[2, 156895])


def _edit(draft: Path, **changed: Any) -> None:
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_ids_beyond_the_vocabulary, ["bos_token_id 151643 is beyond", "eos_token_id 151645 is beyond"]),
        (_no_theta, ["no rope_theta"]),
        (_theta_of_another, ["rope rope_theta is 500000.0, the target's is 10000.0"]),
        (_two_thetas, ["rope_theta is given twice, differently ([10000.0, 500000.0])"]),
        (_horizon_of_its_training, ["max_position_embeddings is 1024, the target reaches 2048"]),
        (_training_state, ["training_state.pt does not belong"]),
        (_sglang_reads_one_layer_further, ["[1, 2, 3] for vLLM and [1, 2, 3] (plus one) for SGLang"]),
        (_only_vllm_knows_the_layers, ["missing from eagle_config: SGLang would read other layers"]),
        (_list_of_ids, ["eos_token_id 156895 is beyond"]),
    ],
)
def test_each_published_fault_is_found(
    root: Path, tmp_path: Path, damage: Callable[[Path], None], said: list[str]
) -> None:
    copy = shutil.copytree(root / "draft", tmp_path / "draft")
    damage(copy)
    problems = validate_draft(copy, TARGET)
    for one in said:
        assert any(one in problem for problem in problems), problems


def test_a_list_of_the_targets_own_ids_is_named_when_it_is_not_the_targets(
    root: Path, tmp_path: Path
) -> None:
    copy = _change(root / "draft", tmp_path / "draft", eos_token_id=[2])
    assert validate_draft(copy, TARGET) == ["eos_token_id is [2], the target's is 2"]


# ---- forms ------------------------------------------------------------------------------------------------


def _as_layers(root: Path, out: Path) -> Path:
    copy = shutil.copytree(root / "draft", out)
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "model.safetensors")
    return copy


def test_a_draft_of_layers_is_measured_and_called_unfit_for_older_sglang(root: Path, tmp_path: Path) -> None:
    found = look_at(_as_layers(root, tmp_path / "draft"), root / "target")
    assert found.form == "layers"
    assert found.problems == ["tensors are named layers.0.*: older SGLang knows midlayer.* only"]
    assert found.obstacles == []


def test_a_half_renamed_draft_is_not_taken_for_another_form(root: Path) -> None:
    names = list(load_file(root / "draft/model.safetensors"))
    assert form_of({}, [*names, "layers.0.hidden_norm.weight"]) == "midlayer"


def test_our_speculators_export_has_no_problems(root: Path) -> None:
    found = look_at(root / "speculators", root / "target")
    assert (found.form, found.problems, found.obstacles) == ("speculators", [], [])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"speculators_config": None}, "names no verifier"),
        ({"speculators_model_type": "dflash"}, "not eagle3"),
        ({"draft_vocab_size": 47}, "expected [47"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "not ascending layers"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "no aux layer ids"),
    ],
)
def test_faults_of_a_speculators_draft_are_found(
    root: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    copy = _change(root / "speculators", tmp_path / "draft", **changed)
    assert any(said in problem for problem in validate_draft(copy, TARGET)), validate_draft(copy, TARGET)


def test_an_option_left_out_of_a_speculators_draft_has_the_readers_default(
    root: Path, tmp_path: Path
) -> None:
    config = json.loads((root / "speculators/config.json").read_text())
    del config["norm_before_residual"]
    copy = shutil.copytree(root / "speculators", tmp_path / "draft")
    (copy / "config.json").write_text(json.dumps(config))
    assert flat_config(config)["norm_before_residual"] is True
    assert any("norm_before_residual is left out" in one for one in validate_draft(copy, TARGET))


# ---- what cannot be measured ------------------------------------------------------------------------------


def test_pickled_weights_are_not_opened(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root / "draft", tmp_path / "draft")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02")
    found = look_at(copy, root / "target")
    assert found.obstacles == ["its weights are pickled (pytorch_model.bin), which is never opened here"]


def test_a_draft_of_another_model_cannot_be_measured(root: Path, tmp_path: Path) -> None:
    copy = _change(root / "draft", tmp_path / "draft", hidden_size=2 * HIDDEN, architectures=["MedusaModel"])
    found = look_at(copy, root / "target")
    assert found.obstacles == [
        "vLLM has no draft class for ['MedusaModel']",
        f"it was made for a target with hidden_size {2 * HIDDEN}; this one has {HIDDEN}",
    ]
    result = CliRunner().invoke(command, ["evaluate", "--import", str(root / "target"), str(copy)])
    assert isinstance(result.exception, BadInput)
    assert "cannot be measured" in result.exception.message


def test_fp8_that_cannot_be_served_here_is_told_before_a_server_starts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packager.serving.fp8_runs_here", lambda: (False, "this CPU has no AMX"))
    target = _change(root / "target", tmp_path / "target", quantization_config={"quant_method": "fp8"})
    result = CliRunner().invoke(command, ["evaluate", str(target), str(root / "draft")])
    assert isinstance(result.exception, BadInput)
    assert "no AMX" in result.exception.message
    assert "packager dequantize" in result.exception.remedy


def test_a_folder_that_is_no_draft_is_told_so(root: Path, tmp_path: Path) -> None:
    found = look_at(tmp_path, root / "target")
    assert found.form == "unreadable"
    assert found.obstacles == found.problems != []


def test_check_only_lists_the_problems_and_serves_nothing(root: Path, tmp_path: Path) -> None:
    copy = _change(root / "draft", tmp_path / "draft", bos_token_id=VOCAB + 1)
    result = CliRunner().invoke(
        command, ["evaluate", str(root / "target"), str(copy), "--import", "--check-only", "--json"]
    )
    document = json.loads(result.stdout)
    assert result.exit_code == BadInput.exit_code
    assert document["form"] == "midlayer"
    assert document["problems"] == [f"bos_token_id {VOCAB + 1} is beyond the target's vocabulary of {VOCAB}"]


@pytest.mark.parametrize("value", ["0", "a", "3-", "1,,2", "5-3"])
def test_numbers_that_are_none_are_a_usage_problem(root: Path, value: str) -> None:
    result = CliRunner().invoke(
        command, ["evaluate", str(root / "target"), str(root / "draft"), "--tokens", value]
    )
    assert result.exit_code == 2
    assert "numbers" in result.stderr


# ---- the readers themselves -------------------------------------------------------------------------------


@pytest.mark.slow
def test_vllms_own_reader_makes_the_same_draft_of_both_exports(root: Path) -> None:
    """`vllm serve DRAFT` goes through it: target, draft tokens, and a config equal to that of our export."""
    base = pytest.importorskip("vllm.transformers_utils.configs.speculators.base")
    config = json.loads((root / "speculators/config.json").read_text())
    assert base.SpeculatorsConfig.extract_vllm_speculative_config(config) == {
        "method": "eagle3",
        "num_speculative_tokens": SPEC.num_speculative_tokens,
    }
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": VERIFIER,
        "architectures": TARGET["architectures"],
    }
    read = base.SpeculatorsConfig.from_pretrained(root / "speculators")
    ours = json.loads((root / "draft/config.json").read_text())
    same = set(ours) - {
        "architectures",
        "model_type",
        "torch_dtype",
        "rope_scaling",
        "rope_theta",
        "eagle_config",
    }
    assert {name: getattr(read, name) for name in same} == {name: ours[name] for name in same}
    assert read.architectures == ["Eagle3LlamaForCausalLM"]
    assert not (read.norm_before_residual or read.norm_before_fc or read.fc_norm or read.norm_output)


@pytest.mark.slow
def test_the_speculators_library_loads_its_form(root: Path) -> None:
    """Its config class reads the file, and its model has a place for every tensor."""
    pytest.importorskip("speculators")
    from speculators import SpeculatorModelConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    config = SpeculatorModelConfig.from_pretrained(root / "speculators")
    assert isinstance(config, Eagle3SpeculatorConfig)
    assert config.eagle_aux_hidden_state_layer_ids == list(SPEC.aux_layers)
    with torch.device("meta"):
        model = Eagle3DraftModel(config)
    tensors = load_file(root / "speculators/model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert unexpected == []
    targets_own = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert set(missing) <= targets_own
