"""Training of the EAGLE3 head: resume, processes, losses, window, early stop, on small data made here."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from draft_data import HIDDEN, SPEC, TARGET, VOCAB, write_data, write_target

from packager.cli.draft import command
from packager.draft.config import draft_config
from packager.draft.curve import LOG_NAME, TrainingLog, read_log, training_svg
from packager.draft.prepare import DraftData
from packager.draft.stage import TRAINING_STATE, train
from packager.draft.validator import validate_draft
from packager.draft.vocabulary import VocabularyMap
from packager.errors import BadInput, UsageProblem

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path: Path, target: Path) -> DraftData:
    return write_data(tmp_path / "work", target)


def _trainer(target: Path, tmp_path: Path, **options: Any) -> Any:
    from packager.draft.loss import Target
    from packager.draft.train import Trainer

    tensors = load_file(target / "model.safetensors")
    vocabulary = VocabularyMap(tuple(range(SPEC.vocab_size)), VOCAB)
    weights = Target(
        tensors["model.word_embeddings.weight"].float(),
        tensors["lm_head.weight"][: SPEC.vocab_size].float(),
        tensors["model.norm.weight"].float(),
        1e-6,
    )
    spec = SPEC.model_copy(update=options.pop("spec", {}))
    return Trainer(
        draft_config(TARGET, spec),
        weights,
        vocabulary,
        spec,
        tmp_path / TRAINING_STATE,
        bf16=False,
        **options,
    )


# ---- interruptions ----------------------------------------------------------------------------------------

_TRAIN = """
import sys
from pathlib import Path
from packager.draft.prepare import DraftData, target_digest
from packager.draft.stage import train
from packager.recipe import DraftSpec
work, target = Path(sys.argv[1]), Path(sys.argv[2])
spec = DraftSpec.model_validate_json((work / "spec.json").read_text())
train(target, spec, DraftData(work, target_digest(target)), lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, data: DraftData, target: Path
) -> None:
    """As often as PACKAGER_KILLS says: 10 take two minutes."""
    wanted = int(os.environ.get("PACKAGER_KILLS", "3"))
    spec = SPEC.model_copy(
        update={"steps": 40 * wanted, "checkpoint_every": 5, "evaluate_every": 20, "optimizer": "muon"}
    )
    (data.workdir / "spec.json").write_text(spec.model_dump_json())
    twin = tmp_path / "twin"
    shutil.copytree(data.workdir, twin)

    def start(work: Path) -> tuple[subprocess.Popen[str], float]:
        """The training, and when it began to train."""
        child = subprocess.Popen(
            [sys.executable, "-c", _TRAIN, str(work), str(target)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for line in child.stdout:
            if "training on" in line:
                break
        return child, time.monotonic()

    child, began = start(twin)
    assert child.communicate()[0]
    assert child.returncode == 0
    whole = time.monotonic() - began

    kills, resumed = 0, False
    rng = random.Random(time.monotonic_ns())  # any moment will do; the claim holds for all of them
    for _ in range(wanted):
        child, _ = start(data.workdir)
        time.sleep(rng.uniform(0, whole / wanted))
        child.send_signal(signal.SIGKILL)
        resumed |= "goes on from step" in child.communicate()[0]
        kills += child.returncode == -signal.SIGKILL
    assert kills, "the training was over before it could be killed"
    child, _ = start(data.workdir)
    resumed |= "goes on from step" in child.communicate()[0]
    assert child.returncode == 0
    assert resumed, "no run found a checkpoint of the one before"
    for name in (TRAINING_STATE, LOG_NAME):
        assert (data.workdir / name).read_bytes() == (twin / name).read_bytes(), name


def test_what_a_killed_run_logged_beyond_its_checkpoint_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = TrainingLog(path)
    log.open_after(2)
    log.write({"step": 3, "loss": 1.5})
    log.close()
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def test_equal_logs_give_equal_pictures_that_show_them() -> None:
    rows = [{"step": n, "loss": 4 / n, "length": 1 + n / 50} for n in range(1, 41)]
    rows[-1]["held_out"] = {"length": 1.9}  # type: ignore[assignment]
    picture = training_svg(rows)
    assert picture == training_svg(rows)
    assert picture.startswith(b"<?xml")
    assert b"held out" in picture
    assert picture != training_svg(rows[:-1])


# ---- several processes ------------------------------------------------------------------------------------


def _torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    return subprocess.run(
        [*launcher, *meeting, "-m", "packager", "draft", "train", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _assert_same_losses(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-3), f"step {row['step']}"


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_from_one_anothers_checkpoints(
    tmp_path: Path, data: DraftData, target: Path
) -> None:
    """Same loss at every step within the rounding of BF16 products; one process speaks and writes."""
    one, two, half = data.workdir, tmp_path / "two", tmp_path / "half"
    for copy in (two, half):
        shutil.copytree(one, copy)
    spec = SPEC.model_copy(
        update={"steps": 30, "evaluate_every": 10, "checkpoint_every": 10}
        | {"optimizer": "muon", "learning_rate": 1e-2}
    )
    alone = train(target, spec, data, lambda _: None)
    options = ["--steps", "30", "--evaluate-every", "10", "--checkpoint-every", "10"]
    options += ["--optimizer", "muon", "--learning-rate", "1e-2", "--json"]
    done = _torchrun(2, str(target), str(two), *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one document: the second process prints none
    assert document["parameters"] == alone.metrics["parameters"]
    assert document["predicted_acceptance"]["drafts"] > 0

    rows, ours = read_log(two / LOG_NAME), read_log(one / LOG_NAME)
    assert [row["step"] for row in rows] == list(range(1, 31))
    _assert_same_losses(rows, ours)
    assert rows[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-5)
    assert ours[-1]["loss"] < 0.7 * ours[0]["loss"], "too little was learned to tell a difference"
    mine, theirs = load_file(one / TRAINING_STATE), load_file(two / TRAINING_STATE)
    assert {name: value.shape for name, value in theirs.items()} == {n: v.shape for n, v in mine.items()}

    # A checkpoint of one process, of a run that was stopped, found by two.
    def stop(now: Any) -> None:
        if now.done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(target, spec, DraftData(half, data.target), lambda _: None, on_step=stop)
    done = _torchrun(2, str(target), str(half), *options)
    assert done.returncode == 0, done.stderr
    assert "goes on from step 10" in done.stderr
    _assert_same_losses(read_log(half / LOG_NAME), ours)

    # A checkpoint of two processes, found by one: it has nothing left to train.
    lines: list[str] = []
    again = train(target, spec, DraftData(two, data.target), lines.append)
    assert any("goes on from step 30" in line for line in lines)
    assert again.predicted.length == pytest.approx(document["predicted_acceptance"]["length"], abs=0.02)


def test_a_process_without_a_sample_computes_one_without_labels(
    data: DraftData, target: Path, tmp_path: Path
) -> None:
    from packager.draft.ranks import Ranks
    from packager.draft.states import samples

    found = samples(data.records(), data.states)[:3]
    cpu = torch.device("cpu")
    parts = [
        _trainer(target, tmp_path, ranks=Ranks(cpu, rank, 2))._read(found[:count], 3)
        for count in (3, 1)
        for rank in (0, 1)
    ]
    labels = [int((part.tokens[:, 1] >= 0).sum()) for part in parts]
    queries = [sample.queries for sample in found]
    assert labels == [queries[0] + queries[2], queries[1], queries[0], 0]


def test_gradients_of_parts_are_those_of_the_whole(data: DraftData, target: Path, tmp_path: Path) -> None:
    """One batch, and the same samples in three parts of unequal size, one of them without labels."""
    from packager.draft.states import collate, samples

    found = samples(data.records(), data.states)[:7]

    def read(group: Any) -> Any:
        return collate(group, aux=3, hidden=HIDDEN, steps=SPEC.ttt_steps)

    blank = read(found[:2])
    blank.tokens.fill_(-1)
    whole, parts = _trainer(target, tmp_path), _trainer(target, tmp_path)
    once = whole.step([read(found)])
    thrice = parts.step([read(found[:1]), read(found[1:]), blank])
    assert thrice.loss == pytest.approx(once.loss, rel=1e-5)
    assert (thrice.counts, thrice.drafts) == (once.counts, once.drafts)
    for mine, theirs in zip(whole.head.parameters(), parts.head.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradients_are_those_of_autograd(dtype: torch.dtype) -> None:
    from packager.bailing.model import RMSNorm
    from packager.draft.head import Norm

    generator = torch.Generator().manual_seed(2)
    values, towards = (torch.randn(5, 7, 24, generator=generator).to(dtype) for _ in range(2))
    found = []
    for kind in (RMSNorm, Norm):
        norm = kind(24, 1e-5)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 24))
        x = values.clone().requires_grad_()
        out = norm(x)
        (out * towards).sum().backward()
        found.append((out, x.grad, norm.weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for autograd, ours in zip(*found, strict=True):
        assert autograd.dtype == ours.dtype
        assert torch.allclose(autograd, ours, rtol=tolerance, atol=tolerance)


# ---- losses -----------------------------------------------------------------------------------------------

_THEIRS = {
    "hard": "ce",
    "kl": "kl_div",
    "reverse_kl": "rkl",
    "js": "jsd",
    "tv": "tv",
    "nla": "nla",
    "lk_hybrid": "lk_hybrid",
}


@pytest.mark.slow
def test_losses_are_speculators_on_the_same_logits(data: DraftData, target: Path) -> None:
    """Whole loss of three steps: theirs sums exponentially decayed means, ours divides by the weights."""
    metrics = pytest.importorskip("speculators.models.eagle3.metrics")
    from speculators.losses import resolve_loss_config

    from packager.draft.loss import STEP_DECAY, Target, draft_loss
    from packager.draft.states import collate, samples

    sample = samples(data.records()[:1], data.states)[0]
    steps, queries = 3, sample.queries
    batch = collate([sample], aux=3, hidden=HIDDEN, steps=steps)
    rows = load_file(target / "model.safetensors")["lm_head.weight"].float()
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(len(batch.tokens), VOCAB, generator=generator) for _ in range(steps)]
    last = batch.last[:queries].float()
    goal = (last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6) @ rows.T)[None]
    assert goal[0].argmax(-1).tolist() == list(sample.ids[sample.prompt + 1 :])  # greedy: what `ce` assumes
    for ours, theirs in _THEIRS.items():
        expected = sum(
            metrics.compute_metrics(
                logits[step][None, :queries],
                goal,
                torch.ones(1, queries, dtype=torch.bool),
                torch.ones(1, queries, dtype=torch.bool),
                step,
                STEP_DECAY,
                loss_config=resolve_loss_config(theirs, "eager"),
            )[0]
            for step in range(steps)
        )
        found, _ = draft_loss(
            logits, batch, Target(rows, rows, torch.ones(HIDDEN), 1e-6), torch.arange(VOCAB), kind=ours
        )
        weights = sum(STEP_DECAY**step for step in range(steps))
        assert torch.allclose(found * weights, expected, rtol=1e-4), ours


# ---- window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 16])
def test_each_step_attends_to_its_window_as_serving_does(window: int | None) -> None:
    """Against a plain decoder that appends one key a step and looks at the last of them."""
    import torch.nn.functional as F

    from packager.bailing.model import rotary_tables
    from packager.draft.head import DraftBatch, Eagle3Head, _rotate

    steps, length = 4, 40
    config = draft_config(TARGET, SPEC.model_copy(update={"sliding_window": window}))
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(VOCAB, HIDDEN, generator=generator)
    head = Eagle3Head(config, embeddings)
    head.initialise(0, torch.randn(SPEC.vocab_size, HIDDEN, generator=generator), torch.ones(HIDDEN))
    ids = torch.randint(0, VOCAB, (length + steps + 1,), generator=generator)
    states = torch.randn(length, 3 * HIDDEN, generator=generator)
    places = torch.tensor([3, 15, 16, 30, 39])
    batch = DraftBatch(
        keys=ids[None, 1 : length + 1],
        states=states[None],
        row=torch.zeros(len(places), dtype=torch.long),
        place=places,
        slot=torch.arange(len(places)),
        tokens=torch.stack([ids[place + 1 : place + 2 + steps] for place in places.tolist()]),
        last=torch.zeros(len(places), HIDDEN),
    )
    layer, attention = head.midlayer, head.midlayer.self_attn
    cos, sin = rotary_tables(config, length + steps)
    with torch.no_grad():
        found = head(batch, steps)
        for query, place in enumerate(places.tolist()):
            fused = head.fc(states[: place + 1])
            x = layer.inputs(F.embedding(ids[1 : place + 2], head.unit_embeddings), fused)
            keys, values = attention.keys_values(x, cos[: place + 1], sin[: place + 1])
            own, x = fused[-1], x[-1]
            for step in range(steps):
                at = place + step
                if step:
                    x = layer.inputs(F.embedding(ids[at + 1], head.unit_embeddings), own)
                    key, value = attention.keys_values(x[None], cos[at : at + 1], sin[at : at + 1])
                    keys, values = torch.cat((keys, key)), torch.cat((values, value))
                seen = slice(-window if window else None, None)
                q = _rotate(attention.q_proj(x).view(1, 4, 16), cos[at : at + 1], sin[at : at + 1])
                k, v = keys[seen].repeat_interleave(2, 1), values[seen].repeat_interleave(2, 1)
                out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
                mixed = own + attention.o_proj(out.flatten())
                own = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
                expected = head.lm_head(head.norm(own))
                assert torch.allclose(found[step][query], expected, atol=1e-4), (place, step)


def test_a_window_stands_in_the_config_as_vllm_reads_it(
    data: DraftData, target: Path, tmp_path: Path
) -> None:
    config = draft_config(TARGET, SPEC.model_copy(update={"sliding_window": 64}))
    assert (config["sliding_window"], config["layer_types"]) == (64, ["sliding_attention"])
    assert not {"sliding_window", "layer_types"} & draft_config(TARGET, SPEC).keys()
    trained = train(target, SPEC.model_copy(update={"steps": 1}), data, lambda _: None)
    from packager.draft.stage import export

    export(tmp_path / "out", trained, target, recipe_digest="sha256:0", inputs={})
    for change, problems in (
        ({}, 0),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"]}, 0),
        ({"sliding_window": 64}, 1),
        ({"layer_types": ["sliding_attention"]}, 1),
    ):
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "out", copy)
        (copy / "config.json").write_text(json.dumps(found | change))
        windows = [line for line in validate_draft(copy, TARGET) if "sliding_window" in line]
        assert len(windows) == problems, change


# ---- early stop -------------------------------------------------------------------------------------------


def test_training_that_gains_nothing_stops_and_stays_stopped(data: DraftData, target: Path) -> None:
    spec = SPEC.model_copy(
        update={"learning_rate": 1e-12, "evaluate_every": 3, "patience": 2, "checkpoint_every": 100}
    )
    lines: list[str] = []
    first = train(target, spec, data, lines.append)
    assert first.metrics["best_step"] == 3
    assert first.metrics["last_step"] == 9
    assert any("stopped at step 9" in line for line in lines)
    log = data.workdir / LOG_NAME
    assert [row["step"] for row in read_log(log) if "held_out" in row] == [3, 6, 9]
    before = log.read_bytes()
    again = train(target, spec, data, lambda _: None)
    assert again.metrics == first.metrics
    assert log.read_bytes() == before


@pytest.mark.slow
def test_the_best_weights_are_kept_not_the_last(data: DraftData, target: Path, tmp_path: Path) -> None:
    """A head that is wiped out after its second measurement."""
    from packager.draft.states import samples

    found = samples(data.records(), data.states)
    trainer = _trainer(target, tmp_path, spec={"evaluate_every": 50, "steps": 110})
    weights: dict[str, torch.Tensor] = {}

    def wipe(now: Any) -> None:
        if now.done == 100:
            weights.update({name: value.clone() for name, value in trainer.head.state_dict().items()})
            with torch.no_grad():
                for parameter in trainer.head.parameters():
                    parameter.zero_()

    kept = trainer.run(found[:50], found[50:], lambda _: None, wipe)
    rows = read_log(tmp_path / LOG_NAME)
    measured = {row["step"]: row["held_out"]["length"] for row in rows if "held_out" in row}
    assert measured[110] < measured[100], "nothing was lost: this shows nothing"
    assert trainer.best.step == 100
    assert kept[3].length == max(measured.values()) == measured[100]
    assert all(torch.equal(value, weights[name]) for name, value in trainer.head.state_dict().items())


@pytest.mark.parametrize(("changes", "longest"), [({"ttt_steps": 5}, 5), ({"num_speculative_tokens": 7}, 7)])
def test_a_prediction_reaches_as_far_as_training_or_the_recipe(
    data: DraftData, target: Path, tmp_path: Path, changes: dict[str, int], longest: int
) -> None:
    """And is for each length what a run with that length would have said."""
    from packager.draft.loss import accepted_of
    from packager.draft.states import samples

    held = samples(data.records(), data.states)[50:]
    trainer = _trainer(target, tmp_path, spec=changes)
    found = trainer.predict(held)
    assert list(found) == list(range(1, longest + 1))
    assert [len(one.per_position) for one in found.values()] == list(found)
    alone = trainer._counts(held, [3])[3]
    assert found[3] == accepted_of(*alone)
    assert found[3].drafts > 0


def test_patience_without_measurements_is_refused(data: DraftData, target: Path) -> None:
    result = CliRunner().invoke(command, ["train", str(target), str(data.workdir), "--patience", "2"])
    assert isinstance(result.exception, UsageProblem)
    assert "evaluate_every" in str(result.exception)


def test_measurements_need_held_out_responses(data: DraftData, target: Path, tmp_path: Path) -> None:
    from packager.draft.states import samples

    trainer = _trainer(target, tmp_path, spec={"evaluate_every": 2})
    with pytest.raises(BadInput, match="no held-out responses"):
        trainer.run(samples(data.records(), data.states), [], lambda _: None)


# ---- the cache of states ----------------------------------------------------------------------------------


def test_cached_states_make_the_same_batch_without_their_files(data: DraftData) -> None:
    from packager.draft.states import StateCache, collate, samples

    found = samples(data.records(), data.states)[:5]

    def read(cache: StateCache) -> Any:
        return vars(collate(found, aux=3, hidden=HIDDEN, steps=3, cache=cache))

    full, none = StateCache(1 << 30), StateCache(0)
    fresh = read(none)
    for name, tensor in read(full).items():
        assert torch.equal(tensor, fresh[name]), name
    shutil.rmtree(data.states)
    for name, tensor in read(full).items():
        assert torch.equal(tensor, fresh[name]), name
    with pytest.raises(BadInput, match="cannot read the hidden states"):
        read(none)
