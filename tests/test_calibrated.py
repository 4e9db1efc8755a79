"""Four bits with calibration data: our transformers model, llm-compressor's algorithms, our own readers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_checkpoint
from sparse_checkpoint import LING_FLASH, write_sparse_checkpoint

from packager.artifact import Manifest, check, read_manifest
from packager.bailing.config import BailingConfig
from packager.bailing.layout import expected_tensors
from packager.checkpoint.source import Checkpoint
from packager.errors import BadInput, UsageProblem
from packager.layouts import QUANTIZABLE
from packager.nano import CHECKPOINT as NANO
from packager.nano.language import prompts
from packager.quantize import calibrated, dequantize, diff
from packager.quantize.calibrated import CalibrationSpec, calibrate, memory_needed
from packager.quantize.calibration_data import choose, read_lines, tokenize
from packager.quantize.calibration_run import CALIBRATED_SCHEMES, CalibratedScheme, smoothed_pairs
from packager.quantize.quantized import WeightCheckpoint

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "num_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
}


def with_tokenizer(checkpoint: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, checkpoint / name)
    return checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, in shards, with the nano's tokenizer and a config that points to code of its own."""
    folder = tmp_path_factory.mktemp("small") / "source"
    auto_map = {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"}
    write_checkpoint(folder, shards=2, mtp_layers=1, num_nextn_predict_layers=1, auto_map=auto_map, **SMALL)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty chats in the nano's language."""
    path = tmp_path_factory.mktemp("data") / "calibration.jsonl"
    lines = [json.dumps({"messages": prompt["messages"]}, ensure_ascii=False) for prompt in prompts(40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(
    source: Path, out: Path, scheme: CalibratedScheme, calibration: Path | None, **fields: Any
) -> Manifest:
    spec = CalibrationSpec(scheme=scheme, **fields)
    return calibrate(
        source,
        out,
        spec,
        calibration=calibration,
        recipe_digest=spec.digest,
        progress=lambda _: None,
    )


# ---- the transformers model ---------------------------------------------------------------------------


def loaded(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from packager.bailing import hf_model

    hf_model.register()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def reference(checkpoint: Path) -> Any:
    from safetensors.torch import load_file

    from packager.bailing.model import BailingMoeV2

    tensors = {k: v for path in checkpoint.glob("*.safetensors") for k, v in load_file(path).items()}
    model = BailingMoeV2(json.loads((checkpoint / "config.json").read_text()))
    model.load_tensors({name: tensor.float() for name, tensor in tensors.items()})
    return model


def token_ids() -> Any:
    import torch

    return torch.randint(5, 2048, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_parameters_and_logits_are_those_of_the_reference(model_type: str, tmp_path: Path) -> None:
    import torch

    checkpoint = NANO
    if model_type != "bailing_moe":
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        checkpoint = write_checkpoint(tmp_path / "v2", model_type=model_type, rope_scaling=yarn, **SMALL)
    model, ids = loaded(checkpoint), token_ids()
    assert set(model.state_dict()) == set(Checkpoint.open(checkpoint).tensors)
    assert not isinstance(model.model.layers[1].mlp.gate, torch.nn.Linear)
    with torch.no_grad():
        expected = reference(checkpoint)(ids)
        assert torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        (logits,) = model(ids, use_cache=False, return_dict=False)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_padding_at_either_end_changes_no_logit() -> None:
    import torch

    model, ids = loaded(NANO), token_ids()
    shorter, padding = ids[:1, :33], torch.full((1, 7), 1)
    mask = torch.ones(1, 40, dtype=torch.int64)
    left, right = mask.clone(), mask.clone()
    left[0, :7] = right[0, 33:] = 0
    with torch.no_grad():
        plain = model(shorter).logits
        after = model(torch.cat((shorter, padding), 1), attention_mask=right).logits[:, :33]
        before = model(torch.cat((padding, shorter), 1), attention_mask=left).logits[:, 7:]
    assert torch.allclose(after, plain, atol=1e-4)
    assert torch.allclose(before, plain, atol=1e-3)


@pytest.mark.slow
def test_within_the_context_every_expert_runs_on_every_token_and_logits_stay() -> None:
    import torch

    from packager.bailing.hf_model import every_expert_sees_every_token

    model, ids = loaded(NANO), token_ids()
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[[Any, Any], None]:
        def hook(_module: Any, arguments: Any) -> None:
            seen[name] = seen.get(name, 0) + len(arguments[0])

        return hook

    experts = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith(".mlp.experts")]
    for name in experts:
        model.get_submodule(name).register_forward_pre_hook(count(name))
    with torch.no_grad():
        routed = model(ids).logits
        assert sum(seen.values()) == 3 * 2 * ids.numel()  # three layers, two experts a token
        seen.clear()
        with every_expert_sees_every_token(model):
            assert torch.allclose(model(ids).logits, routed, atol=1e-4)
    assert seen == dict.fromkeys(experts, ids.numel())


@pytest.mark.slow
def test_a_config_beyond_the_implementation_is_refused() -> None:
    from packager.bailing.hf_config import BailingMoeV2Config
    from packager.bailing.hf_model import BailingMoeV2ForCausalLM

    raw = json.loads((NANO / "config.json").read_text())
    with pytest.raises(BadInput, match="score_function softmax"):
        BailingMoeV2ForCausalLM(BailingMoeV2Config(**{**raw, "score_function": "softmax"}))


# ---- calibration data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "line 3: not JSON"),
        (b'{"prompt": "\xff"}', "line 3: not UTF-8"),
        (b'["a"]', "line 3: needs exactly one of"),
        (b'{"question": "a"}', "line 3: needs exactly one of .* it has none"),
        (b'{"prompt": "a", "text": "b"}', "line 3: .* it has prompt and text"),
        (b'{"prompt": 3}', "line 3: `prompt` is no text"),
        (b'{"text": " "}', "line 3: `text` is no text"),
        (b'{"messages": []}', "line 3: `messages`"),
        (b'{"messages": [{"role": "user"}]}', "line 3: `messages`"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "line 3: `messages`"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(line: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(BadInput, match=complaint):
        read_lines(path)


def test_no_file_and_no_lines_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read_lines(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="no lines"):
        read_lines(tmp_path / "data.jsonl")


def test_lines_are_drawn_by_the_seed_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(100)))
    lines = read_lines(path)
    chosen = [line.number for line in choose(lines, 10, 1)]
    assert chosen == sorted(chosen) and len(set(chosen)) == 10
    assert chosen == [line.number for line in choose(lines, 10, 1)]
    assert chosen != [line.number for line in choose(lines, 10, 2)]
    assert choose(lines, 1000, 1) == lines


@pytest.mark.slow
def test_chats_pass_through_the_template_and_text_does_not(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(NANO)
    rows = [
        {"prompt": "dose?"},
        {"messages": [{"role": "user", "content": "dose?"}]},
        {"messages": [{"role": "user", "content": "dose?"}, {"role": "assistant", "content": "3 mg"}]},
        {"text": "dose?"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prompt, chat, answered, text = tokenize(read_lines(path), tokenizer, 100, "data")
    assert prompt == chat
    assert tokenizer.decode(prompt).endswith("<role>HUMAN</role>dose?<|role_end|><role>ASSISTANT</role>")
    assert tokenizer.decode(answered).endswith("<role>ASSISTANT</role>3 mg<|role_end|>")
    assert tokenizer.decode(text) == "dose?"
    assert tokenize(read_lines(path), tokenizer, 5, "data")[1] == chat[:5]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadInput, match=r"data, line 1: .*roles must alternate"):
        tokenize(read_lines(path), tokenizer, 100, "data")


# ---- what is asked for --------------------------------------------------------------------------------


def test_data_is_asked_for_where_it_is_used_and_nowhere_else(small: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="gptq-w4a16 needs calibration data"):
        run(small, tmp_path / "out", "gptq-w4a16", None)
    with pytest.raises(UsageProblem, match="mxfp4 takes no calibration data"):
        run(small, tmp_path / "out", "mxfp4", data)


def test_rows_that_a_group_does_not_divide_are_refused(data: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_intermediate_size=96)
    with pytest.raises(BadInput, match=r"128 columns.*experts\.0\.down_proj\.weight \[128, 96\]"):
        run(source, tmp_path / "out", "gptq-w4a16", data)


def test_too_little_memory_is_said_before_the_model_is_loaded(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "available_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(calibrated, "_load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match=r"needs about 1\.5 GB: the model .* 1 GB are available"):
        run(small, tmp_path / "out", "mxfp4", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_hundred_billion_parameters_are_refused_from_headers_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BailingConfig.parse(json.loads(LING_FLASH.read_text()))
    needed = memory_needed(config, 206_000_000_000, "gptq-w4a16", 512 * 2048)
    # Two matrices of 4096 columns and one of 1024 for each expert, FP32, and some more for the attention.
    assert 1 < needed.statistics / (256 * 4 * (2 * 4096**2 + 1024**2)) < 1.02
    assert memory_needed(config, 206_000_000_000, "mxfp4", 0).total < 210_000_000_000

    source = with_tokenizer(write_sparse_checkpoint(tmp_path / "source"))
    monkeypatch.setattr(calibrated, "available_memory", lambda: 230_000_000_000)
    monkeypatch.setattr(Checkpoint, "digest", lambda _: pytest.fail("206 GB were hashed"))
    with pytest.raises(BadInput, match=r"model 206 GB, statistics of a layer 35\.7 GB"):
        run(source, tmp_path / "out", "gptq-w4a16", data)


def test_awq_is_said_to_hold_inputs_outputs_and_a_copy_of_a_layer() -> None:
    """Every cache and output of one layer, counted tensor by tensor on the nano."""
    config = BailingConfig.load(NANO)
    layer, tokens = f"model.layers.{config.num_hidden_layers - 1}.", 1000
    shapes = {want.name: want.shape for want in expected_tensors(config) if want.name.startswith(layer)}
    balanced = {
        smooth: [f"{name}.weight" for name in targets]
        for smooth, targets in smoothed_pairs(config)
        if smooth.startswith(layer)
    }
    # A pair's parent is its one weight, or the whole feed-forward, which gives a hidden state.
    parents = {names[0]: shapes[names[0]] for names in balanced.values()}
    inputs = sum(columns for _, columns in parents.values())
    widest = max(rows if len(names) == 1 else config.hidden_size
                 for names in balanced.values() for rows, _ in [shapes[names[0]]])  # fmt: skip
    assert widest == 512 > config.hidden_size  # fused attention, of which a hidden state's width is half
    experts = [shape for name, shape in shapes.items() if "experts" in name]
    copy = sum(rows * columns for rows, columns in experts)
    needed = memory_needed(config, 0, "awq-w4a16", tokens)
    # BF16; a parent gives its outputs twice, from the weights as they were and as they are tried.
    assert needed.statistics == 2 * (tokens * (inputs + 2 * widest) + copy)


def test_awq_scales_the_input_of_each_weight_at_most_once_and_the_router_along() -> None:
    config = BailingConfig.load(NANO)
    names = {want.name.removesuffix(".weight"): want for want in expected_tensors(config)}
    pairs = smoothed_pairs(config)
    balanced = [name for _, targets in pairs for name in targets]
    assert len(balanced) == len(set(balanced)) and {smooth for smooth, _ in pairs} <= set(names)
    attention = {name for name in names if name.endswith("attention.dense")}
    routers = {name for name in names if name.endswith("mlp.gate")}
    quantized = {name for name, want in names.items() if want.role in QUANTIZABLE}
    assert set(balanced) == quantized - attention | routers


@pytest.mark.slow
def test_scaling_the_pairs_against_each_other_changes_no_logit() -> None:
    import torch

    model, ids = loaded(NANO), token_ids()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(ids).logits
        for smooth, balanced in smoothed_pairs(BailingConfig.load(NANO)):
            down = model.get_submodule(smooth).weight
            scales = torch.exp(0.5 * torch.randn(len(down), generator=generator))
            down.div_(scales.view(-1, *[1] * (down.dim() - 1)))
            for name in balanced:
                model.get_submodule(name).weight.mul_(scales)
        assert torch.allclose(model(ids).logits, before, atol=1e-3)


# ---- what comes out -----------------------------------------------------------------------------------


Make = Callable[[CalibratedScheme], Path]


@pytest.fixture(scope="module")
def made(small: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The small checkpoint in a scheme; a finished one is taken as it is, which `calibrate` sees to."""
    base = tmp_path_factory.mktemp("made")

    def make(scheme: CalibratedScheme) -> Path:
        calibration = None if scheme == "mxfp4" else data
        run(small, base / scheme, scheme, calibration, samples=3, sequence_length=32, shard_bytes=300_000)
        return base / scheme

    return make


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CALIBRATED_SCHEMES)
def test_the_output_is_sealed_indexed_and_free_of_code(
    scheme: CalibratedScheme, small: Path, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(scheme)
    manifest = check(out)
    found = Checkpoint.open(out)
    assert len(found.shards) > 1
    config = found.config()
    assert "auto_map" not in config and config["num_nextn_predict_layers"] == 0
    stated = config["quantization_config"]
    assert stated["ignore"] == ["model.word_embeddings", r"re:.*\.mlp\.gate$", "lm_head"]
    kept = {name for name in found.tensors if name.endswith(("embeddings.weight", "norm.weight", "bias"))}
    kept |= {name for name in found.tensors if name.endswith(("mlp.gate.weight", "lm_head.weight"))}
    weights = {name.rpartition(".")[0] for name in found.tensors if name.endswith("weight_packed")}
    # 2 attention, 3 dense, 3 of the shared and of each of 8 routed experts.
    assert len(weights) == 2 * 2 + 3 + 3 * 9 == manifest.metrics["tensors"]["quantized"]
    assert not weights & {name.rpartition(".")[0] for name in kept}
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    monkeypatch.setattr(calibrated, "_load", lambda _: pytest.fail("a finished output was made again"))
    made(scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq-w4a16", "nvfp4", "mxfp4"])
def test_what_is_not_quantized_keeps_its_bytes(scheme: CalibratedScheme, small: Path, made: Make) -> None:
    source, found = Checkpoint.open(small), Checkpoint.open(made(scheme))
    same = source.tensors.keys() & found.tensors.keys()
    assert len(same) == 3 + 2 * 4 + 2
    with source.reader() as before, found.reader() as after:
        for name in same:
            assert np.array_equal(before.bytes(source.tensors[name]), after.bytes(found.tensors[name])), name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq-w4a16", "awq-w4a16"])
def test_our_readers_read_four_bit_integers(scheme: CalibratedScheme, made: Make, tmp_path: Path) -> None:
    opened, quantization = WeightCheckpoint.open_quantized(made(scheme))
    assert (quantization.scheme, quantization.group) == ("int4", 128)
    with opened.checkpoint.reader() as reader:
        for weight in opened.quantized:
            assert np.isfinite(opened.values(reader, weight)).all()
    dequantize(made(scheme), tmp_path / "bf16")
    assert WeightCheckpoint.open(tmp_path / "bf16").quantization is None
    assert not [row for row in diff(made(scheme), tmp_path / "bf16").differing if (row.snr_db or 99) < 45]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_our_readers_refuse_four_bit_floats_by_name(scheme: CalibratedScheme, made: Make) -> None:
    with pytest.raises(BadInput, match=f"not read here: .*{scheme}-pack-quantized"):
        WeightCheckpoint.open(made(scheme))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq-w4a16", "awq-w4a16", "nvfp4"])
def test_the_same_inputs_give_the_same_bytes(
    scheme: CalibratedScheme, small: Path, data: Path, made: Make, tmp_path: Path
) -> None:
    fields = {"samples": 3, "sequence_length": 32, "shard_bytes": 300_000}
    assert run(small, tmp_path / "out", scheme, data, **fields).digest == read_manifest(made(scheme)).digest


@pytest.mark.slow
def test_one_token_calibrates_all_experts_alike(small: Path, data: Path, tmp_path: Path) -> None:
    run(small, tmp_path / "out", "nvfp4", data, samples=1, sequence_length=1)
    found = Checkpoint.open(tmp_path / "out")
    layer = "model.layers.1.mlp.experts"
    with found.reader() as reader:
        inputs, outputs = (
            [
                float(reader.array(found.tensors[f"{layer}.{n}.{name}.input_global_scale"])[0])
                for n in range(SMALL["num_experts"])
            ]
            for name in ("gate_proj", "down_proj")
        )
    # The router sends the token to two of eight; all eight have seen the same input.
    assert len(set(inputs)) == 1
    assert len(set(outputs)) == SMALL["num_experts"]
    assert np.isfinite(inputs + outputs).all() and min(inputs + outputs) > 0


def decompressed(folder: Path) -> dict[str, Any]:
    """All tensors through the code of compressed-tensors, quantized weights as float32."""
    import torch
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    stored = {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    return dict(CompressedTensorsDequantizer(str(folder), dtype=torch.float32).process(stored))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq-w4a16", "awq-w4a16"])
def test_compressed_tensors_reads_the_same_integers_as_we_do(scheme: CalibratedScheme, made: Make) -> None:
    import torch

    theirs = decompressed(made(scheme))
    opened = WeightCheckpoint.open(made(scheme))
    with opened.checkpoint.reader() as reader:
        for weight in opened.quantized:
            # They multiply in the dtype of the scale.
            ours = torch.from_numpy(opened.values(reader, weight)).bfloat16()
            assert torch.equal(ours.float(), theirs[weight].float()), weight


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "decibels"), [("nvfp4", 20.0), ("mxfp4", 18.0)])
def test_four_bit_floats_are_near_the_source(
    scheme: CalibratedScheme, decibels: float, small: Path, made: Make
) -> None:
    theirs, source = decompressed(made(scheme)), Checkpoint.open(small)
    packed = [name for name in Checkpoint.open(made(scheme)).tensors if name.endswith("weight_packed")]
    with source.reader() as reader:
        for name in (name.removesuffix("_packed") for name in packed):
            weight = reader.array(source.tensors[name]).astype(np.float32)
            noise = theirs[name].numpy() - weight
            assert 10 * np.log10((weight**2).sum() / (noise**2).sum()) > decibels, name
    assert len(packed) == 34


@pytest.mark.slow
def test_matrices_that_engines_join_share_their_global_scale(made: Make) -> None:
    found = Checkpoint.open(made("nvfp4"))
    gates = [name for name in found.tensors if name.endswith("gate_proj.weight_global_scale")]
    assert len(gates) == 1 + 1 + 8
    with found.reader() as reader:
        for gate in gates:
            up = found.tensors[gate.replace("gate_proj", "up_proj")]
            assert reader.array(found.tensors[gate]) == reader.array(up)


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = with_tokenizer(write_checkpoint(tmp_path / "source", **SMALL))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][5, 7] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BadInput, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight holds NaN or inf"
    ):
        run(source, tmp_path / "out", "mxfp4", None)


def test_a_scale_that_no_activation_gave_a_value_is_found() -> None:
    import torch

    good = {"a.weight_scale": torch.tensor([0.0, 2.0]), "a.weight_packed": torch.tensor([-1])}
    calibrated._require_scales(good)
    for value in (-10724.3, torch.nan, torch.inf):
        with pytest.raises(BadInput, match=r"a\.input_global_scale"):
            calibrated._require_scales({**good, "a.input_global_scale": torch.tensor([value])})


def rounded_to_nearest(weight: Any) -> Any:
    """INT4 in groups of 128 columns, symmetric, scales in BF16 as compressed-tensors takes them."""
    groups = weight.view(weight.shape[0], -1, 128)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    return ((groups / scales).round().clamp(-8, 7) * scales).view_as(weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "samples", "bound"),
    [
        ("gptq-w4a16", 40, 0.8),
        # No channel of the nano stands out, so AWQ gains nothing; what it moves must not show, though.
        ("awq-w4a16", 8, 1.3),
    ],
)
def test_error_on_the_calibration_data_against_that_of_rounding(
    scheme: CalibratedScheme, samples: int, bound: float, data: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast

    run(NANO, tmp_path / "out", scheme, data, samples=samples, sequence_length=128)
    dequantize(tmp_path / "out", tmp_path / "bf16")
    rows = tokenize(read_lines(data), PreTrainedTokenizerFast.from_pretrained(NANO), 128, "data")
    exact, found, nearest = loaded(NANO), loaded(tmp_path / "bf16"), loaded(NANO)
    linear = [name for name, module in exact.named_modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for name in linear:
            if name != "lm_head":
                weight = nearest.get_submodule(name).weight
                weight.copy_(rounded_to_nearest(weight))
        error = {"found": 0.0, "nearest": 0.0}
        for ids in map(torch.tensor, rows):
            logits = exact(ids[None]).logits
            error["found"] += float((found(ids[None]).logits - logits).square().sum())
            error["nearest"] += float((nearest(ids[None]).logits - logits).square().sum())
    assert error["found"] < bound * error["nearest"]


@pytest.mark.slow
def test_stdout_holds_one_document_and_nothing_of_llm_compressor(
    small: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [small, tmp_path / "out", "--scheme", "awq-w4a16", "--calibration", data, "--samples", "2"]
    command = [sys.executable, "-m", "packager", "calibrate", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["digest"] == read_manifest(tmp_path / "out").digest
    assert document["metrics"]["calibration"]["sequences"] == 2
