"""The draft stage: prepare, train, export, each resumable from the work directory; and the same as single
steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import ArtifactWriter, Manifest
from packager.checkpoint.source import Checkpoint
from packager.draft.config import draft_config
from packager.draft.curve import LOG_NAME, PLOT_NAME, read_log, training_svg
from packager.draft.export import write_draft, write_speculators
from packager.draft.prepare import DraftData, prepare, target_digest
from packager.draft.ranks import joined, leads, processes_here
from packager.draft.vocabulary import VocabularyMap, choose_vocabulary, count_tokens, coverage
from packager.errors import BadInput
from packager.recipe import DraftSpec

if TYPE_CHECKING:
    from packager.draft.loss import Accepted, Target
    from packager.draft.states import Sample
    from packager.draft.train import Progress, Trainer

STAGE = "draft"
_SIDES = {"coverage": False, "held_out_coverage": True}
TRAINING_STATE = "training_state.safetensors"


@dataclass(frozen=True)
class TrainedDraft:
    """A finished training run."""

    trainer: Trainer
    vocabulary: VocabularyMap
    predictions: dict[int, Accepted]
    """Acceptance along the responses to held-out prompts, predicted without serving, by draft tokens."""
    metrics: dict[str, Any]
    """What the manifest says about it; no times."""
    target: str
    """Digest of the target whose states it learned from."""

    @property
    def predicted(self) -> Accepted:
        """The prediction for as many draft tokens as the recipe names."""
        return self.predictions[self.trainer.spec.num_speculative_tokens]


def response_vocabulary(data: DraftData, spec: DraftSpec, target_size: int) -> VocabularyMap:
    """The draft vocabulary from the token counts of the prepared responses, held-out ones not counted."""
    from packager.draft.states import held_out

    counts = count_tokens(record["response_ids"] for record in data.records() if not held_out(record["id"]))
    return choose_vocabulary(counts, spec.vocab_size, target_size)


def coverages(
    records: Sequence[Mapping[str, Any]], vocabulary: VocabularyMap
) -> dict[str, dict[str, dict[str, float]]]:
    """`coverage` of the training side and `held_out_coverage`, each by `language` and by `task`."""
    from packager.draft.states import held_out

    sides = {name: [r for r in records if held_out(r["id"]) == held] for name, held in _SIDES.items()}
    return {
        name: {key: coverage(side, vocabulary, key) for key in ("language", "task")}
        for name, side in sides.items()
    }


def _target_weights(target: Path, vocabulary: VocabularyMap, eps: float) -> Target:
    import torch

    from packager.draft.loss import Target

    checkpoint = Checkpoint.open(target)

    def read(name: str) -> Any:
        info = checkpoint.tensors.get(name)
        if info is None:
            raise BadInput(f"{target} has no tensor {name}", "Give a BailingMoeV2 checkpoint.")
        if info.dtype not in ("BF16", "F16", "F32"):
            raise BadInput(
                f"{name} of {target} is {info.dtype}; embeddings, norm and head must not be quantized"
            )
        return reader.array(info).astype("float32")

    with checkpoint.reader() as reader:
        rows = read("lm_head.weight")[list(vocabulary.target_ids)]
        return Target(
            torch.from_numpy(read("model.word_embeddings.weight")),
            torch.from_numpy(rows),
            torch.from_numpy(read("model.norm.weight")),
            eps,
        )


@contextmanager
def _reproducible_torch() -> Iterator[None]:
    """All cores, deterministic kernels; the process's own settings come back afterwards."""
    import os

    import torch

    filling: Any = torch.utils.deterministic  # torch's stubs do not know its one attribute

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = filling.fill_uninitialized_memory
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_here()))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    # Every result is written whole, so filling new memory with NaN first is a tenth of a step for nothing.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        filling.fill_uninitialized_memory = filled


def _rates(predictions: Mapping[int, Accepted]) -> dict[str, list[float]]:
    """Rates by position, by draft tokens a step."""
    return {
        str(tokens): [round(rate, 4) for rate in one.per_position]
        for tokens, one in predictions.items()
        if one.drafts
    }


def _silent(_: str) -> None:
    """Progress of a process that does not speak."""


