"""Child process: one vLLM engine computes the hidden states of given tokens, as it is asked for them.

`python -m packager.draft.producer JOB.json`. A line on stdin is a request: `prompt_ids`, a list of token id
lists, and `states`, for each the name of its file or null. All of a request are computed, in one call and in
their order, and those with a name are captured: so the bytes of a file do not depend on which others were
there already. The process ends when stdin closes.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from packager.draft.capture import EngineJob, flush, open_engine


def serve(job: EngineJob, requests: queue.Queue[dict[str, Any]]) -> None:
    """Compute one request after the other, for ever.

    Raises:
        TimeoutError: vLLM finished requests without writing their states.
    """
    from vllm import SamplingParams

    assert job.states is not None
    llm = open_engine(job)
    while True:
        request = requests.get()
        llm.generate(
            [{"prompt_token_ids": ids} for ids in request["prompt_ids"]],
            [
                # The one token that is generated was never an input: the states are those of the prompt.
                SamplingParams(
                    temperature=0.0,
                    max_tokens=1,
                    extra_args={"kv_transfer_params": {"states_file": name}} if name else None,
                )
                for name in request["states"]
            ],
            use_tqdm=False,
        )
        flush(llm, [Path(job.states) / name for name in request["states"] if name])


def _read(requests: queue.Queue[dict[str, Any]]) -> None:
    """Pass on what is asked, and end the process with its parent: nobody waits for an engine then."""
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    asked: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    serve(EngineJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")), asked)
