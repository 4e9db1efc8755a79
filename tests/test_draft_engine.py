"""The draft against a real target in a real vLLM: states are those of the layers meant, and the draft is
used."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import served_capacity

from packager.artifact import check
from packager.context.extend import extend
from packager.draft.acceptance import DRAFTED, acceptance_from_metrics, ask
from packager.draft.curve import LOG_NAME, read_log
from packager.draft.prepare import DraftData, prepare
from packager.draft.stage import build, export, train
from packager.draft.validator import validate_draft
from packager.errors import BadInput
from packager.nano import CHECKPOINT, language
from packager.recipe import ContextSpec, DraftSpec, SpeculationRange
from packager.release.draft_evaluation import Plan, evaluate_draft
from packager.serving import Server, ServeSpec

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vllm"),
]

SPEC = DraftSpec(vocab_size=512, aux_layers=(1, 2, 3), prompts=48, max_response_tokens=64, steps=60)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with YaRN, as the draft stage gets it."""
    out = tmp_path_factory.mktemp("target") / "context"
    extend(CHECKPOINT, out, ContextSpec(length=2048), recipe_digest="sha256:0")
    return out


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def data(target: Path, workdir: Path) -> DraftData:
    return prepare(target, SPEC, language.prompts(SPEC.prompts), workdir, lambda _: None)


def _reference_states(target: Path, ids: list[int]) -> list[Any]:
    """The plain torch forward in FP32: inputs of layers 0 … n-1 and the normed output, each [tokens,
    hidden]."""
    from safetensors.torch import load_file

    from packager.bailing.model import BailingMoeV2

    model = BailingMoeV2(json.loads((target / "config.json").read_text()))
    model.load_tensors(load_file(target / "model.safetensors"))
    model = model.float().eval()
    with torch.no_grad():
        _, hidden = model(torch.tensor([ids]), return_hidden=True)
    return [state[0] for state in hidden]


def test_the_layers_were_proved_while_they_were_captured(data: DraftData) -> None:
    """By the checkpoint's own forward; the plain torch model agrees below."""
    found = data.layer_proof
    assert found["proved"], found
    assert [row["layer"] for row in found["layers"]] == [1, 2, 3, 4]
    for row in found["layers"]:
        assert row["cosine"] > 0.99 > 0.97 > row["next_cosine"]
        assert row["tokens_fit_best"] > 0.95 * found["tokens"]


def test_captured_states_are_those_of_the_layers_meant(data: DraftData, target: Path) -> None:
    """Cosine to the reference at the layer meant, and clearly less one layer off."""
    from packager.draft.states import load_states, samples

    longest = max(samples(data.records(), data.states), key=lambda sample: len(sample.ids))
    aux, _ = load_states(longest, 3, 256)
    reference = _reference_states(target, list(longest.ids[:-1]))
    for place, layer in enumerate(SPEC.aux_layers):
        captured = aux[:, place * 256 : (place + 1) * 256].float()
        here, before, after = (
            float(torch.cosine_similarity(captured, reference[number], dim=-1).mean())
            for number in (layer, layer - 1, layer + 1)
        )
        assert here > 0.995, f"layer {layer}: {here}"
        assert max(before, after) < 0.97, (
            f"layer {layer} is hardly told from its neighbours: {before}, {after}"
        )


def test_last_state_predicts_the_response(data: DraftData, target: Path) -> None:
    """Norm and head over the last captured state give back the tokens that the engine chose."""
    from safetensors.torch import load_file

    from packager.draft.states import load_states, samples

    weights = load_file(target / "model.safetensors")
    right = total = 0
    for sample in samples(data.records(), data.states)[:12]:
        last = load_states(sample, 3, 256)[1].float()[sample.prompt - 1 :]
        normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)
        logits = normed * weights["model.norm.weight"].float() @ weights["lm_head.weight"].float().T
        right += int((logits.argmax(-1) == torch.tensor(sample.ids[sample.prompt :])).sum())
        total += len(logits)
    assert right / total > 0.97


