"""Shapes served before there are weights: what is written for an engine, and how it is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import served_capacity
from click.testing import CliRunner
from conftest import TINY_CONFIG
from tiny_architectures import tiny_config

from packager.bailing.vllm_plugin import ROUTING
from packager.cli.throughput_shapes import shape_options, shape_variants
from packager.cli.validate import command as validate
from packager.draft.config import tensor_shapes
from packager.errors import BadInput, PackagerError, UsageProblem
from packager.layouts import Described
from packager.quantize.dialects import read_quantization
from packager.release import dummy_weights
from packager.release.dummy_weights import aux_layers, dummy_shape, dummy_variants
from packager.serving import vllm_command
from packager.serving.plan import model_bytes

MOE = {**TINY_CONFIG, "vocab_size": 4096, "num_hidden_layers": 4}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-moe.json"
    path.write_text(json.dumps(MOE))
    return path


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_shape_becomes_a_folder_without_weights_and_a_command_without_download(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy_weights, "fp8_runs_here", lambda: (True, "a kernel"))
    made = dummy_shape(str(config), tmp_path / "out", synthetic_acceptance=2.5, draft_vocab=512)
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    tokenizer = {
        f"model/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    assert files == tokenizer | {"model/config.json", "model/generation_config.json", "draft/config.json"}
    served = read(made.spec.model / "config.json")
    assert {key: served[key] for key in MOE if key != "eos_token_id"} == {
        key: MOE[key] for key in MOE if key != "eos_token_id"
    }
    stated = read_quantization(served["quantization_config"])
    layout = Described.parse(served).model.tensors()
    assert stated.scheme == "fp8-block"
    quantized = {want.role.value for want in layout if stated.quantizes(want)}
    assert quantized == {
        *("query_key_value", "attention_output", "dense_mlp", "shared_expert", "routed_expert"),
    }
    command = vllm_command(made.spec, target="cuda")
    assert command[command.index("--load-format") + 1] == "dummy"
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative["synthetic_acceptance_length"] == 2.5
    assert speculative["rejection_sample_method"] == "synthetic"
    assert made.spec.env[ROUTING]
    assert made.spec.draft is not None
    # The draft is the one whose bytes a plan counts.
    sizes = tensor_shapes(read(made.spec.draft / "config.json"))
    weights = sum(2 * _count(shape) for name, shape in sizes.items() if name not in ("d2t", "t2d"))
    planned = model_bytes(Described.parse(MOE), "bf16", draft_vocab=512).draft
    assert weights + 8 * 512 + MOE["vocab_size"] == planned


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def test_where_fp8_does_not_run_the_shape_is_bf16_and_says_so(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy_weights, "fp8_runs_here", lambda: (False, "no AMX"))
    made = dummy_shape(str(config), tmp_path / "out")
    assert (made.scheme, made.name) == ("bf16", "tiny-moe bf16")
    assert "Served in BF16: no AMX." in made.notes
    assert "quantization_config" not in read(made.spec.model / "config.json")


def test_real_prompts_are_tokenized_within_the_shape_and_any_answer_has_a_text(
    config: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    made = dummy_shape(str(config), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(made.tokenizer / "tokenizer.json"))
    ids = tokenizer.encode("Weight 57 kg. 剂量是多少?").ids
    assert ids and max(ids) < 2048
    assert tokenizer.decode(ids) == "Weight 57 kg. 剂量是多少?"
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.decode([4095]) != ""
    limit = read(made.tokenizer / "tokenizer_config.json")["model_max_length"]
    assert limit == MOE["max_position_embeddings"]
    config.write_text(json.dumps({**MOE, "vocab_size": 256}))
    with pytest.raises(BadInput, match="smaller than the nano tokenizer's 2046"):
        dummy_shape(str(config), tmp_path / "out")


def test_every_variant_is_marked_and_none_has_the_digest_of_another(config: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"logs": tmp_path, "draft_vocab": 512}
    served = dummy_variants(
        str(config), tmp_path / "a", synthetic_acceptance=(1.9, 2.5), layers=3, scheme="bf16", **settings
    )
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps(tiny_config("SeedOssForCausalLM", vocab_size=2048)))
    served += dummy_variants(str(dense), tmp_path / "b", baseline=True, scheme="bf16", **settings)
    variants = [one.variant for one in served]
    assert [(one.name, one.role, one.mark) for one in variants] == [
        (
            f"tiny-moe bf16 acceptance {length:g}",
            "candidate",
            f"tiny-moe bf16 acceptance {length:g}: dummy weights, synthetic acceptance {length:g}, "
            "3 of 4 layers, uniform random routing",
        )
        for length in (1.9, 2.5)
    ] + [
        (
            "tiny-moe bf16",
            "candidate without draft",
            "tiny-moe bf16: dummy weights, 3 of 4 layers, uniform random routing",
        ),
        ("dense bf16", "baseline", "dense bf16: dummy weights"),
    ]
    assert len({one.subject for one in variants}) == 4
    assert all(one.subject.startswith("dummy:sha256:") for one in variants)


@pytest.mark.parametrize(
    ("layers", "found"),
    [(3, (1, 2, 3)), (6, (1, 2, 3)), (8, (2, 4, 5)), (32, (2, 16, 29)), (64, (2, 32, 61))],
)
def test_a_draft_reads_the_layers_that_engines_choose(layers: int, found: tuple[int, ...]) -> None:
    assert aux_layers(layers) == found


@pytest.mark.parametrize(
    ("shape", "settings", "says"),
    [
        ("no-such-shape", {}, "no shape named"),
        ("{config}", {"layers": 9}, "has 4 layers, not 9"),
        ("{config}", {"layers": 2, "synthetic_acceptance": 2.0}, "reads three layers"),
        ("{config}", {"synthetic_acceptance": 4.5}, "cannot yield 4.5"),
        ("{quantized}", {}, "is quantized already"),
    ],
)
def test_what_cannot_be_served_so_is_refused(
    shape: str, settings: dict[str, Any], says: str, config: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized.json"
    quantized.write_text(json.dumps({**MOE, "quantization_config": {"quant_method": "fp8"}}))
    name = shape.format(config=config, quantized=quantized)
    with pytest.raises(PackagerError, match=says) as caught:
        dummy_shape(name, tmp_path / "out", **settings)
    assert isinstance(caught.value, BadInput if "quantized" in shape else UsageProblem)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--url", "http://127.0.0.1:9", "--shape", "seed-oss-36b", "--input-tokens", "64"],
            "instead of --url",
        ),
        (["--shape", "seed-oss-36b"], "needs input lengths"),
        (["--shape", "no-such-shape", "--input-tokens", "64"], "no shape named"),
        (["--shape", "seed-oss-36b", "--input-tokens", "64", "--synthetic-acceptance", "0.5"], "at least"),
    ],
)
def test_the_verb_says_what_does_not_go_together(options: list[str], says: str, tmp_path: Path) -> None:
    line = ["throughput", "--cache", str(tmp_path), *options]
    done = CliRunner().invoke(validate, line)
    said = done.exception.message if isinstance(done.exception, PackagerError) else done.output
    assert done.exit_code != 0 and says in said


def test_the_same_shape_on_both_sides_has_two_names(config: Path, tmp_path: Path) -> None:
    names = shape_options()
    options = {"shape": str(config), "baseline_shape": str(config), "synthetic_acceptance": ()}
    options |= {f"{side}shape_scheme": "bf16" for side in ("", "baseline_")}
    options |= dict.fromkeys(("shape_layers", "baseline_shape_layers", "shape_draft_vocab"))
    assert len(names) == len(options) + 1
    found = shape_variants(
        options | {"shape_tensor_parallel": 1}, tmp_path, input_tokens=(8,), output_tokens=(8,),
        draft_tokens=None, say=lambda _: None,
    )  # fmt: skip
    first, second = (one.variant.name for one in found)
    assert second == f"{first} (baseline)"


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_serves_a_shape_with_a_draft_that_is_a_config_alone(config: Path, tmp_path: Path) -> None:
    """The sweep's own path on a real engine: experts chosen at random, drafts accepted as often as asked."""
    from packager.nano.language import heldout_items
    from validation.sweep import Plan, measure_sweep
    from validation.tasks import items_from

    settings: dict[str, Any] = {"scheme": "bf16", "draft_vocab": 512, "max_model_len": 256}
    config.write_text(json.dumps({**MOE, "max_position_embeddings": 256}))
    served = dummy_variants(
        str(config), tmp_path, synthetic_acceptance=(2.5,), logs=tmp_path / "logs", **settings
    )[:1]
    plan = Plan(concurrency=(4,), input_tokens=(64,), output_tokens=(96,), repeats=1, requests=8)
    sweep = measure_sweep(served, items_from(heldout_items(4, 0)), plan, cache=tmp_path / "cells")
    (cell,) = sweep.cells
    assert cell.failure is None, cell.failure
    assert cell.answer_tokens == 96 and sweep.lengths == "fixed"
    # 768 tokens in steps of 1 to 4: a standard error of about 0.06.
    assert cell.acceptance_length is not None
    assert cell.acceptance_length.median == pytest.approx(2.5, abs=0.3)
    assert sweep.marks == (served[0].variant.mark,)
    (log,) = (tmp_path / "logs").iterdir()
    assert "Simulating MoE routing" in log.read_text()
    planned = model_bytes(Described.parse(MOE), "bf16", draft_vocab=512).tokens_in(served_capacity.SPACE)
    assert served_capacity.reported(log) == pytest.approx(planned, rel=0.05)
