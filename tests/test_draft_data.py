"""Draft data before and after the engine: chat files, tokens, stored states, disk budget, what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from packager.cli.draft import command
from packager.draft.capture import CaptureJob, _affordable, _seed
from packager.draft.prepare import DraftData, prepare
from packager.draft.prompts import context_length, read_prompts, read_prompts_file, tokenize
from packager.draft.states_file import FILE_OVERHEAD, bytes_per_token, decode_states, encode_states
from packager.errors import BadInput, RemoteFailure
from packager.nano import CHECKPOINT, language
from packager.recipe import DraftSpec

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SPEC = DraftSpec(vocab_size=512, aux_layers=(1, 2, 3), prompts=48, max_response_tokens=64, steps=60)
ONE_RESPONSE = '{"index": 0, "states": "000000.safetensors", "prompt_ids": [5], "response_ids": [6, 2]}\n'
"""Two tokens of states: 4112 bytes and a header."""
ASK = [{"role": "user", "content": "Weight 40 kg. What is the dose?"}]


def _prompt(content: str, role: str = "user") -> dict[str, Any]:
    return {
        "id": "p",
        "messages": [{"role": role, "content": content}],
        "task": "t",
        "language": "en",
    }


# ---- chat files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": ASK},
        {"messages": [*ASK, {"role": "assistant", "content": "80 mg"}]},
        {"prompt": ASK[0]["content"]},
        {"prompt": ASK},
        {"conversations": [{"from": "human", "value": ASK[0]["content"]}, {"from": "gpt", "value": "80 mg"}]},
    ],
    ids=["messages", "finished", "text", "prompt of messages", "sharegpt"],
)
@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "array"])
def test_the_same_question_is_the_same_prompt_in_every_form(
    tmp_path: Path, chat: dict[str, Any], array: bool
) -> None:
    """With the same id, so that it is on the same side of the split."""
    file = tmp_path / "chats"
    file.write_text(json.dumps([chat, chat], indent=1) if array else json.dumps(chat))
    (found,) = read_prompts_file(file)
    assert found["messages"] == ASK
    assert found["id"] == read_prompts([json.dumps({"messages": ASK})], "x")[0]["id"]


def test_tags_are_kept_and_a_system_turn_and_tools_too() -> None:
    chat = {
        "conversations": [
            {"from": "system", "value": "detailed thinking off"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "observation", "value": "c"},
        ],
        "domain": "cardiology",
        "language": "zh",
    }
    (found,) = read_prompts([json.dumps(chat)], "x")
    assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant", "tool"]
    assert (found["task"], found["language"]) == ("cardiology", "zh")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no prompts"),
        ("[]", "holds no prompts"),
        ("[{", "not a JSON array"),
        ('["a"]', "chat 1 has no `messages`"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "the role 'alien' is none of"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "the role 'human' is none of"),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', "nobody asks"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "nobody asks"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "both texts"),
    ],
)
def test_chats_that_cannot_be_answered_are_named(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(text)
    with pytest.raises(BadInput, match=fault) as caught:
        read_prompts_file(file)
    assert caught.value.remedy


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read_prompts_file(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(BadInput, match="not UTF-8"):
        read_prompts_file(tmp_path / "latin.jsonl")


def test_the_split_is_a_function_of_the_id_alone() -> None:
    """Fixed values: a split that moved would let held-out prompts into training."""
    from packager.draft.states import HELD_OUT_SHARE, held_out

    found = [number for number in range(100) if held_out(f"prompt-{number:05d}")]
    assert found == [1, 2, 24, 35, 38]
    share = sum(held_out(str(number)) for number in range(20000)) / 20000
    assert share == pytest.approx(HELD_OUT_SHARE, abs=0.005)


def test_the_vocabulary_is_chosen_on_the_training_side_and_judged_on_the_other(tmp_path: Path) -> None:
    """A token of held-out responses alone is not covered, and lowers the coverage of its language only."""
    from packager.draft.stage import coverages, response_vocabulary
    from packager.draft.states import held_out

    rows, seen = [], {True: 0, False: 0}
    for index in range(200):
        held = held_out(f"p{index}")
        language = "zh" if seen[held] % 2 else "en"
        seen[held] += 1
        ids = [7, 8, 9, 60] if held and language == "zh" else [7, 8, 9, 9]
        rows.append(
            {"index": index, "id": f"p{index}", "task": "t", "language": language, "response_ids": ids}
        )
    assert seen[True] >= 4
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = response_vocabulary(DraftData(tmp_path, "x"), SPEC.model_copy(update={"vocab_size": 10}), 100)
    assert found.target_ids == tuple(range(10))
    assert coverages(rows, found) == {
        "coverage": {"language": {"en": 1.0, "zh": 1.0}, "task": {"t": 1.0}},
        "held_out_coverage": {
            "language": {"en": 1.0, "zh": 0.75},
            "task": {"t": 1 - (seen[True] // 2) / (4 * seen[True])},
        },
    }


# ---- tokens -----------------------------------------------------------------------------------------------


def test_prompts_are_what_the_chat_template_makes_of_them() -> None:
    from transformers import AutoTokenizer

    found = tokenize([_prompt("Weight 40 kg.")], CHECKPOINT, length=512, vocabulary=2048)
    text = AutoTokenizer.from_pretrained(CHECKPOINT).decode(found.prompts[0]["prompt_ids"])
    assert text == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Weight 40 kg.<|role_end|>"
        "<role>ASSISTANT</role>"
    )


def test_one_enormous_sample_is_skipped_and_alone_it_is_an_error() -> None:
    huge, small = _prompt("kg " * 5000), _prompt("kg")
    found = tokenize([huge, small], CHECKPOINT, length=512, vocabulary=2048)
    assert [prompt["messages"] for prompt in found.prompts] == [small["messages"]]
    assert found.too_long[0] > 5000
    with pytest.raises(BadInput, match="no prompt leaves room for a response"):
        tokenize([huge], CHECKPOINT, length=512, vocabulary=2048)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(BadInput, match="beyond the target's vocabulary of 100"):
        tokenize([_prompt("kg")], CHECKPOINT, length=512, vocabulary=100)


def _tokenizer(directory: Path, template: str | None) -> Path:
    """The nano's tokenizer with another chat template."""
    directory.mkdir()
    shutil.copy(CHECKPOINT / "tokenizer.json", directory)
    settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template} if template else {}
    if not template:
        del settings["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "fails on prompt p: roles must alternate"),
        ("{{ messages[0].text.strip() }}", "fails on prompt p"),
        ("{% for m in messages %}{% if m.role == 'HUMAN' %}{{ m.content }}{% endif %}{% endfor %}?", "drops"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path: Path, template: str | None, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        tokenize([_prompt("kg")], _tokenizer(tmp_path / "t", template), length=512, vocabulary=2048)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    with pytest.raises(BadInput, match="no tokenizer"):
        tokenize([_prompt("kg")], tmp_path, length=512, vocabulary=2048)


def test_the_context_is_the_least_of_all_limits(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 2048}
    assert context_length(CHECKPOINT, config, {}) == 512
    assert context_length(CHECKPOINT, config, {"max_model_len": 300}) == 300
    assert context_length(tmp_path, config, {}) == 2048


# ---- states on disk ---------------------------------------------------------------------------------------


def test_fp8_states_keep_within_the_bound_of_their_format() -> None:
    """Layers of magnitudes from 1e-3 to 1e3, and one dimension that dwarfs the others, as in real streams."""
    states = torch.randn(64, 4, 256, generator=torch.Generator().manual_seed(0))
    states = states * torch.tensor([1e-3, 1.0, 30.0, 1e3]).view(1, 4, 1)
    states[:, :, 7] *= 200
    states[3, 1] = 0
    states = states.bfloat16()
    tensors = encode_states(states, "float8")
    back, true = decode_states(tensors).double(), states.double()
    assert tensors["hidden_states"].dtype == torch.float8_e4m3fn
    scale = true.abs().amax(-1, keepdim=True) / 448
    bound = torch.maximum(true.abs() * 2**-4, scale * 2**-10) + true.abs() * 2**-8  # and BF16's own rounding
    assert ((back - true).abs() <= bound * (1 + 1e-6)).all()
    error = (back - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-30)
    assert float(error.max()) < 0.04
    assert torch.equal(decode_states(encode_states(states, "bfloat16")), states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_the_size_said_is_the_size_written(tmp_path: Path, dtype: Any) -> None:
    from safetensors.torch import save_file

    sizes = []
    for tokens in (10, 300):
        tensors = encode_states(torch.randn(tokens, 4, 256), dtype)
        tensors["token_ids"] = torch.arange(tokens)
        save_file(tensors, tmp_path / "states")
        sizes.append((tmp_path / "states").stat().st_size)
        assert 0 < sizes[-1] - tokens * bytes_per_token(4, 256, dtype) <= FILE_OVERHEAD
    assert bytes_per_token(4, 4096, "bfloat16") == 32 * 1024 + 8
    assert bytes_per_token(4, 4096, "float8") == 16 * 1024 + 24


def test_fp8_without_its_scales_is_not_read() -> None:
    tensors = encode_states(torch.randn(3, 4, 8), "float8")
    scales = tensors.pop("scales")
    with pytest.raises(ValueError, match="without scales"):
        decode_states(tensors)
    with pytest.raises(ValueError, match="scales of shape"):
        decode_states({**tensors, "scales": scales[:2]})


# ---- disk budget ------------------------------------------------------------------------------------------


def _job(budget: int | None) -> CaptureJob:
    return CaptureJob(
        target="t",
        prompts="p",
        responses="r",
        states="s",
        layers=(1, 2),
        max_response_tokens=20,
        bytes_per_token=10,
        max_states_bytes=budget,
    )


def test_requests_start_only_if_the_budget_holds_them_at_their_longest() -> None:
    records = [{"index": n, "prompt_ids": [0] * size} for n, size in enumerate((30, 80, 30))]
    first = 10 * (30 + 20) + FILE_OVERHEAD
    second = 10 * 100 + FILE_OVERHEAD  # the context of 100 cuts its response off at once
    for budget, used, expected in (
        (None, 10**9, 3),
        (first, 0, 1),
        (first, 1, 0),
        (first + second - 1, 0, 1),  # and the third, which would fit, is not preferred
        (first + second, 0, 2),
        (2 * first + second, 0, 3),
    ):
        assert len(_affordable(_job(budget), records, 100, used)) == expected, (budget, used)


def test_each_response_is_drawn_from_a_seed_of_its_own() -> None:
    """Fixed by the run's seed and the prompt's id: neither the order of prompts nor a kill changes it."""
    job = _job(None)
    other = job.model_copy(update={"response_seed": 1})
    seeds = {_seed(j, {"id": f"p{n}"}) for j in (job, other) for n in range(100)}
    assert len(seeds) == 200
    assert _seed(job, {"id": "p0", "index": 5}) == _seed(job, {"id": "p0"}) == 1150315936


def test_a_budget_that_holds_no_response_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"max_states_bytes": 100_000})
    lines: list[str] = []
    with pytest.raises(BadInput, match="the budget is 100000"):
        prepare(CHECKPOINT, spec, language.prompts(48), tmp_path / "work", lines.append)
    assert any("2.0 KiB a token in bfloat16" in line and "GB in all" in line for line in lines)


def test_more_than_the_disk_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 400_000))
    with pytest.raises(BadInput, match="GB free"):
        prepare(CHECKPOINT, SPEC, language.prompts(48), tmp_path / "work", lambda _: None)


