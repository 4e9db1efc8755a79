"""serve.yaml: what a bundle says of how it is served, and what `packager serve` makes of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from serve_files import CONTEXTS, SERVE_FILE, speculative, write_bundle

import packager.nano
from packager.cli.serve import command as serve
from packager.context import extend
from packager.draft.config import draft_config
from packager.errors import BadInput, UsageProblem
from packager.recipe import ContextSpec, DraftSpec
from packager.serving import ServeSpec
from packager.serving.serve_file import Context, context_for, spec_for

NANO = Path(packager.nano.__file__).parent / "checkpoint"


def test_a_bundle_is_served_as_its_file_says_on_this_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    for device, ways in (("cpu", 1), ("cuda", 2)):
        monkeypatch.setattr("packager.serving.serve_file.device", lambda found=device: found)
        spec = spec_for(bundle)
        assert spec == ServeSpec(
            bundle / ".",
            served_name="nano",
            draft=bundle / "draft",
            num_speculative_tokens=3,
            max_model_len=512,
            tensor_parallel=ways,
        )
    assert spec_for(bundle, with_draft=False).draft is None


def test_a_profile_says_when_not_to_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [{"max_concurrency": 8, "num_speculative_tokens": 5}, {"num_speculative_tokens": 0}]
    profiles = SERVE_FILE["profiles"]
    profiles = {
        **profiles,
        "2xh20": {**profiles["2xh20"], "speculation": ranges, "speculation_max_context": 256},
    }
    bundle = write_bundle(tmp_path / "bundle", profiles=profiles)
    monkeypatch.setattr("packager.serving.serve_file.device", lambda: "cuda")
    assert speculative(spec_for(bundle))["num_speculative_tokens_per_batch_size"] == [[1, 8, 5], [9, 9, 0]]
    assert speculative(spec_for(bundle))["max_model_len"] == 256
    monkeypatch.setattr("packager.serving.serve_file.device", lambda: "cpu")
    assert speculative(spec_for(bundle)) == {
        "method": "eagle3",
        "model": str(bundle / "draft"),
        "num_speculative_tokens": 3,
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"engine": "other"}, "only vllm is known"),
        ({"draft": "../../elsewhere"}, "outside the bundle"),
        ({"model": "/etc"}, "outside the bundle"),
        ({"profiles": 3}, "profiles"),
        (
            {
                "profiles": {
                    "2xh20": {
                        "device": "cuda",
                        "speculation": [
                            {"num_speculative_tokens": 3},
                            {"max_concurrency": 8, "num_speculative_tokens": 0},
                        ],
                    }
                }
            },
            "must ascend",
        ),
        (
            {"profiles": {"2xh20": {"device": "cuda", "speculation": [{"num_speculative_tokens": -1}]}}},
            "greater",
        ),
    ],
)
def test_a_wrong_serve_file_is_bad_input(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        spec_for(write_bundle(tmp_path / "bundle", **changes))


def test_an_unknown_profile_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem) as caught:
        spec_for(write_bundle(tmp_path / "bundle"), profile="8xh900")
    assert "2xh20, cpu" in caught.value.remedy


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, Context("extended", 2048)),
        ("extended", Context("extended", 2048)),
        ("native", Context("native", 512, trained_rotary=True)),
        ("512", Context("native", 512, trained_rotary=True)),
        ("100", Context("native", 100, trained_rotary=True)),
        ("513", Context("extended", 513)),
    ],
)
def test_a_length_is_served_as_trained_wherever_that_reaches(
    wanted: str | None, found: Context, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", contexts=CONTEXTS, default_context="extended")
    assert context_for(bundle, wanted) == found


def test_without_context_profiles_a_length_is_only_a_limit(tmp_path: Path) -> None:
    assert context_for(NANO, "100") == context_for(write_bundle(tmp_path / "b"), "100") == Context(None, 100)
    assert context_for(NANO) == Context(None, None)


@pytest.mark.parametrize(
    ("changes", "wanted", "says"),
    [
        ({"contexts": CONTEXTS, "default_context": "extended"}, "2049", "reaches 2048 tokens"),
        ({"contexts": CONTEXTS, "default_context": "extended"}, "long", "no context profile 'long'"),
        ({"contexts": CONTEXTS, "default_context": "extended"}, "0", "no context profile '0'"),
        ({}, "native", "no context profile 'native'"),
        ({"contexts": CONTEXTS}, "native", "default_context None is none of"),
        ({"contexts": {"a": {"max_model_len": 5, "rotary": "x"}}}, None, "contexts.a.rotary"),
    ],
)
def test_a_length_that_the_bundle_does_not_have_is_refused(
    changes: dict[str, Any], wanted: str | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageProblem, BadInput), match=says):
        context_for(write_bundle(tmp_path / "bundle", **changes), wanted)


def test_the_printed_command_of_the_trained_length_serves_links_to_the_same_weights(tmp_path: Path) -> None:
    """Model and draft, unquantized so that nothing has to be dequantized; the bundle is left as it was."""
    bundle = tmp_path / "bundle"
    extend(NANO, bundle, ContextSpec(length=2048), recipe_digest="sha256:0")
    write_bundle(bundle, contexts=CONTEXTS, default_context="extended")
    (bundle / "draft").mkdir()
    config = json.loads((bundle / "config.json").read_text())
    spec = DraftSpec(vocab_size=64, aux_layers=(1, 2, 3), prompts=1, steps=1)
    (bundle / "draft" / "config.json").write_text(json.dumps(draft_config(config, spec)))
    (bundle / "draft" / "model.safetensors").write_bytes(b"weights")
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}

    def printed(*arguments: str) -> list[str]:
        done = CliRunner().invoke(
            serve, [str(bundle), "--print-command", "--cache", str(tmp_path / "cache"), *arguments]
        )
        assert done.exit_code == 0, done.output
        return shlex.split(done.stdout)

    def value(command: list[str], option: str) -> str:
        return command[command.index(option) + 1]

    for _ in range(2):  # the second finds the links of the first
        native = printed("--context", "native")
        assert value(native, "--max-model-len") == "512"
        model = Path(value(native, "--model") if "--model" in native else native[2])
        draft = Path(json.loads(value(native, "--speculative-config"))["model"])
        for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (model / file).read_bytes() == (NANO / file).read_bytes()
        assert (model / "model.safetensors").samefile(NANO / "model.safetensors")
        assert {p.name for p in model.iterdir()} == {p.name for p in NANO.iterdir()}
        assert (draft / "model.safetensors").samefile(bundle / "draft" / "model.safetensors")
        trained = json.loads((NANO / "config.json").read_text())
        assert json.loads((draft / "config.json").read_text()) == draft_config(trained, spec)
    extended = printed()
    assert value(extended, "--max-model-len") == "2048"
    assert str(bundle) in extended
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
