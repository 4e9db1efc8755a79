"""Checkpoints on disk: nothing in a file is believed, and a layout fits its config or is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_CONFIG, MakeCheckpoint
from hypothesis import given
from hypothesis import strategies as st

from packager.bailing.config import BailingConfig
from packager.bailing.layout import (
    count_parameters,
    expected_tensors,
    layout_problems,
    mtp_layers_in,
    require_layout,
)
from packager.checkpoint import Checkpoint
from packager.checkpoint.header import build_header, parse_header, read_header
from packager.checkpoint.source import INDEX_NAME, locate
from packager.checkpoint.writer import TensorSpec, plan_shards
from packager.errors import BadInput, UsageProblem

LING_FLASH: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 157184,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "rope_theta": 600000,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 32768,
}


def test_ling_flash_has_the_published_number_of_parameters() -> None:
    counted = count_parameters(BailingConfig.parse(LING_FLASH))
    assert counted.bfloat16 == 102_889_697_280
    assert counted.float32 == 7_936
    assert round(counted.active / 1e9, 2) == 6.15


def test_a_prediction_layer_is_counted_apart() -> None:
    config = BailingConfig.parse(LING_FLASH)
    without, with_one = count_parameters(config), count_parameters(config, mtp_layers=1)
    assert (with_one.total, with_one.active) == (without.total, without.active)
    layer = sum(t.count for t in expected_tensors(config) if t.name.startswith("model.layers.31."))
    own = 4096 * 2 * 4096 + 3 * 4096  # eh_proj, enorm, hnorm, final_layernorm
    assert with_one.mtp == layer + own
    names = [t.name for t in expected_tensors(config, mtp_layers=1)]
    assert mtp_layers_in(config, names) == 1
    assert "model.layers.32.eh_proj.weight" in names


def test_headers_written_here_are_read_by_safetensors_and_the_other_way_round(tiny_checkpoint: Path) -> None:
    import torch
    from safetensors import safe_open

    checkpoint = Checkpoint.open(tiny_checkpoint)
    with checkpoint.reader() as reader:
        for shard in checkpoint.shards:
            with safe_open(tiny_checkpoint / shard, framework="pt") as handle:
                assert set(handle.keys()) == set(checkpoint.shards[shard].tensors)
                for name in handle.keys():  # noqa: SIM118
                    theirs = handle.get_tensor(name)
                    ours = torch.from_numpy(reader.bytes(checkpoint.tensors[name])).view(theirs.dtype)
                    assert torch.equal(ours.view(theirs.shape), theirs)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b'{"a":1}', "an entry needs"),
        (b'{"a":{},"a":{}}', "occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "occurs twice"),
        (json.dumps({"a": entry("F31")}).encode(), "unknown dtype"),
        (json.dumps({"a": entry(shape=[-2])}).encode(), "malformed shape"),
        (json.dumps({"a": entry(shape=[2.0])}).encode(), "malformed shape"),
        (json.dumps({"a": entry(shape=[True, 2])}).encode(), "malformed shape"),
        (json.dumps({"a": entry(offsets=[0])}).encode(), "malformed data_offsets"),
        (json.dumps({"a": entry(offsets=[8, 0])}).encode(), "span"),
        (json.dumps({"a": entry(shape=[10**30])}).encode(), "malformed shape"),
        (json.dumps({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}).encode(), "malformed shape"),
        (json.dumps({"a": entry(shape=[1] * 40 + [2])}).encode(), "malformed shape"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', "-0"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "is not text"),
        (b'{"a":[' + b"[]," * 300_000 + b"[]]}", "more values"),
        (b' {"a":1}', "not a JSON object"),
        (json.dumps({"a": entry(offsets=[8, 16])}).encode(), "gap"),
        (json.dumps({"a": entry(), "b": entry()}).encode(), "overlaps"),
        (json.dumps({"a": entry(), "b": entry(offsets=[4, 12])}).encode(), "overlaps"),
        (json.dumps({"a": entry(), "b": entry(offsets=[8, 16])}).encode(), "truncated"),
        (b"{}", "longer than its header"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_an_unsound_header_is_refused(tmp_path: Path, header: bytes, fault: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadInput, match=fault) as caught:
        read_header(path)
    assert "x.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"abc", "shorter than"),
        (struct.pack("<Q", 2**60) + b"{}", "limit"),
        (struct.pack("<Q", 50) + b"{}", "truncated within the header"),
    ],
)
def test_a_length_that_lies_is_refused_before_it_is_believed(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=fault):
        read_header(path)


@given(st.binary(max_size=200), st.integers(min_value=0, max_value=300))
def test_any_bytes_are_parsed_or_refused_with_a_reason(text: bytes, size: int) -> None:
    try:
        tensors, _ = parse_header(text, size)
    except ValueError as err:
        assert str(err)
    else:
        assert sum(info.nbytes for info in tensors.values()) == size


@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "F8_E4M3"]), st.integers(0, 9)), max_size=6))
def test_a_header_that_is_built_says_the_same_when_it_is_parsed(shapes: list[tuple[str, int]]) -> None:
    specs = [TensorSpec(f"t{i}", dtype, (size, 3)) for i, (dtype, size) in enumerate(shapes)]
    header = build_header((s.name, s.dtype, s.shape) for s in specs)
    assert len(header) % 8 == 0
    tensors, metadata = parse_header(header[8:], sum(s.nbytes for s in specs))
    assert [(i.name, i.dtype, i.shape) for i in tensors.values()] == [
        (s.name, s.dtype, s.shape) for s in specs
    ]
    assert metadata == {"format": "pt"}


def _index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((path / INDEX_NAME).read_text())
    change(document["weight_map"])
    (path / INDEX_NAME).write_text(json.dumps(document))


def test_index_and_shards_must_agree_and_each_disagreement_is_listed(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(shards=3)
    Checkpoint.open(path)
    _index(path, lambda m: (m.pop("lm_head.weight"), m.update(ghost="model-00001-of-00003.safetensors")))
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (path / "model-00003-of-00003.safetensors").unlink()
    (path / "extra.safetensors").write_bytes(b"")
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(path)
    for part in (
        "missing shard model-00003-of-00003.safetensors",
        "truncated",
        "ghost is not in model-00001",
        "extra.safetensors is not in the index",
    ):
        assert part in caught.value.message


def test_a_tensor_that_the_index_forgets_or_misplaces_is_named(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(shards=2)
    _index(path, lambda m: m.pop("model.norm.weight"))
    with pytest.raises(BadInput, match=r"model\.norm\.weight is in .* but not in the index"):
        Checkpoint.open(path)
    _index(path, lambda m: m.update({"model.norm.weight": "../model-00001-of-00002.safetensors"}))
    with pytest.raises(BadInput, match="no shard of this folder"):
        Checkpoint.open(path)


def test_a_hub_cache_snapshot_of_links_is_read_through_them(tmp_path: Path, tiny_checkpoint: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_checkpoint.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert Checkpoint.open(snapshot).digest() == Checkpoint.open(tiny_checkpoint).digest()


def test_the_digest_of_a_source_follows_every_byte_of_it(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(shards=2)
    before = Checkpoint.open(path).digest()
    shard = path / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert Checkpoint.open(path).digest() != before


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no directory"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(BadInput, match="not a checkpoint"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="never loaded"):
        Checkpoint.open(tmp_path)
    with pytest.raises(BadInput, match="not a directory"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageProblem) as caught:
        locate("hf://org/name@abc")
    assert "hf download org/name --revision abc" in caught.value.remedy


def test_a_file_cut_short_while_it_is_read_is_noticed(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint()
    checkpoint = Checkpoint.open(path)
    with (path / "model.safetensors").open("r+b") as handle:
        handle.truncate(checkpoint.shards["model.safetensors"].data_start + 10)
    with checkpoint.reader() as reader, pytest.raises(BadInput, match="has changed since it was opened"):
        for info in checkpoint.tensors.values():
            reader.bytes(info)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"n_group": 3}, "divide"),
        ({"num_experts_per_tok": 5}, "exceeds"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        BailingConfig.parse({**TINY_CONFIG, **change})


def test_config_fields_that_transformers_5_moved_are_found() -> None:
    raw = {
        k: v for k, v in TINY_CONFIG.items() if k not in ("rope_theta", "partial_rotary_factor", "head_dim")
    }
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    config = BailingConfig.parse(raw)
    assert (config.rope_theta, config.rotary_dim, config.head_dim) == (5e5, 16, 64)


def test_missing_unknown_and_misshapen_tensors_are_listed_in_one_error(
    make_checkpoint: MakeCheckpoint,
) -> None:
    path = make_checkpoint()
    checkpoint = Checkpoint.open(path)
    require_layout(expected_tensors(BailingConfig.load(path)), checkpoint.tensors, "x")
    other = expected_tensors(BailingConfig.parse({**TINY_CONFIG, "vocab_size": 128, "num_experts": 6}))
    problems = layout_problems(other, checkpoint.tensors)
    assert "wrong shape: lm_head.weight is [256, 128], expected [128, 128]" in problems
    assert any(p.startswith("missing: model.layers.1.mlp.experts.5.up_proj.weight") for p in problems)
    fewer = expected_tensors(BailingConfig.parse({**TINY_CONFIG, "use_qk_norm": False}))
    assert sum(p.startswith("unknown: ") for p in layout_problems(fewer, checkpoint.tensors)) == 4
    with pytest.raises(BadInput, match="10 tensors do not fit"):
        require_layout(other, checkpoint.tensors, "x")


def test_shards_are_cut_at_the_size_asked_for_and_keep_weight_and_scale_together() -> None:
    groups = [
        [TensorSpec(f"w{i}", "F8_E4M3", (64, 10)), TensorSpec(f"s{i}", "F32", (1, 1))] for i in range(5)
    ]
    plans = plan_shards(groups, 1300)
    assert [len(plan.tensors) for plan in plans] == [4, 4, 2]
    assert plans[0].name == "model-00001-of-00003.safetensors"
    assert [len(plan.tensors) for plan in plan_shards(groups, 1)] == [2] * 5


def read_all(checkpoint: Checkpoint) -> None:
    with checkpoint.reader() as reader:
        for info in checkpoint.tensors.values():
            reader.bytes(info)


def _vanish(shard: Path) -> None:
    shard.unlink()


def _replace(shard: Path) -> None:
    other = shard.with_suffix(".new")
    other.write_bytes(shard.read_bytes())
    other.replace(shard)


def _edit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "says"),
    [(_vanish, "cannot read"), (_replace, "has changed"), (_edit, "has changed")],
    ids=["vanished", "replaced", "edited"],
)
def test_a_directory_that_vanishes_or_changes_while_it_is_read_is_an_error(
    harm: Callable[[Path], None], says: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    checkpoint = Checkpoint.open(copy)
    shard = sorted(checkpoint.shards)[1]
    harm(copy / shard)
    with pytest.raises(BadInput, match=says):
        read_all(checkpoint)
    with pytest.raises(BadInput, match=says):
        checkpoint.digest()
    shutil.rmtree(copy)
    with pytest.raises(BadInput, match=r"no file|cannot read"):
        checkpoint.config()


def test_a_shard_edited_in_the_middle_of_reading_is_noticed_at_the_next_read(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    checkpoint = Checkpoint.open(copy)
    first, second, *_ = checkpoint.tensors.values()
    with checkpoint.reader() as reader:
        reader.bytes(first)
        _edit(copy / first.shard)
        with pytest.raises(BadInput, match="has changed"):
            reader.bytes(second)