# ---- the engine, and the work directory -------------------------------------------------------------------


def test_an_engine_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    """A real child process, which finds its job unreadable."""
    from packager.draft.prepare import _run_child

    (tmp_path / "job.json").write_text('{"target": "somewhere"}')
    with pytest.raises(RemoteFailure, match=r"(?s)died with exit code 1.*Field required") as caught:
        _run_child(tmp_path / "job.json", tmp_path / "capture.log", 0, lambda _: None, lambda: None)
    assert str(tmp_path / "capture.log") in caught.value.remedy


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="no vllm")
def test_vllm_that_dies_leaves_a_work_directory_to_go_on_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a disk smaller than the responses might need is enough within a budget."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 400_000))
    spec = SPEC.model_copy(update={"max_states_bytes": 399_000})
    lines: list[str] = []
    with pytest.raises(RemoteFailure, match="the engine that serves the target died") as caught:
        prepare(CHECKPOINT, spec, language.prompts(48), tmp_path / "work", lines.append, engine={"dtype": 1})
    assert "dtype" in caught.value.message
    assert any("the budget is" in line for line in lines)
    assert not (tmp_path / "work" / "complete").exists()


def test_a_changed_target_takes_responses_anew(tmp_path: Path) -> None:
    """The states of the target before are deleted, and said to be."""
    target = tmp_path / "target"
    shutil.copytree(CHECKPOINT, target)
    spec = SPEC.model_copy(update={"max_states_bytes": 1000})  # stops before the engine
    work = tmp_path / "work"
    with pytest.raises(BadInput):
        prepare(target, spec, language.prompts(4), work, lambda _: None)
    (work / "states" / "000000.safetensors").write_bytes(b"old")
    (work / "responses.jsonl").write_text('{"index": 0, "states": "000000.safetensors"}\n')
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    lines: list[str] = []
    with pytest.raises(BadInput):
        prepare(target, spec, language.prompts(4), work, lines.append)
    assert any("the target, the prompts or the sampling changed" in line for line in lines)
    assert not list((work / "states").iterdir())
    assert not (work / "responses.jsonl").exists()


