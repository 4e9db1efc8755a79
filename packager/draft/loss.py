"""What a head is trained towards, and its teacher-forced acceptance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packager.draft.head import DraftBatch
from packager.recipe import DraftLoss

STEP_DECAY = 0.8
"""Weight of each further training-time-test step, as in EAGLE3."""

_SPECULATORS: dict[str, str] = {
    "kl": "kl_div_loss",
    "reverse_kl": "reverse_kl_div_loss",
    "js": "js_div_loss",
    "tv": "tv_loss",
    "nla": "neg_log_acceptance_loss",
    "lk_hybrid": "lk_hybrid_loss",
}
"""Our names of the functions of speculators.losses.eager, which take any leading shape."""


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

    def to(self, device: torch.device) -> Target:
        """The same on another device."""
        return Target(self.embeddings.to(device), self.head_rows.to(device), self.norm.to(device), self.eps)


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


def accepted_of(counts: Sequence[int], drafts: int) -> Accepted:
    """Rates from what `count_accepted` counts."""
    return Accepted(tuple(count / max(1, drafts) for count in counts), drafts)


def draft_labels(batch: DraftBatch, to_draft: Tensor) -> Tensor:
    """[N, S] int64: the draft id that each step of each query should propose; -1 where there is none.

    `to_draft` [vocab] int64 maps target tokens to draft ids, -1 outside the draft vocabulary.
    """
    return to_draft[batch.tokens.clamp(min=0)].masked_fill(batch.tokens < 0, -1)[:, 1:]


def draft_loss(
    logits: Sequence[Tensor],
    batch: DraftBatch,
    target: Target,
    to_draft: Tensor,
    *,
    kind: DraftLoss = "soft",
    counts: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and for each step which queries predict their token, bool [N].

    A query has a loss where the target's own token is in the draft vocabulary; elsewhere nothing that the
    head does is accepted. `soft` is the cross-entropy against the target's distribution over the draft
    vocabulary (its forward KL up to a constant), `hard` that against the target's token; the others are
    speculators' (speculators/losses/eager.py). Steps are averaged with weights `STEP_DECAY`**step.

    Args:
        logits: of each step, [N, draft vocab].
        counts: [S] int64, the labels that each step's sum is divided by; None: those of this batch. A batch
            that is computed in parts gives the sum of its parts' counts, so that the parts' losses add up to
            the loss of the whole, whatever each part holds.
    """
    with torch.no_grad():
        last = batch.last.float()
        normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + target.eps) * target.norm
        wanted = F.linear(normed, target.head_rows)
        if kind == "soft":
            wanted = wanted.softmax(-1)
        labels = draft_labels(batch, to_draft)
    rows_there = torch.arange(len(wanted), device=wanted.device)
    total = logits[0].new_zeros((), dtype=torch.float32)
    norm = 0.0
    right = []
    for step, rows in enumerate(logits):
        label = labels[:, step]
        known = label >= 0
        wide = rows.float()
        # What the target says at step k of a query it says at step 0 of the k-th query after it.
        goal = wanted[(rows_there + step).clamp(max=len(wanted) - 1)] if step else wanted
        loss = _per_query(kind)(wide, goal, label)
        count = known.sum() if counts is None else counts[step]
        weight = STEP_DECAY**step
        total = total + weight * (loss * known).sum() / count.clamp(min=1)
        norm += weight
        right.append((wide.argmax(-1) == label) & known)
    return total / norm, right


def _per_query(kind: DraftLoss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(logits, goal, labels) -> loss [N]; the goal is probabilities for `soft` and logits for the others."""
    if kind == "soft":
        return lambda logits, goal, _: -(goal * logits.log_softmax(-1)).sum(-1)
    if kind == "hard":
        return lambda logits, _, label: F.cross_entropy(logits, label.clamp(min=0), reduction="none")
    from speculators.losses import eager

    function: Callable[[Tensor, Tensor], Tensor] = getattr(eager, _SPECULATORS[kind])
    return lambda logits, goal, _: function(logits, goal)


def count_accepted(batch: DraftBatch, right: Sequence[Tensor]) -> tuple[list[int], int]:
    """Drafts accepted up to each position, and the number of drafts, as serving would draft.

    Greedy decoding visits few of the positions: the draft after a verification starts behind the tokens it
    yielded. What the target would say past the end of its response is not known and counts as rejected.
    """
    accepted = torch.stack(list(right)).cpu().long().cumprod(0).sum(0).tolist()
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
