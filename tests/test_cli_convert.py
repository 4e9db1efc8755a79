"""The verbs inspect, quantize, relabel, diff and extend-context as a user meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint

from packager.artifact import is_sealed
from packager.cli import run


@pytest.fixture(scope="module")
def fp8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "fp8"
    assert run(["quantize", str(tiny_checkpoint), str(out), "--shard-bytes", "60000"]) == 0
    return out


def document(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """Run a verb with --json and parse its whole stdout."""
    capsys.readouterr()
    assert run([str(a) for a in arguments] + ["--json"]) == code
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a verb that must fail with `code` and one message; return stderr."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    return captured.err


def test_inspect_tells_what_a_checkpoint_is(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "inspect", tiny_checkpoint)
    assert found["sound"] and not found["problems"] and not found["notes"]
    assert found["architecture"] == "BailingMoeV2ForCausalLM"
    assert found["weights"]["shards"] == 3
    assert found["parameters"]["total"] == sum(r["elements"] for r in found["weights"]["dtypes"].values())
    assert found["parameters"]["float32"] == found["weights"]["dtypes"]["F32"]["elements"] == 4
    assert found["context"] == {
        "length": 64,
        "trained_length": 64,
        "rope_type": "default",
        "factor": 1.0,
        "rope_theta": 10000.0,
        "rotary_dim": 32,
    }
    assert found["quantization"] is None


def test_inspect_fits_80_columns_and_needs_no_torch(fp8: Path) -> None:
    code = (
        "import sys; from packager.cli import run; code = run(['inspect', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(fp8)],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "80"},
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in ("BailingMoeV2ForCausalLM", "fp8-block, compressed-tensors", "F8_E4M3", "stage quantize"):
        assert part in result.stdout


def test_inspect_lists_what_is_wrong_and_exits_3(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"type": "linear", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    path = make_checkpoint(shards=2, rope_scaling=rope, eos_token_id=[2, 999])
    (path / "modeling.py").write_text("")
    (path / "old.bin").write_bytes(b"")
    (path / "tokenizer.json").unlink()
    found = document(capsys, "inspect", path, code=3)
    assert any("rope_type disagree" in line for line in found["problems"])
    assert any("64 is not 4 x 64" in line for line in found["problems"])
    for part in ("eos_token_id 999", "never run", "pickled", "no tokenizer.json"):
        assert any(part in line for line in found["notes"]), part
    (path / "model-00002-of-00002.safetensors").unlink()
    found = document(capsys, "inspect", path, code=3)
    assert any("missing shard" in line for line in found["problems"])
    assert found["weights"] is None
    assert found["parameters"]["total"] > 0


def test_inspect_finds_tensors_that_do_not_fit(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(mtp_layers=1)
    assert "prediction layer" in document(capsys, "inspect", path)["notes"][0]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "num_experts": 2, "n_group": None, "topk_group": None})
    )
    found = document(capsys, "inspect", path, code=3)
    assert any(line.startswith("unknown: model.layers.1.mlp.experts.3.") for line in found["problems"])


def test_quantize_extend_relabel_and_diff_work_on_one_another(
    tiny_checkpoint: Path, fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = document(capsys, "quantize", tiny_checkpoint, fp8, "--shard-bytes", 60000)
    assert again["metrics"]["fidelity"]["routed_expert"]["snr_db"] > 30
    long = document(capsys, "extend-context", fp8, tmp_path / "long", "--length", 256)
    assert long["metrics"]["factor"] == 4.0
    other = document(capsys, "relabel", tmp_path / "long", tmp_path / "ds", "--dialect", "deepseek")
    assert other["metrics"]["dialect"] == "deepseek"
    found = document(capsys, "inspect", tmp_path / "ds")
    assert found["context"]["length"] == 256
    assert found["quantization"]["dialect"] == "deepseek"
    assert found["artifact"]["digest"] == other["digest"]
    assert document(capsys, "diff", fp8, tmp_path / "ds")["equal"]
    compared = document(capsys, "diff", tiny_checkpoint, fp8)
    assert not compared["equal"]
    ratios = [row["snr_db"] for row in compared["differing"]]
    assert ratios == sorted(ratios) and ratios[0] > 28
    assert run(["diff", str(tiny_checkpoint), str(fp8), "--limit", "2"]) == 0
    table = capsys.readouterr().out
    assert f"{compared['identical']} weights equal, {len(ratios)} differ" in table
    assert compared["differing"][0]["name"] in table.replace("\n", "")


def test_diff_names_what_only_one_side_has(
    tiny_checkpoint: Path, make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "diff", tiny_checkpoint, make_checkpoint(num_experts=6, vocab_size=128))
    assert len(found["only_second"]) == 6
    assert any(line.startswith("lm_head.weight [256, 128]") for line in found["misshapen"])


@pytest.mark.parametrize(
    "verb",
    [
        ("inspect", "{}"),
        ("quantize", "{}", "{out}"),
        ("relabel", "{}", "{out}", "--dialect", "deepseek"),
        ("dequantize", "{}", "{out}"),
        ("extend-context", "{}", "{out}", "--length", "256"),
        ("diff", "{}", "{}"),
    ],
    ids=lambda verb: verb[0],
)
def test_wrong_input_is_one_message_with_its_code_and_leaves_nothing(
    verb: tuple[str, ...],
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def with_source(source: object) -> list[str]:
        return [part.format(source, out=out) for part in verb]

    (tmp_path / "empty").mkdir()
    assert "no directory" in refusal(capsys, 3, *with_source(tmp_path / "none"))
    assert "not a checkpoint" in refusal(capsys, 3, *with_source(tmp_path / "empty"))
    assert "Write hf://" in refusal(capsys, 2, *with_source("hf://name"))
    other = tmp_path / "llama"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert "LlamaForCausalLM is not" in refusal(capsys, 3, *with_source(other))
    cut = tmp_path / "cut"
    shutil.copytree(tiny_checkpoint, cut)
    shard = cut / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    capsys.readouterr()
    assert run(with_source(cut)) == 3
    assert "truncated" in "".join(capsys.readouterr())
    assert not out.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_one_changed_byte_in_a_sealed_artifact_exits_5(
    name: str, fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(fp8, bad)
    text = (bad / name).read_bytes()
    (bad / name).write_bytes(text.replace(b" ", b"\t", 1))
    out = tmp_path / "out"
    for arguments in (
        ("relabel", bad, out, "--dialect", "deepseek"),
        ("extend-context", bad, out, "--length", 256),
        ("diff", fp8, bad),
    ):
        assert name in refusal(capsys, 5, *arguments)
    found = document(capsys, "inspect", bad, code=5)
    assert any(name in line for line in found["problems"])
    assert not out.exists()


def test_a_finished_folder_is_not_overwritten_by_other_settings(
    tiny_checkpoint: Path, fp8: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (fp8 / "manifest.json").read_bytes()
    message = refusal(capsys, 3, "quantize", tiny_checkpoint, fp8, "--dialect", "deepseek")
    assert "finished artifact" in message
    assert (fp8 / "manifest.json").read_bytes() == before
    assert is_sealed(fp8)
    assert "not empty" in refusal(capsys, 3, "quantize", tiny_checkpoint, tiny_checkpoint)


def test_a_length_or_dialect_that_cannot_be_is_a_usage_problem(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(capsys, 2, "relabel", fp8, tmp_path / "x", "--dialect", "gguf")
    refusal(capsys, 2, "relabel", fp8, tmp_path / "x", "--dialect", "compressed-tensors")
    refusal(capsys, 2, "quantize", fp8, tmp_path / "x", "--scheme", "int4")
    assert "multiple" in refusal(capsys, 3, "extend-context", fp8, tmp_path / "x", "--length", 100)
    assert not (tmp_path / "x").exists()
