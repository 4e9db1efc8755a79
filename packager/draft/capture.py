"""Child process: one vLLM engine writes greedy responses and the hidden states that produced them.

`python -m packager.draft.capture JOB.json`. States are taken while the tokens are generated, so nothing is
computed twice and the engine starts once. A line goes into `responses.jsonl` only when the states file it
names is complete, so a killed run keeps every finished chunk. Progress: lines `@ <done> <total>` on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

CHUNK = 256
"""Prompts handed to the engine at once; a kill loses at most one chunk."""
_FLUSH_TIMEOUT_S = 60.0


class CaptureJob(BaseModel):
    """What to generate. Paths are strings because the job crosses a process boundary as JSON."""

    target: str
    prompts: str
    """JSONL: `index`, `id`, `messages`, `task`, `language`."""
    responses: str
    """JSONL appended to."""
    states: str
    """Directory of states files."""
    layers: tuple[int, ...]
    """Layer ids whose inputs are captured; the number of layers stands for the last layer's output."""
    max_response_tokens: int
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`."""


def run(job: CaptureJob) -> None:
    """Generate what is not generated yet.

    Raises:
        TimeoutError: vLLM finished requests without writing their states.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # One process: no second copy of the weights, and the end of this process is the end of the engine.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    records = [json.loads(line) for line in Path(job.prompts).read_text(encoding="utf-8").splitlines()]
    options: dict[str, Any] = {"max_num_seqs": 128, "seed": 0, "disable_log_stats": True}
    if current_platform.is_cpu():
        options["enforce_eager"] = (
            True  # compiling takes longer than the small models that run here need in all
        )
    options |= job.engine
    llm = LLM(
        model=job.target,
        # A shared prefix block would be computed once and its states would be missing from the later
        # requests.
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(job.layers)}},
        },
        kv_transfer_config=KVTransferConfig(
            kv_connector="HiddenStatesConnector",
            kv_connector_module_path="packager.draft.connector",
            kv_role="kv_producer",
            kv_connector_extra_config={"directory": job.states},
        ),
        **options,
    )
    tokenizer = llm.get_tokenizer()
    limit = llm.llm_engine.model_config.max_model_len
    print(f"@ 0 {len(records)}", flush=True)
    with Path(job.responses).open("a", encoding="utf-8") as out:
        for start in range(0, len(records), CHUNK):
            chunk, prompts, params = [], [], []
            for record in records[start : start + CHUNK]:
                ids = tokenizer.apply_chat_template(
                    record["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
                )
                room = limit - len(ids)
                if room < 2:  # nothing to draft
                    continue
                chunk.append(record)
                prompts.append({"prompt_token_ids": ids})
                params.append(
                    SamplingParams(
                        temperature=0.0,
                        max_tokens=min(job.max_response_tokens, room),
                        extra_args={
                            "kv_transfer_params": {"states_file": f"{record['index']:06d}.safetensors"}
                        },
                    )
                )
            outputs = llm.generate(prompts, params, use_tqdm=False)
            files = [f"{record['index']:06d}.safetensors" for record in chunk]
            _flush(llm, [Path(job.states) / file for file in files])
            for record, file, output in zip(chunk, files, outputs, strict=True):
                row = {
                    "index": record["index"],
                    "id": record["id"],
                    "task": record["task"],
                    "language": record["language"],
                    "prompt_ids": list(output.prompt_token_ids),
                    "response_ids": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                    "states": file,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
            print(f"@ {min(start + CHUNK, len(records))} {len(records)}", flush=True)


def _flush(llm: Any, files: list[Path]) -> None:
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
