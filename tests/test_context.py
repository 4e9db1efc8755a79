"""YaRN: the patch says one thing to every reader, and the numbers are those that engines compute."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from packager.artifact import check
from packager.checkpoint import Checkpoint
from packager.cli.extend_context import command as extend_context
from packager.context import extend, undo, undo_patch, yarn_patch
from packager.context.yarn import RECORD, yarn_frequencies
from packager.draft.config import draft_config
from packager.errors import BadInput, IntegrityFailure, UsageProblem
from packager.nano import CHECKPOINT
from packager.recipe import ContextSpec, DraftSpec

ROOT = Path(__file__).parents[1]
PLAIN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "head_dim": 128,
    "rope_scaling": None,
}


def run(source: Path, out: Path, length: int = 256) -> Any:
    return extend(source, out, ContextSpec(length=length), recipe_digest="sha256:0")


def test_the_patch_for_128k_is_what_upstream_publishes_and_no_reader_misses_it() -> None:
    patched = yarn_patch(PLAIN, 131072)
    assert patched["max_position_embeddings"] == 131072
    assert (
        patched["rope_parameters"]
        == patched["rope_scaling"]
        == {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "rope_theta": 600000,
            "partial_rotary_factor": 0.5,
        }
    )
    assert PLAIN["rope_scaling"] is None, "the argument is left as it was"
    assert patched["rope_parameters"] is not patched["rope_scaling"]


def test_a_draft_without_partial_rotation_gets_none() -> None:
    draft = {
        "max_position_embeddings": 32768,
        "rope_theta": 600000,
        "architectures": ["LlamaForCausalLMEagle3"],
    }
    patched = yarn_patch(draft, 65536)
    assert "partial_rotary_factor" not in patched["rope_parameters"]
    assert patched["rope_parameters"]["factor"] == 2.0


def test_settings_that_transformers_5_wrote_are_taken_over() -> None:
    moved = {
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    rope = yarn_patch(moved, 1024)["rope_scaling"]
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (1e4, 0.5)


@pytest.mark.parametrize(
    ("change", "length", "fault"),
    [
        ({}, 32768, "no larger multiple"),
        ({}, 16384, "no larger multiple"),
        ({}, 100_000, "no larger multiple"),
        ({"max_position_embeddings": None}, 131072, "trained length is unknown"),
        ({"rope_theta": None}, 131072, "no rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072, "'yarn' already"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 131072, "'linear' already"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, 131072, "contradict: factor"),
        ({"rope_parameters": {"rope_theta": 10000}}, 131072, "rope_theta twice"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, 131072, "partial_rotary_factor twice"),
        ({"rope_scaling": [1]}, 131072, "not an object"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, 131072, "two types"),
        ({"original_max_position_embeddings": 8192}, 131072, "extended before"),
    ],
)
def test_a_config_or_length_that_does_not_fit_is_refused(
    change: dict[str, Any], length: int, fault: str
) -> None:
    with pytest.raises(BadInput, match=fault):
        yarn_patch({**PLAIN, **change}, length)


def test_a_patched_config_is_not_patched_again() -> None:
    with pytest.raises(BadInput, match="extended before"):
        yarn_patch(yarn_patch(PLAIN, 131072), 262144)


# --- the trained length again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"rope_parameters": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}},
    ],
)
def test_undoing_gives_back_every_key_as_it_was_and_where_it_stood(before: dict[str, Any]) -> None:
    for config in ({**PLAIN, **before}, {k: v for k, v in PLAIN.items() if k != "rope_scaling"} | before):
        patched = yarn_patch(config, 131072)
        assert RECORD in patched
        assert json.dumps(undo_patch(patched)) == json.dumps(config)


def test_a_yarn_config_by_others_is_undone_too() -> None:
    """Upstream's recipe: an addition to rope_scaling alone, with or without the longer maximum."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for longest in (32768, 131072):
        found = undo_patch({**PLAIN, "rope_scaling": scaling, "max_position_embeddings": longest})
        assert found == PLAIN


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 600000}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, "no YaRN to undo"),
        ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "'linear', not by YaRN"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "contradicts itself"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "factor is"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "two types"),
        ({"rope_scaling": {**YARN, "rope_theta": 10000}}, "rope_theta is"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "lack original_max_position_embeddings"),
        ({"rope_scaling": YARN, RECORD: {"config": {"max_position_embeddings": 8192}}}, "was altered"),
        ({"rope_scaling": YARN, RECORD: 1}, "was altered"),
    ],
)
def test_what_cannot_be_undone_for_certain_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        undo_patch({**PLAIN, **change})