def test_sampling_is_part_of_what_responses_are_taken_for(tmp_path: Path) -> None:
    """Greedy has no seed; a temperature, its seed and the states' dtype each make other data."""
    prompts, marks = language.prompts(4), []
    for number, change in enumerate(
        (
            {},
            {"response_seed": 5, "top_p": 0.5},
            {"temperature": 0.7},
            {"temperature": 0.7, "response_seed": 5},
            {"states_dtype": "float8"},
        )
    ):
        work = tmp_path / str(number)
        spec = SPEC.model_copy(update={"max_states_bytes": 1000, **change})
        with pytest.raises(BadInput, match="the budget is 1000"):
            prepare(CHECKPOINT, spec, prompts, work, lambda _: None)
        marks.append((work / "prepared_for").read_text())
    assert marks[0] == marks[1]
    assert len(set(marks)) == 4


def test_states_beyond_a_lowered_budget_are_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    spec = SPEC.model_copy(update={"max_states_bytes": 1000})
    with pytest.raises(BadInput):
        prepare(CHECKPOINT, spec, language.prompts(4), work, lambda _: None)
    (work / "states" / "000000.safetensors").write_bytes(b"x" * 5000)
    (work / "responses.jsonl").write_text(ONE_RESPONSE)
    with pytest.raises(BadInput, match="take 5000 bytes, the budget is 1000"):
        prepare(CHECKPOINT, spec, language.prompts(4), work, lambda _: None)


