"""Captured responses and states on disk, read back as training batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packager.draft.head import DraftBatch
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
        raise BadInput(f"cannot read the hidden states {sample.path}: {err}", _AGAIN) from None
    if states.shape[:2] != (len(sample.ids) - 1, layers):
        raise BadInput(
            f"{sample.path} holds states of shape {tuple(states.shape)}, expected {len(sample.ids) - 1} "
            f"tokens and {layers} layers",
            _AGAIN,
        )
    if tokens.tolist() != list(sample.ids[:-1]):
        raise BadInput(f"{sample.path} holds the states of other tokens", _AGAIN)
    return states


def collate(group: Sequence[Sample], *, aux: int, hidden: int, steps: int) -> DraftBatch:
    """Read a group of samples.

    Keys are rounded up to 16 and queries to 64 (with queries of no sample, in slots of their own): a matrix
    product of a shape not seen before is several times slower on a CPU.
    """
    length = _round_up(max(len(s.ids) for s in group) - 2)
    total = sum(s.queries for s in group)
    rows = _round_up(total, 64)
    spare = torch.arange(rows - total)
    first_free = max(s.queries for s in group)
    batch = DraftBatch(
        keys=torch.zeros(len(group), length, dtype=torch.long),
        states=torch.zeros(len(group), length, aux * hidden, dtype=torch.bfloat16),
        row=torch.cat((torch.empty(total, dtype=torch.long), spare % len(group))),
        place=torch.zeros(rows, dtype=torch.long),
        slot=torch.cat((torch.empty(total, dtype=torch.long), first_free + spare // len(group))),
        tokens=torch.full((rows, steps + 1), -1, dtype=torch.long),
        last=torch.zeros(rows, steps, hidden, dtype=torch.bfloat16),
    )
    begin = 0
    for row, sample in enumerate(group):
        fused, last = load_states(sample, aux, hidden)
        count, queries = len(sample.ids) - 2, sample.queries
        here = slice(begin, begin + queries)
        batch.keys[row, :count] = torch.tensor(sample.ids[1:-1])
        batch.states[row, :count] = fused[:count]
        batch.row[here] = row
        batch.slot[here] = torch.arange(queries)
        batch.place[here] = batch.slot[here] + sample.prompt - 1
        response, predicting = torch.tensor(sample.ids[sample.prompt :]), last[sample.prompt :]
        for step in range(steps + 1):
            batch.tokens[here][: len(response) - step, step] = response[step : step + queries]
            if step < steps:
                batch.last[here][: queries - step, step] = predicting[step:]
        begin += queries
    return batch


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
