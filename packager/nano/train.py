"""Train the nano model: `python -m packager.nano.train OUT`. Seeded; about an hour on two cores.

The loss is taken on responses alone: what a prompt holds is random and would only teach noise. Records are
short at first and grow to the trained length; a long record is asked several times in one conversation, so
that its tokens are read once for many answers. Experts are balanced by their bias, without an auxiliary loss
(arXiv 2408.15664), as in the model line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from packager.bailing.model import Attention, BailingMoeV2, MoE
from packager.nano.architecture import CONFIG, TRAINED_LENGTH, render
from packager.nano.language import (
    CHINESE_SHARE,
    LONGEST_RECORD,
    TASKS,
    WardRecord,
    samples,
    tenths,
)
from packager.nano.tokenizer import train_tokenizer, write_tokenizer
from packager.optimizer import Optimizers

SEED = 20
WORLD = 2
"""Processes, one thread each: how the data is split, so the result, does not follow the core count."""
BATCH_TOKENS = 2560
"""Tokens per process and step."""
PEAK_RATE = 2e-3
WARM_UP = 100
STEPS = 1600
DECAY_FROM = 700
GROWTH = (250, 700)
"""Steps over which the longest record grows …"""
SHORTEST_RECORD = 6
"""Lines of the longest record at first."""
BALANCE_RATE = 1e-3
"""Step of the expert bias; twenty times that at first, when a few experts would take all tokens."""


@dataclass
class Example:
    """A tokenized conversation; `wanted[i]` says whether token i is part of a response."""

    ids: list[int]
    wanted: list[bool]


class Examples:
    """An endless seeded stream of training conversations."""

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.streams = {task: samples(task, seed, held_out=False) for task in TASKS if task != "lookup"}

    def _tokenize(self, turns: list[tuple[str, str]]) -> Example:
        ids: list[int] = []
        wanted: list[bool] = []
        for number, (question, response) in enumerate(turns):
            prompt = render(question)
            if number:  # the system turn stands once
                prompt = prompt[prompt.index("<role>HUMAN") :]
            for text, mark in ((prompt, False), (response + "<|role_end|>", True)):
                piece = self.tokenizer.encode(text).ids
                ids += piece
                wanted += [mark] * len(piece)
        return Example(ids[: TRAINED_LENGTH + 1], wanted[: TRAINED_LENGTH + 1])

    def short(self) -> Example:
        """A question of a task other than `lookup`, or a drill; the two hardest tasks come twice as often."""
        kind = self.rng.choice([*self.streams, "dose", "choice", "add", "compare"])
        if kind == "add":
            return self._add()
        if kind == "compare":
            return self._compare()
        sample = next(self.streams[kind])
        return self._tokenize([(sample.question, sample.response)])

    def _add(self) -> Example:
        """A drill of the sum in `dose`. The task alone has so few sums that they are learned by heart."""
        a, b = 10 * self.rng.randrange(2, 180), self.rng.randrange(2, 190)
        return self._tokenize([(f"Add {a} and {b}.", f"{a} + {b} = {a + b}.")])

    def _compare(self) -> Example:
        """A drill of the comparison in `triage`, with any thresholds."""
        rng = self.rng
        low = rng.randrange(10, 300)
        high = low + rng.randrange(5, 150)
        below, above = max(low - 60, 1), high + 60
        value = rng.randrange(*rng.choice(((below, low), (low, high), (high, above))))
        v, u, e = tenths(value), tenths(low), tenths(high)
        answer = f"{v} < {u}" if value < low else f"{u} <= {v} < {e}" if value < high else f"{v} >= {e}"
        return self._tokenize([(f"Compare {v} with {u} and {e}.", f"{answer}.")])

    def record(self, longest: int) -> Example:
        """A record of up to `longest` lines, asked about several of its lines: in turn, or all at once.

        The second form is a drill: many answers for few tokens, from which looking up is learned soonest.
        """
        rng = self.rng
        zh, drill = rng.random() < CHINESE_SHARE, rng.random() < 0.5
        record = WardRecord.draw(rng, zh, longest)
        entries = record.entries
        asked = [record.ask(rng, e) for e in rng.sample(entries, min(len(entries), 16 if drill else 4))]
        asked = [sample for sample in asked if not sample.held_out]
        if not asked:
            return self.record(longest)
        if drill:
            names = ", ".join(sample.key.split("|")[0] for sample in asked)
            answers = "\n".join(sample.response.split("\n")[0] for sample in asked)
            return self._tokenize([(f"{record.text}{'列出' if zh else 'List'} {names}.", answers)])
        turns = [(sample.question, sample.response) for sample in asked]
        return self._tokenize([(record.text + turns[0][0], turns[0][1]), *turns[1:]])


def _batch(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of supervised targets, each [n, length], padded to a multiple of 16."""
    length = -(-max(len(e.ids) - 1 for e in examples) // 16) * 16
    ids = torch.full((len(examples), length + 1), CONFIG["pad_token_id"])
    mask = torch.zeros(len(examples), length + 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = torch.tensor(example.wanted)
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


def longest_record(step: int) -> int:
    """Lines of the longest record at a step."""
    return round(float(np.interp(step, GROWTH, (SHORTEST_RECORD, LONGEST_RECORD))))


def batches(tokenizer: Tokenizer, rank: int, start: int = 0) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Micro-batches of each step from `start` on: a little over half short questions, the rest records."""
    examples = Examples(tokenizer, f"train-{SEED}-{rank}")
    for step in itertools.count():
        short: list[Example] = []
        while sum(len(e.ids) for e in short) < BATCH_TOKENS * 0.55:
            short.append(examples.short())
        records: list[Example] = []
        while sum(len(e.ids) for e in records) < BATCH_TOKENS * 0.45:
            records.append(examples.record(longest_record(step)))
        if step >= start:
            yield [_batch(short), _batch(records)]


def learning_rate(step: int) -> float:
    """Linear warm-up, constant, then linear to zero."""
    return PEAK_RATE * float(np.interp(step + 1, (0, WARM_UP, DECAY_FROM, STEPS), (0, 1, 1, 0)))


@torch.no_grad()
def plant_position_heads(model: BailingMoeV2) -> None:
    """Make two heads of the first layer, and the key head they share, look one and two tokens back.

    Answering from a record binds a drug to the name before it: a head that looks one token back has to appear
    together with one that matches names (induction, arXiv 2209.11895), and did not within an hour. Given the
    first, the second is learned in minutes.

    Dimension 0 of every embedding holds the same number, and these heads' queries and keys read little else,
    so that only the rotary embedding tells positions apart: a query turned by d finds the key d tokens back.
    """
    weight = model.model.word_embeddings.weight
    weight[:, 0] = 4.0
    attention: Attention = model.model.layers[0].attention  # type: ignore[assignment]
    head, queries, keys = attention.head_dim, attention.heads, attention.kv_heads
    half = int(head * CONFIG["partial_rotary_factor"]) // 2
    strength = torch.tensor([1.0, 0.8, 0.5])  # the fastest three frequencies tell neighbours apart best
    frequency = CONFIG["rope_theta"] ** -(torch.arange(3) / half)
    weight = attention.query_key_value.weight
    # (row of the fused projection where the head starts, tokens back)
    for start, back in (
        ((queries - 2) * head, 1.0),
        ((queries - 1) * head, 2.0),
        ((queries + keys - 1) * head, 0.0),
    ):
        weight[start : start + head] *= 0.2
        weight[start : start + 3, 0] = strength * torch.cos(back * frequency)
        weight[start + half : start + half + 3, 0] = -strength * torch.sin(back * frequency)
    # What they bring is to be heard beside the token itself.
    weight[-head:] *= 2.0
    attention.dense.weight[:, -2 * head :] *= 2.0
    attention.query_layernorm.weight.fill_(1.5)
    attention.key_layernorm.weight.fill_(1.5)


def optimizers(model: BailingMoeV2) -> Optimizers:
    """Muon for the matrices of attention and feed-forward, AdamW for experts, embeddings, head and vectors.

    With AdamW alone, looking up in a record was not learned in the time given; Muon takes two-dimensional
    parameters only, so the stacked experts stay with AdamW.
    """
    inner = {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.endswith(("proj.weight", "dense.weight", "query_key_value.weight"))
    }
    named = dict(model.named_parameters())
    return Optimizers(
        [p for name, p in named.items() if name in inner],
        [p for name, p in named.items() if name not in inner],
        matrix_decay=0.05,
        betas=(0.9, 0.98),
        decay=0.0,
    )


def _all_reduce(model: BailingMoeV2, numbers: Tensor) -> None:
    """Sum gradients, expert loads and `numbers` over the processes, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [numbers])
    dist.all_reduce(flat)
    parts = torch.split(flat, [g.numel() for g in gradients] + [numbers.numel()])
    for gradient, part in zip([*gradients, numbers], parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def train_step(
    model: BailingMoeV2,
    optimizer: Optimizers,
    parts: list[tuple[Tensor, Tensor, Tensor]],
    rate: float,
    balance: float,
) -> tuple[float, float]:
    """One update; returns the mean loss per response token (nats) and the share of tokens predicted right."""
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    experts = moes[0].gate.experts
    totals = torch.zeros(3 + experts * len(moes))  # loss, right, response tokens, then each layer's loads
    for inputs, targets, mask in parts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.lm_head(model.states(inputs)[mask])
        loss = F.cross_entropy(logits.float(), targets[mask], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        loads = [moe.load.float() for moe in moes if moe.load is not None]
        right = (logits.argmax(-1) == targets[mask]).sum()
        totals += torch.cat([torch.stack((loss.detach(), right.float(), mask.sum().float())), *loads])
    if dist.is_initialized():
        _all_reduce(model, totals)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= totals[2]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(rate)
    optimizer.zero_grad()
    for moe, load in zip(moes, totals[3:].chunk(len(moes)), strict=True):
        moe.gate.expert_bias += balance * torch.sign(load.mean() - load)
    return float(totals[0] / totals[2]), float(totals[1] / totals[2])


@torch.no_grad()
def exact_match(model: BailingMoeV2, tokenizer: Tokenizer, task: str, count: int) -> float:
    """Share of held-out items whose whole response is the greedy one (every token is its prefix's argmax)."""
    stream = samples(task, "training-eval", held_out=True)
    right = 0
    for _ in range(count):
        sample = next(stream)
        prompt = tokenizer.encode(render(sample.question)).ids
        response = tokenizer.encode(sample.response + "<|role_end|>").ids
        ids = torch.tensor([prompt + response])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.states(ids[:, :-1])[0, len(prompt) - 1 :]
            best = model.lm_head(states).argmax(-1)
        right += bool((best == ids[0, len(prompt) :]).all())
    return right / count


def write_checkpoint(model: BailingMoeV2, tokenizer: Tokenizer, out: Path) -> None:
    """Write a complete checkpoint directory: weights in BF16, config, tokenizer, generation settings."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file(model.dump_tensors(), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    settings = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, out)


def _worker(rank: int, out: Path, steps: int, stop_after: int | None, evaluate_every: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out.resolve()}/rendezvous", rank=rank, world_size=WORLD
    )
    tokenizer = train_tokenizer()
    model = BailingMoeV2(CONFIG)
    model.initialise(SEED)
    plant_position_heads(model)
    optimizer = optimizers(model)
    saved, start = out / "training_state.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    begun, tokens = time.monotonic(), 0
    for step, parts in enumerate(batches(tokenizer, rank, start), start):
        balance = BALANCE_RATE * max(1.0, 20 - step / 10)
        loss, right = train_step(model, optimizer, parts, learning_rate(step), balance)
        tokens += WORLD * sum(inputs.numel() for inputs, _, _ in parts)
        if math.isnan(loss):
            raise FloatingPointError(f"training diverged at step {step}: the loss is NaN")
        last = step + 1 in (steps, stop_after)
        if rank == 0:
            line: dict[str, object] = {
                "step": step,
                "loss": round(loss, 5),
                "token_accuracy": round(right, 5),
            }
            evaluate = step + 1 == steps or (evaluate_every and (step + 1) % evaluate_every == 0)
            if evaluate:
                count = 200 if last else 40
                line["exact_match"] = {task: exact_match(model, tokenizer, task, count) for task in TASKS}
                state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, saved.with_suffix(".new"))
                saved.with_suffix(".new").replace(saved)
                write_checkpoint(model, tokenizer, out)
            if step < 5 or step % 20 == 0 or evaluate or last:
                line["tokens_per_second"] = round(tokens / (time.monotonic() - begun))
                with (out / "training.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
        if last:
            break
    if rank == 0:
        write_checkpoint(model, tokenizer, out)
    dist.destroy_process_group()


def train(out: Path, steps: int = STEPS, *, stop_after: int | None = None, evaluate_every: int = 200) -> None:
    """Train for `steps` (or stop early after `stop_after` of them); write checkpoint and log to `out`.

    A run that was interrupted goes on from its last saved step.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    # Keep freed memory in the process: giving it back after each step costs more than the arithmetic.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _worker, args=(out, steps, stop_after, evaluate_every), nprocs=WORLD
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--stop-after", type=int, default=None)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, stop_after=arguments.stop_after)
