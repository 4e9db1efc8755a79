"""Training of an EAGLE3 head on captured states: training-time test, checkpoints, exact resume.

Every step's batch follows from (seed, step) alone and the checkpoint holds parameters and both optimizer
moments, so a run that was killed and started again ends with the same bytes as one that was not (same
machine, same threads).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packager.draft.head import DraftBatch, Eagle3Head
from packager.draft.states import Sample, collate, once, schedule
from packager.draft.vocabulary import VocabularyMap
from packager.errors import BadInput
from packager.recipe import DraftSpec

CHECKPOINT_EVERY = 40
"""Steps between checkpoints: what a kill can lose."""
WARMUP_SHARE = 0.05
FLOOR = 0.02
"""Learning rate at the end, as a share of its peak."""
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
CLIP = 1.0
"""Largest norm of the gradient."""
STEP_DECAY = 0.8
"""Weight of each further training-time-test step, as in EAGLE3."""


@dataclass(frozen=True)
class Target:
    """What the head takes from the target: frozen embedding, head rows of the draft vocabulary, final
    norm."""

    embeddings: Tensor
    """[vocab, hidden] FP32."""
    head_rows: Tensor
    """[draft vocab, hidden] FP32."""
    norm: Tensor
    """[hidden] FP32."""
    eps: float


@dataclass(frozen=True)
class Accepted:
    """Teacher-forced acceptance: at each draft position the share of drafts accepted up to and including
    it."""

    per_position: tuple[float, ...]
    drafts: int

    @property
    def length(self) -> float:
        """Tokens per verification: the accepted ones and the target's own."""
        return 1.0 + sum(self.per_position)


def fast_bf16() -> bool:
    """Whether this CPU multiplies BF16 in hardware; without that it is slower than FP32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def draft_loss(
    logits: Sequence[Tensor], batch: DraftBatch, target: Target, to_draft: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and for each step which queries predict their token, bool [N].

    The loss of a query is the cross-entropy against the target's distribution over the draft vocabulary (its
    forward KL up to a constant), where the target's own token is in that vocabulary; elsewhere nothing the
    head does is accepted. `to_draft` [vocab] int64 maps target tokens to draft ids, -1 outside.
    """
    with torch.no_grad():
        last = batch.last.float()
        normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + target.eps) * target.norm
        goal = F.linear(normed, target.head_rows).softmax(-1)
        labels = to_draft[batch.tokens.clamp(min=0)].masked_fill(batch.tokens < 0, -1)
    total = logits[0].new_zeros((), dtype=torch.float32)
    norm = 0.0
    right = []
    for step, rows in enumerate(logits):
        label = labels[:, step + 1]
        known = label >= 0
        wide = rows.float()
        loss = -(goal[:, step] * wide.log_softmax(-1)).sum(-1)
        weight = STEP_DECAY**step
        total = total + weight * (loss * known).sum() / known.sum().clamp(min=1)
        norm += weight
        right.append((wide.argmax(-1) == label) & known)
    return total / norm, right


def count_accepted(batch: DraftBatch, right: Sequence[Tensor]) -> tuple[list[int], int]:
    """Drafts accepted up to each position, and the number of drafts, as serving would draft.

    Greedy decoding visits few of the positions: the draft after a verification starts behind the tokens it
    yielded. What the target would say past the end of its response is not known and counts as rejected.
    """
    accepted = torch.stack(list(right)).long().cumprod(0).sum(0).tolist()
    counts, drafts, free = [0] * len(right), 0, 0
    real = (batch.tokens[:, 1] >= 0).tolist()
    for slot, hits in itertools.compress(zip(batch.slot.tolist(), accepted, strict=True), real):
        if slot == 0:
            free = 0
        if slot == free:
            drafts += 1
            free += hits + 1
            for position in range(hits):
                counts[position] += 1
    return counts, drafts


