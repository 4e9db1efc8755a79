"""The endpoint client against a server that fails, stalls, hangs up and dies."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from loopback_chat import LoopbackChat

from validation.answers import AnswerFile
from validation.connections import retry_after
from validation.endpoint import Completion, Endpoint, Message, Request, Sampling
from validation.errors import AnswersNotKept, MeasurementError, ServerUnreachable


def questions(count: int) -> list[Request]:
    return [
        Request(id=f"q{k}", messages=(Message(role="user", content=f"question {k}"),)) for k in range(count)
    ]


def _question(name: str) -> str:
    return f"question {name.removeprefix('q')}"


MANY = 10_000
WHERE: dict[str, Any] = {"sampling": Sampling(top_logprobs=None), "subject": "s"}


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
    with pytest.raises(ServerUnreachable, match="cannot connect"):
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
    def file() -> AnswerFile[Completion]:
        return AnswerFile(tmp_path, settings={"subject": "s"}, kind=Completion)

    with file(), pytest.raises(MeasurementError, match="in use"), file():
        pass


_CLIENT = """
import sys
from pathlib import Path
from validation.endpoint import Endpoint, Message, Request, Sampling
url, cache, many = sys.argv[1:]
said = [Message(role="user", content=f"question {k}") for k in range(int(many))]
requests = [Request(id=f"q{k}", messages=(one,)) for k, one in enumerate(said)]
Endpoint(url, "model").complete(requests, Sampling(top_logprobs=None), subject="s", cache=Path(cache))
"""


@pytest.mark.slow
def test_of_ten_thousand_items_none_is_lost_or_asked_twice_when_client_and_server_are_killed(
    tmp_path: Path,
) -> None:
    dead = False
    with LoopbackChat(lambda m: "re " + m, lambda *_: "disconnect" if dead else None) as server:
        # First the client is killed, then the server goes away in the middle, then all goes well.
        process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, server.url, str(tmp_path), str(MANY)],
            cwd=Path(__file__).parents[1],
        )
        while len(server.asked) < MANY // 3 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        (path,) = tmp_path.iterdir()
        kept = [path.read_bytes().count(b"\n") - 1]
        assert MANY // 3 - 100 < kept[0] < MANY
        asked = dict(server.asked)

        def stop_serving(done: int, _: int) -> None:
            nonlocal dead
            dead = done >= 2 * MANY // 3

        client = endpoint(server.url, attempts=2)
        with pytest.raises(ServerUnreachable, match="in 2 attempts"):
            client.complete(questions(MANY), **WHERE, cache=tmp_path, progress=stop_serving)
        kept.append(path.read_bytes().count(b"\n") - 1)
        dead = False
        got = client.complete(questions(MANY), **WHERE, cache=tmp_path)
    assert [c.text for c in got] == [f"re question {k}" for k in range(MANY)]
    assert kept[0] < 2 * MANY // 3 <= kept[1] < MANY
    lines = [json.loads(line)["answer"]["id"] for line in path.read_bytes().splitlines()[1:]]
    assert len(lines) == len(set(lines)) == MANY
    # Asked twice are only those that were on their way, eight at most, when one side went away.
    assert len([name for name in lines[: kept[0]] if asked[_question(name)] != 1]) == 0
    assert all(server.asked[_question(name)] == 1 for name in lines[: kept[0]])
    assert sum(count > 1 for count in server.asked.values()) <= 16


@pytest.mark.parametrize("error", ["File too large", "the disk is full"])
def test_a_full_disk_keeps_the_answers_before_it_and_the_same_command_goes_on(
    tmp_path: Path, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = os.write

    def until_full(file: int, data: bytes) -> int:
        try:
            return real(file, data)
        except OSError:
            raise OSError(errno.ENOSPC, "no space") from None

    if error == "the disk is full":  # the kernel's refusal is real, only its number is changed
        monkeypatch.setattr(os, "write", until_full)
    with LoopbackChat(lambda _: "ok") as server:
        client = endpoint(server.url, concurrency=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            with pytest.raises(AnswersNotKept, match=error) as said:
                client.complete(questions(40), Sampling(), subject="s", cache=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (path,) = tmp_path.iterdir()
        kept = path.read_bytes().splitlines()[1:]
        assert path.read_bytes().endswith(b"\n") and 4000 < path.stat().st_size <= 5000
        assert f"{len(kept)} answers are kept" in said.value.message
        before = dict(server.asked)
        assert len(client.complete(questions(40), Sampling(), subject="s", cache=tmp_path)) == 40
        for line in kept:
            name = _question(json.loads(line)["answer"]["id"])
            assert server.asked[name] == before[name] == 1


def test_blanks_that_a_loss_of_power_left_are_dropped(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok") as server:
        client = endpoint(server.url, concurrency=1)
        client.complete(questions(3), Sampling(), subject="s", cache=tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-30] + bytes(4096))
        got = client.complete(questions(3), Sampling(), subject="s", cache=tmp_path)
        assert [c.text for c in got] == ["ok"] * 3
        assert sorted(server.asked.values()) == [1, 1, 2]


def test_a_server_that_asks_to_wait_is_left_alone_that_long(tmp_path: Path) -> None:
    times: list[float] = []

    def busy(message: str, before: int) -> tuple[str, object] | None:
        times.append(time.monotonic())
        return ("wait", 0.4) if message == "question 0" and before == 0 else None

    with LoopbackChat(lambda _: "ok", busy) as server:
        endpoint(server.url, concurrency=1).complete(questions(4), Sampling(), subject="s", cache=tmp_path)
        assert sum(server.asked.values()) == 5
    assert times[1] - times[0] >= 0.39


@pytest.mark.parametrize(("header", "low", "high"), [("3", 3, 3), ("soon", None, None)])
def test_retry_after_is_read(header: str, low: float | None, high: float | None) -> None:
    assert retry_after(header) == low == high
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60)))
    assert later is not None and 58 < later <= 60


def test_an_answer_that_never_ends_runs_out_of_time(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "ok", lambda _, before: "drip" if before == 0 else None) as server:
        client = endpoint(server.url, timeout_s=0.3)
        got = client.complete(questions(2), Sampling(), subject="s", cache=tmp_path)
        assert [c.text for c in got] == ["ok"] * 2
        assert sum(server.asked.values()) == 4


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