def test_the_command_extends_and_undoes_to_the_same_bytes(tmp_path: Path) -> None:
    def packager(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(extend_context, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    long, short = tmp_path / "long", tmp_path / "short"
    packager(str(CHECKPOINT), str(long), "--length", "2048")
    assert packager(str(long), str(short), "--undo")["metrics"]["length"] == 512
    assert {p.name for p in short.iterdir()} == {p.name for p in CHECKPOINT.iterdir()} | {"manifest.json"}
    for file in CHECKPOINT.iterdir():
        assert (short / file.name).read_bytes() == file.read_bytes()
    assert (short / "model.safetensors").samefile(CHECKPOINT / "model.safetensors")
    for wrong in ([], ["--undo", "--length", "2048"]):
        done = CliRunner().invoke(extend_context, [str(long), str(tmp_path / "none"), *wrong])
        assert isinstance(done.exception, UsageProblem)


# --- the draft ---------------------------------------------------------------------------------------------

DRAFT = DraftSpec(vocab_size=64, aux_layers=(1, 2, 3), prompts=1, steps=1)


def nano_config() -> dict[str, Any]:
    return json.loads((CHECKPOINT / "config.json").read_text())  # type: ignore[no-any-return]


def test_a_draft_made_for_the_extended_target_is_the_extended_draft_of_the_trained_target() -> None:
    native = draft_config(nano_config(), DRAFT)
    made, patched = draft_config(yarn_patch(nano_config(), 2048), DRAFT), yarn_patch(native, 2048)
    del patched[RECORD]
    assert made == patched
    assert made["rope_parameters"] is not made["rope_scaling"]
    assert undo_patch(made) == native


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A draft for the nano at its trained length, as exported: names and shapes right, weights random."""
    from safetensors.numpy import save_file

    from packager.draft.config import tensor_shapes

    out, config = tmp_path / "draft", draft_config(nano_config(), DRAFT)
    out.mkdir()
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
        if name not in ("d2t", "t2d")
    }
    tensors |= {"d2t": np.zeros(64, dtype=np.int64), "t2d": np.arange(2048) < 64}
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def test_a_draft_is_extended_and_undone_as_its_target_is(draft: Path, tmp_path: Path) -> None:
    from packager.draft.validator import validate_draft

    manifest = run(draft, tmp_path / "long", 2048)
    extended = Checkpoint.open(tmp_path / "long").config()
    before = draft_config(nano_config(), DRAFT)
    for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids", "draft_vocab_size", "architectures"):
        assert extended[key] == before[key]
    assert manifest.metrics["rotary_dim"] == 64, "a draft rotates whole heads"
    assert validate_draft(draft, nano_config()) == []
    assert validate_draft(tmp_path / "long", yarn_patch(nano_config(), 2048)) == []
    assert validate_draft(draft, yarn_patch(nano_config(), 2048)) != []
    undo(tmp_path / "long", tmp_path / "short", recipe_digest="sha256:0")
    assert (tmp_path / "short" / "config.json").read_bytes() == (draft / "config.json").read_bytes()


def test_another_architecture_is_refused(draft: Path, tmp_path: Path) -> None:
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(BadInput, match="no BailingMoeV2ForCausalLM configuration"):
        run(draft, tmp_path / "long", 2048)


# --- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "share", "theta", "original", "factor"),
    [
        (128, 0.5, 600000.0, 32768, 4.0),
        (64, 0.5, 10000.0, 512, 4.0),
        (128, 1.0, 10000.0, 4096, 2.0),
        (64, 0.5, 10000.0, 64, 8.0),
    ],
)
def test_the_frequencies_are_those_of_transformers(
    head_dim: int, share: float, theta: float, original: int, factor: float
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from packager.bailing.hf_config import BailingMoeV2Config

    length = int(original * factor)
    plain = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "rope_theta": theta,
        "partial_rotary_factor": share,
        "max_position_embeddings": original,
    }
    config = BailingMoeV2Config(**yarn_patch(plain, length))
    theirs, their_mscale = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    ours = yarn_frequencies(int(head_dim * share), theta, factor, original)
    assert len(theirs) == len(ours.inverse) == int(head_dim * share) // 2
    np.testing.assert_allclose(theirs.numpy(), ours.inverse, rtol=1e-6)
    assert ours.mscale == pytest.approx(their_mscale, rel=1e-12)


def _real_config() -> dict[str, Any]:
    return json.loads((ROOT / "recipes" / "ling-flash-2.0.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="no vllm")
def test_vllms_rotary_modules_hold_our_numbers_for_target_and_draft_at_both_sizes() -> None:
    """The tables that vLLM makes of the patched files, as its model code asks for them: every position."""
    import torch
    from transformers import LlamaConfig
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from packager.bailing.hf_config import BailingMoeV2Config

    real = DraftSpec(vocab_size=32000, aux_layers=(2, 16, 29), prompts=1, steps=1)
    for plain, spec in ((nano_config(), DRAFT), (_real_config(), real)):
        trained, head = plain["max_position_embeddings"], plain["head_dim"]
        target = yarn_patch(plain, 4 * trained)
        for kind, raw, rotary_dim in (
            (BailingMoeV2Config, target, head // 2),
            (LlamaConfig, draft_config(target, spec), head),
            (LlamaConfig, yarn_patch(draft_config(plain, spec), 4 * trained), head),
        ):
            config = kind(**{name: value for name, value in raw.items() if name != "model_type"})
            parameters = dict(config.rope_parameters)
            if kind is BailingMoeV2Config:  # bailing_moe.py, BailingAttention.__init__
                parameters["partial_rotary_factor"] = int(head * config.partial_rotary_factor) / head
            with set_current_vllm_config(VllmConfig()):
                module = get_rope(
                    head,
                    max_position=config.max_position_embeddings,
                    is_neox_style=True,
                    rope_parameters=parameters,
                    dtype=torch.float32,
                )
            ours = yarn_frequencies(rotary_dim, float(plain["rope_theta"]), 4.0, trained)
            assert round(ours.mscale, 4) == 1.1386 == round(module.mscale, 4)
            assert module.rotary_dim == rotary_dim
            assert module.cos_sin_cache.shape == (4 * trained, rotary_dim)
            theirs = module._compute_inv_freq(4.0).numpy()
            np.testing.assert_allclose(theirs, ours.inverse, rtol=2e-6)
            angles = np.arange(4 * trained)[:, None] * ours.inverse
            expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * ours.mscale
            # vLLM multiplies position and frequency in float32: the angle is off by up to 2^-23 of itself.
            rounding = 2.5e-7 * np.concatenate([angles, angles], axis=1) + 1e-6
            assert (np.abs(module.cos_sin_cache.numpy() - expected) <= ours.mscale * rounding).all()


def test_fast_pairs_are_left_alone_slow_ones_divided_and_the_published_mscale_comes_out() -> None:
    found = yarn_frequencies(64, 600000.0, 4.0, 32768)
    unscaled = 600000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(found.inverse[: found.low + 1], unscaled[: found.low + 1], rtol=1e-12)
    np.testing.assert_allclose(found.inverse[found.high :], unscaled[found.high :] / 4, rtol=1e-12)
    assert 0 < found.low < found.high < 32
    turns = 32768 * unscaled / (2 * math.pi)
    assert turns[found.low] >= 32 > turns[found.low + 1]
    assert turns[found.high] <= 1 < turns[found.high - 1]
    assert round(found.mscale, 4) == 1.1386


def test_the_stage_links_weights_and_rewrites_only_two_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = run(tiny_checkpoint, out)
    assert check(out) == manifest
    source, extended = Checkpoint.open(tiny_checkpoint), Checkpoint.open(out)
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_checkpoint.iterdir()} | {"manifest.json"}
    for shard in source.shards:
        assert (out / shard).samefile(tiny_checkpoint / shard)
    assert not (out / "tokenizer.json").samefile(tiny_checkpoint / "tokenizer.json")
    assert extended.config()["max_position_embeddings"] == 256
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 256
    changed = {p.name for p in tiny_checkpoint.iterdir() if p.read_bytes() != (out / p.name).read_bytes()}
    assert changed == {"config.json", "tokenizer_config.json"}
    assert manifest.metrics["inverse_frequencies"] == pytest.approx(
        yarn_frequencies(32, 10000.0, 4.0, 64).inverse.tolist(), rel=1e-8
    )
    assert run(tiny_checkpoint, out) == manifest
    with pytest.raises(BadInput, match="extended before"):
        run(out, tmp_path / "twice", 1024)
    assert not (tmp_path / "twice").exists()


def test_a_sealed_source_that_was_altered_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from packager.quantize import quantize
    from packager.recipe import QuantizeSpec

    quantize(tiny_checkpoint, tmp_path / "fp8", QuantizeSpec(), recipe_digest="x", progress=lambda _: None)
    manifest = run(tmp_path / "fp8", tmp_path / "good")
    assert manifest.inputs == {"source": check(tmp_path / "fp8").digest}
    shutil.copytree(tmp_path / "fp8", tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text('{"version": "1.1"}')
    with pytest.raises(IntegrityFailure, match=r"tokenizer\.json"):
        run(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
