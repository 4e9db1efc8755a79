"""`packager serve`: serve a bundle or checkpoint with vLLM or SGLang until it is interrupted."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.cli.starting import (
    API_KEY,
    Chosen,
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
    from packager.serving.server import Server

_INTERRUPTED = 130


@click.command(name="serve")
@click.argument("bundle")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@starting_options
@click.option(
    "--api-key-env",
    metavar="NAME",
    help=f"Environment variable with the key that clients must send. Default: {API_KEY}, if it is set.",
)
@click.option("--print-command", is_flag=True, help="Print the engine's command and start nothing.")
@options.as_json
def command(
    bundle: str,
    host: str,
    port: int,
    wanted: Wanted,
    api_key_env: str | None,
    print_command: bool,
    as_json: bool,
) -> int:
    """Serve BUNDLE (a bundle's or checkpoint's folder) through an OpenAI-compatible interface.

    Takes the profile of the bundle that fits this machine, prints the address once the engine is healthy, and
    runs until interrupted; a second interrupt kills it. On a processor without FP8 kernels the weights are
    dequantized to BF16 first, into the cache. Arguments after `--` go to the engine as they are.
    """
    if wanted.engine_arguments and not wanted.engine_arguments[0].startswith("-"):
        raise UsageProblem(
            f"{wanted.engine_arguments[0]!r} is no option of the engine",
            "Give one BUNDLE; quote spaces in it.",
        )
    chosen = choose(bundle, wanted, start=not print_command)
    if print_command:
        _print_command(chosen, wanted, host, port, as_json)
        return 0
    key = api_key(api_key_env)
    if key is None and not is_loopback(host):
        say(f"warning: whoever reaches {host}:{port} may use it: there is no API key (see --api-key-env)")
    serving = False
    try:
        with (
            signals_interrupt(),
            server_for(chosen, wanted, name="serve", host=host, port=port, key=key) as server,
        ):
            serving = True
            try:
                _announce(server, chosen, (api_key_env or API_KEY) if key else None, as_json)
                code = server.wait()
            except KeyboardInterrupt:
                say("stopping")
                return 0
            raise server.failure(f"the engine ended with exit code {code}", code)
    except KeyboardInterrupt:
        say("killed" if serving else "stopped before it served")
        return _INTERRUPTED


def _print_command(chosen: Chosen, wanted: Wanted, host: str, port: int, as_json: bool) -> None:
    from packager.serving.engine import sglang_command, vllm_command

    found = chosen.found
    spec = found.spec(make=found.ready)
    if wanted.engine == "sglang":
        arguments = sglang_command(spec, host=host, port=port)
    else:
        arguments = vllm_command(spec, host=host, port=port, target=chosen.target)
    document = {"kind": "serve command", "profile": chosen.profile, "command": arguments}
    click.echo(json.dumps(document, indent=2) if as_json else shlex.join(arguments))
    if not found.ready:
        say(f"{found.why_dequantized}; without --print-command the weights are dequantized to that folder")


def _announce(server: Server, chosen: Chosen, key_name: str | None, as_json: bool) -> None:
    spec, length = server.spec, chosen.context
    weights = "dequantized" if chosen.found.why_dequantized else "native"
    if as_json:
        document = {
            "kind": "server",
            "url": f"{server.url}/v1",
            "model": spec.served_name,
            "engine": server.engine,
            "engine_version": chosen.version,
            "profile": chosen.profile,
            "weights_served": weights,
            "draft": spec.draft is not None,
            "context": length.name,
            "max_model_len": length.max_model_len or spec.max_model_len,
            "api_key": key_name is not None,
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
    if key_name:
        click.echo(f'    -H "Authorization: Bearer ${key_name}" \\')
    click.echo(f"    -d {shlex.quote(json.dumps(question))}\n")
    click.echo(f"  packager chat --url {server.url}\n")
    sys.stdout.flush()
