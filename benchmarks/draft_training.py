"""How fast a draft head trains, as a ratio to a plain loop over speculators' own parts in the same run.

    python benchmarks/draft_training.py [--target DIR --workdir DIR] [--prompts 300] [--seconds 8]

Ours is `packager draft train`'s loop: schedule, reader thread, state cache, head, loss, optimizer. The peer
is what speculators' trainer does in a step, which as a whole needs CUDA: its `ArrowDataset` over the same
states files, its multipack sampler, `CollateFn` and `shift_batch` in a `DataLoader`, its `Eagle3DraftModel`
with its KL loss and training-time test, gradient clipping and a fused AdamW, under the same BF16 autocast.
Same samples, sizes, start, threads. The loader has no worker, because there is nothing to hide: reading is
a few hundredths of the peer's step, and its share is printed. The peer computes every position of a packed
row with dense masks, so it slows down with the row's length: it is measured with several first, and the one
that is best for it is used. The two take turns; a figure is the median of the rounds.

Response tokens are the positions with a loss at the first step: what a head learns from. Padded tokens are
the positions that go through the model. Without --workdir responses and states of the packaged nano are
made first (vLLM, a minute).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packager.checkpoint.source import Checkpoint
from packager.draft.config import draft_config
from packager.draft.loss import STEP_DECAY, Target
from packager.draft.prepare import DraftData, prepare, target_digest
from packager.draft.stage import _reproducible_torch, _target_weights, response_vocabulary
from packager.draft.states import Sample, held_out, samples, schedule
from packager.draft.train import BETAS, CLIP, WEIGHT_DECAY, Trainer
from packager.draft.vocabulary import VocabularyMap
from packager.recipe import DraftSpec

NANO = Path(__file__).parents[1] / "packager" / "nano" / "checkpoint"
PEER_LAYOUTS = (("sdpa", 512), ("sdpa", 1024), ("sdpa", 2048), ("eager", 512))
"""Attention and packed length that the peer is tried with."""
READING: list[float] = []
"""Seconds that the peer took to read each batch."""


@dataclass(frozen=True)
class Work:
    """What a loop did in some time."""

    seconds: float
    response: int
    padded: int
    steps: int

    @property
    def rates(self) -> tuple[float, float]:
        """Response and padded tokens a second."""
        return self.response / self.seconds, self.padded / self.seconds


Loop = Iterator[tuple[int, int]]
"""Each turn trains one step and gives its response and padded tokens."""


def timed(loop: Loop, seconds: float) -> Work:
    """Let a loop run for about that long."""
    began, response, padded, steps = time.perf_counter(), 0, 0, 0
    while (spent := time.perf_counter() - began) < seconds:
        more, wide = next(loop)
        response, padded, steps = response + more, padded + wide, steps + 1
    return Work(spent, response, padded, steps)


def ours(trainer: Trainer, found: list[Sample]) -> Loop:
    """Our training loop, as `Trainer.run` has it."""
    from concurrent.futures import ThreadPoolExecutor

    spec = trainer.spec
    groups = schedule(found, spec.batch_tokens, spec.seed)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(trainer._next, groups)
        while True:
            batches = ahead.result()
            ahead = reader.submit(trainer._next, groups)
            trainer.step(batches)
            yield (
                sum(int((batch.tokens[:, 1] >= 0).sum()) for batch in batches),
                sum(batch.keys.numel() for batch in batches),
            )


def peer_data(found: list[Sample], folder: Path) -> Path:
    """The same samples as speculators keeps them: an Arrow dataset, and hidden states `hs_<row>`."""
    from datasets import Dataset

    states = folder / "hidden_states"
    states.mkdir(parents=True)
    rows: dict[str, list[Any]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    for index, sample in enumerate(found):
        (states / f"hs_{index}.safetensors").symlink_to(sample.path.resolve())
        ids = sample.ids[:-1]  # the last token has no state: nothing came after it
        rows["input_ids"].append(list(ids))
        rows["loss_mask"].append([at >= sample.prompt for at in range(len(ids))])
        rows["seq_len"].append(len(ids))
    Dataset.from_dict(rows).with_format("torch").save_to_disk(str(folder))
    return folder


def peer_model(
    config: dict[str, Any], weights: Target, vocabulary: VocabularyMap, trainer: Trainer, attention: str
) -> Any:
    """speculators' model of the same shape, with the same weights to start from."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models import eagle3
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters"),
    )
    llama = LlamaConfig(**{key: config[key] for key in keys})
    llama._attn_implementation = attention
    model = eagle3.Eagle3DraftModel(
        eagle3.Eagle3SpeculatorConfig(
            transformer_layer_config=llama,
            draft_vocab_size=config["draft_vocab_size"],
            norm_before_residual=False,
            eagle_aux_hidden_state_layer_ids=config["eagle_aux_hidden_state_layer_ids"],
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
            ),
        )
    )
    model.load_vocab_mappings(torch.tensor(vocabulary.reachable), torch.tensor(vocabulary.offsets))
    state = {
        name.replace("midlayer.", "layers.0."): value.clone()
        for name, value in trainer.head.state_dict().items()
    }
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(weights.embeddings)
        model.verifier_lm_head.weight.copy_(weights.head_rows)
        model.verifier_norm.weight.copy_(weights.norm)
    return model


