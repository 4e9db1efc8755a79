"""`packager plan`: bytes, fit and bounds against figures that follow from the published shape alone."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import MakeCheckpoint, write_checkpoint

from packager.bailing.config import BailingConfig
from packager.cli.plan import command
from packager.errors import BadInput, UsageProblem
from packager.layouts import Described
from packager.serving import tuned_kernels
from packager.serving.plan import (
    Plan,
    decode_bound,
    fit,
    make_plan,
    model_bytes,
    shape_config,
    smallest,
    split_problem,
)
from validation.hardware import hardware_file, parse_hardware

CONTEXT = 131072


@pytest.fixture(scope="module")
def flash() -> Described:
    return shape_config("ling-flash-2.0")


def planned(config: Described, hardware: str | None, context: int = CONTEXT, concurrency: int = 32) -> Plan:
    model = model_bytes(config, "fp8", draft_vocab=32000)
    return make_plan(
        model, parse_hardware(hardware) if hardware else None, context=context, concurrency=concurrency
    )


def test_bytes_of_the_published_shape(flash: Described) -> None:
    bf16 = model_bytes(flash, "bf16")
    assert bf16.weights == 2 * 102_889_697_280 + 4 * 7_936
    assert bf16.kv_per_token == 2 * 32 * 4 * 128 * 2
    fp8 = model_bytes(flash, "fp8")
    # One byte a quantized weight, four for each block of 16384, two for the rest: within a hair of half.
    assert 0.505 < fp8.weights / bf16.weights < 0.508
    assert model_bytes(flash, "fp8", draft_vocab=32000).kv_per_token == 33 * 4 * 128 * 2 * 2


def test_single_stream_bound_is_active_bytes_over_bandwidth(flash: Described) -> None:
    """6.15 B active parameters less one embedding, in BF16, over 16 TB/s: 1452 tokens/s."""
    bound = decode_bound(model_bytes(flash, "bf16"), parse_hardware("4xh20"), 1, 0)
    assert bound.tokens_per_s == pytest.approx(1452, abs=1)
    assert bound.limited_by == "memory bandwidth"


def test_bound_falls_with_context_and_rises_with_concurrency(flash: Described) -> None:
    model, cards = model_bytes(flash, "fp8"), parse_hardware("2xh20")
    rates = [decode_bound(model, cards, n, 2048).tokens_per_s for n in (1, 8, 32, 128)]
    assert rates == sorted(rates)
    assert decode_bound(model, cards, 8, 65536).tokens_per_s < rates[1]


def test_large_batches_on_weak_arithmetic_are_bound_by_it(flash: Described) -> None:
    bound = decode_bound(model_bytes(flash, "fp8"), parse_hardware("2xh20"), 8192, 1)
    assert bound.limited_by == "arithmetic"
    head, rest = 157184 * 4096, 32_788_224
    eight_bits = 6_152_277_760 - 2 * head - rest
    # The head, routers and norms stay in BF16, at half the rate.
    work = 2 * (eight_bits + 2 * (head + rest))
    assert bound.tokens_per_s == pytest.approx(2 * 296e12 / work, rel=0.001)


def test_a_draft_at_the_assumed_acceptance_length_gains_less_than_that_length(flash: Described) -> None:
    model, cards = model_bytes(flash, "fp8", draft_vocab=32000), parse_hardware("2xh20")
    plain = decode_bound(model, cards, 1, 2048)
    drafted = decode_bound(model, cards, 1, 2048, acceptance_length=3.1)
    assert 1.0 < drafted.tokens_per_s / plain.tokens_per_s < 3.1
    useless = decode_bound(model, cards, 1, 2048, acceptance_length=1.0)
    assert useless.tokens_per_s < plain.tokens_per_s


def test_two_h20_hold_the_fp8_release_and_one_does_not(flash: Described) -> None:
    two = planned(flash, "2xh20")
    assert two.fits
    assert two.fit.sequences(CONTEXT) == two.fit.kv_tokens // CONTEXT > 1
    assert two.context_at_concurrency == two.fit.kv_tokens // 32 < CONTEXT
    one = planned(flash, "1xh20")
    assert not one.fits
    assert one.fit.problem is not None
    assert "the weights take 105 GB" in one.fit.problem
    assert one.alternative is not None
    assert one.alternative.hardware.label == "1xh20-141"
    assert one.same_card is not None
    assert one.same_card.hardware.label == "2xh20"
    assert one.bounds == ()


def test_without_hardware_the_smallest_that_fits_is_planned(flash: Described) -> None:
    plan = planned(flash, None)
    assert plan.fits
    assert plan.fit.hardware.label == "1xh20-141"


def test_smallest_is_minimal(flash: Described) -> None:
    model = model_bytes(flash, "bf16")
    found = smallest(model, CONTEXT)
    assert found is not None
    for key in hardware_file().cards:
        for count in (1, 2, 4, 8):
            other = fit(model, parse_hardware(f"{count}x{key}"), CONTEXT)
            assert other.problem is not None or other.hardware.memory >= found.hardware.memory


def test_more_cards_than_kv_heads_repeat_the_heads(flash: Described) -> None:
    model = model_bytes(flash, "fp8")
    four, eight = (fit(model, parse_hardware(f"{n}xh200"), CONTEXT) for n in (4, 8))
    # The weights' share of a card halves, but a token costs each card the same: far from twice the tokens.
    assert four.kv_tokens < eight.kv_tokens < 1.5 * four.kv_tokens


@pytest.mark.parametrize(("ways", "says"), [(3, "attention heads"), (16, "expert width 1024")])
def test_impossible_splits_are_named(flash: Described, ways: int, says: str) -> None:
    problem = split_problem(flash, ways, "fp8")
    assert problem is not None
    assert says in problem
    assert split_problem(flash, 8, "fp8") is None


def test_shard_headers_are_believed_over_the_config(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(shards=3)
    config = BailingConfig.load(path)
    read = model_bytes(config, "bf16", directory=path)
    assert read.weights_source == "shard headers"
    assert read.weights == model_bytes(config, "bf16").weights
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.unlink()
    assert model_bytes(config, "bf16", directory=path).weights < read.weights
    assert model_bytes(config, "fp8", directory=path).weights_source == "computed from config.json"


def test_json_document_and_serve_command() -> None:
    done = CliRunner().invoke(
        command, ["--shape", "ling-flash-2.0", "--hardware", "2xh20", "--context", str(CONTEXT), "--json"]
    )
    document = json.loads(done.stdout)
    assert document["fits"] is True
    assert document["needs_context_extension"] is True
    serve = document["serve_command"]
    assert serve[:3] == ["vllm", "serve", "BUNDLE"]
    assert serve[serve.index("--tensor-parallel-size") + 1] == "2"
    assert serve[serve.index("--max-model-len") + 1] == str(CONTEXT)
    speculative = json.loads(serve[serve.index("--speculative-config") + 1])
    assert speculative == {"method": "eagle3", "model": "BUNDLE/draft", "num_speculative_tokens": 3}


def test_every_declared_architecture_can_be_planned_and_a_dense_one_has_no_experts_to_spread() -> None:
    done = CliRunner().invoke(
        command,
        ["--shape", "seed-oss-36b", "--precision", "bf16", "--hardware", "2xh200", "--plot", "--json"],
    )
    document = json.loads(done.stdout)
    assert document["parameters"] == document["active_parameters"] == 36_151_104_512
    assert [split["fits"] for split in document["splits"]] == [False, True, True, True]
    assert not any(split["expert_parallel"] for split in document["splits"])
    rates = [bound["tokens_per_s"] for bound in document["over_concurrency"]]
    assert rates == sorted(rates)
    assert len(rates) > 5
    assert document["prefill_seconds_bound"] > 1


def printed_commands() -> list[dict[str, list[str]]]:
    """What `plan` prints for every shape, card, number of cards, context and draft: vLLM's and SGLang's."""
    more = [["--context", str(CONTEXT), "--draft-tokens", "5"], ["--no-draft"], ["--precision", "bf16"]]
    lines = [[key] for key in hardware_file().cards] + [["h200", *one] for one in more]
    found = {}
    for shape, count, (key, *options) in product(("ling-flash-2.0", "seed-oss-36b"), (1, 2, 4, 8), lines):
        line = ["--shape", shape, "--hardware", f"{count}x{key}", "--json", *options]
        document = json.loads(CliRunner().invoke(command, line).stdout)
        pair = {name: document[name] for name in ("serve_command", "sglang_command")}
        if pair["serve_command"] is not None:
            found[str(pair)] = pair
    return list(found.values())


SGLANG_OPTIONS: dict[str, type] = {
    **dict.fromkeys(("--model-path", "--served-model-name", "--host", "--load-format"), str),
    **dict.fromkeys(("--speculative-algorithm", "--speculative-draft-model-path"), str),
    **dict.fromkeys(("--port", "--context-length", "--tp-size", "--speculative-num-steps"), int),
    **dict.fromkeys(("--speculative-eagle-topk", "--speculative-num-draft-tokens"), int),
}
"""By SGLang's page "Server Arguments" (0.5): what the option takes. The parser of 0.5.23 agrees."""


