"""The endpoint client against a server that fails, stalls, hangs up and dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat

from validation.endpoint import AnswerFile, Completion, Endpoint, Message, Request, Sampling
from validation.errors import MeasurementError, ServerUnreachable


def questions(count: int) -> list[Request]:
    return [
        Request(id=f"q{k}", messages=(Message(role="user", content=f"question {k}"),)) for k in range(count)
    ]


def endpoint(url: str, **options: float) -> Endpoint:
    return Endpoint(url, "model", **{"backoff_s": 0.01, **options})  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_requests_whatever_order_they_arrive_in(tmp_path: Path) -> None:
    def slow_first(message: str, _: int) -> float:
        return 0.2 if message == "question 0" else 0.0

    with LoopbackChat(lambda m: m.upper(), slow_first) as server:
        got = endpoint(server.url).complete(questions(6), Sampling(), subject="s", cache=tmp_path)
    assert [(c.id, c.text) for c in got] == [(f"q{k}", f"QUESTION {k}") for k in range(6)]
    assert got[0].tokens is not None and [t.token for t in got[0].tokens] == ["QUESTION", "0"]


def test_the_settings_asked_for_are_those_sent_and_those_recorded(tmp_path: Path) -> None:
    sampling = Sampling(temperature=0.0, top_p=0.9, seed=11, max_tokens=17, top_logprobs=3)
    with LoopbackChat(lambda _: "ok") as server:
        endpoint(server.url).complete(questions(1), sampling, subject="s", cache=tmp_path)
        sent = server.bodies[0]
    asked = {k: sent[k] for k in ("temperature", "top_p", "seed", "max_tokens", "logprobs", "top_logprobs")}
    assert asked == {
        "temperature": 0.0, "top_p": 0.9, "seed": 11, "max_tokens": 17, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    (path,) = tmp_path.iterdir()
    settings = json.loads(path.read_text().splitlines()[0])["settings"]
    assert settings == {"subject": "s", "model": "model", "sampling": sampling.model_dump()}


@pytest.mark.parametrize("fault", [500, 503, 429, "disconnect", "rubbish"])
def test_a_passing_fault_is_tried_again(tmp_path: Path, fault: int | str) -> None:
    with LoopbackChat(lambda _: "ok", lambda _, before: fault if before < 2 else None) as server:
        got = endpoint(server.url).complete(questions(3), Sampling(), subject="s", cache=tmp_path)
        assert [c.text for c in got] == ["ok"] * 3
        assert set(server.asked.values()) == {3}


@pytest.mark.slow
def test_a_stalled_request_times_out_and_is_tried_again(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok", lambda _, before: 8.0 if before == 0 else None) as server:
        got = endpoint(server.url, timeout_s=2.0).complete(
            questions(1), Sampling(), subject="s", cache=tmp_path
        )
        assert got[0].text == "ok"
        assert server.asked["question 0"] == 2


def test_retries_are_bounded_and_what_was_answered_is_kept_and_never_asked_again(tmp_path: Path) -> None:
    broken = True

    def fault(message: str, _: int) -> int | None:
        return 500 if broken and message == "question 4" else None

    with LoopbackChat(lambda _: "ok", fault) as server:
        client = endpoint(server.url, concurrency=1, attempts=3)
        with pytest.raises(ServerUnreachable, match=r"'q4' in 3 attempts; last: HTTP 500"):
            client.complete(questions(8), Sampling(), subject="s", cache=tmp_path)
        assert server.asked["question 4"] == 3
        before = dict(server.asked)
        broken = False
        got = client.complete(questions(8), Sampling(), subject="s", cache=tmp_path)
        assert [c.id for c in got] == [f"q{k}" for k in range(8)]
        for k in range(4):
            assert server.asked[f"question {k}"] == before[f"question {k}"] == 1


def test_a_full_cache_needs_no_server_and_starts_none(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as server:
        endpoint(server.url).complete(questions(3), Sampling(), subject="s", cache=tmp_path)

    def start() -> str:
        raise AssertionError("a server was started though every answer is on disk")

    got = Endpoint(start, "model").complete(questions(3), Sampling(), subject="s", cache=tmp_path)
    assert [c.text for c in got] == ["ok"] * 3


def test_other_weights_or_other_sampling_are_asked_anew(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as server:
        client = endpoint(server.url)
        client.complete(questions(1), Sampling(), subject="a", cache=tmp_path)
        client.complete(questions(1), Sampling(), subject="b", cache=tmp_path)
        client.complete(questions(1), Sampling(max_tokens=3), subject="a", cache=tmp_path)
        assert server.asked["question 0"] == 3


def test_equal_conversations_are_asked_once(tmp_path: Path) -> None:
    twins = [Request(id=i, messages=(Message(role="user", content="same"),)) for i in ("a", "b")]
    with LoopbackChat(lambda _: "ok") as server:
        got = endpoint(server.url).complete(twins, Sampling(), subject="s", cache=tmp_path)
        assert [c.id for c in got] == ["a", "b"]
        assert server.asked["same"] == 1


def test_no_more_requests_are_in_flight_than_allowed(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok", lambda *_: 0.05) as server:
        endpoint(server.url, concurrency=3).complete(questions(12), Sampling(), subject="s", cache=tmp_path)
        assert server.most_busy == 3


def test_an_unknown_model_is_named_with_those_served(tmp_path: Path) -> None:
    with (
        LoopbackChat(lambda _: "ok", model="other") as server,
        pytest.raises(MeasurementError, match="'other'"),
    ):
        endpoint(server.url).complete(questions(1), Sampling(), subject="s", cache=tmp_path)


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match="ConnectError"):
        endpoint("http://127.0.0.1:9", attempts=2).complete(
            questions(1), Sampling(), subject="s", cache=tmp_path
        )


def test_a_line_cut_off_by_a_kill_is_asked_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as server:
        client = endpoint(server.url, concurrency=1)
        client.complete(questions(4), Sampling(), subject="s", cache=tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-40])
        got = client.complete(questions(4), Sampling(), subject="s", cache=tmp_path)
        assert [c.text for c in got] == ["ok"] * 4
        assert sorted(server.asked.values()) == [1, 1, 1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_not_a_silent_loss(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as server:
        client = endpoint(server.url)
        client.complete(questions(3), Sampling(), subject="s", cache=tmp_path)
        (path,) = tmp_path.iterdir()
        lines = path.read_bytes().split(b"\n")
        lines[2] = lines[2][:50]
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(MeasurementError, match="damaged"):
            client.complete(questions(3), Sampling(), subject="s", cache=tmp_path)


def test_two_measurements_cannot_write_one_answer_file(tmp_path: Path) -> None:
    settings = {"subject": "s", "model": "model", "sampling": Sampling()}
    with (
        AnswerFile(tmp_path, **settings),  # type: ignore[arg-type]
        pytest.raises(MeasurementError, match="in use"),
        AnswerFile(tmp_path, **settings),  # type: ignore[arg-type]
    ):
        pass


def _run_until_killed(url: str, cache: str) -> None:
    Endpoint(url, "model", concurrency=2).complete(questions(40), Sampling(), subject="s", cache=Path(cache))


@pytest.mark.slow
def test_a_client_killed_in_the_middle_loses_no_answer_and_asks_none_twice(tmp_path: Path) -> None:
    with LoopbackChat(lambda m: "ok " + m, lambda *_: 0.03) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=_run_until_killed, args=(server.url, str(tmp_path))
        )
        process.start()
        while len(server.asked) < 12:
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (path,) = tmp_path.iterdir()
        kept = [json.loads(line)["completion"]["id"] for line in path.read_bytes().split(b"\n")[1:-1]]
        assert 8 <= len(kept) < 40
        first = dict(server.asked)
        got = endpoint(server.url).complete(questions(40), Sampling(), subject="s", cache=tmp_path)
        assert [c.text for c in got] == [f"ok question {k}" for k in range(40)]
        for name in kept:
            message = f"question {name.removeprefix('q')}"
            assert server.asked[message] == first[message] == 1


def test_a_prompt_that_is_too_long_is_an_answer_only_where_that_is_asked_for(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok", max_characters=5) as server:
        client = endpoint(server.url)
        got = client.complete(questions(1), Sampling(), subject="s", cache=tmp_path, refusals=True)
        assert got[0].finish_reason == "refused"
        with pytest.raises(MeasurementError, match="too long"):
            client.complete(questions(1), Sampling(), subject="s", cache=tmp_path)


def test_a_log_probability_that_is_not_finite_is_no_answer(tmp_path: Path) -> None:
    nan = float("nan")
    with (
        LoopbackChat(lambda _: [("x", nan, [("x", nan)])]) as server,
        pytest.raises(ServerUnreachable, match="not finite"),
    ):
        endpoint(server.url, attempts=2).complete(questions(1), Sampling(), subject="s", cache=tmp_path)


def test_completions_survive_json() -> None:
    one = Completion(
        id="a",
        text="答案：5",
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
        tokens=None,
        seconds=0.5,
    )
    assert Completion.model_validate_json(one.model_dump_json()) == one
