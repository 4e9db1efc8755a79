"""`packager chat`: answers with their figures, a conversation within its context, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from loopback_chat import LoopbackChat

from packager.cli.chat import command as chat
from packager.errors import RemoteFailure, UsageProblem
from packager.serving.conversation import Conversation, Served
from validation.errors import MeasurementError
from validation.streaming import PromptTooLong


def said(message: str) -> str:
    return f"You said {message} just now"


def run(url: str, *arguments: str, typed: str | None = None) -> Any:
    return CliRunner().invoke(chat, ["--url", url, *arguments], input=typed)


def test_one_question_gives_the_answer_and_its_figures() -> None:
    with LoopbackChat(said, max_model_len=100, accepted=2) as server:
        done = run(f"{server.url}/v1/", "--once", "hello there", "--system", "Be brief.")
        assert done.exit_code == 0, done.output
        assert done.stdout == "You said hello there just now\n"
        assert "6 tokens" in done.stderr
        assert "3.00 a step" in done.stderr
        assert "10 of 100 used" in done.stderr
        assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert "max_tokens" not in server.bodies[0]
        found = json.loads(run(server.url, "--once", "你好", "--max-tokens", "9", "--json").stdout)
    [answer] = found["answers"]
    assert (found["model"], found["max_model_len"]) == ("model", 100)
    assert (answer["answer"], answer["finish_reason"]) == ("You said 你好 just now", "stop")
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (1, 5)
    assert answer["acceptance_length"] == 3.0
    assert answer["tokens_per_s"] > 0
    assert answer["ttft_ms"] > 0
    assert server.bodies[1]["max_tokens"] == 9


def test_piped_questions_are_conversations_of_their_own() -> None:
    with LoopbackChat(said) as server:
        done = run(server.url, typed="one\n\n two \n")
        assert done.stdout == "You said one just now\nYou said two just now\n"
        assert "a step" not in done.stderr  # no draft, no such counters
        assert [len(body["messages"]) for body in server.bodies] == [1, 1]
        answers = json.loads(run(server.url, "--json", typed="one\ntwo\n").stdout)["answers"]
    assert [one["question"] for one in answers] == ["one", "two"]


def conversation(server: LoopbackChat, length: int | None, **settings: Any) -> Conversation:
    return Conversation(httpx.Client(base_url=server.url), Served("model", length), **settings)


@pytest.mark.parametrize("told", [40, None])
def test_the_oldest_exchanges_make_room_for_the_next(told: int | None) -> None:
    """By the server's count of tokens where it says its context; else once it refuses."""
    with LoopbackChat(said, max_model_len=40) as server:
        talk = conversation(server, told, system="Be brief.")
        answers = [talk.ask(f"question {k}") for k in range(8)]
        turns = [[m["content"] for m in body["messages"]] for body in server.bodies]
    dropped = [one.dropped for one in answers]
    assert dropped[:3] == [0, 0, 0]
    assert sum(dropped) >= 3
    assert all(one.total_tokens <= 40 + 6 for one in answers)
    assert {one[0] for one in turns} == {"Be brief."}
    assert turns[-1][-3:] == ["question 6", "You said question 6 just now", "question 7"]
    assert turns[1][1:] == ["question 0", "You said question 0 just now", "question 1"]


def test_a_question_that_never_fits_is_refused() -> None:
    with LoopbackChat(said, max_model_len=40) as server:
        talk = conversation(server, 40)
        talk.ask("short")
        with pytest.raises(PromptTooLong, match="maximum context length is 40"):
            talk.ask("word " * 50)
        done = run(server.url, "--once", "word " * 50)
    assert isinstance(done.exception, PromptTooLong)


def test_what_was_said_before_an_answer_was_stopped_stays() -> None:
    with LoopbackChat(said) as server:
        talk = conversation(server, None)

        def stop(text: str) -> None:
            if "hello" in text:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            talk.ask("hello", stop)
        talk.ask("go on")
        assert [m["content"] for m in server.bodies[1]["messages"]] == ["hello", "You said hello", "go on"]
        talk.reset()
        talk.ask("anew")
        assert len(server.bodies[2]["messages"]) == 1


