"""`packager chat`: a conversation in the terminal, with the speed of each answer."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from packager.cli import options
from packager.cli.starting import (
    Ended,
    Wanted,
    api_key,
    choose,
    is_loopback,
    say,
    server_for,
    signals_interrupt,
    starting_options,
)
from packager.errors import UsageProblem

if TYPE_CHECKING:
    import httpx

    from packager.serving.conversation import Answer, Conversation, Served

_CAUTION = "Answers may be wrong, and are no medical advice."
_HELP = "/reset forgets the conversation, /system TEXT instructs, /quit ends. Ctrl-C stops an answer."
_PROMPT = "> "
_TIMEOUT_S = 600.0
"""Between two pieces of an answer; a long prompt is read first."""
_DEATH_S = 1.0
"""A server's port closes this much before its process is gone, at most."""
_INTERRUPTED = 130
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a model says may not steer the terminal."""


@click.command(name="chat")
@click.argument("bundle", required=False)
@click.option("--url", help="Address of a running server, without /v1, instead of BUNDLE.")
@click.option("--model", help="Name of the model at --url. Default: the first that it lists.")
@click.option("--system", help="Instructions that the conversation starts with.")
@click.option("--once", metavar="QUESTION", help="Ask this, print the answer, and end.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of an answer. Default: no limit.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the server's key.")
@starting_options
@options.as_json
def command(
    bundle: str | None,
    url: str | None,
    model: str | None,
    system: str | None,
    once: str | None,
    max_tokens: int | None,
    temperature: float,
    api_key_env: str | None,
    wanted: Wanted,
    as_json: bool,
) -> int:
    """Talk to the model in BUNDLE, or to the server at --url.

    BUNDLE is served for as long as the conversation lasts. After each answer its speed is shown: tokens/s,
    the time to the first token, and with a draft how many tokens a step yielded.

    Standard input that is no terminal is read as questions, one a line, each a conversation of its own;
    answers go to standard output, the rest to standard error.
    """
    if (bundle is None) == (url is None):
        raise UsageProblem(
            "give either BUNDLE or --url", "For instance: packager chat --url http://127.0.0.1:8000"
        )
    interactive = once is None and sys.stdin.isatty()
    if interactive and as_json:
        raise UsageProblem("a conversation is no JSON document", "Add --once QUESTION, or pipe questions in.")
    # A key that was set for a server of one's own is not for others, unless it is named.
    own = url is None or is_loopback(urlsplit(url).hostname or "")
    key = api_key(api_key_env) if own or api_key_env else None
    try:
        with signals_interrupt(interrupt=False), _address(bundle, url, wanted, key) as address:
            from packager.serving.conversation import Conversation, served_by

            with _client(address, key) as client:
                served = served_by(client, model)
                talk = Conversation(client, served, system, max_tokens, temperature)
                if interactive:
                    _converse(talk, served)
                else:
                    questions = [once] if once is not None else (line.strip() for line in sys.stdin)
                    _answer_all(talk, served, questions, as_json)
    except KeyboardInterrupt:
        say("ended")
        return _INTERRUPTED
    return 0


@contextlib.contextmanager
def _address(bundle: str | None, url: str | None, wanted: Wanted, key: str | None) -> Iterator[str]:
    """The server's address, without /v1; a server of `bundle` runs until this is left.

    Raises:
        RemoteFailure: that server died meanwhile, with the cause from its log.
    """
    from validation.errors import ServerUnreachable

    if bundle is None:
        assert url is not None
        yield url.rstrip("/").removesuffix("/v1")
        return
    chosen = choose(bundle, wanted, start=True)
    with server_for(chosen, wanted, name="chat", host="127.0.0.1", port=None, key=key) as server:
        try:
            yield server.url
        except ServerUnreachable:
            deadline = time.monotonic() + _DEATH_S
            while time.monotonic() < deadline:
                server.check_alive()
                time.sleep(0.05)
            raise


def _client(url: str, key: str | None) -> httpx.Client:
    import httpx

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageProblem(f"{url!r} is not the address of a server", "Give http://host:port.")
    return httpx.Client(
        base_url=url,
        timeout=httpx.Timeout(_TIMEOUT_S, connect=10.0),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        trust_env=not is_loopback(parts.hostname),  # a proxy is for what lies outside
    )


def _answer_all(talk: Conversation, served: Served, questions: Iterable[str], as_json: bool) -> None:
    """Each question by itself: the answer to stdout, its figures to stderr; or one document at the end."""
    from packager.serving.conversation import document

    answers = []
    for question in questions:
        if not question:
            continue
        talk.reset()
        answer = talk.ask(question)
        answers.append(document(answer))
        if not as_json:
            click.echo(answer.streamed.text)
            sys.stdout.flush()
            say(_figures(answer, served))
    if as_json:
        found = {
            "kind": "chat",
            "model": served.model,
            "max_model_len": served.max_model_len,
            "answers": answers,
        }
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))


# --- in a terminal ---


def _converse(talk: Conversation, served: Served) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has arrows and history; what is said is in no file

    length = f", {served.max_model_len} tokens of context" if served.max_model_len else ""
    say(f"\n{served.model}{length}. {_CAUTION}\n{_HELP}\n")
    with _CtrlC() as ctrl_c:
        for line in _lines(ctrl_c):
            if not line.startswith("/"):
                _answer(talk, served, line, ctrl_c)
            elif not _obey(talk, line):
                break


class _CtrlC:
    """Ctrl-C ends what is under way and nothing else: pressed between two things it ends nothing."""

    def __init__(self) -> None:
        self.armed = False

    def __enter__(self) -> _CtrlC:
        self._previous = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _pressed(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def _lines(ctrl_c: _CtrlC) -> Iterator[str]:
    """What is typed, until the input ends; Ctrl-C empties the line."""
    while True:
        try:
            ctrl_c.armed = True
            line = input(_PROMPT if sys.stdout.isatty() else "").strip()
        except Ended:
            raise
        except KeyboardInterrupt:
            say("")
            continue
        except EOFError:
            say("")
            return
        finally:
            ctrl_c.armed = False
        if line:
            yield line


def _obey(talk: Conversation, line: str) -> bool:
    """Carry a command out; whether the conversation goes on."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        talk.reset()
        say("(forgotten)")
    elif name == "/system":
        talk.system = rest.strip() or None
        talk.reset()
        say("(instructions set, conversation forgotten)" if talk.system else "(no instructions)")
    else:
        say(_HELP)
    return True


