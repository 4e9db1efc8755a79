"""Captured responses and states on disk, read back as training batches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packager.draft.head import DraftBatch
from packager.draft.ranks import processes_here
from packager.draft.states_file import decode_states
from packager.errors import BadInput

_AGAIN = "Delete that file and run `packager draft prepare` again: its response alone is taken anew."
HELD_OUT_SHARE = 0.06
"""Share of prompts kept out of training, chosen by a hash of their id."""


def held_out(prompt_id: str) -> bool:
    """Whether a prompt belongs to the held-out side; the same in every run and on every machine."""
    return int(sha256(prompt_id.encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT_SHARE


@dataclass(frozen=True)
class Sample:
    """One prompt with its response, and where the states lie."""

    path: Path
    prompt: int
    """Prompt tokens."""
    ids: tuple[int, ...]
    """Prompt and response tokens."""
    passing: bool = False
    """Whether its file is there for one step only, so that there is no use in remembering it."""
    remedy: str = _AGAIN
    """What to do where its file is of no use."""

    @property
    def queries(self) -> int:
        """Positions that carry loss at step 0."""
        return len(self.ids) - self.prompt - 1


def sample_of(record: Mapping[str, Any], directory: Path) -> Sample:
    """The sample of one record of `responses.jsonl`."""
    return Sample(
        directory / record["states"],
        len(record["prompt_ids"]),
        (*record["prompt_ids"], *record["response_ids"]),
    )


def samples(records: Sequence[dict[str, Any]], directory: Path) -> list[Sample]:
    """The records that have something to learn from: two response tokens or more."""
    found = [sample_of(record, directory) for record in records]
    return [sample for sample in found if sample.queries >= 1]


def load_states(sample: Sample, aux: int, hidden: int) -> tuple[Tensor, Tensor]:
    """(aux states `[tokens - 1, aux * hidden]`, last states `[tokens - 1, hidden]`), BF16 however stored.

    Raises:
        BadInput: the file is missing, torn, of another shape, or belongs to other tokens.
    """
    states = load_layers(sample, aux + 1)
    if states.shape[2] != hidden:
        raise BadInput(f"{sample.path} holds states of width {states.shape[2]}, expected {hidden}")
    return states[:, :aux].flatten(1), states[:, aux]


def load_layers(sample: Sample, layers: int) -> Tensor:
    """All captured states `[tokens - 1, layers, hidden]`, BF16 however stored. Raises as `load_states`."""
    try:
        with safe_open(sample.path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        states, tokens = decode_states(tensors), tensors["token_ids"]
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise BadInput(f"cannot read the hidden states {sample.path}: {err}", sample.remedy) from None
    if states.shape[:2] != (len(sample.ids) - 1, layers):
        raise BadInput(
            f"{sample.path} holds states of shape {tuple(states.shape)}, expected {len(sample.ids) - 1} "
            f"tokens and {layers} layers",
            sample.remedy,
        )
    if tokens.tolist() != list(sample.ids[:-1]):
        raise BadInput(f"{sample.path} holds the states of other tokens", sample.remedy)
    return states


class StateCache:
    """`load_states` with a memory: a run reads every sample many times.

    States are kept as they are read, until `budget` bytes are full; what does not fit is read anew each time.
    """

    def __init__(self, budget: int | None = None) -> None:
        """`budget` None: half of the memory that is free now, shared with the run's other processes here."""
        if budget is None:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            budget = free // 2 // processes_here()
        self._free = budget
        self._kept: dict[Path, tuple[Tensor, Tensor]] = {}

    def load(self, sample: Sample, aux: int, hidden: int) -> tuple[Tensor, Tensor]:
        """As `load_states`; the response's part alone of the last states, `[queries, hidden]`."""
        found = self._kept.get(sample.path)
        if found is None:
            states, last = load_states(sample, aux, hidden)
            found = states[:-1], last[sample.prompt :].clone()  # a view would hold all layers
            size = sum(tensor.untyped_storage().nbytes() for tensor in found)
            if size <= self._free and not sample.passing:
                self._kept[sample.path] = found
                self._free -= size
        return found


def collate(
    group: Sequence[Sample], *, aux: int, hidden: int, steps: int, cache: StateCache | None = None
) -> DraftBatch:
    """Read a group of samples, through `cache` if given.

    Keys are rounded up to 16 and queries to 64 (with queries of no sample, in slots of their own): a matrix
    product of a shape not seen before is several times slower on a CPU.
    """
    load = (cache or StateCache(0)).load
    length = _round_up(max(len(s.ids) for s in group) - 2)
    counts = [s.queries for s in group]
    total = sum(counts)
    rows = _round_up(total, 64)
    keys = np.zeros((len(group), length), dtype=np.int64)
    tokens = np.full((rows, steps + 1), -1, dtype=np.int64)
    place = np.zeros(rows, dtype=np.int64)
    slot = np.empty(rows, dtype=np.int64)
    row = np.empty(rows, dtype=np.int64)
    states = torch.zeros(len(group), length, aux * hidden, dtype=torch.bfloat16)
    last = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    begin = 0
    for index, sample in enumerate(group):
        queries = sample.queries
        here = slice(begin, begin + queries)
        ids = np.asarray(sample.ids)
        states[index, : len(ids) - 2], last[here] = load(sample, aux, hidden)
        keys[index, : len(ids) - 2] = ids[1:-1]
        row[here] = index
        slot[here] = np.arange(queries)
        place[here] = slot[here] + sample.prompt - 1
        for step in range(steps + 1):
            reached = min(queries, queries + 1 - step)
            tokens[begin : begin + max(0, reached), step] = ids[sample.prompt + step :][:queries]
        begin += queries
    spare = np.arange(rows - total)
    row[total:], slot[total:] = spare % len(group), max(counts) + spare // len(group)
    return DraftBatch(
        keys=torch.from_numpy(keys),
        states=states,
        row=torch.from_numpy(row),
        place=torch.from_numpy(place),
        slot=torch.from_numpy(slot),
        tokens=torch.from_numpy(tokens),
        last=last,
    )


def _round_up(value: int, to: int = 16) -> int:
    return -(-value // to) * to


def schedule(found: Sequence[Sample], batch_tokens: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches of similar length, at most `batch_tokens` padded tokens each (at least one sample).

    The stream is a pure function of its arguments, so a resumed run skips to where it was.
    """
    epoch = 0
    while True:
        rng = random.Random(f"{seed}|{epoch}")
        order = sorted(found, key=lambda s: (len(s.ids) // 32, rng.random()))
        groups = _grouped(order, batch_tokens)
        rng.shuffle(groups)
        yield from groups
        epoch += 1


def once(found: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Every sample once, in batches of similar length."""
    return _grouped(sorted(found, key=lambda s: len(s.ids)), batch_tokens)


def _grouped(order: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    longest = 0
    for sample in order:
        longest = max(longest, _round_up(len(sample.ids)))
        if not groups or longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = _round_up(len(sample.ids))
        groups[-1].append(sample)
    return groups