def test_a_server_that_cannot_be_talked_to_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    gone = run("http://127.0.0.1:9", "--once", "x").exception
    assert isinstance(gone, RemoteFailure)
    assert "no server answers at http://127.0.0.1:9" in gone.message
    with LoopbackChat(
        said, api_key="sesame", faults=lambda m, _: {"down": "disconnect", "bad": 500}.get(m)
    ) as server:
        closed = run(server.url, "--once", "x").exception
        assert isinstance(closed, RemoteFailure)
        assert "wants an API key" in closed.message
        monkeypatch.setenv("A_KEY", "sesame")
        opened = ("--api-key-env", "A_KEY", "--once")
        assert run(server.url, *opened, "x").stdout == "You said x just now\n"
        assert "does not serve 'other'" in str(run(server.url, "--model", "other", *opened, "x").exception)
        assert "broke off" in str(run(server.url, *opened, "down").exception)
        assert isinstance(run(server.url, *opened, "bad").exception, MeasurementError)
    assert isinstance(run(server.url, "--api-key-env", "NO_SUCH_KEY", "--once", "x").exception, UsageProblem)
    for arguments in ([], ["bundle", "--url", "http://127.0.0.1:9"], ["--url", "ftp://x", "--once", "x"]):
        assert isinstance(CliRunner().invoke(chat, arguments).exception, UsageProblem), arguments


class Terminal:
    """A `packager` in a terminal of 80 columns; what it shows is read as far as a text."""

    def __init__(self, *arguments: str) -> None:
        self.screen, self._seen = "", 0
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "packager", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def until(self, text: str, timeout_s: float = 30.0) -> str:
        """What came since the last call, up to and with `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen[self._seen :]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        start, self._seen = self._seen, self.screen.index(text, self._seen) + len(text)
        return self.screen[start : self._seen]

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self._master)


@pytest.fixture
def talking() -> Iterator[tuple[Terminal, LoopbackChat]]:
    """A conversation with a server that takes its time over long stories, and tries to steer the terminal."""
    with LoopbackChat(
        lambda m: "once upon a time " * 2000 if "story" in m else f"{said(m)}\x1b[2J",
        lambda asked, _: "disconnect" if asked == "die" else None,
        max_model_len=100000,
        pace_s=0.005,
        accepted=1,
    ) as server:
        terminal = Terminal("chat", "--url", server.url)
        terminal.until("> ")
        yield terminal, server
        terminal.process.kill()


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_the_session(
    talking: tuple[Terminal, LoopbackChat],
) -> None:
    terminal, server = talking
    assert "no medical advice" in terminal.screen
    assert all(len(line) <= 100 for line in terminal.screen.splitlines())
    terminal.type("hello\n")
    shown = terminal.until("of 100000 used")
    assert "You said hello just now\ufffd[2J" in shown
    assert "2.00 a step" in shown
    terminal.until("> ")
    terminal.type("tell a story\n")
    terminal.until("once upon a time once")
    terminal.type("\x03")
    terminal.until("(stopped after")
    terminal.until("> ")
    deadline = time.monotonic() + 10
    while server.busy and time.monotonic() < deadline:  # the server hears that nobody listens
        time.sleep(0.05)
    assert server.busy == 0
    terminal.type("half a line\x03")
    terminal.until("> ")
    terminal.type("/system Be brief.\n")
    terminal.until("(instructions set, conversation forgotten)")
    terminal.type("again\n")
    terminal.until("used")
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["Be brief.", "again"]
    terminal.type("/nonsense\n")
    terminal.until("/reset forgets")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.slow
def test_a_signal_ends_the_session_and_a_dead_server_too(talking: tuple[Terminal, LoopbackChat]) -> None:
    terminal, server = talking
    terminal.type("tell a story\n")
    terminal.until("once upon")
    terminal.process.terminate()
    assert terminal.close() == 130
    other = Terminal("chat", "--url", server.url)
    other.until("> ")
    other.type("die\n")
    other.until("error: http://127.0.0.1")
    assert other.close() == 6
