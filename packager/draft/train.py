"""Training of an EAGLE3 head on captured states: training-time test, checkpoints, exact resume.

Every step's batch follows from (seed, step) alone and the checkpoint holds parameters and the optimizers'
moments, so a run that was killed and started again ends with the same bytes as one that was not (same
machine, same threads, same number of processes). With several processes each batch is split over them and
every loss is divided by the labels of the whole batch, so that their sum is the loss of one process up to
rounding; the checkpoint is unsharded, so another number of processes may go on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packager.draft.curve import LOG_NAME, TrainingLog
from packager.draft.head import DraftBatch, Eagle3Head
from packager.draft.loss import (
    STEP_DECAY,
    Accepted,
    Target,
    accepted_of,
    count_accepted,
    draft_labels,
    draft_loss,
)
from packager.draft.ranks import Ranks, alone, like, whole
from packager.draft.spool import Spool
from packager.draft.states import Sample, StateCache, collate, once, schedule
from packager.draft.vocabulary import VocabularyMap
from packager.errors import BadInput
from packager.optimizer import Optimizers
from packager.recipe import DraftSpec

WARMUP_SHARE = 0.05
FLOOR = 0.02
"""Learning rate at the end, as a share of its peak."""
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
MATRIX_DECAY = 0.05
"""Weight decay of matrices under Muon."""
CLIP = 1.0
"""Largest norm of the gradient."""


@dataclass(frozen=True)
class Step:
    """One training step, or its part in one process."""

    loss: float
    counts: tuple[int, ...]
    """Drafts accepted up to each position, teacher-forced, on the step's own batch."""
    drafts: int

    @property
    def accepted(self) -> Accepted:
        """The counts as rates."""
        return accepted_of(self.counts, self.drafts)


@dataclass(frozen=True)
class Progress:
    """Where a run is; for a live display."""

    done: int
    steps: int
    loss: float
    accepted: Accepted


@dataclass(frozen=True)
class Best:
    """The best measurement on held-out responses so far."""

    step: int
    counts: tuple[int, ...]
    drafts: int
    stale: int = 0
    """Measurements since then, none of them better."""

    @property
    def accepted(self) -> Accepted:
        """The counts as rates."""
        return accepted_of(self.counts, self.drafts)


