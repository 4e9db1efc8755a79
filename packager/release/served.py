"""Directories made servable on this machine, and servers that start when they are first asked something."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from packager.artifact import MANIFEST_NAME, is_sealed, read_manifest

if TYPE_CHECKING:
    from packager.serving import Server, ServeSpec
    from packager.serving.cpu import Device
    from packager.serving.serve_file import Context
    from validation.endpoint import Target

Say = Callable[[str], None]
STARTUP_TIMEOUT_S = 1800.0
"""Reading 200 GB from a slow disk takes this long; an engine that dies is noticed at once."""
_DEATH_S = 1.0
"""A server's port closes this much before its process is gone, at most."""


def cache_directory() -> Path:
    """Where dequantized weights and views are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-packager"


def dequantize_files(model: Path, out: Path) -> None:
    """Dequantize `model` into `out`, through a folder of links to the checkpoint's own files.

    A bundle holds more than a checkpoint (a signature beside its seal, a card, a draft), which nothing that
    reads checkpoints has to know.
    """
    from packager.checkpoint.source import SIDE_SUFFIXES
    from packager.quantize import dequantize

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="checkpoint-") as view:
        for file in model.iterdir():
            if file.suffix in (".safetensors", *SIDE_SUFFIXES) and file.name != MANIFEST_NAME:
                (Path(view) / file.name).symlink_to(file.resolve())
        dequantize(Path(view), out)


@dataclass(frozen=True)
class Servable:
    """A bundle or checkpoint as it is to be served here; nothing is written before `spec` is called."""

    stored: ServeSpec
    """Naming the directory's own weights."""
    context: Context
    cache: Path
    why_dequantized: str
    """Why this machine serves the weights dequantized, in a sentence; empty: as they are stored."""

    @cached_property
    def digest(self) -> str:
        """Of the stored weights; of a bundle, of all of it."""
        from packager.checkpoint.source import Checkpoint

        model = self.stored.model
        return read_manifest(model).digest if is_sealed(model) else Checkpoint.open(model).digest()

    @property
    def subject(self) -> str:
        """Digest of what is served, and how; it binds evidence."""
        parts = [self.digest]
        if self.stored.draft is not None:
            # A bundle's digest covers its draft; this tells it from the same bundle served without.
            parts.append(f"draft x{self.stored.num_speculative_tokens}")
        if self.why_dequantized:
            parts.append("dequantized")
        if self.context.trained_rotary:
            parts.append("trained rotary")
        return ":".join(parts)

    @property
    def dequantized(self) -> Path:
        """A folder of the cache named for the weights' identity: other weights never hit it."""
        return self.cache / "dequantized" / self.digest.removeprefix("sha256:")[:24]

    @property
    def ready(self) -> bool:
        """Whether no weights have to be converted first."""
        return not self.why_dequantized or is_sealed(self.dequantized)

    def spec(self, say: Say = lambda _: None, *, make: bool = True) -> ServeSpec:
        """What an engine is started with; `make` False: only named, nothing is written."""
        spec = self.stored
        if self.why_dequantized:
            spec = replace(spec, model=self.dequantized)
            if make and not self.ready:
                say(f"{self.why_dequantized}; dequantizing to BF16 in {self.dequantized}")
                dequantize_files(self.stored.model, self.dequantized)
        return self._as_trained(spec, make and self.ready) if self.context.trained_rotary else spec

    def _as_trained(self, spec: ServeSpec, make: bool) -> ServeSpec:
        """With model and draft at their trained length, by links in a folder of the cache."""
        from packager.context import trained_view

        # Named for where the bundle is and what it says.
        parts = [str(self.stored.model), str(spec.model)]
        parts.append((self.stored.model / "config.json").read_text(encoding="utf-8"))
        if spec.draft is not None:
            parts.append((spec.draft / "config.json").read_text(encoding="utf-8"))
        view = self.cache / "trained" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        draft = None
        if spec.draft is not None:
            draft = trained_view(spec.draft, view / "draft") if make else view / "draft"
        model = trained_view(spec.model, view / "model") if make else view / "model"
        return replace(spec, model=model, draft=draft)


def servable(
    directory: Path,
    *,
    profile: str | None = None,
    with_draft: bool = True,
    context: str | None = None,
    cache: Path | None = None,
    target: Device | None = None,
) -> Servable:
    """How a bundle's or checkpoint's folder is served on `target`; None: on this machine.

    Raises:
        BadInput: neither a bundle nor a checkpoint.
        UsageProblem: a profile or context that it does not have.
    """
    from packager.serving.cpu import fp8_runs_here
    from packager.serving.serve_file import context_for, is_fp8, spec_for

    directory = directory.resolve()
    spec = spec_for(directory, profile=profile, with_draft=with_draft, target=target)
    length = context_for(directory, context)
    if length.max_model_len is not None:
        spec = replace(spec, max_model_len=length.max_model_len)
    spec.check()
    # GPUs serve every form that is made here as it is stored.
    runs, reason = (True, "") if target == "cuda" else fp8_runs_here()
    return Servable(
        stored=spec,
        context=length,
        cache=(cache or cache_directory()).resolve(),
        why_dequantized=reason if is_fp8(spec.model) and not runs else "",
    )


@dataclass
class Served:
    """One model; its server starts at the first question, so that cached measurements start none."""

    label: str
    subject: str
    """Digest of what is served, and how."""
    tokenizer: Path
    log: Path
    spec: Callable[[], ServeSpec]
    say: Say
    name: str = "model"
    _server: Server | None = field(default=None, init=False)

    def url(self) -> str:
        """Base URL of the running server; starts it if need be."""
        if self._server is None:
            from packager.serving import Server

            self.say(f"serving {self.label}")
            self.log.parent.mkdir(parents=True, exist_ok=True)
            server = Server(self.spec(), self.log, startup_timeout_s=STARTUP_TIMEOUT_S)
            server.start()
            self._server = server
        return self._server.url

    def target(self, cache: Path, label: str | None = None) -> Target:
        """What measurements take: this model, its answers kept in `cache`, called `label` if given."""
        from validation.endpoint import Target

        return Target(self.url, self.name, self.subject, label or self.label, cache)

    def stop(self) -> None:
        """Stop the server if it runs."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @contextlib.contextmanager
    def running(self) -> Iterator[Served]:
        """Stop the server at the end, whatever happens.

        Raises:
            RemoteFailure: the server died under a measurement; with the cause from its log.
        """
        from validation.errors import ServerUnreachable

        try:
            yield self
        except ServerUnreachable:
            deadline = time.monotonic() + _DEATH_S
            while self._server is not None and time.monotonic() < deadline:
                self._server.check_alive()
                time.sleep(0.05)
            raise
        finally:
            self.stop()