@pytest.mark.slow
def test_the_parsers_of_vllm_and_sglang_take_every_command_that_plan_prints() -> None:
    """SGLang's own parser where it is installed; else its documented options and their types."""
    pytest.importorskip("vllm")
    commands = printed_commands()
    assert len(commands) > 12
    wrong = [["vllm", "serve", "m", "--tensor-parallel", "two"], ["vllm", "serve", "m", "--spec", "{x"]]
    lines = [pair["serve_command"] for pair in commands]
    script = (
        "import contextlib, dataclasses, io, json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.config.speculative import SpeculativeConfig\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "fields = {one.name for one in dataclasses.fields(SpeculativeConfig)}\n"
        "def taken(line):\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(io.StringIO()):\n"
        "            found = parser.parse_args(line[2:])\n"
        "    except SystemExit:\n"
        "        return None\n"
        "    drafted = found.speculative_config or {}\n"
        "    return [found.model_tag, found.max_model_len, found.tensor_parallel_size, sorted(drafted),\n"
        "            sorted(set(drafted) - fields)]\n"
        "print(json.dumps([taken(line) for line in json.load(sys.stdin)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([*lines, *wrong]),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    *found, tensor, spec = json.loads(done.stdout.splitlines()[-1])
    assert tensor is None and spec is None
    for line, (model, length, ways, drafted, unknown) in zip(lines, found, strict=True):
        given = dict(pairwise(line))
        assert line[:3] == ["vllm", "serve", model]
        assert str(length) == given["--max-model-len"]
        assert str(ways) == given.get("--tensor-parallel-size", "1")
        assert bool(drafted) is ("--speculative-config" in given)
        assert unknown == []
    for pair in commands:
        line = pair["sglang_command"]
        assert line[:3] == ["python", "-m", "sglang.launch_server"]
        given = dict(zip(line[3::2], line[4::2], strict=True))
        assert given.keys() <= SGLANG_OPTIONS.keys()
        assert all(SGLANG_OPTIONS[name](value) is not None for name, value in given.items())
        if "--speculative-num-steps" in given:
            steps, tokens = (given[f"--speculative-{name}"] for name in ("num-steps", "num-draft-tokens"))
            assert int(tokens) == int(steps) + 1
    try:
        from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]
    except ImportError:
        return
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for pair in commands:
        assert parser.parse_args(pair["sglang_command"][3:]).model_path == "BUNDLE"


