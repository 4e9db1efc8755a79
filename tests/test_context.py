"""YaRN: the patch says one thing to every reader, and the numbers are those that engines compute."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.artifact import check
from packager.checkpoint import Checkpoint
from packager.context import extend, yarn_patch
from packager.context.yarn import yarn_frequencies
from packager.errors import BadInput, IntegrityFailure
from packager.recipe import ContextSpec

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
        ({"rope_scaling": []}, 131072, "not an object"),
        ({"original_max_position_embeddings": 8192}, 131072, "extended before"),
    ],
)
def test_a_config_or_length_that_does_not_fit_is_refused(
    change: dict[str, Any], length: int, fault: str
) -> None:
    with pytest.raises(BadInput, match=fault):
        yarn_patch({**PLAIN, **change}, length)


def test_a_patched_config_is_not_patched_again() -> None:
    with pytest.raises(BadInput, match="already"):
        yarn_patch(yarn_patch(PLAIN, 131072), 262144)


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
    with pytest.raises(BadInput, match="already"):
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
