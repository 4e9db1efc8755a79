"""What `serve` and `chat` share: options, the choice of a profile, the server, the signals that end it."""

from __future__ import annotations

import functools
import ipaddress
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from packager.errors import BadInput, UsageProblem

if TYPE_CHECKING:
    from packager.release.served import Servable
    from packager.serving.cpu import Device
    from packager.serving.installed import Engine
    from packager.serving.serve_file import Context, ServeFile
    from packager.serving.server import Server

API_KEY = "VLLM_API_KEY"
"""The environment variable that vLLM itself reads its key from."""
FORBIDDEN = "--trust-remote-code"


@dataclass(frozen=True)
class Wanted:
    """How a bundle or checkpoint is to be served, as the command line says."""

    engine: Engine
    profile: str | None
    with_draft: bool
    context: str | None
    gpu_memory_utilization: float | None
    cache: Path | None
    log: Path | None
    startup_timeout: float
    any_version: bool
    engine_arguments: tuple[str, ...] = ()


def starting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that starts a server, handed over as one `Wanted`."""

    @functools.wraps(function)
    def packed(**own: Any) -> Any:
        wanted = {name: own.pop(name) for name in Wanted.__dataclass_fields__ if name in own}
        return function(wanted=Wanted(**wanted), **own)

    shared = [
        click.option("--engine", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True),
        click.option("--profile", help="A profile of the bundle. Default: the one that fits this machine."),
        click.option(
            "--draft/--no-draft", "with_draft", default=True, help="Decode with the bundle's EAGLE3 draft."
        ),
        click.option(
            "--context",
            metavar="NAME|TOKENS",
            help="native (as trained), extended, or a number of tokens, served as trained where that "
            "reaches. Default: the bundle's.",
        ),
        click.option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of each GPU's memory that the engine takes. Default: the engine's, 0.9.",
        ),
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            help="Where dequantized weights are kept. Default: ~/.cache/moe-packager.",
        ),
        click.option(
            "--log", type=click.Path(path_type=Path), help="The engine's log. Default: in the cache."
        ),
        click.option(
            "--startup-timeout",
            type=click.FloatRange(min=1),
            default=1800,
            show_default=True,
            help="Seconds.",
        ),
        click.option(
            "--any-version", is_flag=True, help="Start an engine outside the bundle's range of versions."
        ),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(shared), packed)


def say(line: str) -> None:
    """A line for people, on stderr."""
    click.echo(line, err=True)


@dataclass(frozen=True)
class Chosen:
    """A folder with the profile and length that it is served at."""

    found: Servable
    file: ServeFile | None
    """None: a plain checkpoint."""
    profile: str | None
    target: Device
    version: str | None
    """Of the engine; None: not asked for."""

    @property
    def context(self) -> Context:
        """The length served."""
        return self.found.context


def choose(bundle: str, wanted: Wanted, *, start: bool) -> Chosen:
    """Find how `bundle` is served here, and say what was chosen; nothing is written or started.

    Args:
        start: check the engine, and that the profile fits; else only the command is wanted.

    Raises:
        UsageProblem: the engine is missing or of another version, or no profile fits.
        BadInput, IntegrityFailure, RemoteFailure: as `locate` and `servable`.
    """
    from packager.checkpoint.source import locate
    from packager.release.served import cache_directory, servable
    from packager.serving.choose import Load, choose_profile
    from packager.serving.cpu import device, fp8_runs_here
    from packager.serving.installed import check_engine
    from packager.serving.machine import this_machine
    from packager.serving.serve_file import SERVE_NAME, context_for, is_fp8, read_serve_file

    if any(part.partition("=")[0] == FORBIDDEN for part in wanted.engine_arguments):
        raise UsageProblem(f"{FORBIDDEN} is never on", "Leave it out; no model here needs code of its own.")
    directory = locate(bundle).resolve()
    path = directory / SERVE_NAME
    file = read_serve_file(path) if path.is_file() else None
    target: Device = "cuda" if wanted.engine == "sglang" else device()
    profile, version = wanted.profile, None
    if not start and file is not None and wanted.engine == "vllm":
        shown = profile or file.default_profile
        if shown in file.profiles and (
            profile or all(one.device != target for one in file.profiles.values())
        ):
            target = file.profiles[shown].device
    length = context_for(directory, wanted.context)
    tokens = length.max_model_len or (file.max_model_len if file else None)
    if start:
        versions = file.engine_versions if file else None
        version = check_engine(wanted.engine, target, versions, any_version=wanted.any_version)
    environment: dict[str, str] = {}
    if file is not None and tokens is not None:
        dequantized = target == "cpu" and is_fp8(directory / file.model) and not fp8_runs_here()[0]
        load = Load(tokens, dequantized, wanted.gpu_memory_utilization)
        try:
            choice = choose_profile(file, this_machine(), target, load, wanted=profile)
        except UsageProblem as err:
            if start or profile not in (None, *file.profiles):
                raise
            say(f"note: {err.message}")
        else:
            profile = choice.name
            say(f"profile {profile}" + (f": {choice.why}" if choice.why else ""))
            if target == "cpu" and choice.profile.needs is not None:
                environment = _cache_space(choice.profile.needs.kv_bytes(tokens))
    found = servable(
        directory,
        profile=profile,
        with_draft=wanted.with_draft,
        context=wanted.context,
        cache=wanted.cache or cache_directory(),
        target=target,
    )
    arguments = wanted.engine_arguments
    if wanted.gpu_memory_utilization is not None:
        arguments = ("--gpu-memory-utilization", f"{wanted.gpu_memory_utilization:g}", *arguments)
    stored = replace(found.stored, extra_args=arguments, env=environment)
    _warn_of_length(file, length, tokens)
    return Chosen(replace(found, stored=stored), file, profile, target, version)


def _cache_space(needed: int) -> dict[str, str]:
    """vLLM's setting of the KV cache on a processor, where a request needs more than is taken by default."""
    from packager.serving.needs import CPU_CACHE_BYTES, GIB

    if needed <= CPU_CACHE_BYTES or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(-(-needed // GIB))}


def _warn_of_length(file: ServeFile | None, length: Context, tokens: int | None) -> None:
    """Say where more is served than the evidence bears out. As trained, the length is the trained one."""
    measured = file.context_measured if file else None
    if measured is None or tokens is None or length.trained_rotary or tokens <= (measured.tokens or 0):
        return
    far = f"read rightly up to {measured.tokens} tokens" if measured.tokens else "measured at no length"
    say(
        f"warning: {tokens} tokens are served; in the evidence records were {far}: beyond, it is claimed only"
    )


def api_key(name: str | None) -> str | None:
    """The key that an environment variable holds: the one named, or vLLM's own if it is set."""
    if name is None:
        return os.environ.get(API_KEY) or None
    key = os.environ.get(name)
    if not key:
        raise UsageProblem(
            f"the environment variable {name} holds no API key", "Set it, or leave the option out."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server at that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def server_for(
    chosen: Chosen, wanted: Wanted, *, name: str, host: str, port: int | None, key: str | None
) -> Server:
    """The server, not started; weights are dequantized for it if need be. `name`: of its log in the cache."""
    from packager.serving.server import Server, claim_port

    if port is not None:
        claim_port(host, port)  # before weights are converted for a server that could not start
    spec = chosen.found.spec(say)
    if key is not None:
        if wanted.engine == "sglang":
            raise BadInput("an API key can be given to vLLM only", "Put a proxy with a key before SGLang.")
        spec = replace(spec, env={**spec.env, API_KEY: key})  # never on the command line, where ps shows it
    server = Server(
        spec,
        wanted.log or chosen.found.cache / f"{name}.log",
        port=port,
        host=host,
        startup_timeout_s=wanted.startup_timeout,
        engine=wanted.engine,
        say=say,
    )
    say(f"starting {'SGLang' if wanted.engine == 'sglang' else 'vLLM'} {chosen.version} (log: {server.log})")
    return server


class Ended(KeyboardInterrupt):
    """A signal that ends the whole session, where Ctrl-C may only end an answer."""


@contextmanager
def signals_interrupt(*, interrupt: bool = True) -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C; with `interrupt`, Ctrl-C too, even where the shell has it
    ignored (`&`)."""

    def end(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise Ended

    chosen = [signal.SIGTERM, signal.SIGHUP, *([signal.SIGINT] if interrupt else [])]
    previous = {signum: signal.signal(signum, end) for signum in chosen}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