def test_states_captured_on_line_train_as_those_captured_while_generating(
    data: DraftData, target: Path, tmp_path: Path
) -> None:
    """To rounding, since prompts are computed otherwise than one token after the other; and bit by bit as the
    same states read off-line. The spool stays within the least budget that it can have."""
    spec = SPEC.model_copy(update={"steps": 8, "batch_tokens": 512, "checkpoint_every": 2})
    works = {name: DraftData(tmp_path / name, data.target) for name in ("generated", "spooled", "read")}
    for work in works.values():
        work.states.mkdir(parents=True)
        shutil.copy(data.responses, work.responses)
    for path in data.states.iterdir():
        (works["generated"].states / path.name).hardlink_to(path)
    train(target, spec, works["generated"], lambda _: None)

    spooled, read, held = works["spooled"], works["read"], list[int]()

    def look(_: object) -> None:
        files = list(spooled.spool.glob("*-*"))
        held.append(sum(path.stat().st_size for path in files))
        for path in files:
            copy = read.states / path.name.split("-")[1]
            if not copy.exists():
                copy.hardlink_to(path)

    with pytest.raises(BadInput, match="on-line training needs") as refused:
        online = {"states": "online", "max_states_bytes": 1}
        train(target, spec.model_copy(update=online), spooled, lambda _: None)
    online["max_states_bytes"] = int(refused.value.message.split()[3])
    train(target, spec.model_copy(update=online), spooled, lambda _: None, on_step=look)
    assert max(held) <= online["max_states_bytes"] < 0.7 * data.states_bytes()
    assert spooled.layer_proof["proved"], spooled.layer_proof
    train(target, spec, read, lambda _: None)
    assert read_log(spooled.workdir / LOG_NAME) == read_log(read.workdir / LOG_NAME)
    rows = [read_log(works[name].workdir / LOG_NAME) for name in ("generated", "spooled")]
    assert len(rows[1]) == 8
    for generated, ours in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(generated["loss"], rel=0.02), f"step {ours['step']}"


def test_sampled_responses_stop_at_the_budget_and_go_on_when_it_is_raised(
    target: Path, tmp_path: Path
) -> None:
    """FP8 states of sampled responses. The second run begins as after a kill: some responses are gone, one
    line is torn."""
    from packager.draft.states import load_layers, samples

    budget = 1_200_000
    sampled = {"temperature": 0.8, "response_seed": 3, "states_dtype": "float8", "prompts": 24}
    spec = SPEC.model_copy(update={**sampled, "max_states_bytes": budget})
    prompts, work, said = language.prompts(24), tmp_path / "work", list[str]()
    first = prepare(target, spec, prompts, work, said.append)
    before = first.records()
    assert 4 < len(before) < 24
    assert budget - 200_000 < first.states_bytes() <= budget
    assert any(f"stopped within the budget of 0.0012 GB: {len(before)} responses" in line for line in said)
    assert first.layer_proof["proved"], first.layer_proof
    assert b"F8_E4M3" in (first.states / before[0]["states"]).read_bytes()[:500]
    assert load_layers(samples(before, first.states)[0], 4).dtype == torch.bfloat16
    ended = [record["response_ids"][-1] == 2 for record in before]
    assert sum(ended) > 0.7 * len(ended), "sampled at another temperature than 0.8: texts do not end"

    said.clear()
    prepare(target, spec, prompts, work, said.append)
    assert said == [f"draft: {len(before)} responses and their states are there"]

    lines = first.responses.read_bytes().splitlines(keepends=True)
    first.responses.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    (work / "complete").unlink()
    after = prepare(target, SPEC.model_copy(update=sampled), prompts, work, said.append).records()
    assert "draft: 24/24 responses with hidden states" in said
    assert [record["id"] for record in after] == [prompt["id"] for prompt in prompts]
    assert first.responses.read_bytes().splitlines(keepends=True)[:4] == lines[:4]
    assert len(list(first.states.iterdir())) == 24


