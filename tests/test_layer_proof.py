"""Captured layers are proved: states of another layer are refused by its name, however weights are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from quantizing import run

from packager.checkpoint.source import Checkpoint
from packager.draft import layer_proof
from packager.draft.layer_proof import describe, prove_layers
from packager.draft.states_file import encode_states
from packager.errors import BadInput, RemoteFailure
from packager.nano import CHECKPOINT
from packager.quantize import dequantize
from packager.recipe import QuantizeSpec, StatesDtype

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from packager.bailing.layerwise import LayerwiseForward  # noqa: E402

PROMPT = [5, 900, 41, 7, 333, 1200, 8, 60, 61, 62, 90, 17]
RESPONSE = [40, 41, 900, 7, 8, 2]
CAPTURED = (1, 2, 3, 4)


def _write(directory: Path, states: Any, dtype: StatesDtype = "bfloat16") -> list[dict[str, Any]]:
    """The states file and record of the one response, as the engine leaves them."""
    directory.mkdir(exist_ok=True)
    tensors = {**encode_states(states, dtype), "token_ids": torch.tensor((PROMPT + RESPONSE)[:-1])}
    save_file(tensors, directory / "000000.safetensors")
    return [{"prompt_ids": PROMPT, "response_ids": RESPONSE, "states": "000000.safetensors"}]


def _nano_states(layers: Sequence[int]) -> Any:
    """[tokens, layers, hidden] by the plain torch model that the nano was trained with, in BF16."""
    from packager.bailing.model import BailingMoeV2

    model = BailingMoeV2(json.loads((CHECKPOINT / "config.json").read_text()))
    model.load_tensors(load_file(CHECKPOINT / "model.safetensors"))
    found: list[Any] = []
    last: list[Any] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _a, out: last.append(out))
    with torch.no_grad():
        _, found = model.bfloat16()(torch.tensor([(PROMPT + RESPONSE)[:-1]]), return_hidden=True)
    found = [*found[:-1], last[0]]  # what it returns last is behind the norm
    return torch.stack([found[layer][0] for layer in layers], dim=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_states_of_the_layers_meant_are_proved(tmp_path: Path, dtype: StatesDtype) -> None:
    records = _write(tmp_path / "states", _nano_states(CAPTURED), dtype)
    found = prove_layers(CHECKPOINT, CAPTURED, records, tmp_path / "states")
    assert found["proved"]
    assert [row["layer"] for row in found["layers"]] == list(CAPTURED)
    tokens = len(PROMPT + RESPONSE) - 1
    assert found["tokens"] == tokens
    for row in found["layers"]:
        assert row["cosine"] > 0.99 > 0.95 > row["next_cosine"]
        assert row["tokens_fit_best"] == tokens
    assert len(describe(found)) == len(CAPTURED)


@pytest.mark.parametrize(
    ("meant", "taken"), [((1, 2, 3, 4), (2, 3, 4, 4)), ((2, 4), (1, 4)), ((2, 4), (2, 3))]
)
def test_an_off_by_one_is_refused_and_the_layer_it_is_named(
    tmp_path: Path, meant: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    records = _write(tmp_path / "states", _nano_states(taken))
    wrong = next((a, b) for a, b in zip(meant, taken, strict=True) if a != b)
    with pytest.raises(RemoteFailure, match=f"captured as layer {wrong[0]} is layer {wrong[1]}: cosine"):
        prove_layers(CHECKPOINT, meant, records, tmp_path / "states")


def test_states_of_no_layer_are_refused(tmp_path: Path) -> None:
    states = _nano_states(CAPTURED)
    states[:, 1] = torch.randn(states[:, 1].shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RemoteFailure, match="captured as layer 2 fits no layer"):
        prove_layers(CHECKPOINT, CAPTURED, _write(tmp_path / "states", states), tmp_path / "states")


def test_what_was_not_proved_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = _write(tmp_path / "states", _nano_states(CAPTURED))
    monkeypatch.setattr(layer_proof, "available_memory", lambda: 1_000_000)
    found = prove_layers(CHECKPOINT, CAPTURED, records, tmp_path / "states")
    assert (found["proved"], "GB of memory" in found["reason"]) == (False, True)
    assert "not proved" in describe(found)[0]


def test_a_checkpoint_without_a_reference_forward_is_not_proved(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"use_qk_norm": False}))
    found = prove_layers(tmp_path / "other", CAPTURED, [], tmp_path)
    assert (found["proved"], "no QK norm" in found["reason"]) == (False, True)


# ---- the forward, one layer at a time ---------------------------------------------------------------------


def _layers(checkpoint: Path) -> Any:
    model = LayerwiseForward(Checkpoint.open(checkpoint))
    return torch.stack([states[0] for states in model.inputs([[5, 90, 41, 7, 33, 120, 8]])])


def test_one_layer_at_a_time_is_the_transformers_forward() -> None:
    from packager.bailing.hf_config import BailingMoeConfig
    from packager.bailing.hf_model import BailingMoeForCausalLM

    config = json.loads((CHECKPOINT / "config.json").read_text())
    whole = BailingMoeForCausalLM(BailingMoeConfig(**config, initializer_range=0.02))
    whole.load_state_dict(load_file(CHECKPOINT / "model.safetensors"))
    seen: list[Any] = []
    for layer in whole.model.layers:
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    whole.model.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    ids = [PROMPT, RESPONSE]
    found = list(LayerwiseForward(Checkpoint.open(CHECKPOINT)).inputs(ids))
    for place, prompt in enumerate(ids):
        seen.clear()
        with torch.no_grad():
            whole.float()(torch.tensor([prompt]))
        assert len(seen) == len(found) == 5
        for layer, expected in enumerate(seen):
            assert torch.allclose(found[layer][place], expected, atol=1e-5), f"layer {layer}"


@pytest.mark.parametrize(
    "spec",
    [
        QuantizeSpec(),
        QuantizeSpec(dialect="deepseek"),
        QuantizeSpec(scheme="fp8-channel"),
        QuantizeSpec(scheme="w8a8"),
    ],
    ids=["fp8-block", "deepseek", "fp8-channel", "w8a8"],
)
def test_quantized_weights_are_multiplied_by_their_scales(
    tmp_path: Path, tiny_checkpoint: Path, spec: QuantizeSpec
) -> None:
    """As the verb `dequantize` does, which rounds to BF16 afterwards; and other values than before."""
    run(tiny_checkpoint, tmp_path / "quantized", spec, min_snr_db=None)
    dequantize(tmp_path / "quantized", tmp_path / "back")
    quantized, back = _layers(tmp_path / "quantized"), _layers(tmp_path / "back")
    added = back[-1] - back[0]  # by the layers; what they are given is the same
    assert (quantized[-1] - back[-1]).norm() < 0.01 * added.norm()
    assert (_layers(tiny_checkpoint)[-1] - back[-1]).norm() > 0.01 * added.norm()


def test_packed_weights_have_no_forward(tmp_path: Path, tiny_checkpoint: Path) -> None:
    run(tiny_checkpoint, tmp_path / "int4", QuantizeSpec(scheme="int4-g128"), min_snr_db=None)
    with pytest.raises(BadInput, match="has no tensor"):
        LayerwiseForward(Checkpoint.open(tmp_path / "int4"))
