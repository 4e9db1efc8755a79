"""Responses and hidden states from the served target, in a child process that runs vLLM once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.artifact import is_sealed, read_manifest
from packager.checkpoint.source import Checkpoint
from packager.draft.config import check_aux_layers
from packager.errors import BadInput, RemoteFailure
from packager.recipe import DraftSpec

_LOG_TAIL = 15
_REMEDY = 'Give JSONL with one chat a line: {"messages": [{"role": "user", "content": …}]}.'


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

    def records(self) -> list[dict[str, Any]]:
        """Complete records, in the prompts' order; a torn last line counts for nothing.

        Raises:
            BadInput: nothing has been prepared here.
        """
        found: dict[int, dict[str, Any]] = {}
        if self.responses.exists():
            for line in self.responses.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                found[record["index"]] = record
        if not found:
            raise BadInput(f"{self.workdir} holds no responses", "Run `packager draft prepare` first.")
        return [found[index] for index in sorted(found)]


def target_digest(target: Path) -> str:
    """Identity of the target: of its manifest if it is a sealed artifact, else of its bytes."""
    return read_manifest(target).digest if is_sealed(target) else Checkpoint.open(target).digest()


def read_prompts(lines: Iterable[str], where: str) -> list[dict[str, Any]]:
    """Prompts from JSONL: `messages`, and optionally `id`, `task`, `language`; equal messages count once.

    Raises:
        BadInput: a line is not JSON or its messages are not a chat that ends with the user; or there is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as err:
            raise BadInput(f"{where}, line {number} is not JSON: {err}", _REMEDY) from None
        messages = raw.get("messages") if isinstance(raw, dict) else None
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise BadInput(f"{where}, line {number} has no `messages` of role and content", _REMEDY)
        if messages[-1]["role"] == "assistant":  # a finished chat: the target answers it anew
            messages = messages[:-1]
        if not messages or messages[-1]["role"] == "system":
            raise BadInput(f"{where}, line {number}: nobody asks anything", _REMEDY)
        key = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        found.setdefault(
            key,
            {
                "id": str(raw.get("id", hashlib.sha256(key.encode()).hexdigest()[:16])),
                "messages": messages,
                "task": str(raw.get("task", "general")),
                "language": str(raw.get("language", "unknown")),
            },
        )
    if not found:
        raise BadInput(f"{where} holds no prompts", _REMEDY)
    return list(found.values())


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def engine_environment() -> dict[str, str]:
    """This process's environment, with what vLLM needs on a CPU where nothing else is set."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"  # vLLM's CPU build is slow without it
    if openmp.exists():
        wanted["LD_PRELOAD"] = str(openmp)
    return wanted | dict(os.environ)


def prepare(
    target: Path,
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    workdir: Path,
    progress: Callable[[str], None],
    *,
    engine: Mapping[str, Any] | None = None,
) -> DraftData:
    """Greedy responses of `target` to `prompts[: spec.prompts]`, and its states at their tokens.

    What `workdir` holds for the same target, layers, length and prompts is kept; for others it is discarded.
    `engine`: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        BadInput: the target is no checkpoint, its layers are not those of the spec, no prompts, or too little
        disk. RemoteFailure: the engine died; the message ends with its log's tail.
    """
    checkpoint = Checkpoint.open(target)
    config = checkpoint.config()
    check_aux_layers(spec.aux_layers, config["num_hidden_layers"])
    if not prompts:
        raise BadInput("no prompts to prepare a draft from")
    chosen = [{"index": index, **prompt} for index, prompt in enumerate(prompts[: spec.prompts])]
    digest = target_digest(target)
    layers = (*spec.aux_layers, config["num_hidden_layers"])
    data = DraftData(workdir, digest)
    key = hashlib.sha256(
        json.dumps([digest, layers, spec.max_response_tokens, chosen], sort_keys=True).encode()
    ).hexdigest()
    _claim(data, key, progress)

    have = {record["index"] for record in data.records()} if data.responses.exists() else set()
    wanted = [prompt for prompt in chosen if prompt["index"] not in have]
    if not wanted or (workdir / "complete").exists():
        progress(f"draft: {len(have)} responses and their states are there")
        return data
    per_token = len(layers) * config["hidden_size"] * 2
    _check_disk(workdir, per_token, len(wanted), spec.max_response_tokens, progress)
    _write_lines(workdir / "prompts.jsonl", wanted)
    job = {
        "target": str(target.resolve()),
        "prompts": str(workdir / "prompts.jsonl"),
        "responses": str(data.responses),
        "states": str(data.states),
        "layers": layers,
        "max_response_tokens": spec.max_response_tokens,
        "engine": dict(engine or {}),
    }
    (workdir / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run_child(workdir / "job.json", workdir / "capture.log", len(have), progress)
    (workdir / "complete").touch()
    return data


def _claim(data: DraftData, key: str, progress: Callable[[str], None]) -> None:
    """Make the work directory one for `key`; what was taken under another key is of no use."""
    data.workdir.mkdir(parents=True, exist_ok=True)
    mark = data.workdir / "prepared_for"
    if mark.exists() and mark.read_text(encoding="utf-8") != key:
        progress("draft: the target or the prompts changed; responses and states are taken anew")
        mark.unlink()
    if not mark.exists():
        shutil.rmtree(data.states, ignore_errors=True)
        for name in ("responses.jsonl", "complete", "prompts.jsonl", "job.json"):
            (data.workdir / name).unlink(missing_ok=True)
        mark.write_text(key, encoding="utf-8")
    data.states.mkdir(exist_ok=True)
    if data.responses.exists():  # cut a line that a kill tore, so that the next one starts on its own
        whole = data.responses.read_bytes()
        data.responses.write_bytes(whole[: whole.rfind(b"\n") + 1])


def _check_disk(
    workdir: Path, per_token: int, prompts: int, response: int, progress: Callable[[str], None]
) -> None:
    """Say what the states will take. The prompts' own length is not known yet, so responses count twice."""
    need = per_token * prompts * 2 * response
    free = shutil.disk_usage(workdir).free
    progress(f"draft: states take {per_token / 1024:.1f} KiB a token, about {need / 1e9:.2f} GB in all")
    if need > free:
        raise BadInput(
            f"hidden states need about {need / 1e9:.1f} GB, {workdir} has {free / 1e9:.1f} GB free",
            "Free space, choose another workspace, or lower draft.prompts.",
        )


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _run_child(job: Path, log: Path, done_before: int, progress: Callable[[str], None]) -> None:
    """Run `packager.draft.capture`; it ends with this process, whose pipe it watches."""
    command = [sys.executable, "-m", "packager.draft.capture", str(job)]
    with log.open("wb") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=engine_environment()
        )
        assert child.stdout is not None and child.stdin is not None
        try:
            for raw in child.stdout:
                line = raw.decode(errors="replace")
                if line.startswith("@ "):
                    done, total = map(int, line[2:].split())
                    progress(
                        f"draft: {done_before + done}/{done_before + total} responses with hidden states"
                    )
                else:
                    errors.write(raw)
        finally:
            child.stdin.close()
            code = child.wait()
    if code:
        tail = "\n".join(
            "  | " + line for line in log.read_text("utf-8", "replace").splitlines()[-_LOG_TAIL:]
        )
        raise RemoteFailure(
            f"the engine that generates responses died with exit code {code}\n{tail}",
            f"The whole log is {log}.",
        )
