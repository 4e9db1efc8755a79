"""Child process: one vLLM engine writes responses and the hidden states that produced them.

`python -m packager.draft.capture JOB.json`. States are taken while the tokens are generated, so nothing is
computed twice and the engine starts once. A line goes into `responses.jsonl` only when the states file it
names is complete, so a killed run keeps every finished chunk. Under a disk budget a request starts only if
the budget holds its states at their longest. Progress: lines `@ <done> <total>` on stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from packager.draft.states_file import FILE_OVERHEAD
from packager.recipe import StatesDtype

FIRST_CHUNK = 8
"""Few, so that the layers are proved before much is taken."""
CHUNK = 256
"""Prompts handed to the engine at once; a kill loses at most one chunk."""
_FLUSH_TIMEOUT_S = 60.0


class EngineJob(BaseModel):
    """An engine that captures. Paths are strings because a job crosses a process boundary as JSON."""

    target: str
    states: str | None
    """Directory of states files; None: nothing is captured."""
    layers: tuple[int, ...]
    """Layer ids whose inputs are captured; the number of layers stands for the last layer's output."""
    states_dtype: StatesDtype = "bfloat16"
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`."""


class CaptureJob(EngineJob):
    """What to generate."""

    prompts: str
    """JSONL: `index`, `id`, `task`, `language`, `prompt_ids`."""
    responses: str
    """JSONL appended to."""
    max_response_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    response_seed: int = 0
    bytes_per_token: int
    """Of a states file."""
    max_states_bytes: int | None = None
    """What the states files may take together; None: no bound."""


def open_engine(job: EngineJob, *, sampled: bool = False) -> Any:
    """The `vllm.LLM` of a job. `sampled`: requests have a temperature."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # One process: no second copy of the weights, and the end of this process is the end of the engine.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    options: dict[str, Any] = {"max_num_seqs": 128, "seed": 0, "disable_log_stats": True}
    if current_platform.is_cpu():
        options["enforce_eager"] = (
            True  # compiling takes longer than the small models that run here need in all
        )
        if sampled:
            # Behind a part of a prompt vLLM 0.32 rewinds the request's generator, which a CPU's cannot: the
            # engine would die. Whole prompts need room for the longest.
            room = max(4096, job.engine.get("max_model_len", 0))
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": room}
            _mend_cpu_sampling()
    if job.states is not None:
        # A shared prefix block would be computed once and its states would be missing from the later
        # requests.
        options["enable_prefix_caching"] = False
        options["speculative_config"] = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(job.layers)}},
        }
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="HiddenStatesConnector",
            kv_connector_module_path="packager.draft.connector",
            kv_role="kv_producer",
            kv_connector_extra_config={"directory": job.states, "dtype": job.states_dtype},
        )
    return LLM(model=job.target, **options | job.engine)


def run(job: CaptureJob) -> None:
    """Generate what is not generated yet.

    Raises:
        TimeoutError: vLLM finished requests without writing their states.
    """
    records = [json.loads(line) for line in Path(job.prompts).read_text(encoding="utf-8").splitlines()]
    llm = open_engine(job, sampled=job.temperature > 0)
    limit = llm.llm_engine.model_config.max_model_len
    states = None if job.states is None else Path(job.states)
    used = sum(path.stat().st_size for path in states.glob("*.safetensors")) if states else 0
    done, begin = 0, 0
    print(f"@ 0 {len(records)}", flush=True)
    with Path(job.responses).open("a", encoding="utf-8") as out:
        while begin < len(records):
            chunk = _affordable(job, records[begin : begin + (CHUNK if begin else FIRST_CHUNK)], limit, used)
            if not chunk:
                break
            begin += len(chunk)
            outputs = llm.generate(
                [{"prompt_token_ids": record["prompt_ids"]} for record in chunk],
                [_sampling(job, record, limit) for record in chunk],
                use_tqdm=False,
            )
            files = [states / _file(record) for record in chunk] if states else []
            flush(llm, files)
            for record, output in zip(chunk, outputs, strict=True):
                row = {
                    "index": record["index"],
                    "id": record["id"],
                    "task": record["task"],
                    "language": record["language"],
                    "prompt_ids": list(output.prompt_token_ids),
                    "response_ids": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                    "states": _file(record),
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
            used += sum(file.stat().st_size for file in files)
            done += len(chunk)
            print(f"@ {done} {len(records)}", flush=True)


def _mend_cpu_sampling() -> None:
    """Give vLLM's rejection sampler its temperatures on a CPU.

    vLLM 0.32 (vllm/utils/cpu_triton_utils.py, `_expand_kernel_impl`) writes a request's temperature and top_p
    into an int64 copy that is thrown away, and samples at whatever was in memory: texts that never end.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        values = x.masked_fill(x == replace_from, replace_to)
        return values.repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand


def _room(job: CaptureJob, record: dict[str, Any], limit: int) -> int:
    """Most tokens of a response."""
    return min(job.max_response_tokens, limit - len(record["prompt_ids"]))


def _affordable(
    job: CaptureJob, records: list[dict[str, Any]], limit: int, used: int
) -> list[dict[str, Any]]:
    """The records up to the first whose states, at their longest, the budget might not hold.

    A shorter one behind it is not preferred: that would leave the long prompts out of the data.
    """
    if job.max_states_bytes is None:
        return records
    for number, record in enumerate(records):
        tokens = len(record["prompt_ids"]) + _room(job, record, limit)
        used += tokens * job.bytes_per_token + FILE_OVERHEAD
        if used > job.max_states_bytes:
            return records[:number]
    return records


def _file(record: dict[str, Any]) -> str:
    return f"{record['index']:06d}.safetensors"


def _seed(job: CaptureJob, record: dict[str, Any]) -> int:
    """A request's own seed, so that what is drawn for it does not depend on the requests before it."""
    return int.from_bytes(hashlib.sha256(f"{job.response_seed}|{record['id']}".encode()).digest()[:4], "big")


def _sampling(job: CaptureJob, record: dict[str, Any], limit: int) -> Any:
    from vllm import SamplingParams

    drawn = {"top_p": job.top_p, "seed": _seed(job, record)} if job.temperature else {}
    return SamplingParams(
        temperature=job.temperature,
        max_tokens=_room(job, record, limit),
        extra_args=None if job.states is None else {"kv_transfer_params": {"states_file": _file(record)}},
        **drawn,
    )


def flush(llm: Any, files: list[Path]) -> None:
    """The states of the last requests are written with the engine's next step, which nobody else would
    start."""
    deadline = time.monotonic() + _FLUSH_TIMEOUT_S
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"vLLM wrote no states for {len(missing)} requests, the first {missing[0].name}"
            )
        llm.llm_engine.step()
        time.sleep(0.01)


def _end_with_parent() -> None:
    """Leave at once when the parent's pipe closes: an engine nobody waits for must not hold the machine."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    run(CaptureJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