@pytest.mark.parametrize(
    ("card", "tuned"),
    [("h20", [False, False, True, True]), ("h200", [False, True, True, False]), ("b200", [None] * 4)],
)
def test_tuned_settings_of_the_expert_kernel_are_looked_for_by_the_shape_on_a_card(
    flash: Described, card: str, tuned: list[bool | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of vLLM 0.32.0: N is 1024 / TP. On Blackwell, and with whole experts on Hopper, nothing reads them."""
    monkeypatch.setattr(tuned_kernels, "shipped", tuned_kernels.table)
    found = [tuned_kernels.kernels(flash.model, "fp8", card, ways) for ways in (1, 2, 4, 8)]
    experts = [one.experts for one in found if one.experts is not None]
    device = tuned_kernels.DEVICES[card]
    assert [one.file for one in experts] == [
        f"E=256,N={1024 // ways},device_name={device},dtype=fp8_w8a8,block_shape=[128,128].json"
        for ways in (1, 2, 4, 8)
    ]
    assert [one.found if one.used == "yes" else None for one in experts] == tuned
    whole = found[2].whole_experts
    assert whole is not None and whole.file.startswith("E=64,N=1024,") and whole.used == "no"
    assert {one.file.split(",device")[0] for one in found[1].dense} == {
        *("N=2560,K=4096", "N=4096,K=2048", "N=9216,K=4096", "N=4096,K=4608"),
        *("N=1024,K=4096", "N=4096,K=512"),
    }


def test_the_list_of_tuned_settings_is_that_of_the_release_it_names() -> None:
    installed, listed = tuned_kernels.shipped(), tuned_kernels.table()
    if not installed.installed or installed.release != listed.release:
        pytest.skip("another vLLM is installed, or none")
    assert listed.names <= installed.names
    devices = tuple(f"device_name={name}{end}" for name in tuned_kernels.DEVICES.values() for end in ".,")
    ours = [name for name in installed.names if any(device in name for device in devices)]
    kinds = (".json", ",dtype=fp8_w8a8,block_shape=[128,128].json", ",dtype=int8_w8a8.json")
    wanted = {name for name in ours if name.endswith(tuple(f"{d[:-1]}{k}" for d in devices for k in kinds))}
    assert listed.names == wanted


def test_output_fits_eighty_columns_and_its_commands_can_be_pasted() -> None:
    line = ["--shape", "ling-flash-2.0", "--hardware", "2xh20", "--context", str(CONTEXT), "--plot"]
    said = CliRunner().invoke(command, [*line, "--acceptance-length", "3.1"]).stdout
    # The JSON of one option cannot be broken.
    assert [row for row in said.splitlines() if len(row) > 80 and "--speculative-config" not in row] == []
    assert "  2xh20: fused MoE not tuned (vLLM's default)" in said
    document = json.loads(CliRunner().invoke(command, [*line, "--json"]).stdout)
    for engine, name in (("vLLM", "serve_command"), ("SGLang", "sglang_command")):
        pasted = said.split(f"serve with {engine}\n")[1].split("\n  (")[0].split("\n\n")[0]
        assert shlex.split(pasted.replace("\\\n", " ")) == document[name]
    assert document["kernels"]["splits"][2]["fused_moe"]["tuned"] is True


def test_a_config_without_weights_is_enough(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    done = CliRunner().invoke(command, [str(bare), "--precision", "bf16", "--no-draft"])
    assert done.exit_code == 0, done.output
    assert "computed from config.json" in done.stdout
    lines = done.stdout.splitlines()
    assert shlex.split(lines[lines.index("serve with vLLM") + 1])[:3] == ["vllm", "serve", str(bare)]


def test_a_release_that_does_not_fit_names_what_would_hold_it() -> None:
    done = CliRunner().invoke(command, ["--shape", "ling-flash-2.0", "--hardware", "1xh20"])
    assert done.exit_code == 0
    assert "no: the weights take 105 GB of each card" in done.stdout
    assert "1xh20-141 or 2xh20" in done.stdout
    assert "tokens/s" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either SOURCE or --shape"),
        (["--shape", "nothing"], "no shape named"),
        (["--shape", "ling-flash-2.0", "--hardware", "2xabacus"], "not known"),
        (["--shape", "ling-flash-2.0", "--hardware", "0xh20"], "not known"),
        (["--shape", "ling-flash-2.0", "--acceptance-length", "9"], "cannot yield"),
    ],
)
def test_wrong_use_is_one_clear_message(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(command, arguments)
    assert isinstance(done.exception, UsageProblem)
    assert says in done.exception.message


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(command, [str(tmp_path)]).exception, BadInput)
    assert isinstance(CliRunner().invoke(command, [str(tmp_path / "none")]).exception, BadInput)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from packager.cli.plan import command; "
        "command(['--shape', 'ling-flash-2.0', '--json'], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
