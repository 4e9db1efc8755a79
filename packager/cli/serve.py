"""`packager serve`: serve a bundle or checkpoint with vLLM until it is interrupted."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from packager.cli import options

if TYPE_CHECKING:
    from packager.serving.serve_file import Context
    from packager.serving.server import Server


@click.command(name="serve")
@click.argument("bundle")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--profile", help="A profile of the bundle. Default: the one for this machine.")
@click.option("--draft/--no-draft", "with_draft", default=True, help="Decode with the bundle's EAGLE3 draft.")
@click.option(
    "--context",
    metavar="NAME|TOKENS",
    help="native (as trained), extended, or a number of tokens, served as trained where that reaches. "
    "Default: the bundle's.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Where dequantized weights are kept. Default: ~/.cache/moe-packager.",
)
@click.option("--log", type=click.Path(path_type=Path), help="vLLM's log. Default: in the cache.")
@click.option(
    "--startup-timeout", type=click.FloatRange(min=1), default=1800, show_default=True, help="Seconds."
)
@click.option("--print-command", is_flag=True, help="Print the engine's command and start nothing.")
@options.as_json
def command(
    bundle: str,
    host: str,
    port: int,
    profile: str | None,
    with_draft: bool,
    context: str | None,
    cache: Path | None,
    log: Path | None,
    startup_timeout: float,
    print_command: bool,
    as_json: bool,
) -> None:
    """Serve BUNDLE (a bundle's or checkpoint's folder) through vLLM's OpenAI interface.

    Prints the address once the engine is healthy and runs until interrupted. On a processor without FP8
    kernels the weights are dequantized to BF16 first, into the cache.
    """
    from packager.checkpoint.source import locate
    from packager.release.served import cache_directory, servable
    from packager.serving.engine import vllm_command
    from packager.serving.server import Server, claim_port

    cache = (cache or cache_directory()).resolve()
    found = servable(locate(bundle), profile=profile, with_draft=with_draft, context=context, cache=cache)
    if print_command:
        arguments = vllm_command(found.spec(make=found.ready), host=host, port=port)
        document = {"kind": "serve command", "command": arguments}
        click.echo(json.dumps(document, indent=2) if as_json else shlex.join(arguments))
        if not found.ready:
            later = "without --print-command the weights are dequantized to that folder"
            click.echo(f"{found.why_dequantized}; {later}", err=True)
        return
    claim_port(host, port)  # before weights are converted for a server that could not start
    spec = found.spec(lambda line: click.echo(line, err=True))
    server = Server(spec, log or cache / "serve.log", port=port, host=host, startup_timeout_s=startup_timeout)
    click.echo(f"starting vLLM (log: {server.log})", err=True)
    with _signals_interrupt(), server:
        try:
            _announce(server, "dequantized" if found.why_dequantized else "native", found.context, as_json)
            code = server.wait()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
            return
        raise server.failure(f"the engine ended with exit code {code}")


def _announce(server: Server, weights: str, length: Context, as_json: bool) -> None:
    spec = server.spec
    if as_json:
        document = {
            "kind": "server",
            "url": f"{server.url}/v1",
            "model": spec.served_name,
            "weights_served": weights,
            "draft": spec.draft is not None,
            "context": length.name,
            "max_model_len": length.max_model_len or spec.max_model_len,
            "startup_s": round(server.startup_s or 0.0, 2),
            "log": str(server.log),
        }
        click.echo(json.dumps(document))
        return
    question = {
        "model": spec.served_name,
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
    }
    context = f", context {length.name} ({length.max_model_len} tokens)" if length.name else ""
    click.echo(
        f"serving {spec.served_name} at {server.url}/v1 (weights {weights}{context}); interrupt to stop\n"
    )
    click.echo(f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    click.echo(f"    -d {shlex.quote(json.dumps(question))}\n")
    sys.stdout.flush()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, and Ctrl-C itself even where the shell has it ignored (`&`)."""

    def interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
