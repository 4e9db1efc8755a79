"""The work directory of draft data: what it holds, for which target and settings, whether it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import BadInput
from packager.recipe import DraftSpec

PROOF = "layer_proof.json"
COMPLETE = "complete"
_TARGET = "prepared_from"
"""Holds the digest of the target that gave the responses."""


@dataclass(frozen=True)
class DraftData:
    """What `prepare` leaves in a work directory."""

    workdir: Path
    target: str
    """Digest of the target the states were taken from."""

    @property
    def responses(self) -> Path:
        """JSONL: one record a prompt, with token ids and the name of its states file."""
        return self.workdir / "responses.jsonl"

    @property
    def states(self) -> Path:
        """Directory of states files."""
        return self.workdir / "states"

    @property
    def spool(self) -> Path:
        """Directory of states files on their way, where they are taken on-line."""
        return self.workdir / "spool"

    @property
    def layer_proof(self) -> dict[str, Any]:
        """What `layer_proof.prove_layers` found; `proved` is false with a `reason` where it was not run."""
        path = self.workdir / PROOF
        if not path.exists():
            return {"proved": False, "reason": "the states were not compared with a forward"}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def states_bytes(self) -> int:
        """Bytes that the states files take."""
        return sum(path.stat().st_size for path in self.states.glob("*.safetensors"))

    def records(self) -> list[dict[str, Any]]:
        """Complete records, in the prompts' order; a torn last line counts for nothing.

        Raises:
            BadInput: nothing has been prepared here.
        """
        if not (found := self.taken()):
            raise BadInput(f"{self.workdir} holds no responses", "Run `packager draft prepare` first.")
        return found

    def taken(self) -> list[dict[str, Any]]:
        """The same, where there may be none yet."""
        found: dict[int, dict[str, Any]] = {}
        if self.responses.exists():
            for line in self.responses.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                found[record["index"]] = record
        return [found[index] for index in sorted(found)]


def prepared(workdir: Path, default: str) -> DraftData:
    """What lies in `workdir`; `default` is the target's digest where none was written down."""
    path = workdir / _TARGET
    return DraftData(workdir, path.read_text(encoding="utf-8") if path.exists() else default)


def claim(data: DraftData, key: str, progress: Callable[[str], None]) -> None:
    """Make the work directory one for `key`; what was taken under another key is of no use."""
    data.workdir.mkdir(parents=True, exist_ok=True)
    mark = data.workdir / "prepared_for"
    if mark.exists() and mark.read_text(encoding="utf-8") != key:
        progress(
            "draft: the target, the prompts or the sampling changed; responses and states are taken anew"
        )
        mark.unlink()
    if not mark.exists():
        for directory in (data.states, data.spool):
            shutil.rmtree(directory, ignore_errors=True)
        for name in ("responses.jsonl", COMPLETE, PROOF, "prompts.jsonl", "job.json"):
            (data.workdir / name).unlink(missing_ok=True)
        (data.workdir / _TARGET).write_text(data.target, encoding="utf-8")
        mark.write_text(key, encoding="utf-8")
    data.states.mkdir(exist_ok=True)
    if data.responses.exists():  # cut a line that a kill tore, so that the next one starts on its own
        whole = data.responses.read_bytes()
        data.responses.write_bytes(whole[: whole.rfind(b"\n") + 1])
    named = {record["states"] for record in data.taken()}
    for path in data.states.iterdir():  # of requests that a kill cut off; they would count against the budget
        if path.name not in named:
            path.unlink()


def drop_torn(data: DraftData, per_token: int, progress: Callable[[str], None]) -> None:
    """Forget the responses whose states are missing or cut short, so that they are taken again."""
    taken, kept = data.taken(), []
    for record in taken:
        path = data.states / record["states"]
        tokens = len(record["prompt_ids"]) + len(record["response_ids"]) - 1
        if path.exists() and path.stat().st_size > tokens * per_token:
            kept.append(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            path.unlink(missing_ok=True)
    if len(kept) < len(taken):
        progress(f"draft: {len(taken) - len(kept)} responses without whole states are taken again")
        partial = data.responses.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(data.responses)
        (data.workdir / COMPLETE).unlink(missing_ok=True)


def is_complete(data: DraftData, spec: DraftSpec) -> bool:
    """Whether there is nothing left to take: everything is there, or what the budget allowed.

    Raises:
        BadInput: the states that are there exceed the budget.
    """
    budget, used = None if spec.states == "online" else spec.max_states_bytes, data.states_bytes()
    if budget is not None and used > budget:
        raise BadInput(
            f"the states in {data.workdir} take {used} bytes, the budget is {budget}",
            "Raise draft.max_states_bytes, or delete that directory to take fewer.",
        )
    mark = data.workdir / COMPLETE
    if not mark.exists():
        return False
    stopped = json.loads(mark.read_text(encoding="utf-8") or "{}").get("stopped_at_bytes")
    return stopped is None or (budget is not None and budget <= stopped)