def train(
    target: Path,
    spec: DraftSpec,
    data: DraftData,
    progress: Callable[[str], None],
    *,
    on_step: Callable[[Progress], None] | None = None,
    engine: Mapping[str, Any] | None = None,
    devices: str | None = None,
) -> TrainedDraft:
    """Train a head for `target` on prepared data, continuing an interrupted run of the same settings.

    Under `torchrun` the processes train together; the first alone writes, and calls `progress` and `on_step`.
    What they get back is good for its figures, not for `export`, because each has a shard of the head; a
    single process that trains again reads the whole of it from the checkpoint.

    With `spec.states` on-line, `target` is served beside the training, with further arguments `engine` of
    `vllm.LLM` and, where there is CUDA, on `devices` (as CUDA_VISIBLE_DEVICES names them).

    Raises:
        BadInput: the data is missing, damaged or was taken from another target; the loss diverged; on-line,
        the budget or the disk is too small. RemoteFailure: on-line, the engine died.
    """
    from packager.draft.online import online_states
    from packager.draft.states import held_out, samples
    from packager.draft.train import Trainer

    if not leads():
        progress, on_step = _silent, None
    if data.target != target_digest(target):
        raise BadInput(
            "the target is not the one the hidden states were taken from",
            "Run `packager draft prepare` again.",
        )
    if spec.states == "offline" and not any(data.states.glob("*.safetensors")):
        raise BadInput(
            f"{data.workdir} holds responses without hidden states",
            "Train with --states online, or run `packager draft prepare --states offline`.",
        )
    records = data.records()
    config = Checkpoint.open(target).config()
    vocabulary = response_vocabulary(data, spec, config["vocab_size"])
    covered = coverages(records, vocabulary)
    for key in ("language", "task"):
        for name, share in covered["held_out_coverage"][key].items():
            progress(
                f"draft: {spec.vocab_size} tokens cover {share:.1%} of the held-out responses, {key} {name}"
            )
    if spec.sliding_window is not None:
        progress(
            f"draft: a window of {spec.sliding_window} tokens; vLLM takes it from the draft's config, SGLang "
            "from --speculative-draft-window-size alone"
        )
    with _reproducible_torch(), joined() as ranks:
        weights = _target_weights(target, vocabulary, config.get("rms_norm_eps", 1e-6))
        trainer = Trainer(
            draft_config(config, spec),
            weights,
            vocabulary,
            spec,
            data.workdir / TRAINING_STATE,
            ranks=ranks,
        )
        sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for record in records:
            sides[held_out(record["id"])].append(record)
        training, held = samples(sides[False], data.states), samples(sides[True], data.states)
        progress(f"draft: training on {len(training)} responses, {len(held)} held out")
        with (
            online_states(target, spec, data, training, held, ranks, progress, engine=engine, devices=devices)
            if spec.states == "online"
            else nullcontext()
        ) as spool:
            kept = spool.held if spool else held
            predictions = trainer.run(training, kept, progress, on_step, spool)
        task_of = {record["states"]: str(record["task"]) for record in sides[True]}
        tasks: dict[str, list[Sample]] = {}
        for sample, there in zip(held, kept, strict=True):
            tasks.setdefault(task_of[sample.path.name], []).append(there)
        by_task = {task: trainer.predict(found) for task, found in sorted(tasks.items())}
    predicted = predictions[spec.num_speculative_tokens]
    if predicted.drafts:
        rates = " ".join(f"{rate:.3f}" for rate in predicted.per_position)
        progress(f"draft: predicted acceptance length {predicted.length:.2f} on held-out prompts ({rates})")
    metrics = {
        "samples": {"training": len(training), "held_out": len(held)},
        "response_tokens": sum(len(record["response_ids"]) for record in records),
        **covered,
        "layer_proof": data.layer_proof,
        "steps": spec.steps,
        "parameters": sum(parameter.numel() for parameter in trainer.head.parameters()),
        "bf16_matmul": trainer.bf16,
        "predicted_acceptance": {
            "length": round(predicted.length, 4) if predicted.drafts else None,
            "per_position": [round(rate, 4) for rate in predicted.per_position],
            "drafts": predicted.drafts,
            "by_tokens": _rates(predictions),
            "by_task": {task: _rates(one) for task, one in by_task.items()},
            "kind": f"along the {'sampled' if spec.temperature else 'greedy'} responses to held-out prompts, "
            "not served",
        },
    }
    if trainer.best:
        metrics |= {"best_step": trainer.best.step, "last_step": trainer.done}
    return TrainedDraft(trainer, vocabulary, predictions, metrics, data.target)


def export(
    out: Path,
    trained: TrainedDraft,
    target: Path,
    *,
    recipe_digest: str,
    inputs: Mapping[str, str],
    verifier: str | None = None,
) -> Manifest:
    """Seal a trained draft as an artifact in `out`: for vLLM and SGLang, or, with `verifier` (hub name or
    folder of the target), in the form of the speculators library.

    Raises:
        BadInput: `out` is taken, or the export does not pass the validator.
    """
    tools = {name: metadata.version(name) for name in ("torch", "safetensors", "matplotlib")}
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=dict(inputs)) as writer:
        config, head = Checkpoint.open(target).config(), trained.trainer.head
        if verifier is None:
            write_draft(writer, head, trained.vocabulary, config)
        else:
            tokens = trained.trainer.spec.num_speculative_tokens
            write_speculators(writer, head, trained.vocabulary, config, verifier=verifier, tokens=tokens)
        writer.write_json("training.json", {**trained.trainer.settings(), "target": trained.target})
        rows = read_log(trained.trainer.log)
        writer.write_bytes(LOG_NAME, "".join(json.dumps(row) + "\n" for row in rows).encode())
        writer.write_bytes(PLOT_NAME, training_svg(rows))
        return writer.seal(trained.metrics, tools)


def build(
    target: Path,
    out: Path,
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    *,
    recipe_digest: str,
    inputs: Mapping[str, str],
    workdir: Path,
    progress: Callable[[str], None],
    engine: Mapping[str, Any] | None = None,
) -> Manifest:
    """The whole stage: prepare, train, export; after a kill it continues where it was.

    Args:
        target: the checkpoint to serve: the context artifact, or its dequantized copy where FP8 does not run.
        out: directory of the sealed draft.
        prompts: mappings with `id`, `messages`, `task`, `language`.
        inputs: digests that the manifest names.
        workdir: responses, hidden states and the training checkpoint; of no use once `out` is sealed.
        engine: further arguments of `vllm.LLM`.
    """
    data = prepare(target, spec, prompts, workdir, progress, engine=engine)
    trained = train(target, spec, data, progress, engine=engine)
    return export(out, trained, target, recipe_digest=recipe_digest, inputs=inputs)
