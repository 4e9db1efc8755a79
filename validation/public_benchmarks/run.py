"""Named benchmarks as one served model answers them, item by item.

Two styles. `likelihood`: as lm-eval defines each task; a multiple choice is the likeliest continuation.
`reasoning`: multiple choices are asked in chat, to be thought through and ended with `Answer: X`; long
decoding is where quantization drifts, and the likelihood of one letter does not see it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from validation.document import Document, digest_of
from validation.endpoint import Message, Progress, Sampling, Target
from validation.errors import MeasurementError
from validation.public_benchmarks.load import TaskData, describe, load_tasks
from validation.tasks import AccuracyComparison, AccuracyRun, Item, ItemResult, accuracy_of, compare_accuracy
from validation.tasks.accuracy import measure_accuracy

if TYPE_CHECKING:
    from validation.public_benchmarks.model import Generated

Style = Literal["likelihood", "reasoning"]
_RIGHT_OR_WRONG = ("acc", "exact_match", "prompt_level_strict_acc", "pass@1", "pass_at_1")
"""Metrics that say right or wrong of one item, in the order in which one is taken."""
_FILTERS = ("flexible-extract",)
"""Filters taken before a task's first, where it has several: they read an answer whatever its wrapping."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TRAILING_CUE = re.compile(r"\s*(?:Answer|答案)\s*[:：]?\s*$", re.IGNORECASE)
_ASK = {
    "en": "Think it through step by step. End with a line of the form\nAnswer: X\n"
    "where X is the letter of the one right option.",
    "zh": "请逐步思考。最后单独一行写出\n答案：X\n其中 X 为唯一正确选项的字母。",
}


class TaskScore(Document):
    """One metric of one task, as lm-eval averages it."""

    task: str
    metric: str
    filter: str
    value: float
    items: int
    higher_is_better: bool


class BenchmarkRun(Document):
    """All tasks as one served model answered them."""

    schema_version: int = 1
    label: str
    subject: str
    lm_eval: str
    """Version of the library that defines the tasks."""
    style: Style
    chat: bool
    """Whether generated answers were asked for in chat."""
    names: tuple[str, ...]
    """As asked for."""
    data: tuple[TaskData, ...]
    items: AccuracyRun | None
    """Every item that is right or wrong; None: no task has such."""
    scores: tuple[TaskScore, ...]
    """lm-eval's own averages; of style `likelihood` only."""


