"""A spool of hidden states for one training run: its engine, its proof of the layers, its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packager.checkpoint.source import Checkpoint
from packager.draft.capture import EngineJob
from packager.draft.engine_process import EngineProcess, engine_environment
from packager.draft.prepare import prove_once
from packager.draft.prompts import context_length
from packager.draft.ranks import Ranks
from packager.draft.spool import PROOF_SAMPLES, Spool
from packager.draft.states import Sample
from packager.draft.states_file import bytes_per_token
from packager.draft.workdir import PROOF, DraftData
from packager.errors import BadInput
from packager.recipe import DraftSpec

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


@contextmanager
def online_states(
    target: Path,
    spec: DraftSpec,
    data: DraftData,
    training: Sequence[Sample],
    held: Sequence[Sample],
    ranks: Ranks,
    progress: Callable[[str], None],
    *,
    engine: Mapping[str, Any] | None = None,
    devices: str | None = None,
) -> Iterator[Spool]:
    """An open spool of `data` whose engine serves `target`; the layers that it captures are proved.

    The first of the processes has the engine; the others see its files. What is of no use after the run is
    deleted at its end; after an error everything stays.

    Args:
        engine: further arguments of `vllm.LLM`.
        devices: CUDA devices of the engine, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        BadInput: the budget or the disk is too small; on CUDA no `devices`, or elsewhere some.
        RemoteFailure: the engine died or counts layers in another way.
    """
    cuda = ranks.device.type == "cuda"
    if devices and not cuda:
        raise BadInput("there is no CUDA device here to capture on", "Leave out --capture-devices.")
    config = Checkpoint.open(target).config()
    layers = (*spec.aux_layers, config["num_hidden_layers"])
    options = {"tensor_parallel_size": devices.count(",") + 1} if devices else {}
    options = {**(engine or {}), **options}
    job = EngineJob(
        target=str(target.resolve()),
        states=str(data.spool.resolve()),
        layers=layers,
        states_dtype=spec.states_dtype,
        engine={"max_model_len": context_length(target, config, options), **options},
    )
    spool = Spool(
        data.spool,
        spec,
        training,
        held,
        bytes_per_token=bytes_per_token(len(layers), config["hidden_size"], spec.states_dtype),
        taken_from=[data.target, layers, spec.states_dtype],
        engine=None if ranks.rank else _engine(data, job, devices, cuda=cuda),
    )
    with spool:
        spool.open(progress)
        if ranks.rank:
            while not (data.workdir / PROOF).exists():
                time.sleep(0.1)
        else:
            records = [
                {"states": s.path.name, "prompt_ids": s.ids[: s.prompt], "response_ids": s.ids[s.prompt :]}
                for s in spool.kept[:PROOF_SAMPLES]
            ]
            prove_once(data, target, layers, records, spool.directory, progress)
        yield spool
    if not ranks.rank:
        spool.finish()
        progress(
            f"draft: the spool held {spool.peak / 1e9:.3g} GB of states at most, of {spool.budget / 1e9:.3g}"
        )


def _engine(data: DraftData, job: EngineJob, devices: str | None, *, cuda: bool) -> EngineProcess:
    path = data.workdir / "online_job.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    environment = {  # without what torchrun set: the engine is no part of its group
        name: value
        for name, value in engine_environment().items()
        if name not in _TORCHRUN and not name.startswith(_TORCHRUN_PREFIXES)
    }
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return EngineProcess(
        [sys.executable, "-m", "packager.draft.producer", str(path)],
        data.workdir / "online.log",
        environment,
        refusal=BadInput(
            "hidden states are to be captured on-line, and the engine has no GPU of its own",
            "Name GPUs that the training leaves free: --capture-devices 4,5,6,7; or take them off-line.",
        )
        if cuda and not devices
        else None,
    )
