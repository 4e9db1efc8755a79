"""`packager serve`: serve a bundle or checkpoint with vLLM until it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from packager.cli import options

if TYPE_CHECKING:
    from packager.serving import ServeSpec
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
    from packager.artifact import is_sealed
    from packager.checkpoint.source import locate
    from packager.serving.cpu import fp8_runs_here
    from packager.serving.engine import vllm_command
    from packager.serving.serve_file import context_for, is_fp8, spec_for
    from packager.serving.server import Server, claim_port

    directory = locate(bundle).resolve()
    spec = spec_for(directory, profile=profile, with_draft=with_draft)
    length = context_for(directory, context)
    if length.max_model_len is not None:
        spec = replace(spec, max_model_len=length.max_model_len)
    spec.check()
    cache = (cache or _cache_directory()).resolve()
    runs, reason = fp8_runs_here()
    dequantized = is_fp8(spec.model) and not runs
    stored = spec.model
    if dequantized:
        spec = replace(spec, model=_dequantized_path(cache, stored))
    view = _trained_view_path(cache, stored, spec) if length.trained_rotary else None
    if print_command:
        if view is not None:
            spec = _as_trained(spec, view, make=not dequantized or is_sealed(spec.model))
        arguments = vllm_command(spec, host=host, port=port)
        document = {"kind": "serve command", "command": arguments}
        click.echo(json.dumps(document, indent=2) if as_json else shlex.join(arguments))
        if dequantized and not is_sealed(_dequantized_path(cache, stored)):
            click.echo(
                f"{reason}; without --print-command the weights are dequantized to that folder", err=True
            )
        return
    claim_port(host, port)  # before weights are converted for a server that could not start
    if dequantized and not is_sealed(spec.model):
        click.echo(f"{reason}; dequantizing to BF16 in {spec.model}", err=True)
        _dequantize(stored, spec.model)
    if view is not None:
        spec = _as_trained(spec, view)
    server = Server(spec, log or cache / "serve.log", port=port, host=host, startup_timeout_s=startup_timeout)
    click.echo(f"starting vLLM (log: {server.log})", err=True)
    with _signals_interrupt(), server:
        try:
            _announce(server, "dequantized" if dequantized else "native", length, as_json)
            code = server.wait()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
            return
        raise server.failure(f"the engine ended with exit code {code}")


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-packager"


def _dequantized_path(cache: Path, model: Path) -> Path:
    """A folder of the cache named for the weights' identity: other weights never hit it."""
    from packager.artifact import is_sealed, read_manifest
    from packager.checkpoint.source import Checkpoint

    digest = read_manifest(model).digest if is_sealed(model) else Checkpoint.open(model).digest()
    return cache / "dequantized" / digest.removeprefix("sha256:")[:24]


def _trained_view_path(cache: Path, stored: Path, spec: ServeSpec) -> Path:
    """A folder of the cache for this bundle at its trained length: named for where it is and what it says."""
    parts = [str(stored), str(spec.model), (stored / "config.json").read_text(encoding="utf-8")]
    if spec.draft is not None:
        parts.append((spec.draft / "config.json").read_text(encoding="utf-8"))
    return cache / "trained" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _as_trained(spec: ServeSpec, view: Path, *, make: bool = True) -> ServeSpec:
    """`spec` with model and draft at their trained length, by links in `view`; `make` False: only named."""
    from packager.context import trained_view

    draft = None
    if spec.draft is not None:
        draft = trained_view(spec.draft, view / "draft") if make else view / "draft"
    model = trained_view(spec.model, view / "model") if make else view / "model"
    return replace(spec, model=model, draft=draft)


def _dequantize(model: Path, out: Path) -> None:
    """Dequantize through a folder of links: a bundle holds more than the checkpoint that is converted."""
    from packager.artifact import MANIFEST_NAME
    from packager.checkpoint.source import SIDE_SUFFIXES
    from packager.quantize import dequantize

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="checkpoint-") as view:
        for file in model.iterdir():
            if file.suffix in (".safetensors", *SIDE_SUFFIXES) and file.name != MANIFEST_NAME:
                (Path(view) / file.name).symlink_to(file.resolve())
        dequantize(Path(view), out)


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
