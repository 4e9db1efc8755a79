"""What an engine's log says: how far a start is, and what to do when memory ran out."""

from __future__ import annotations

from pathlib import Path

import pytest

from packager.serving.engine_log import StartupProgress, memory_trouble

# Lines of vLLM 0.32, the bar as tqdm writes it.
LOG = (
    "(EngineCore pid=9) INFO 11-25 04:15:02 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with\n",
    "(EngineCore pid=9) INFO 11-25 04:15:02 [cpu_model_runner.py:68] Starting to load model /m...\n"
    "Loading safetensors checkpoint shards:   0% Completed | 0/21 [00:00<?, ?it/s]\n",
    "\rLoading safetensors checkpoint shards:  33% Completed | 7/21 [00:10<00:20,  1.4s/it]",
    "\rLoading safetensors checkpoint shards: 100% Completed | 21/21 [00:30<00:00,  1.4s/it]\n",
    "(EngineCore pid=9) INFO 11-25 04:15:03 [cpu_model_runner.py:75] Loading drafter model...\n"
    "Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 1193.60it/s]\n",
    "(EngineCore pid=9) INFO 11-25 04:15:33 [monitor.py:40] Starting torch.compile\n",
    "(EngineCore pid=9) INFO 11-25 04:15:04 [kv_cache_utils.py:2327] GPU KV cache size: 419,328 tokens, Maxi",
    "\rCapturing CUDA graphs (decode, FULL):  10%|█         | 1/10",
)


def test_a_start_is_followed_by_its_log(tmp_path: Path) -> None:
    log, said, now = tmp_path / "log", list[str](), [100.0]
    log.touch()
    progress = StartupProgress(log, said.append, clock=lambda: now[0])
    for text in (*LOG, "\n", "", "", "", ""):
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
        now[0] += 12
        progress.look()
    assert [line.strip() for line in said] == [
        "24 s  loading weights: 0 of 21 files",
        "36 s  loading weights: 7 of 21 files",
        "48 s  loading weights: 21 of 21 files",
        "60 s  loading the draft: 1 of 1 files",
        "72 s  compiling",
        "84 s  KV cache of 419,328 tokens",
        "96 s  capturing CUDA graphs",
        "132 s  capturing CUDA graphs",
    ]


def test_counting_alone_is_said_every_few_seconds(tmp_path: Path) -> None:
    log, said, now = tmp_path / "log", list[str](), [0.0]
    progress = StartupProgress(log, said.append, clock=lambda: now[0])
    for k in range(12):
        log.write_text("".join(f"Loading safetensors checkpoint shards: | {n}/21 [\n" for n in range(k + 1)))
        now[0] += 1
        progress.look()
    assert [line.split()[-4:-2] for line in said] == [["0", "of"], ["5", "of"], ["10", "of"]]


OUT_OF_MEMORY = (
    "(EngineCore pid=9) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 "
    "has a total capacity of 79.11 GiB of which 1.2 GiB is free."
)


def test_memory_that_ran_out_is_named_with_what_helps() -> None:
    found = memory_trouble(OUT_OF_MEMORY)
    assert found is not None
    assert all(part in found[1] for part in ("--context", "--gpu-memory-utilization", "--max-num-seqs"))
    killed = memory_trouble("INFO loading", 137)
    assert killed is not None and "killed" in killed[0]
    assert memory_trouble("ValueError: head_dim", 1) is None


@pytest.mark.slow
def test_the_engines_own_messages_of_too_little_memory_are_understood() -> None:
    """Raised by its own functions, for a GPU that is too small and one that others use."""
    kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from types import SimpleNamespace

    from vllm.v1.worker.utils import request_memory

    def message(room: int) -> str:
        with pytest.raises(ValueError) as caught:
            kv_cache_utils._check_enough_kv_cache_memory(room, lambda: 8 << 30, 131072, lambda _: 55000)
        return f"(EngineCore pid=9) ERROR 11-25 [core.py:1] ValueError: {caught.value}"

    too_long, remedy = memory_trouble(message(3 << 30)) or ("", "")
    assert "a request of 131072 tokens needs 8.0 GiB of KV cache, 3.0 are left" in too_long
    assert remedy.startswith("--context 55000 fits.")
    none, remedy = memory_trouble(message(0)) or ("", "")
    assert "the weights leave none for the KV cache" in none
    snapshot = SimpleNamespace(device_="cuda:0", free_memory=20 << 30, total_memory=80 << 30)
    with pytest.raises(ValueError) as caught:
        request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=0.9))
    held, remedy = memory_trouble(str(caught.value)) or ("", "")
    assert "the engine takes 90% of 80.0 GiB, 20.0 GiB are free" in held
    assert "--gpu-memory-utilization 0.24" in remedy