def _answer(talk: Conversation, served: Served, question: str, ctrl_c: _CtrlC) -> None:
    """Ask, print what comes as it comes, then its figures. Only the server's death ends the session."""
    from validation.errors import MeasurementError, ServerUnreachable

    def write(text: str) -> None:
        sys.stdout.write(text.translate(_CONTROLS))
        sys.stdout.flush()

    began = time.monotonic()
    try:
        ctrl_c.armed = True
        answer = talk.ask(question, write)
    except Ended:
        raise
    except KeyboardInterrupt:
        write("\n")
        say(click.style(f"  (stopped after {time.monotonic() - began:.1f} s)", dim=True))
        return
    except ServerUnreachable:
        write("\n")
        raise
    except MeasurementError as err:
        say(f"  {err.message}")
        return
    finally:
        ctrl_c.armed = False
    write("\n")
    if answer.dropped:
        few = "exchange was" if answer.dropped == 1 else f"{answer.dropped} exchanges were"
        say(click.style(f"  (the oldest {few} left out: the context is full)", dim=True))
    say(click.style(_figures(answer, served), dim=True))


def _figures(answer: Answer, served: Served) -> str:
    """What an answer took, on one line of a terminal."""
    streamed = answer.streamed
    said = [f"{streamed.completion_tokens} tokens"]
    if streamed.tokens_per_s is not None:
        said.append(f"{streamed.tokens_per_s:.0f} tokens/s")
    said.append(f"first after {1000 * streamed.first_s:.0f} ms")
    if answer.acceptance_length is not None:
        said.append(f"{answer.acceptance_length:.2f} a step")
    if served.max_model_len:
        said.append(f"{answer.total_tokens} of {served.max_model_len} used")
    if streamed.finish_reason == "length":
        said.append("cut off")
    return "  " + ", ".join(said)