def test_stage_builds_a_draft_that_vllm_accepts_tokens_from(
    data: DraftData, target: Path, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    manifest = build(
        target,
        draft,
        SPEC,
        language.prompts(SPEC.prompts),
        recipe_digest="sha256:0",
        inputs={"context": check(target).digest},
        workdir=data.workdir,
        progress=lambda _: None,
    )
    assert check(draft).digest == manifest.digest
    assert validate_draft(draft, json.loads((target / "config.json").read_text())) == []
    plan = Plan(
        ServeSpec(target),
        draft,
        language.heldout_items(2),
        tokens=(3,),
        concurrency=(1, 4),
        max_tokens=48,
        contexts=(512, 2048),
        long_prompts=[*language.long_items(1, 2), *language.long_items(4, 2)],
    )
    found = evaluate_draft(plan, manifest.metrics, lambda _: None)
    [run] = found.runs
    for cell in run.cells.values():
        assert cell.acceptance is not None
        assert cell.identity is not None
        assert len(cell.acceptance.per_position) == 3
        assert cell.acceptance.length > 1.5
        assert cell.acceptance.length == pytest.approx(1 + sum(cell.acceptance.per_position), abs=1e-6)
        assert cell.identity.identical >= 0.9 * cell.identity.of
        assert cell.identity.unexplained == 0
        assert cell.output_tokens > 100
    assert run.groups is not None
    assert set(run.groups.by_task) == set(language.TASKS)
    assert list(run.contexts) == list(found.without.contexts) == [512, 2048]
    assert run.contexts[2048].prompt_tokens > 1500 > run.contexts[512].prompt_tokens
    assert found.predictions[3].served == found.runs[0].cells[1].acceptance.length
    json.dumps(found.as_dict(), allow_nan=False)


def test_vllm_drafts_by_batch_as_the_settings_say_from_a_speculators_export(
    data: DraftData, target: Path, tmp_path: Path
) -> None:
    """Three tokens for one request at once, none for more, none behind a long prompt: the counters tell.
    The draft is the same as above, in the form of the speculators library, and is itself the model to serve:
    vLLM finds the target in its config."""
    trained = train(target, SPEC, data, lambda _: None)
    draft = tmp_path / "draft"
    export(draft, trained, target, recipe_digest="sha256:0", inputs={}, verifier=str(target))
    ranges = (
        SpeculationRange(max_concurrency=1, num_speculative_tokens=3),
        SpeculationRange(num_speculative_tokens=0),
    )
    prompts = language.heldout_items(3)
    spec = ServeSpec(draft, draft=draft, speculation=ranges, speculation_max_context=1024)
    with Server(spec, tmp_path / "server.log") as server:
        readings = [server.metrics()]
        for concurrency in (1, 8):
            ask(server.url, "model", prompts, max_tokens=48, concurrency=concurrency)
            readings.append(server.metrics())
        ask(server.url, "model", language.long_items(4, 2), max_tokens=24)
        beyond = acceptance_from_metrics(readings[-1], server.metrics())
    # The draft's own layer takes its part of the cache.
    capacity = served_capacity.reported(tmp_path / "server.log")
    assert capacity == pytest.approx(served_capacity.planned(target, draft), rel=0.05)
    assert capacity < 0.95 * served_capacity.planned(target)
    single = acceptance_from_metrics(readings[0], readings[1])
    drafted = [after[DRAFTED] - before[DRAFTED] for before, after in pairwise(readings)]
    assert single.length > 1.5
    assert drafted[1] < 0.25 * drafted[0]  # the last requests of a batch are alone again
    assert beyond.length < 1.1  # beyond the limit vLLM verifies zeros instead of drafts