class Trainer:
    """One training run whose state is kept in the file `checkpoint`; `run` continues it if it was
    interrupted."""

    def __init__(
        self,
        config: Mapping[str, Any],
        target: Target,
        vocabulary: VocabularyMap,
        spec: DraftSpec,
        checkpoint: Path,
        *,
        bf16: bool | None = None,
    ) -> None:
        self.spec, self.checkpoint, self.target = spec, checkpoint, target
        self.bf16 = fast_bf16() if bf16 is None else bf16
        self.hidden = config["hidden_size"]
        self.aux = len(config["eagle_aux_hidden_state_layer_ids"])
        self.to_draft = torch.full((vocabulary.target_size,), -1, dtype=torch.long)
        self.to_draft[list(vocabulary.target_ids)] = torch.arange(len(vocabulary.target_ids))
        self.head = Eagle3Head(config, target.embeddings)
        self.head.initialise(spec.seed, target.head_rows, target.norm)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=spec.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self._ids = vocabulary.target_ids
        self._key = ""

    def settings(self) -> dict[str, Any]:
        """The run's exact configuration, for the file beside its output."""
        return {
            "recipe": self.spec.model_dump(mode="json"),
            "optimizer": {"name": "AdamW", "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip": CLIP},
            "schedule": {"name": "cosine", "warmup_share": WARMUP_SHARE, "floor": FLOOR},
            "loss": {"name": "cross-entropy to the target's distribution", "step_decay": STEP_DECAY},
            "bf16_matmul": self.bf16,
        }

    def run(
        self, training: Sequence[Sample], held: Sequence[Sample], progress: Callable[[str], None]
    ) -> Accepted:
        """Train to `spec.steps`; predicted acceptance on `held` at the end.

        Raises:
            BadInput: nothing to train on, unreadable states, or a loss that is no longer finite.
        """
        if not training:
            raise BadInput("no sample has a response of two tokens or more", "Prepare more prompts.")
        identity = {
            "settings": self.settings(),
            "config": self.head.config,
            "vocabulary": self._ids,
            "data": [(sample.path.name, sample.ids) for sample in training],
        }
        self._key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        start = self._resume()
        if start:
            progress(f"draft: training goes on from step {start}")
        began = time.monotonic()
        batches = itertools.islice(
            schedule(training, self.spec.batch_tokens, self.spec.seed), start, self.spec.steps
        )
        with ThreadPoolExecutor(1) as reader:  # the next batch is read while this one is trained on
            ahead = reader.submit(self._next, batches)
            for step in range(start, self.spec.steps):
                batch = ahead.result()
                assert batch is not None
                ahead = reader.submit(self._next, batches)
                loss, accepted = self._step(step, batch)
                done = step + 1
                if done % CHECKPOINT_EVERY == 0 or done == self.spec.steps:
                    if not math.isfinite(loss):
                        raise BadInput(
                            f"the loss is {loss} at step {done}", "Lower draft.learning_rate and train again."
                        )
                    self._save(done)
                    rates = " ".join(f"{rate:.3f}" for rate in accepted.per_position)
                    pace = (time.monotonic() - began) / (done - start)
                    progress(
                        f"draft: step {done}/{self.spec.steps} loss {loss:.3f} accepted {rates} "
                        f"length {accepted.length:.2f} ({pace * (self.spec.steps - done):.0f} s left)"
                    )
        return self.evaluate(held)

    def _next(self, batches: Any) -> DraftBatch | None:
        group = next(batches, None)
        if group is None:
            return None
        return collate(group, aux=self.aux, hidden=self.hidden, steps=self.spec.ttt_steps)

    def _forward(self, batch: DraftBatch, steps: int) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            return self.head(batch, steps)  # type: ignore[no-any-return]

    def _step(self, step: int, batch: DraftBatch) -> tuple[float, Accepted]:
        warmup = max(1, int(self.spec.steps * WARMUP_SHARE))
        turn = (step - warmup) / max(1, self.spec.steps - warmup)
        scale = (
            (step + 1) / warmup
            if step < warmup
            else FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * turn))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.learning_rate * scale
        loss, right = draft_loss(self._forward(batch, self.spec.ttt_steps), batch, self.target, self.to_draft)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), CLIP)
        self.optimizer.step()
        counts, drafts = count_accepted(batch, right)
        return float(loss.detach()), Accepted(tuple(c / max(1, drafts) for c in counts), drafts)

    @torch.no_grad()
    def evaluate(self, held: Sequence[Sample], positions: int | None = None) -> Accepted:
        """Acceptance of the present weights on `held`, predicted without serving."""
        steps = positions or self.spec.num_speculative_tokens
        counts, drafts = [0] * steps, 0
        for group in once(held, self.spec.batch_tokens):
            batch = collate(group, aux=self.aux, hidden=self.hidden, steps=steps)
            _, right = draft_loss(self._forward(batch, steps), batch, self.target, self.to_draft)
            here, count = count_accepted(batch, right)
            counts, drafts = [a + b for a, b in zip(counts, here, strict=True)], drafts + count
        return Accepted(tuple(count / max(1, drafts) for count in counts), drafts)

    def _save(self, done: int) -> None:
        tensors = {}
        for name, parameter in self.head.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        part = self.checkpoint.with_suffix(".partial")
        # One key: the library writes several in an order that changes from process to process.
        save_file(tensors, part, {"run": f"{self._key} {done}"})
        os.replace(part, self.checkpoint)  # noqa: PTH105

    def _resume(self) -> int:
        """Load the checkpoint of this very run, if there is one; the number of steps done."""
        if not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, framework="pt") as handle:
                key, _, done = (handle.metadata() or {}).get("run", "").partition(" ")
                if key != self._key:
                    return 0
                with torch.no_grad():
                    for name, parameter in self.head.named_parameters():
                        parameter.copy_(handle.get_tensor(f"model.{name}"))
                        self.optimizer.state[parameter] = {
                            "step": torch.tensor(float(done)),
                            "exp_avg": handle.get_tensor(f"exp_avg.{name}").clone(),
                            "exp_avg_sq": handle.get_tensor(f"exp_avg_sq.{name}").clone(),
                        }
        except SafetensorError:
            return 0
        return int(done)
