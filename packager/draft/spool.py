"""Hidden states on-line: an engine captures them ahead of the trainer, in a folder of bounded size.

What a training step reads follows from the data, the seed and the number of the step, so the states of each
step are asked for in that order, as far ahead as the budget allows. A step's files are deleted when a
checkpoint lies behind it, never before: a killed run goes on from its checkpoint and finds every state that
it had read since. What an engine computes for one step is one request, whole, whatever was there already, so
that a state's bytes do not depend on when a run was killed. States of held-out responses are captured first
and kept.

The folder holds `spool.json` (what it is for), `kept-<index>.safetensors` and
`<step>-<index>.safetensors`. A file has its name only when it is complete, and that is how whoever waits for
it learns of it: the trainer's reader, and under `torchrun` the other processes, of which only the first asks
and deletes. There is no thread: room appears when a checkpoint is saved, and then more is asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from packager.draft.engine_process import EngineProcess
from packager.draft.states import Sample, once, schedule
from packager.draft.states_file import FILE_OVERHEAD, is_whole
from packager.errors import BadInput, RemoteFailure, UsageProblem
from packager.recipe import DraftSpec

_MARK, _LOCK = "spool.json", "lock"
_POLL_S = 0.005
_ANEW = "Delete that file and run `packager draft train` again: it is captured anew, and no step is lost."
PROOF_SAMPLES = 2
"""States that are kept at the least, held out or not: those that the layers are proved on."""


_FULL = ("No space left on device", "Disk quota exceeded")
"""How the system says so, in the log of an engine that died of it."""


class Closed(Exception):
    """Somebody waits for states that nobody will need."""


@dataclass(frozen=True)
class Unit:
    """What one training step reads."""

    step: int
    """From 0."""
    samples: tuple[Sample, ...]
    """Distinct, with their paths in the spool."""
    bytes: int
    """At most."""


@dataclass(frozen=True)
class Need:
    """Bytes that a spool has to hold at the least."""

    kept: int
    """Held-out responses."""
    interval: int
    """The steps between two checkpoints, where they take most."""
    epoch: int
    """Every training sample once: what they would take off-line."""

    @property
    def total(self) -> int:
        """The smallest budget that works."""
        return self.kept + self.interval


class Spool:
    """The folder, as the trainer sees it. Use it as a context; `open` comes first, then `begin`."""

    def __init__(
        self,
        directory: Path,
        spec: DraftSpec,
        training: Sequence[Sample],
        held: Sequence[Sample],
        *,
        bytes_per_token: int,
        taken_from: Sequence[Any],
        engine: EngineProcess | None,
    ) -> None:
        """
        Args:
            directory: made if it is not there.
            spec: fixes the order of the samples, the checkpoints and the budget.
            taken_from: JSON values that fix the states of given tokens: the target's digest, layers, dtype.
            engine: answers requests with files in `directory`; None: another process has it.
        """
        assert spec.max_states_bytes is not None
        self.directory, self.spec, self.budget = directory, spec, spec.max_states_bytes
        self._training, self._engine = training, engine
        self._per_token = bytes_per_token
        self.kept = [self._place(s, "kept") for s in [*held, *training[: max(0, PROOF_SAMPLES - len(held))]]]
        """The samples whose states stay, with their paths in the spool."""
        self.held = self.kept[: len(held)]
        """The held-out ones of them."""
        order = [spec.batch_tokens, spec.accumulate, spec.seed]
        self._marks = {
            "kept": _digest([*taken_from, _names(self.kept)]),
            "steps": _digest([*taken_from, order, _names(training)]),
        }
        self.need = self._needed()
        self._used = self.peak = 0
        self._resident: dict[int, Unit] = {}
        self._ahead: Iterator[Unit] = iter(())
        self._next: Unit | None = None
        self._closed = threading.Event()
        self._locked: IO[str] | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it takes

    def _place(self, sample: Sample, prefix: str) -> Sample:
        path = self.directory / f"{prefix}-{sample.path.name}"
        return replace(sample, path=path, passing=prefix != "kept", remedy=_ANEW)

    def _bytes(self, samples: Iterable[Sample]) -> int:
        return sum((len(sample.ids) - 1) * self._per_token + FILE_OVERHEAD for sample in samples)

    def _units(self) -> Iterator[Unit]:
        spec = self.spec
        groups = schedule(self._training, spec.batch_tokens, spec.seed) if self._training else iter(())
        for step in range(spec.steps):
            found = itertools.chain.from_iterable(itertools.islice(groups, spec.accumulate))
            # An epoch can end within a step, and the next begin with a sample that it has already.
            samples = tuple(self._place(sample, f"{step:07d}") for sample in dict.fromkeys(found))
            yield Unit(step, samples, self._bytes(samples))

    def _needed(self) -> Need:
        interval = most = 0
        for unit in self._units():
            interval += unit.bytes
            most = max(most, interval)
            if (unit.step + 1) % self.spec.checkpoint_every == 0:
                interval = 0
        return Need(self._bytes(self.kept), most, self._bytes(self._training))

    def describe(self) -> list[str]:
        """Lines for people, before anything is captured."""
        need = self.need
        lines = [
            f"on-line states take {self._per_token / 1024:.1f} KiB a token: {need.kept / 1e9:.3g} GB for "
            f"{len(self.kept)} responses that stay, up to {need.interval / 1e9:.3g} GB between two "
            f"checkpoints; the budget is {self.budget / 1e9:.3g} GB"
        ]
        if self.budget >= need.kept + need.epoch:
            lines.append(
                f"the budget holds the states of all responses, {(need.kept + need.epoch) / 1e9:.3g} GB: "
                "off-line they would be computed once, on-line they are in every epoch"
            )
        return lines

    def _require_room(self) -> None:
        need = self.need
        if need.total > self.budget:
            raise BadInput(
                f"on-line training needs {need.total} bytes for hidden states, {need.kept} for "
                f"{len(self.kept)} responses that stay and {need.interval} for the steps between two "
                f"checkpoints; the budget is {self.budget}",
                "Raise draft.max_states_bytes (--max-states-bytes), lower draft.checkpoint_every or "
                "draft.batch_tokens, or prepare fewer prompts.",
            )

    def _require_free(self, wanted: int) -> None:
        there, free = self._on_disk(), shutil.disk_usage(self.directory).free
        if wanted - there > free:
            raise BadInput(
                f"the budget for hidden states is {self.budget / 1e9:.3g} GB, {self.directory} has "
                f"{free / 1e9:.3g} GB free and holds {there / 1e9:.3g} GB of them",
                f"Free space, or lower draft.max_states_bytes: {self.need.total} bytes are needed.",
            )

    # ---- the folder

    def open(self, progress: Callable[[str], None]) -> None:
        """Make the folder one for these data and have the states captured that stay.

        Raises:
            BadInput: the budget or the disk is too small. UsageProblem: another run has the folder.
        RemoteFailure: the engine died.
        """
        if self._engine is None:
            while self._found_marks() != self._marks:
                self._pause()
        else:
            for line in self.describe():
                progress(f"draft: {line}")
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_room()
            self._lock()
            self._claim(progress)
            self._used = self.peak = self.need.kept
            self._require_free(self.need.kept)
            for group in once(self.kept, self.spec.batch_tokens):
                self._ask(group)
        self._wait(self.kept)

    def _lock(self) -> None:
        """Keep a second run out, which would delete what this one waits for; it ends with the process."""
        self._locked = (self.directory / _LOCK).open("w")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageProblem(
                f"another run trains on {self.directory}", "Wait for it, or take another work directory."
            ) from None

    def _found_marks(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.directory / _MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def _claim(self, progress: Callable[[str], None]) -> None:
        """Delete what is of no use here, what a kill left half written and what is not whole."""
        was = self._found_marks()
        expected = set()
        if was.get("kept") == self._marks["kept"]:
            expected = {sample.path.name for sample in self.kept}
        elif was:
            progress("draft: the target or the responses changed; on-line states are captured anew")
        same_steps = was.get("steps") == self._marks["steps"]
        for path in self.directory.iterdir():
            of_step = same_steps and path.suffix == ".safetensors" and not path.name.startswith("kept-")
            if path.name not in {*expected, _MARK, _LOCK} and not of_step:
                path.unlink()
        part = self.directory / f"{_MARK}.partial"
        part.write_text(json.dumps(self._marks), encoding="utf-8")
        part.replace(self.directory / _MARK)

    def _whole(self, sample: Sample) -> bool:
        """Whether the sample's file is there, to the last byte; another is deleted."""
        if is_whole(sample.path, len(sample.ids) - 1, self._per_token):
            return True
        sample.path.unlink(missing_ok=True)
        return False

    def _ask(self, samples: Sequence[Sample]) -> None:
        """Have the states of `samples` computed, and captured where there are none."""
        names = [None if self._whole(sample) else sample.path.name for sample in samples]
        if any(names):
            assert self._engine is not None
            try:
                self._engine.ask({"states": names, "prompt_ids": [list(s.ids[:-1]) for s in samples]})
            except RemoteFailure as err:
                raise self._explained(err) from None

    # ---- the trainer's side

    def begin(self, done: int) -> None:
        """The trainer goes on behind step `done`: ask for what comes, as far as the budget reaches."""
        self._ahead = itertools.dropwhile(lambda unit: unit.step < done, self._units())
        self._next = next(self._ahead, None)
        if self._engine is None:
            return
        to_come = (self.spec.steps - done) * self.need.interval
        self._require_free(min(self.budget, self.need.kept + to_come))
        units = self._reserve()
        names = {sample.path for unit in units for sample in unit.samples}
        for path in self.directory.glob("*.safetensors"):
            if path not in names and not path.name.startswith("kept-"):
                path.unlink()
        for unit in units:
            self._ask(unit.samples)

    def saved(self, done: int) -> None:
        """A checkpoint has `done` steps behind it: their states may go, and others be asked for."""
        if self._engine is None:
            return
        for step in [step for step in self._resident if step < done]:
            unit = self._resident.pop(step)
            for sample in unit.samples:
                sample.path.unlink(missing_ok=True)
            self._used -= unit.bytes
        for unit in self._reserve():
            self._ask(unit.samples)

    def _reserve(self) -> list[Unit]:
        """The next steps' states that there is room for."""
        found = []
        while self._next is not None and self._used + self._next.bytes <= self.budget:
            self._used += self._next.bytes
            self._resident[self._next.step] = self._next
            found.append(self._next)
            self._next = next(self._ahead, None)
        self.peak = max(self.peak, self._used)
        return found

    def follow(self, groups: Iterable[Sequence[Sample]], done: int) -> Iterator[list[Sample]]:
        """`groups`, the batches behind step `done`, each as soon as its states are there, with their paths.

        Raises:
            BadInput: the disk is full. RemoteFailure: the engine died. Closed: the spool was closed.
        """
        for number, group in enumerate(groups, done * self.spec.accumulate):
            found = [self._place(sample, f"{number // self.spec.accumulate:07d}") for sample in group]
            self._wait(found)
            yield found

    def _wait(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            while not sample.path.exists():
                self._pause()
                if self._engine is not None and not sample.path.exists():
                    try:
                        self._engine.check()
                    except RemoteFailure as err:
                        raise self._explained(err) from None

    def _pause(self) -> None:
        if self._closed.is_set():
            raise Closed
        time.sleep(_POLL_S)

    def _explained(self, err: RemoteFailure) -> BadInput | RemoteFailure:
        assert self._engine is not None
        again = "The same command goes on from the last checkpoint."
        log = self._engine.log.read_text("utf-8", "replace")
        if any(sign in log for sign in _FULL):
            return BadInput(
                f"the disk of {self.directory} is full: hidden states could not be written to it",
                f"Free {max(0, self.budget - self._on_disk())} bytes. {again}",
            )
        return RemoteFailure(err.message, f"{err.remedy} {again}")

    def _on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))

    def stop(self) -> None:
        """Let nobody wait any longer."""
        self._closed.set()

    def finish(self) -> None:
        """Delete the states of steps: after an early stop some lie there for nothing."""
        for path in self.directory.glob("*.safetensors"):
            if not path.name.startswith("kept-"):
                path.unlink()

    def close(self) -> None:
        """End the engine. What is in the folder stays, for a run that goes on."""
        self.stop()
        if self._engine is not None:
            self._engine.close()
        if self._locked is not None:
            self._locked.close()


def _names(samples: Sequence[Sample]) -> list[Any]:
    return [(sample.path.name, sample.prompt, sample.ids) for sample in samples]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