def theirs(model: Any, data: Path, spec: DraftSpec, hidden: int, length: int, bf16: bool) -> Loop:
    """A plain loop over speculators' loader, model and loss: what its trainer does in a step."""
    device = next(model.parameters()).device
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.data import shift_batch
    from speculators.train.data import ArrowDataset
    from speculators.train.dataloader import _setup_dataloader

    dataset = ArrowDataset(max_len=length, datapath=data, on_missing="raise")
    loader = _setup_dataloader(
        dataset, length, hidden, num_workers=0, num_target_layers=len(spec.aux_layers), preprocess=shift_batch
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=spec.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    losses = resolve_loss_config("kl_div", "eager")
    for epoch in itertools.count():
        loader.batch_sampler.epoch = epoch
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            READING.append(time.perf_counter() - began)
            if batch is None:
                break
            inputs = {
                key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)
            }
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                _, loss, _ = model(
                    **inputs, ttt_steps=spec.ttt_steps, ttt_step_loss_decay=STEP_DECAY, loss_config=losses
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            yield int(inputs["loss_mask"].sum()), inputs["input_ids"].numel()


def best_peer(make: Callable[[str, int], Loop], longest: int, seconds: float) -> tuple[str, int]:
    """The attention and packed length with which the peer gets through most response tokens."""
    found: dict[tuple[str, int], float] = {}
    for attention, length in PEER_LAYOUTS:
        if length < longest:
            continue  # would truncate samples
        loop = make(attention, length)
        for _ in range(2):
            next(loop)  # meets the shapes
        found[attention, length] = timed(loop, seconds).rates[0]
        print(
            f"  peer, {attention:<5} rows of {length:>4}: {found[attention, length]:8.0f} response tokens/s"
        )
    return max(found, key=lambda key: found[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=NANO, help="checkpoint; default: the packaged nano")
    parser.add_argument("--workdir", type=Path, help="what `packager draft prepare` made for the target")
    parser.add_argument("--prompts", type=int, default=300, help="without --workdir")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    spec = DraftSpec(vocab_size=512, aux_layers=(1, 2, 3), prompts=options.prompts, steps=10**6)
    with tempfile.TemporaryDirectory() as name, _reproducible_torch():
        root = Path(name)
        if options.workdir:
            data = DraftData(options.workdir, target_digest(options.target))
        else:
            from packager.nano import language

            data = prepare(
                options.target, spec, language.prompts(options.prompts), root / "work",
                lambda line: print(line, file=sys.stderr),
            )  # fmt: skip
        config = Checkpoint.open(options.target).config()
        vocabulary = response_vocabulary(data, spec, config["vocab_size"])
        weights = _target_weights(options.target, vocabulary, config["rms_norm_eps"])
        found = samples([row for row in data.records() if not held_out(row["id"])], data.states)
        draft = draft_config(config, spec)
        trainer = Trainer(draft, weights, vocabulary, spec, root / "state")
        arrow = peer_data(found, root / "arrow")

        def peer(attention: str, length: int) -> Loop:
            model = peer_model(draft, weights, vocabulary, trainer, attention)
            return theirs(model, arrow, spec, config["hidden_size"], length, trainer.bf16)

        print(
            f"{len(found)} samples, {sum(s.queries for s in found)} response tokens of "
            f"{sum(len(s.ids) for s in found)}; {torch.get_num_threads()} threads, "
            f"{'BF16' if trainer.bf16 else 'FP32'} products, {spec.ttt_steps} training-time-test steps"
        )
        attention, length = best_peer(peer, max(len(s.ids) for s in found), min(3.0, options.seconds))
        loops = {"ours": ours(trainer, found), "peer": peer(attention, length)}
        for loop in loops.values():
            timed(loop, options.seconds)  # fills caches, meets the shapes
        READING.clear()
        rounds: dict[str, list[Work]] = {name: [] for name in loops}
        for _ in range(options.rounds):
            for which, loop in loops.items():
                rounds[which].append(timed(loop, options.seconds))
    print(f"{'':<34}{'steps/s':>9}{'response tokens/s':>20}{'padded tokens/s':>18}")
    figures = {}
    for which, works in rounds.items():
        figures[which] = [statistics.median(work.rates[at] for work in works) for at in (0, 1)]
        pace = statistics.median(work.steps / work.seconds for work in works)
        what = "packager" if which == "ours" else f"speculators, {attention}, rows of {length}"
        print(f"{what:<34}{pace:>9.2f}{figures[which][0]:>20.0f}{figures[which][1]:>18.0f}")
    spent = sum(work.seconds for work in rounds["peer"])
    print(f"{'  of it reading':<34}{sum(READING) / spent:>9.1%}")
    ratios = [mine / other for mine, other in zip(figures["ours"], figures["peer"], strict=True)]
    print(f"{'ours / this':<34}{'':>9}{ratios[0]:>20.2f}{ratios[1]:>18.2f}   (goal 1.0)")


if __name__ == "__main__":
    main()
