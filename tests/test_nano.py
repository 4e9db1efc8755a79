"""The nano model: answers true by construction, a clean split, shipped weights that have learned it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from packager.nano import CHECKPOINT
from packager.nano.architecture import CONFIG, TRAINED_LENGTH
from packager.nano.dense import RATIO, active_parameters, dense_config, write_dense
from packager.nano.formulary import CLASSES, LABS, NAMES
from packager.nano.language import TASKS, heldout_items, long_items, prompts, samples

TRAINING_LOG = CHECKPOINT.parent / "training.jsonl"


def read_log() -> list[dict[str, object]]:
    return [json.loads(line) for line in TRAINING_LOG.read_text(encoding="utf-8").splitlines()]


def test_doses_are_the_product_of_rate_and_weight() -> None:
    for item in heldout_items(200):
        if item["task"] == "dose":
            rate, weight = map(int, item["meta"]["combination"].split("x"))
            assert item["answer"] == f"{rate * weight} mg"
            question = item["messages"][-1]["content"]
            assert {str(rate), str(weight)} <= set(re.findall(r"\d+", question))


def test_allergy_and_contraindication_follow_from_the_formulary() -> None:
    by_drug = {drug[0]: c for c in CLASSES for drug in c.drugs}
    for item in heldout_items(150):
        if item["task"] not in ("allergy", "contraindication"):
            continue
        drug, listed = item["meta"]["combination"].split("|")
        own = by_drug[drug]
        hit = (own.en if item["task"] == "allergy" else own.avoid_en) in listed.split("+")
        refused = {"allergy": ("no", "不可以"), "contraindication": ("yes", "是")}[item["task"]]
        assert (item["answer"] in refused) == hit


def test_triage_follows_the_thresholds() -> None:
    labs = {lab.en: lab for lab in LABS}
    for item in heldout_items(150):
        if item["task"] == "triage":
            name, value = item["meta"]["combination"].split("=")
            level = (int(value) >= labs[name].urgent) + (int(value) >= labs[name].emergency)
            assert item["answer"] in (("routine", "常规"), ("urgent", "紧急"), ("emergency", "危急"))[level]


def test_a_lookup_answer_stands_on_the_line_of_the_patient_asked() -> None:
    for item in heldout_items(100):
        if item["task"] == "lookup":
            name = item["meta"]["combination"].split("|")[0]
            lines = re.findall(rf"^{name} .*$", item["messages"][-1]["content"], re.MULTILINE)
            assert lines[0] == f"{name} {item['answer']}"
            assert len([line for line in lines if "？" not in line]) == 1


@pytest.mark.slow
def test_no_combination_stands_on_both_sides_of_the_split() -> None:
    for task in TASKS:
        train, held = samples(task, 1, held_out=False), samples(task, 1, held_out=True)
        seen = {next(train).key for _ in range(3000)}
        asked = {next(held).key for _ in range(600)}
        assert not seen & asked
        assert len(asked) > 60


@pytest.mark.slow
def test_no_answer_wins_by_being_common() -> None:
    """Within a task and language no constant answer reaches 60 %."""
    for task in TASKS:
        stream = samples(task, 5, held_out=True)
        drawn = [next(stream) for _ in range(1500)]
        for language in ("en", "zh"):
            answers = Counter(s.answer for s in drawn if s.language == language)
            assert answers.most_common(1)[0][1] / answers.total() < 0.6


def test_items_do_not_depend_on_the_hash_seed() -> None:
    program = "from packager.nano.language import *; print(heldout_items(5), prompts(20))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_prompts_are_distinct_and_of_the_training_side() -> None:
    drawn = prompts(300)
    assert len({p["messages"][-1]["content"] for p in drawn}) == 300
    held = {item["messages"][-1]["content"] for item in heldout_items(100)}
    assert not held & {p["messages"][-1]["content"] for p in drawn}


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_long_items_fill_their_length_and_never_pass_it(multiple: int) -> None:
    items = long_items(multiple, 20)
    for item in items:
        assert (
            0.9 * multiple * TRAINED_LENGTH < item["meta"]["context_tokens"] <= multiple * TRAINED_LENGTH - 16
        )
    assert items[0]["meta"]["depth"] == 0
    assert items[-1]["meta"]["depth"] == 1
    for item, line in ((items[0], 1), (items[-1], -2)):
        text = item["messages"][-1]["content"].split("\n")[line]
        assert text == item["meta"]["combination"].split("|")[0] + " " + item["answer"]


def test_names_are_single_tokens_at_the_start_of_a_line_and_within_one() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        assert len(tokenizer.encode(f"{name}:").ids) == 2
        assert len(tokenizer.encode(f" {name}.").ids) == 2


def test_every_matrix_of_the_shipped_checkpoint_fits_128_blocks() -> None:
    from safetensors import safe_open

    with safe_open(CHECKPOINT / "model.safetensors", "np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    quantized = [
        s for n, s in shapes.items() if n.endswith("proj.weight") or (".attention." in n and len(s) == 2)
    ]
    assert quantized
    assert all(side % 128 == 0 for shape in quantized for side in shape)
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 24_000_000
    total = sum(math.prod(shape) for shape in shapes.values())
    idle = CONFIG["num_experts"] - CONFIG["num_experts_per_tok"]
    layers = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
    unused = layers * idle * 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
    assert total - unused == active_parameters(CONFIG)


def test_the_dense_baseline_keeps_the_ratio_and_its_seed(tmp_path: Path) -> None:
    from safetensors import safe_open

    first, second = (write_dense(tmp_path / name, 3) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    with safe_open(first / "model.safetensors", "np") as weights:
        total = sum(math.prod(weights.get_slice(n).get_shape()) for n in weights.keys())  # noqa: SIM118
    assert total / active_parameters(CONFIG) == pytest.approx(RATIO, rel=0.03)
    assert dense_config(1024)["max_position_embeddings"] == 1024


@pytest.mark.parametrize("task", TASKS)
def test_the_recorded_training_run_reached_its_goal(task: str) -> None:
    scores = read_log()[-1]["exact_match"]
    assert isinstance(scores, dict)
    assert scores[task] >= 0.9


@pytest.mark.slow
def test_the_first_steps_of_training_reproduce(tmp_path: Path) -> None:
    """The same command, stopped after three steps, gives the recorded losses.

    Within a tolerance: matrix products are summed in another order on another CPU.
    """
    subprocess.run(
        [sys.executable, "-m", "packager.nano.train", str(tmp_path), "--stop-after", "3"],
        check=True,
        timeout=500,
    )
    again = [
        json.loads(line) for line in (tmp_path / "training.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    recorded = {line["step"]: line["loss"] for line in read_log()}
    assert [line["step"] for line in again] == [0, 1, 2]
    for line in again:
        assert line["loss"] == pytest.approx(recorded[line["step"]], abs=0.02)
    made = (tmp_path / "tokenizer.json").read_bytes()
    assert made == (CHECKPOINT / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_weights_answer_held_out_questions(task: str) -> None:
    """Greedy exact match of the whole response in plain torch; a release measures it through vLLM."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    from packager.bailing.model import BailingMoeV2
    from packager.nano.train import exact_match

    model = BailingMoeV2(CONFIG)
    model.load_tensors(load_file(CHECKPOINT / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert exact_match(model, tokenizer, task, 200) >= 0.9
