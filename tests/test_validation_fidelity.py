"""Fidelity from log-probabilities of given texts: exact where all is listed, else a bound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from loopback_chat import LoopbackChat
from scipy.stats import entropy

from packager.cli import run
from validation.endpoint import Message, Target
from validation.errors import MeasurementError
from validation.fidelity import Bounds, compare_routing, compare_scores, divergence, fidelity_panel
from validation.prompt_logprobs import Passage, Position, Scoring, score_passages

WORDS = ("aspirin", "ibuprofen", "warfarin", "heparin", "morphine", "codeine")


def position(probabilities: np.ndarray, listed: int | None = None) -> Position:
    """A position as a server lists it."""
    order = np.argsort(-probabilities)[:listed]
    top = tuple((str(i), math.log(probabilities[i])) for i in order)
    return Position(token=str(order[0]), logprob=top[0][1], top=top)


def test_with_all_tokens_listed_it_is_the_divergence_and_with_some_a_lower_bound_of_it() -> None:
    chance = np.random.default_rng(3)
    missing = []
    for _ in range(200):
        p, q = chance.dirichlet(np.full(60, 0.3)), chance.dirichlet(np.full(60, 0.3))
        p, q = (0.9 * p + 0.1 / 60, 0.9 * q + 0.1 / 60)
        exact = float(entropy(p, q))
        assert divergence(position(p), position(q)).kl == pytest.approx(exact, abs=1e-9)
        bound = divergence(position(p, 20), position(q, 20))
        assert 0 <= bound.kl <= exact + 1e-9
        shared = {t for t, _ in position(p, 20).top} & {t for t, _ in position(q, 20).top}
        rest = np.array([str(i) not in shared for i in range(60)])
        assert bound.rest == pytest.approx(p[rest].sum())
        within = float(entropy(p[rest] / p[rest].sum(), q[rest] / q[rest].sum()))
        assert bound.kl + bound.rest * within == pytest.approx(exact, abs=1e-9)
        missing.append(exact - bound.kl)
    assert max(missing) > 0.1  # with so few listed the bound is not the whole


def server(sharpness: float) -> LoopbackChat:
    """Finds the right word the likelier the greater `sharpness`, in odd places less."""

    def score(words: list[str]) -> list[dict[str, float]]:
        found = []
        for number, word in enumerate(words):
            scores = dict.fromkeys((word, *WORDS), 0.0) | {word: sharpness * (1 + number % 2)}
            total = math.log(sum(map(math.exp, scores.values())))
            found.append({w: s - total for w, s in scores.items()})
        return found

    return LoopbackChat(lambda _: "take aspirin now", score=score)


def target(served: LoopbackChat, cache: Path, subject: str) -> Target:
    return Target(served.url, "model", subject, subject, cache)


def passages() -> list[Passage]:
    return [
        Passage(id=f"p{k}", language="zh" if k % 3 else "en", text=f"give drug{k} daily {k}")
        for k in range(12)
    ]


def test_slices_noise_and_alarms_follow_from_the_scores_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with server(4.0) as one, server(3.0) as two:
        reference = score_passages(target(one, tmp_path, "a"), passages())
        again = score_passages(target(one, tmp_path, "a"), passages(), scoring=Scoring(repetition=1))
        candidate = score_passages(target(two, tmp_path, "b"), passages())
        assert {*one.asked.values()} == {2} and {*two.asked.values()} == {1}
        score_passages(target(one, tmp_path, "a"), passages())
        assert {*one.asked.values()} == {2}
    found = compare_scores(reference, candidate, again=again)
    assert found.overall.tokens == 36 and found.noise is not None and found.noise.kl_max == 0.0
    assert [s.name for s in found.by_language] == ["en", "zh"]
    assert [s.name for s in found.by_position] == ["1–16"]
    # Places 1 and 3 are odd, place 2 is not: of the three, two are sharper.
    exact = []
    for number in (1, 2, 3):
        p, q = (one.score([*["x"] * 4])[number] for one in (server(4.0), server(3.0)))  # type: ignore[misc]
        exact.append(sum(math.exp(p[w]) * (p[w] - q[w]) for w in p))
    assert found.overall.kl_mean == pytest.approx(np.mean(exact), abs=1e-5)
    assert found.overall.perplexity_ratio > 1 and found.overall.top1_agreement == 1.0
    assert {g.name for g in found.raised} == {"mean KL", "perplexity ratio"}
    wide = compare_scores(reference, candidate, bounds=Bounds(max_mean_kl_nats=1, max_perplexity_ratio=2))
    assert wide.raised == []
    panel = fidelity_panel([found])
    assert panel.subjects == ("a", "b") and "Alarms: b: mean KL" in panel.summary


def test_both_interfaces_of_servers_give_the_same_scores(tmp_path: Path) -> None:
    with server(2.0) as served:
        where = target(served, tmp_path, "a")
        new = score_passages(where, passages())
        old = score_passages(where, passages(), scoring=Scoring(form="echo"))
    assert new.passages == old.passages
    assert compare_scores(new, new.model_copy(update={"passages": old.passages})).overall.kl_max == 0.0


def test_what_is_given_is_not_judged(tmp_path: Path) -> None:
    said = (Message(role="user", content="which drug"), Message(role="assistant", content="take aspirin"))
    passage = Passage(id="p", language="en", messages=said, context_tokens=2)
    with server(2.0) as served:
        (scored,) = score_passages(target(served, tmp_path, "a"), [passage]).passages
        assert served.bodies[0]["add_generation_prompt"] is False
        longer = passage.model_copy(update={"context_tokens": 4})
        with pytest.raises(MeasurementError, match="nothing to score"):
            score_passages(target(served, tmp_path, "a"), [longer])
    assert scored.context == ("which", "drug")
    assert [at.token for at in scored.positions] == ["take", "aspirin"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as mute, pytest.raises(MeasurementError, match="no log-probabilities"):
        score_passages(target(mute, tmp_path, "m"), [Passage(id="p", language="en", messages=MESSAGES)])
    with server(2.0) as served:
        where = target(served, tmp_path, "a")
        some, other = score_passages(where, passages()), score_passages(where, passages()[:3])
        with pytest.raises(MeasurementError, match="did not score the same texts"):
            compare_scores(some, other)
        with pytest.raises(MeasurementError, match="plain texts alone"):
            chat = Passage(id="p", language="en", messages=MESSAGES)
            score_passages(where, [chat], scoring=Scoring(form="echo"))
    cut = some.passages[0].model_copy(update={"context": ("other",)})
    with pytest.raises(MeasurementError, match="other tokens"):
        compare_scores(some, some.model_copy(update={"passages": (cut, *some.passages[1:])}))


MESSAGES = (Message(role="user", content="a question"),)


def test_expert_choices_agree_as_sets() -> None:
    one = [np.array([[0, 1], [2, 3], [4, 5], [6, 7]])]
    other = [np.array([[1, 0], [2, 4], [6, 7], [7, 6]])]
    found = compare_routing(
        one, other, [3], names=("BF16", "FP8"), subjects=("a", "b"), source="the engine",
        bounds=Bounds(min_experts_shared=0.6),
    )  # fmt: skip
    assert found.same_set == 0.5 and found.jaccard == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    assert found.alarm.outcome == "fail" and found.layers[0].layer == 3
    panel = fidelity_panel([], [found])
    assert panel.subjects == ("a", "b") and "experts shared" in panel.summary
    with pytest.raises(MeasurementError, match="shapes"):
        compare_routing(one, [other[0][:2]], [3], names=("", ""), subjects=("", ""), source="")


def test_the_verb_compares_two_servers_and_an_alarm_is_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = tmp_path / "items.jsonl"
    row = {"task": "t", "language": "en", "answer": "aspirin"}
    asked = [[{"role": "user", "content": f"question {k}"}] for k in range(4)]
    rows = [{**row, "id": f"q{k}", "messages": messages} for k, messages in enumerate(asked)]
    items.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with server(4.0) as one, server(3.0) as two:
        line = ["validate", "fidelity", "--items", str(items), "--cache", str(tmp_path / "cache")]
        line += ["--url", two.url, "--subject", "b", "--reference-url", one.url, "--reference-subject", "a"]
        assert run([*line, "--json"]) == 4
        said = capsys.readouterr()
        assert "further from reference than the bounds allow" in said.err
        document = json.loads(said.out)
        assert document["identity"]["identical"] == 4
        # "question k" is given, "take aspirin now" is judged: three tokens of four texts.
        assert document["fidelity"]["overall"]["tokens"] == 12
        assert run([*line, "--max-mean-kl", "1", "--max-p99-kl", "1"]) == 4  # perplexity still
        assert "alarm: perplexity ratio" in capsys.readouterr().out
        assert run([*line, "--top-logprobs", "0"]) == 0
    wrong = {"either --url or --serve": ["--serve", str(tmp_path)], "needs --reference-subject": line[:0]}
    for message, more in wrong.items():
        assert run([*line[: -2 if "subject" in message else None], *more]) == 2
        assert message in capsys.readouterr().err
