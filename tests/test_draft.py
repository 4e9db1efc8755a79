"""The EAGLE3 draft: its head, vocabulary, training, export and acceptance, on small data made here.

What needs a real target and engine is in test_draft_engine.py.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from draft_data import HIDDEN, SPEC, TARGET, VOCAB, YARN, write_data, write_target

from packager.artifact import check
from packager.cli.draft import command
from packager.draft.acceptance import acceptance_from_metrics
from packager.draft.config import draft_config
from packager.draft.prepare import DraftData, prepare
from packager.draft.prompts import read_prompts
from packager.draft.stage import TRAINING_STATE, train
from packager.draft.vocabulary import VocabularyMap, choose_vocabulary, coverage
from packager.errors import BadInput

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path: Path, target: Path) -> DraftData:
    return write_data(tmp_path / "work", target)


@pytest.mark.slow
@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain rope", "yarn"])
def test_head_computes_what_speculators_model_computes(rope_scaling: dict[str, Any] | None) -> None:
    """Same weights, same sample: equal logits at every response position of every training-time-test step."""
    eagle3 = pytest.importorskip("speculators.models.eagle3")
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    from packager.draft.head import DraftBatch, Eagle3Head

    config = draft_config(TARGET | {"rope_scaling": rope_scaling}, SPEC)
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(VOCAB, HIDDEN, generator=generator)
    ours = Eagle3Head(config, embeddings)
    ours.initialise(0, torch.randn(SPEC.vocab_size, HIDDEN, generator=generator) * 0.1, torch.ones(HIDDEN))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)

    llama = LlamaConfig(
        **{
            key: config[key]
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "rms_norm_eps",
                "max_position_embeddings",
                "rope_parameters",
            )
        }
    )
    llama._attn_implementation = "eager"
    theirs = eagle3.Eagle3DraftModel(
        eagle3.Eagle3SpeculatorConfig(
            transformer_layer_config=llama,
            draft_vocab_size=SPEC.vocab_size,
            norm_before_residual=False,
            eagle_aux_hidden_state_layer_ids=list(SPEC.aux_layers),
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
            ),
        )
    )
    state = {name.replace("midlayer.", "layers.0."): value for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith(("layers", "fc", "norm", "lm_head"))]
    theirs.embed_tokens.weight.data.copy_(embeddings)

    ids = torch.randint(0, VOCAB, (40,), generator=generator)
    states = torch.randn(39, 3 * HIDDEN, generator=generator)
    prompt, steps = 25, 3
    queries = len(ids) - prompt - 1
    places = torch.arange(prompt - 1, prompt - 1 + queries)
    padded = torch.cat((ids, torch.zeros(steps, dtype=torch.long)))
    batch = DraftBatch(
        keys=ids[None, 1:-1],
        states=states[None, :-1],
        row=torch.zeros(queries, dtype=torch.long),
        place=places,
        slot=torch.arange(queries),
        tokens=torch.stack([padded[place + 1 : place + 2 + steps] for place in places.tolist()]),
        last=torch.zeros(queries, HIDDEN),
    )
    captured: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
    with torch.no_grad():
        mine = ours(batch, steps)
        theirs(
            hidden_states=states[None],
            input_ids=ids[None, 1:],
            document_ids=torch.zeros(1, 39, dtype=torch.long),
            ttt_steps=steps,
        )
    for step in range(steps):
        valid = queries - step
        expected = captured[step][0, prompt - 1 : prompt - 1 + valid]
        assert torch.allclose(mine[step][:valid], expected, atol=1e-4), f"step {step}"


def test_a_sample_gets_the_same_logits_alone_and_in_a_batch(data: DraftData, target: Path) -> None:
    from packager.draft.head import Eagle3Head
    from packager.draft.states import collate, samples

    found = samples(data.records(), data.states)[:6]
    embeddings = load_file(target / "model.safetensors")["model.word_embeddings.weight"].float()
    head = Eagle3Head(draft_config(TARGET, SPEC), embeddings)
    head.initialise(0, embeddings[: SPEC.vocab_size], torch.ones(HIDDEN))
    with torch.no_grad():
        together = head(collate(found, aux=3, hidden=HIDDEN, steps=3), 3)
        begin = 0
        for sample in found:
            alone = head(collate([sample], aux=3, hidden=HIDDEN, steps=3), 3)
            for step in range(3):
                part = together[step][begin : begin + sample.queries]
                assert torch.allclose(part, alone[step][: sample.queries], atol=1e-4), (
                    f"step {step} of {sample.path.name}"
                )
            begin += sample.queries


@pytest.mark.slow
def test_loss_is_speculators_kl_up_to_the_targets_own_entropy(data: DraftData, target: Path) -> None:
    losses = pytest.importorskip("speculators.losses.eager")
    from packager.draft.loss import Target, draft_loss
    from packager.draft.states import collate, samples

    sample = samples(data.records()[:1], data.states)
    batch = collate(sample, aux=3, hidden=HIDDEN, steps=1)
    logits = torch.randn(len(batch.tokens), VOCAB)
    weights = load_file(target / "model.safetensors")
    rows = weights["lm_head.weight"].float()
    found, _ = draft_loss([logits], batch, Target(rows, rows, torch.ones(HIDDEN), 1e-6), torch.arange(VOCAB))
    last = batch.last.float()
    goal = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6) @ rows.T
    entropy = -(goal.softmax(-1) * goal.log_softmax(-1)).sum(-1)
    real = batch.tokens[:, 1] >= 0  # the rest fills the batch up to its shape
    expected = (losses.kl_div_loss(logits, goal) + entropy)[real].mean()
    assert torch.allclose(found, expected, rtol=1e-4)


# ---- vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vocabulary_map_is_the_one_speculators_builds() -> None:
    mapping = pytest.importorskip("speculators.train.vocab_mapping")
    rng = random.Random(5)
    counts = Counter(rng.choices(range(200), weights=[1 / (n + 1) for n in range(200)], k=3000))
    d2t, t2d = mapping.build_vocab_mappings_from_distribution(dict(counts), 64, 200)
    found = choose_vocabulary(counts, 64, 200)
    assert found.offsets == d2t.tolist()
    assert found.reachable == t2d.tolist()


def test_free_places_of_the_vocabulary_are_filled_without_repeats() -> None:
    found = choose_vocabulary({7: 5, 3: 1}, 6, 10)
    assert found.target_ids == (0, 1, 2, 3, 4, 7)
    assert [draft + offset for draft, offset in enumerate(found.offsets)] == list(found.target_ids)


def test_coverage_counts_tokens_not_kinds() -> None:
    records = [
        {"language": "en", "response_ids": [1, 1, 1, 9]},
        {"language": "zh", "response_ids": [9, 9]},
    ]
    assert coverage(records, VocabularyMap((1, 2), 10), "language") == {"en": 0.75, "zh": 0.0}


@pytest.mark.parametrize(
    ("counts", "size", "fault"),
    [({}, 4, "no response tokens"), ({50: 1}, 4, "token 50"), ({1: 1}, 99, "larger than")],
)
def test_vocabulary_faults_are_named(counts: dict[int, int], size: int, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        choose_vocabulary(counts, size, 10)


# ---- training ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_a_deterministic_language(data: DraftData, target: Path) -> None:
    before = train(target, SPEC.model_copy(update={"steps": 1}), data, lambda _: None).predicted
    (data.workdir / TRAINING_STATE).unlink()
    after = train(target, SPEC, data, lambda _: None)
    assert after.predicted.drafts > 10, "too few held-out drafts to judge"
    assert before.length < 2.0
    assert after.predicted.length > 2.7
    assert list(after.predicted.per_position) == sorted(after.predicted.per_position, reverse=True)
    assert after.metrics["coverage"]["language"] == {"en": 1.0, "zh": 1.0}
    sealed = after.metrics["predicted_acceptance"]
    assert list(sealed["by_tokens"]) == ["1", "2", "3"]
    assert sealed["by_tokens"]["3"] == sealed["per_position"]
    assert sealed["by_task"] == {"chain": sealed["by_tokens"]}
    lengths = [1 + sum(rates) for rates in sealed["by_tokens"].values()]
    assert lengths == sorted(lengths), "a longer draft yields no fewer tokens"


def test_predicted_acceptance_walks_as_serving_does(data: DraftData) -> None:
    """A response of eight tokens: a draft of three all right, then none, then one before the end."""
    from packager.draft.loss import count_accepted
    from packager.draft.states import collate, samples

    sample = next(s for s in samples(data.records(), data.states) if s.queries == 7)
    batch = collate([sample], aux=3, hidden=HIDDEN, steps=3)
    hits = {0: 3, 4: 0, 5: 1}  # verified behind tokens 0, 4 and 5; others are never drafted from
    right = [
        torch.tensor([hits.get(slot, 3 if slot % 2 else 0) > step for slot in range(len(batch.slot))])
        for step in range(3)
    ]
    counts, drafts = count_accepted(batch, right)
    assert (counts, drafts) == ([2, 1, 1], 3)
    # Of one token each: verified behind 0, 2 (even: wrong), 3, 5 and, past the right one, no further label.
    assert count_accepted(batch, right[:1]) == ([3], 4)


@pytest.mark.slow
def test_another_seed_starts_anew(data: DraftData, target: Path) -> None:
    short = SPEC.model_copy(update={"steps": 4})
    train(target, short, data, lambda _: None)
    lines: list[str] = []
    train(target, short.model_copy(update={"seed": 2}), data, lines.append)
    assert not any("goes on" in line for line in lines)


def _truncate(data: DraftData) -> None:
    path = data.states / "000003.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _other_tokens(data: DraftData) -> None:
    content = load_file(data.states / "000003.safetensors")
    content["token_ids"] = content["token_ids"] + 1
    save_file(content, data.states / "000003.safetensors")


def _other_width(data: DraftData) -> None:
    content = load_file(data.states / "000003.safetensors")
    content["hidden_states"] = content["hidden_states"][..., :32].contiguous()
    save_file(content, data.states / "000003.safetensors")


def _no_file(data: DraftData) -> None:
    (data.states / "000003.safetensors").unlink()


@pytest.mark.parametrize("damage", [_truncate, _other_tokens, _other_width, _no_file])
def test_damaged_states_are_named(damage: Any, data: DraftData, target: Path) -> None:
    damage(data)
    with pytest.raises(BadInput, match=r"000003\.safetensors"):
        train(target, SPEC, data, lambda _: None)


def test_states_of_another_target_are_refused(data: DraftData, target: Path) -> None:
    (target / "config.json").write_text(json.dumps(TARGET | {"rope_theta": 5000.0}))
    with pytest.raises(BadInput, match="not the one the hidden states were taken from"):
        train(target, SPEC, data, lambda _: None)


def test_a_torn_last_response_line_counts_for_nothing(data: DraftData) -> None:
    with data.responses.open("a") as out:
        out.write('{"index": 64, "id": "p64", "respo')
    assert len(data.records()) == 64


# ---- export and validator ---------------------------------------------------------------------------------


def test_prompts_are_read_once_each_and_finished_chats_are_answered_anew() -> None:
    chat = [{"role": "user", "content": "a"}]
    lines = [
        json.dumps({"id": "x", "messages": chat, "language": "en"}),
        "",
        json.dumps({"messages": [*chat, {"role": "assistant", "content": "b"}]}),
    ]
    found = read_prompts(lines, "file")
    assert [(prompt["id"], prompt["messages"], prompt["language"]) for prompt in found] == [("x", chat, "en")]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "hello"}', "no `messages`"),
        ('{"messages": [{"role": "user"}]}', "no `messages`"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "nobody asks"),
        ("", "no prompts"),
    ],
)
def test_bad_prompts_are_named(line: str, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        read_prompts([line], "prompts.jsonl")


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (0, 1, 2), (1, 2, 5)])
def test_impossible_aux_layers_are_refused_before_an_engine_starts(
    target: Path, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    spec = SPEC.model_copy(update={"aux_layers": layers})
    prompts = [{"id": "a", "messages": [], "task": "t", "language": "en"}]
    with pytest.raises(BadInput, match="aux layers"):
        prepare(target, spec, prompts, tmp_path / "work", lambda _: None)
    assert not (tmp_path / "work").exists()


def test_preparing_needs_a_checkpoint_and_prompts(target: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        prepare(tmp_path / "nothing", SPEC, [{}], tmp_path / "work", lambda _: None)
    with pytest.raises(BadInput, match="no prompts"):
        prepare(target, SPEC, [], tmp_path / "work", lambda _: None)


# ---- acceptance -------------------------------------------------------------------------------------------


def test_acceptance_comes_from_the_growth_of_the_counters() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    before = {
        "vllm:spec_decode_num_drafts": 10.0,
        "vllm:spec_decode_num_accepted_tokens": 12.0,
        f"{name}:0": 8.0,
    }
    after = {
        "vllm:spec_decode_num_drafts": 110.0,
        "vllm:spec_decode_num_accepted_tokens": 192.0,
        f"{name}:0": 88.0,
        f"{name}:1": 60.0,
        f"{name}:2": 40.0,
    }
    report = acceptance_from_metrics(before, after)
    assert (report.drafts, report.accepted) == (100, 180)
    assert report.length == pytest.approx(2.8)
    assert report.per_position == pytest.approx((0.8, 0.6, 0.4))
    assert sum(report.per_position) == pytest.approx(report.length - 1)


@pytest.mark.parametrize(
    "after", [{}, {"vllm:spec_decode_num_drafts": 0.0, "vllm:spec_decode_num_accepted_tokens": 0.0}]
)
def test_a_server_that_drafts_nothing_is_not_measured(after: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        acceptance_from_metrics({}, after)


# ---- command line -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_and_export_verbs_give_json(data: DraftData, target: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = [str(target), str(data.workdir)]
    trained = runner.invoke(command, ["train", *arguments, "--json"], catch_exceptions=False)
    assert json.loads(trained.stdout)["steps"] == SPEC.steps
    result = runner.invoke(
        command, ["export", *arguments, str(tmp_path / "out"), "--json"], catch_exceptions=False
    )
    assert json.loads(result.stdout)["digest"] == check(tmp_path / "out").digest
    checked = runner.invoke(
        command, ["evaluate", str(target), str(tmp_path / "out"), "--check-only", "--json"]
    )
    assert (checked.exit_code, json.loads(checked.stdout)["problems"]) == (0, [])


def test_export_without_training_is_refused(data: DraftData, target: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["export", str(target), str(data.workdir), str(tmp_path / "out")])
    assert isinstance(result.exception, BadInput)
    assert not (tmp_path / "out").exists()