def measure_benchmarks(
    target: Target,
    names: Sequence[str],
    *,
    style: Style = "likelihood",
    data: Path | None = None,
    include: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    max_tokens: int | None = None,
    chat: bool = True,
    unsafe_code: bool = False,
    metadata: Mapping[str, Any] | None = None,
    expected: Mapping[str, str] | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> BenchmarkRun:
    """Run tasks by name; answers already in the target's cache are not asked for again.

    Args:
        limit: first N items of each task.
        max_tokens: of an answer; None: what each task says, 4096 in style `reasoning`.
        chat: ask for generated answers in chat; off: as plain text, which code completion wants.
        expected: digests of the items by task, checked before anything is asked.
        others: see `load_tasks`.

    Raises:
        MeasurementError, ServerUnreachable: see `load_tasks` and `Endpoint.collect`.
    """
    if not names:
        raise MeasurementError("no benchmark named", "Name tasks as lm-eval does, such as multimedqa.")
    tasks = load_tasks(
        names, data=data, include=include, fewshot=fewshot, unsafe_code=unsafe_code, metadata=metadata
    )
    records = describe(tasks, limit, expected)
    if style == "reasoning":
        items, scores = _reason(target, tasks, limit, max_tokens, concurrency, progress)
    else:
        if unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own second lock
        items, scores = _evaluate(target, tasks, limit, max_tokens, chat, unsafe_code, concurrency, progress)
    return BenchmarkRun(
        label=target.label,
        subject=target.subject,
        lm_eval=version("lm_eval"),
        style=style,
        chat=chat,
        names=tuple(names),
        data=records,
        items=items,
        scores=tuple(scores),
    )


def compare_benchmarks(
    reference: BenchmarkRun, candidate: BenchmarkRun, *, margin_points: float, confidence: float = 0.95
) -> AccuracyComparison:
    """Compare two runs over the same items against a margin in percentage points.

    Raises:
        MeasurementError: the runs differ in data, style or sampling, or no item is right or wrong.
    """
    # Not the library's fingerprints: the same rows have others in another folder.
    asked = [
        (run.style, run.chat, [(d.task, d.items_digest, d.fewshot, d.settings) for d in run.data])
        for run in (reference, candidate)
    ]
    if asked[0] != asked[1]:
        raise MeasurementError(f"{reference.label} and {candidate.label} ran different tasks or data")
    if reference.items is None or candidate.items is None:
        raise MeasurementError(
            "none of these tasks says right or wrong of an item", "Compare the averages of the two runs."
        )
    return compare_accuracy(
        reference.items, candidate.items, margin_points=margin_points, confidence=confidence
    )


def _evaluate(
    target: Target,
    tasks: Mapping[str, Any],
    limit: int | None,
    max_tokens: int | None,
    chat: bool,
    unsafe_code: bool,
    concurrency: int,
    progress: Progress | None,
) -> tuple[AccuracyRun | None, list[TaskScore]]:
    """lm-eval's evaluation: likelihoods of plain text, generation in chat."""
    from lm_eval.evaluator import evaluate

    from validation.public_benchmarks.model import EndpointLM

    model = EndpointLM(target, chat=chat, max_tokens=max_tokens, concurrency=concurrency, progress=progress)
    generative = {name: t for name, t in tasks.items() if t.OUTPUT_TYPE == "generate_until"}
    likely = {name: t for name, t in tasks.items() if name not in generative}
    samples: dict[str, list[dict[str, Any]]] = {}
    scores: list[TaskScore] = []
    for group, in_chat in ((likely, False), (generative, chat)):
        if not group:
            continue
        found = evaluate(
            model,
            {"tasks": group, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=in_chat,
            fewshot_as_multiturn=in_chat,
            confirm_run_unsafe_code=unsafe_code,
        )
        samples |= found["samples"]
        scores += _scores(found)
    prompts, results = [], list[ItemResult]()
    for name in sorted(tasks):
        own = samples[name]
        first = own[0]["filter"]
        filters = {sample["filter"] for sample in own}
        taken = next((f for f in _FILTERS if f in filters), first)
        own = [sample for sample in own if sample["filter"] == taken]
        prompts += [[name, s["doc_id"], s["prompt_hash"], s["target_hash"]] for s in own]
        metric = _binary_metric(own)
        if metric is not None:
            results += [_result(name, tasks[name], s, metric, model.generated) for s in own]
    if not results:
        return None, scores
    sampling = Sampling(max_tokens=max_tokens or 256, top_logprobs=None)
    return accuracy_of(target, results, digest_of(prompts), sampling, model.seconds), scores


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, values in sorted(found["results"].items()):
        for key, value in sorted(values.items()):
            metric, _, taken = key.partition(",")
            if not taken or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = (found.get("higher_is_better") or {}).get(task, {}).get(metric)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=taken,
                    value=float(value),
                    items=found["n-samples"][task]["effective"],
                    higher_is_better=better is not False,
                )
            )
    return scores


def _binary_metric(samples: Sequence[Mapping[str, Any]]) -> str | None:
    for metric in _RIGHT_OR_WRONG:
        if all(metric in s and isinstance(s[metric], bool | int | float) for s in samples) and all(
            float(s[metric]) in (0.0, 1.0) for s in samples
        ):
            return metric
    return None


