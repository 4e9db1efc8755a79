"""Responses and hidden states from the served target, in a child process that runs vLLM once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packager.artifact import is_sealed, read_manifest
from packager.checkpoint.source import Checkpoint
from packager.draft.config import check_aux_layers
from packager.draft.engine_process import death, engine_environment
from packager.draft.layer_proof import describe, prove_layers
from packager.draft.prompts import context_length, tokenize
from packager.draft.states_file import FILE_OVERHEAD, bytes_per_token
from packager.draft.workdir import COMPLETE, PROOF, DraftData, claim, drop_torn, is_complete
from packager.errors import BadInput
from packager.recipe import DraftSpec

__all__ = ["DraftData", "engine_environment", "prepare", "target_digest"]


def target_digest(target: Path) -> str:
    """Identity of the target: of its manifest if it is a sealed artifact, else of its bytes."""
    return read_manifest(target).digest if is_sealed(target) else Checkpoint.open(target).digest()


def prepare(
    target: Path,
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    workdir: Path,
    progress: Callable[[str], None],
    *,
    engine: Mapping[str, Any] | None = None,
) -> DraftData:
    """Responses of `target` to `prompts[: spec.prompts]`, and its states at their tokens.

    What `workdir` holds for the same target, layers, length, sampling, states dtype and prompts is kept,
    responses whose states file is missing or cut short excepted; for others it is discarded.

    With `spec.states` on-line responses alone are taken, and their states while training. Off-line, under a
    disk budget (`spec.max_states_bytes`) capturing stops before a response that might exceed it: how
    long responses get is not known beforehand, and what fits is a data set as good as a shorter list of
    prompts. Called again it does nothing more, unless the budget was raised.

    The captured layers are proved (`packager.draft.layer_proof`) on the first responses, while the others are
    generated.

    Args:
        target: the checkpoint to serve.
        spec: what to take.
        prompts: mappings with `id`, `messages`, `task`, `language`.
        workdir: where responses and states go.
        progress: gets a line now and then.
        engine: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        BadInput: the target is no checkpoint, its layers are not those of the spec, no prompts or none that
        the target can answer, or too little disk. RemoteFailure: the engine died (the message ends with its
        log's tail), or its states are those of other layers.
    """
    checkpoint = Checkpoint.open(target)
    config = checkpoint.config()
    check_aux_layers(spec.aux_layers, config["num_hidden_layers"])
    if not prompts:
        raise BadInput("no prompts to prepare a draft from")
    chosen = [{"index": index, **prompt} for index, prompt in enumerate(prompts[: spec.prompts])]
    if len(chosen) < spec.prompts:
        progress(f"draft: {spec.prompts} prompts were asked for, {len(chosen)} distinct ones are there")
    digest = target_digest(target)
    layers = (*spec.aux_layers, config["num_hidden_layers"])
    data = DraftData(workdir, digest)
    sampling = [spec.temperature, spec.top_p, spec.response_seed] if spec.temperature else "greedy"
    key = [digest, layers, spec.max_response_tokens, sampling, spec.states_dtype, chosen]
    claim(data, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(), progress)

    per_token = bytes_per_token(len(layers), config["hidden_size"], spec.states_dtype)
    online = spec.states == "online"
    if not online:
        drop_torn(data, per_token, progress)
    elif there := data.states_bytes():
        progress(
            f"draft: {data.states} holds {there / 1e9:.3g} GB of states that on-line training does not read"
        )

    def prove() -> None:
        if not online:
            prove_once(data, target, layers, data.records(), data.states, progress)

    have = {record["index"] for record in data.taken()}
    if is_complete(data, spec):
        progress(f"draft: {len(have)} responses {'' if online else 'and their states '}are there")
        return data
    (workdir / COMPLETE).unlink(missing_ok=True)
    wanted = [prompt for prompt in chosen if prompt["index"] not in have]
    if wanted:
        length = context_length(target, config, engine or {})
        found = tokenize(wanted, target, length=length, vocabulary=config["vocab_size"])
        if found.too_long:
            progress(
                f"draft: {len(found.too_long)} prompts leave no room within the {length} tokens that the "
                f"target serves and are skipped (the longest has {max(found.too_long)} tokens)"
            )
        if online:
            _plan_spool(spec, found.prompts, per_token, length, progress)
        else:
            _plan_disk(data, spec, found.prompts, per_token, length, progress)
        _write_lines(workdir / "prompts.jsonl", found.prompts)
        job = {
            "target": str(target.resolve()),
            "prompts": str(workdir / "prompts.jsonl"),
            "responses": str(data.responses),
            "states": None if online else str(data.states),
            "layers": layers,
            "max_response_tokens": spec.max_response_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "response_seed": spec.response_seed,
            "states_dtype": spec.states_dtype,
            "bytes_per_token": per_token,
            "max_states_bytes": None if online else spec.max_states_bytes,
            "engine": {"max_model_len": length, **(engine or {})},
        }
        (workdir / "job.json").write_text(json.dumps(job), encoding="utf-8")
        log, what = workdir / "capture.log", "responses" if online else "responses with hidden states"
        _run_child(workdir / "job.json", log, len(have), progress, prove, what)
        wanted = found.prompts
    prove()
    taken = len(data.records()) - len(have)
    stopped = spec.max_states_bytes if taken < len(wanted) and not online else None
    if stopped is not None:
        progress(
            f"draft: stopped within the budget of {stopped / 1e9:.3g} GB: {len(have) + taken} responses, "
            f"{data.states_bytes() / 1e9:.3g} GB of states; {len(wanted) - taken} prompts got none"
        )
    (workdir / COMPLETE).write_text(json.dumps({"stopped_at_bytes": stopped}), encoding="utf-8")
    return data


def prove_once(
    data: DraftData,
    target: Path,
    layers: Sequence[int],
    records: Sequence[Mapping[str, Any]],
    directory: Path,
    progress: Callable[[str], None],
) -> None:
    """Prove the layer ids on the states of `records` in `directory`, if that has not been done."""
    if (data.workdir / PROOF).exists():
        return
    proof = prove_layers(target, layers, records, directory)
    for line in describe(proof):
        progress(f"draft: {line}")
    partial = data.workdir / (PROOF + ".partial")
    partial.write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    partial.replace(data.workdir / PROOF)


def _plan_disk(
    data: DraftData,
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    per_token: int,
    length: int,
    progress: Callable[[str], None],
) -> None:
    """Say what the states will take, and refuse what cannot be kept.

    Raises:
        BadInput: the disk or the budget is too small.
    """
    asked = [len(prompt["prompt_ids"]) for prompt in prompts]
    most = [
        per_token * (tokens + min(spec.max_response_tokens, length - tokens)) + FILE_OVERHEAD
        for tokens in asked
    ]
    used, budget = data.states_bytes(), spec.max_states_bytes
    least, need = per_token * sum(asked), sum(most)
    free = shutil.disk_usage(data.workdir).free
    progress(
        f"draft: states take {per_token / 1024:.1f} KiB a token in {spec.states_dtype}: {sum(asked)} prompt "
        f"tokens are {least / 1e9:.3g} GB, with responses of up to {spec.max_response_tokens} tokens at most "
        f"{need / 1e9:.3g} GB in all"
    )
    remedy = "Free space, choose another workspace, or lower draft.prompts or draft.max_states_bytes."
    if budget is not None:
        if not used and most[0] > budget:
            raise BadInput(
                f"a response and its states may take {most[0]} bytes, the budget is {budget}",
                "Raise draft.max_states_bytes or lower draft.max_response_tokens.",
            )
        if used + need > budget:
            fit = int(len(most) * (budget - used) / need)
            progress(
                f"draft: the budget is {budget / 1e9:.3g} GB; it holds {fit} of {len(most)} responses or more"
            )
        need = min(need, budget - used)
    if need > free:
        raise BadInput(
            f"hidden states need up to {need / 1e9:.3g} GB, {data.workdir} has {free / 1e9:.3g} GB free",
            remedy,
        )


def _plan_spool(
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    per_token: int,
    length: int,
    progress: Callable[[str], None],
) -> None:
    """Say what states taken on-line will need, as far as that is known before the responses are.

    Raises:
        BadInput: the budget does not even hold the held-out prompts.
    """
    from packager.draft.states import held_out

    budget = spec.max_states_bytes
    assert budget is not None
    asked = [len(prompt["prompt_ids"]) for prompt in prompts if held_out(prompt["id"])]
    least = per_token * sum(asked)
    most = least + per_token * sum(min(spec.max_response_tokens, length - tokens) for tokens in asked)
    between = per_token * spec.checkpoint_every * spec.accumulate * spec.batch_tokens
    progress(
        f"draft: states take {per_token / 1024:.1f} KiB a token in {spec.states_dtype}; on-line those of "
        f"{len(asked)} held-out prompts stay, {least / 1e9:.3g} GB and with responses at most "
        f"{most / 1e9:.3g} GB, beside {between / 1e9:.3g} GB or less between two checkpoints; the budget is "
        f"{budget / 1e9:.3g} GB"
    )
    if least > budget:
        raise BadInput(
            f"the states of the held-out prompts take more than {least} bytes, the budget is {budget}",
            "Raise draft.max_states_bytes (--max-states-bytes) or lower draft.prompts.",
        )


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _run_child(
    job: Path,
    log: Path,
    done_before: int,
    progress: Callable[[str], None],
    on_first: Callable[[], None],
    what: str = "responses with hidden states",
) -> None:
    """Run `packager.draft.capture`; it ends with this process, whose pipe it watches.

    `on_first` is called once the first responses are there, and may raise to end the child.
    """
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
                    if done:
                        on_first()
                    progress(f"draft: {done_before + done}/{done_before + total} {what}")
                else:
                    errors.write(raw)
        finally:
            child.stdin.close()
            code = child.wait()
    if code:
        raise death(code, log)