def fast_bf16() -> bool:
    """Whether this CPU multiplies BF16 in hardware; without that it is slower than FP32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Trainer:
    """One training run whose state is kept in the file `checkpoint` and whose course is logged beside it;
    `run` continues it if it was interrupted."""

    def __init__(
        self,
        config: Mapping[str, Any],
        target: Target,
        vocabulary: VocabularyMap,
        spec: DraftSpec,
        checkpoint: Path,
        *,
        bf16: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`bf16` None: where it is fast. `ranks` None: a single process."""
        self.ranks = ranks or alone()
        self.device = self.ranks.device
        self.spec, self.checkpoint, self.target = spec, checkpoint, target.to(self.device)
        self.bf16 = (self.device.type == "cuda" or fast_bf16()) if bf16 is None else bf16
        self.hidden = config["hidden_size"]
        self.aux = len(config["eagle_aux_hidden_state_layer_ids"])
        to_draft = torch.full((vocabulary.target_size,), -1, dtype=torch.long)
        to_draft[list(vocabulary.target_ids)] = torch.arange(len(vocabulary.target_ids))
        self.to_draft = to_draft.to(self.device)
        self.head = Eagle3Head(config, target.embeddings)
        self.head.initialise(spec.seed, target.head_rows, target.norm)
        self.head.to(self.device)
        self.ranks.shard(self.head)
        matrices = {
            name
            for name, parameter in self.head.named_parameters()
            # Rows of the output head are tokens, not directions of one map.
            if spec.optimizer == "muon" and parameter.dim() == 2 and not name.startswith("lm_head.")
        }
        named = dict(self.head.named_parameters())
        self.optimizer = Optimizers(
            [parameter for name, parameter in named.items() if name in matrices],
            [parameter for name, parameter in named.items() if name not in matrices],
            matrix_decay=MATRIX_DECAY,
            betas=BETAS,
            decay=WEIGHT_DECAY,
        )
        self._rate = 0.0
        self.best: Best | None = None
        self.done = 0
        """Steps that the present run has behind it."""
        self.log = checkpoint.with_name(LOG_NAME)
        self._best_weights: dict[str, Tensor] = {}
        self._cache = StateCache()
        self._ids = vocabulary.target_ids
        self._key = ""

    def settings(self) -> dict[str, Any]:
        """The run's exact configuration, for the file beside its output."""
        return {
            "recipe": self.spec.model_dump(mode="json"),
            "optimizer": {
                "name": self.spec.optimizer,
                "betas": list(BETAS),
                "weight_decay": WEIGHT_DECAY,
                "matrix_decay": MATRIX_DECAY,
                "clip": CLIP,
            },
            "schedule": {"name": "cosine", "warmup_share": WARMUP_SHARE, "floor": FLOOR},
            "loss": {"name": self.spec.loss, "step_decay": STEP_DECAY},
            "bf16_matmul": self.bf16,
        }

    def run(
        self,
        training: Sequence[Sample],
        held: Sequence[Sample],
        progress: Callable[[str], None],
        on_step: Callable[[Progress], None] | None = None,
        spool: Spool | None = None,
    ) -> dict[int, Accepted]:
        """Train to `spec.steps` or an early stop; at the end what `predict` says of `held`.

        With `spec.evaluate_every` the head holds the best weights afterwards, else the last.

        Args:
            progress: gets a line at each checkpoint.
            on_step: is called after each step.
            spool: where the states of `training` arrive while it goes on; None: they lie where it says.

        Raises:
            BadInput: nothing to train or evaluate on, unreadable states, or a loss that is not finite.
        """
        if not training:
            raise BadInput("no sample has a response of two tokens or more", "Prepare more prompts.")
        if self.spec.evaluate_every and not held:
            raise BadInput("no held-out responses to evaluate on", "Prepare more prompts.")
        settings = self.settings()
        del settings["recipe"]["max_states_bytes"]  # a larger disk is no other run
        identity = {
            "settings": settings,
            "config": self.head.config,
            "vocabulary": self._ids,
            "data": [(sample.path.name, sample.ids) for sample in training],
        }
        self._key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.done = self._resume()
        self.ranks.agree(self.done, "the step that training goes on from")
        if self.done:
            progress(f"draft: training goes on from step {self.done}")
        log = TrainingLog(self.log) if self.ranks.rank == 0 else None
        try:
            if log:
                log.open_after(self.done)
            self._train(training, held, log, progress, on_step, spool)
        finally:
            if log:
                log.close()
        if self._best_weights:
            with torch.no_grad():
                for name, parameter in self.head.named_parameters():
                    parameter.copy_(self._best_weights[name])
        return self.predict(held)

    def _train(
        self,
        training: Sequence[Sample],
        held: Sequence[Sample],
        log: TrainingLog | None,
        progress: Callable[[str], None],
        on_step: Callable[[Progress], None] | None,
        spool: Spool | None,
    ) -> None:
        spec, start = self.spec, self.done
        began = time.monotonic()
        groups: Iterator[list[Sample]] = itertools.islice(
            schedule(training, spec.batch_tokens, spec.seed),
            start * spec.accumulate,
            spec.steps * spec.accumulate,
        )
        if spool:
            if start < spec.steps and not self._stalled():
                spool.begin(start)
            groups = spool.follow(groups, start)
        with ThreadPoolExecutor(1) as reader, spool or nullcontext():
            # The next batch is read while this one is trained on.
            ahead = reader.submit(self._next, groups)
            while self.done < spec.steps and not self._stalled():
                batches = ahead.result()
                ahead = reader.submit(self._next, groups)
                found = self.step(batches)
                row = {
                    "step": self.done,
                    "loss": found.loss,
                    "length": found.accepted.length,
                    "accepted": found.accepted.per_position,
                    "learning_rate": self._rate,
                }
                if spec.evaluate_every and (self.done % spec.evaluate_every == 0 or self.done == spec.steps):
                    now = self._measure(held)
                    row["held_out"] = {"length": now.length, "accepted": now.per_position}
                if log:
                    log.write(row)
                if on_step:
                    on_step(Progress(self.done, spec.steps, found.loss, found.accepted))
                if self.done % spec.checkpoint_every == 0 or self.done == spec.steps or self._stalled():
                    if not math.isfinite(found.loss):
                        raise BadInput(
                            f"the loss is {found.loss} at step {self.done}",
                            "Lower draft.learning_rate and train again.",
                        )
                    if log:
                        log.flush()
                    self._save()
                    if spool:
                        spool.saved(self.done)
                    rates = " ".join(f"{rate:.3f}" for rate in found.accepted.per_position)
                    pace = (time.monotonic() - began) / (self.done - start)
                    progress(
                        f"draft: step {self.done}/{spec.steps} loss {found.loss:.3f} accepted {rates} "
                        f"length {found.accepted.length:.2f} ({pace * (spec.steps - self.done):.0f} s left)"
                    )
        if self.best and self._stalled() and self.done < spec.steps:
            progress(
                f"draft: stopped at step {self.done}: the held-out acceptance length of step "
                f"{self.best.step}, {self.best.accepted.length:.2f}, was not passed since"
            )

    def _stalled(self) -> bool:
        """Whether held-out acceptance has not grown for as many measurements as `patience` allows."""
        return (
            self.spec.patience is not None and self.best is not None and self.best.stale >= self.spec.patience
        )

    def _measure(self, held: Sequence[Sample]) -> Accepted:
        tokens = self.spec.num_speculative_tokens
        counts, drafts = self._counts(held, [tokens])[tokens]
        now = Best(self.done, tuple(counts), drafts)
        if self.best is None or now.accepted.length > self.best.accepted.length:
            self.best = now
            self._best_weights = {
                name: parameter.detach().clone() for name, parameter in self.head.named_parameters()
            }
        else:
            was = self.best
            self.best = Best(was.step, was.counts, was.drafts, was.stale + 1)
        return now.accepted

    def _next(self, groups: Iterator[list[Sample]]) -> list[DraftBatch]:
        """The next step's batches, this process's part of each; empty at the end."""
        return [
            self._read(group, self.spec.ttt_steps) for group in itertools.islice(groups, self.spec.accumulate)
        ]

    def _read(self, group: Sequence[Sample], steps: int) -> DraftBatch:
        mine = group[self.ranks.rank :: self.ranks.size]
        batch = collate(mine or group[:1], aux=self.aux, hidden=self.hidden, steps=steps, cache=self._cache)
        if not mine:  # collectives need every process: one without a sample computes another's, unlabelled
            batch.tokens.fill_(-1)
        return batch.pinned() if self.device.type == "cuda" else batch

    def _forward(self, batch: DraftBatch, steps: int) -> list[Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.head(batch, steps)  # type: ignore[no-any-return]

    def step(self, batches: Sequence[DraftBatch]) -> Step:
        """One optimizer step on the gradients of `batches`, this process's parts of them."""
        warmup = max(1, int(self.spec.steps * WARMUP_SHARE))
        turn = (self.done - warmup) / max(1, self.spec.steps - warmup)
        scale = (
            (self.done + 1) / warmup
            if self.done < warmup
            else FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * turn))
        )
        self._rate = self.spec.learning_rate * scale
        self.optimizer.zero_grad()
        here = [batch.to(self.device) for batch in batches]
        known = torch.stack([(draft_labels(batch, self.to_draft) >= 0).sum(0) for batch in here]).sum(0)
        labels = self.ranks.sum(known)
        steps = self.spec.ttt_steps
        sums = torch.zeros(steps + 2, dtype=torch.float64)
        for batch, read in zip(here, batches, strict=True):
            loss, right = draft_loss(
                self._forward(batch, steps),
                batch,
                self.target,
                self.to_draft,
                kind=self.spec.loss,
                counts=labels,
            )
            # Sharded gradients are averaged over the processes; the parts' losses are to be summed.
            (loss * self.ranks.size if self.ranks.size > 1 else loss).backward()  # type: ignore[no-untyped-call]
            counts, drafts = count_accepted(read, right)
            sums += torch.tensor([float(loss.detach()), drafts, *counts], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), CLIP)
        self.optimizer.step(self._rate)
        self.done += 1
        total, drafts, *counts = self.ranks.sum(sums.to(self.device)).tolist()
        return Step(total, tuple(round(count) for count in counts), round(drafts))

    def predict(self, held: Sequence[Sample]) -> dict[int, Accepted]:
        """Acceptance of the present weights on `held`, predicted without serving, by draft tokens a step.

        For every K up to the steps of training-time test, or the recipe's own K if that is more. The first
        rates of a longer draft are not those of a shorter one: it starts from other tokens.
        """
        longest = max(self.spec.num_speculative_tokens, self.spec.ttt_steps)
        found = self._counts(held, range(1, longest + 1))
        return {tokens: accepted_of(counts, drafts) for tokens, (counts, drafts) in found.items()}

    @torch.no_grad()
    def _counts(self, held: Sequence[Sample], lengths: Sequence[int]) -> dict[int, tuple[list[int], int]]:
        """Drafts accepted up to each position, and drafts, of drafts of each of these lengths."""
        steps = max(lengths)
        sums = torch.zeros(len(lengths), steps + 1, dtype=torch.long)
        for group in once(held, self.spec.batch_tokens):
            read = self._read(group, steps)
            batch = read.to(self.device)
            _, right = draft_loss(self._forward(batch, steps), batch, self.target, self.to_draft, kind="hard")
            for row, length in zip(sums, lengths, strict=True):
                counts, drafts = count_accepted(read, right[:length])
                row[: length + 1] += torch.tensor([drafts, *counts])
        self.ranks.reshard(self.head)
        found = self.ranks.sum(sums.to(self.device)).tolist()
        return {length: (row[1 : length + 1], row[0]) for row, length in zip(found, lengths, strict=True)}

    def _save(self) -> None:
        """Write the checkpoint; the parameters are gathered by all processes and written by the first."""
        tensors = {}
        for name, parameter in self.head.named_parameters():
            tensors[f"model.{name}"] = whole(parameter)
            for moment, value in self.optimizer.moments(parameter).items():
                tensors[f"{moment}.{name}"] = whole(value)
            if self._best_weights:
                tensors[f"best.{name}"] = whole(self._best_weights[name])
        if self.ranks.rank:
            return
        part = self.checkpoint.with_suffix(".partial")
        run = {"key": self._key, "done": self.done, "best": vars(self.best) if self.best else None}
        # One key: the library writes several in an order that changes from process to process.
        save_file(tensors, part, {"run": json.dumps(run)})
        os.replace(part, self.checkpoint)  # noqa: PTH105

    def _resume(self) -> int:
        """Load the checkpoint of this very run, if there is one; the number of steps done."""
        if not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, framework="pt") as handle:
                try:
                    run = json.loads((handle.metadata() or {}).get("run", ""))
                except ValueError:
                    return 0
                if run["key"] != self._key:
                    return 0
                best = run["best"]
                self.best = Best(**best | {"counts": tuple(best["counts"])}) if best else None
                with torch.no_grad():
                    for name, parameter in self.head.named_parameters():
                        parameter.copy_(like(handle.get_tensor(f"model.{name}"), parameter))
                        moments = {
                            moment: like(handle.get_tensor(f"{moment}.{name}"), parameter)
                            for moment in self.optimizer.moment_names(parameter)
                        }
                        self.optimizer.restore(parameter, moments, run["done"])
                        if self.best:
                            self._best_weights[name] = like(handle.get_tensor(f"best.{name}"), parameter)
        except SafetensorError:
            return 0
        return int(run["done"])