def _result(
    name: str, task: Any, sample: Mapping[str, Any], metric: str, said: Mapping[str, Generated]
) -> ItemResult:
    prompt = str(sample["arguments"][0][0])
    generated = said.get(prompt)
    question = _last_turn(prompt) if task.OUTPUT_TYPE == "generate_until" else prompt
    expected, extracted = str(sample["target"]), None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(c) for c in task.doc_to_choice(sample["doc"])]
        likelihoods = [r[0][0] for r in sample["resps"]][: len(choices)]
        extracted = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
        gold = _gold(task, sample["doc"], choices)
        expected = choices[gold] if gold is not None else expected
        pairs = zip(choices, likelihoods, strict=False)
        text = "\n".join(f"{choice}: {likelihood:.4f} nats" for choice, likelihood in pairs)
    elif task.OUTPUT_TYPE == "generate_until":
        text = generated.text if generated is not None else str(sample["resps"][0][0])
        filtered = sample["filtered_resps"][0]
        extracted = str(filtered[0] if isinstance(filtered, list) and filtered else filtered)
    else:
        text = str(sample["resps"][0][0])
    return ItemResult(
        id=f"{name}:{sample['doc_id']}",
        task=name,
        language=_language(question),
        question=question,
        expected=expected,
        extracted=extracted,
        correct=float(sample[metric]) == 1.0,
        text=text,
        finish_reason=generated.finish_reason if generated is not None else "stop",
        prompt_tokens=0,
        completion_tokens=generated.completion_tokens if generated is not None else 0,
    )


def _last_turn(prompt: str) -> str:
    """The question proper: the user's last turn in a conversation (see `EndpointLM`), else the prompt."""
    try:
        turns = json.loads(prompt)["messages"]
        return str([turn["content"] for turn in turns if turn["role"] == "user"][-1])
    except (ValueError, KeyError, TypeError, IndexError):
        return prompt


def _reason(
    target: Target,
    tasks: Mapping[str, Any],
    limit: int | None,
    max_tokens: int | None,
    concurrency: int,
    progress: Progress | None,
) -> tuple[AccuracyRun | None, list[TaskScore]]:
    items: list[Item] = []
    for name, task in sorted(tasks.items()):
        if task.OUTPUT_TYPE != "multiple_choice":
            raise MeasurementError(
                f"{name} is no multiple choice, so it has no variant with reasoning",
                "Run it with --style likelihood: generative tasks are generated there too.",
            )
        items += [_item(name, task, number, doc) for number, doc in task.doc_iterator(limit=limit)]
    sampling = Sampling(max_tokens=max_tokens or 4096, top_logprobs=None)
    run = measure_accuracy(target, items, concurrency=concurrency, sampling=sampling, progress=progress)
    return run, []


def _item(name: str, task: Any, number: int, doc: Mapping[str, Any]) -> Item:
    choices = [str(c) for c in task.doc_to_choice(doc)]
    gold = _gold(task, doc, choices)
    if gold is None or len(choices) > len(_LETTERS):
        raise MeasurementError(f"{name}, item {number}: not one right option among at most 26")
    question = _TRAILING_CUE.sub("", str(task.doc_to_text(doc)))
    # Letters as choices mean that the question lists the options; texts as choices are listed here.
    if choices != list(_LETTERS[: len(choices)]):
        question += "\n" + "\n".join(f"{letter}. {c}" for letter, c in zip(_LETTERS, choices, strict=False))
    language = _language(question)
    return Item(
        id=f"{name}:{number}",
        task=name,
        language=language,
        messages=(Message(role="user", content=f"{question}\n\n{_ASK[language]}"),),
        answer=_LETTERS[gold],
        kind="choice",
    )


def _gold(task: Any, doc: Mapping[str, Any], choices: Sequence[str]) -> int | None:
    """Index of the right choice; None if there is not exactly one."""
    target = task.doc_to_target(doc)
    if isinstance(target, str):
        target = choices.index(target) if target in choices else int(target) if target.isdigit() else None
    return target if isinstance(target, int) and 0 <= target < len(choices) else None


def _language(text: str) -> Literal["en", "zh"]:
    return "zh" if len(re.findall(r"[一-鿿]", text)) > 0.1 * len(text) else "en"