def test_nothing_is_done_again_within_the_same_budget(tmp_path: Path) -> None:
    work = tmp_path / "work"
    spec = SPEC.model_copy(update={"max_states_bytes": 6000})
    with pytest.raises(BadInput):
        prepare(CHECKPOINT, spec, language.prompts(4), work, lambda _: None)
    (work / "states" / "000000.safetensors").write_bytes(b"x" * 5000)
    (work / "responses.jsonl").write_text(ONE_RESPONSE)
    (work / "complete").write_text('{"stopped_at_bytes": 6000}')
    found = prepare(CHECKPOINT, spec, language.prompts(4), work, lambda _: None)
    assert len(found.records()) == 1


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_response_without_whole_states_is_taken_again(tmp_path: Path, damage: str) -> None:
    """Alone; the budget stops this before an engine starts."""
    work = tmp_path / "work"
    spec = SPEC.model_copy(update={"max_states_bytes": 6000})
    with pytest.raises(BadInput):
        prepare(CHECKPOINT, spec, language.prompts(4), work, lambda _: None)
    if damage == "truncated":
        (work / "states" / "000000.safetensors").write_bytes(b"x" * 3000)
    (work / "responses.jsonl").write_text(ONE_RESPONSE)
    (work / "complete").write_text('{"stopped_at_bytes": null}')
    lines: list[str] = []
    with pytest.raises(BadInput, match="the budget is 6000"):
        prepare(CHECKPOINT, spec, language.prompts(4), work, lines.append)
    assert "draft: 1 responses without whole states are taken again" in lines
    assert not (work / "complete").exists()


def test_states_without_a_proof_say_so(tmp_path: Path) -> None:
    found = DraftData(tmp_path, "x").layer_proof
    assert (found["proved"], "not compared" in found["reason"]) == (False, True)


def test_the_prepare_verb_offers_what_the_recipe_has() -> None:
    result = CliRunner().invoke(command, ["prepare", "--help"])
    for option in ("temperature", "top-p", "response-seed", "states-dtype", "max-states-bytes"):
        assert f"--{option}" in result.stdout
