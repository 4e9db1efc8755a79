"""MedBench asked of a served model: answers for the upload, and scores where the files hold labels.

Choices are right if the set of letters is. Open answers get the recall of the reference's key points,
averaged over the items of a task (MedBench's Macro-Recall). Which points a reference has and whether an
answer holds one is decided on the server by means that are not published; here a point is what
`other.key_points` lists (each a text or a list of equivalent texts), or else each phrase of the reference,
and it is held if it occurs word for word, punctuation, spaces and width of letters aside. A paraphrase is not
counted, so the figure is a lower bound: fit to compare two models on the same items, not to compare with the
leaderboard.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from validation.document import Document
from validation.endpoint import Message, Progress, Request, Sampling, Target
from validation.errors import MeasurementError
from validation.medbench.files import Question, TaskFile, check, data_digest, written
from validation.tasks import AccuracyComparison, AccuracyRun, ItemResult, accuracy_of, compare_accuracy
from validation.tasks.scores import Score, ScoreComparison, compare_scores
from validation.tasks.scoring import parse_choice

_ENUMERATION = re.compile(r"[①-⑳]|[（(]\d{1,2}[)）]|(?:^|\n)\s*\d{1,2}[.、．)）]|(?:^|\n)\s*[-*•]")
_BREAKS = re.compile(r"[，,。；;、：:！!？?\n]")


class OpenAnswer(Document):
    """One open item with a reference."""

    id: str
    task: str
    question: str
    reference: str
    points: int
    held: int
    missing: tuple[str, ...]
    """Key points that the answer does not hold."""
    text: str

    @property
    def recall(self) -> float:
        """Share of the key points held."""
        return self.held / self.points


class TaskShare(Document):
    """One task, or one dimension: the mean over its tasks, as MedBench averages."""

    name: str
    dimension: str
    items: int
    labelled: int
    choices_right: int | None
    """Of the labelled choices; None: there are none, or it is a dimension of several tasks."""
    score: float | None
    """0 to 1; None: no labels, not measured here."""


class MedBenchRun(Document):
    """All tasks as one served model answered them."""

    schema_version: int = 1
    label: str
    subject: str
    model: str
    data_digest: str
    sampling: Sampling
    answers: dict[str, str]
    """In MedBench's form, by task and line."""
    faults: tuple[str, ...]
    choices: AccuracyRun | None
    """The labelled choices, to be compared item by item."""
    open: tuple[OpenAnswer, ...]
    by_task: tuple[TaskShare, ...]
    by_dimension: tuple[TaskShare, ...]
    seconds: float


class MedBenchComparison(Document):
    """A candidate against a reference on the same labelled items."""

    schema_version: int = 1
    reference: str
    candidate: str
    choices: AccuracyComparison | None
    open: ScoreComparison | None
    """By recall; None: fewer than two open items have labels."""
    margin_points: float

    @property
    def inferior(self) -> bool:
        """Whether the loss is shown to exceed the margin, in choices or in open answers."""
        return any(c is not None and c.overall.verdict == "inferior" for c in (self.choices, self.open))


def measure_medbench(
    target: Target,
    files: Sequence[TaskFile],
    *,
    sampling: Sampling | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> MedBenchRun:
    """Ask every question as it stands; answers already in the target's cache are not asked for again.

    Raises:
        MeasurementError, ServerUnreachable: see `Endpoint.complete`.
    """
    sampling = sampling or Sampling(max_tokens=2048, top_logprobs=None)
    questions = [question for file in files for question in file.questions]
    requests = [Request(id=q.id, messages=(Message(role="user", content=q.text),)) for q in questions]
    completions = target.ask(requests, sampling, concurrency=concurrency, progress=progress)
    safe = {file.task for file in files if file.dimension == "safety and ethics"}
    answers = {}
    chosen: list[ItemResult] = []
    open_answers: list[OpenAnswer] = []
    for question, completion in zip(questions, completions, strict=True):
        said = after_thinking(completion.text)
        answers[question.id] = answer = written(question.form, said)
        if not question.label:
            continue
        if question.form == "text":
            open_answers.append(_open(question, said))
            continue
        letters = parse_choice(answer)
        chosen.append(
            ItemResult(
                id=question.id,
                task=question.task,
                language="zh",
                question=question.text,
                expected=parse_choice(question.label) or question.label,
                extracted=letters,
                correct=letters is not None and letters == parse_choice(question.label),
                text=completion.text,
                finish_reason=completion.finish_reason,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
                safety=question.task in safe,
            )
        )
    digest, seconds = data_digest(files), sum(c.seconds for c in completions)
    by_task = tuple(_task(file, chosen, open_answers) for file in files)
    return MedBenchRun(
        label=target.label,
        subject=target.subject,
        model=target.model,
        data_digest=digest,
        sampling=sampling,
        answers=answers,
        faults=tuple(check(files, answers)),
        choices=accuracy_of(target, chosen, digest, sampling, seconds) if chosen else None,
        open=tuple(open_answers),
        by_task=by_task,
        by_dimension=tuple(_dimension(name, by_task) for name in sorted({t.dimension for t in by_task})),
        seconds=seconds,
    )


def compare_medbench(
    reference: MedBenchRun, candidate: MedBenchRun, *, margin_points: float
) -> MedBenchComparison:
    """Compare two runs over the same files against a margin in percentage points.

    Raises:
        MeasurementError: the runs differ in data or sampling, or there are no labels to compare on.
    """
    if reference.data_digest != candidate.data_digest:
        raise MeasurementError(
            f"{reference.label} and {candidate.label} answered different files; they do not pair"
        )
    if reference.sampling != candidate.sampling:
        raise MeasurementError(f"{reference.label} and {candidate.label} were sampled differently")
    if reference.choices is None and not reference.open:
        raise MeasurementError(
            "the files hold no labels, so nothing can be compared here",
            "Compare the two results that MedBench's server gives, or give files with answers.",
        )
    choices = None
    if reference.choices is not None and candidate.choices is not None:
        choices = compare_accuracy(reference.choices, candidate.choices, margin_points=margin_points)
    return MedBenchComparison(
        reference=reference.label,
        candidate=candidate.label,
        choices=choices,
        open=_compare_open(reference, candidate, margin_points),
        margin_points=margin_points,
    )


def _compare_open(reference: MedBenchRun, candidate: MedBenchRun, margin: float) -> ScoreComparison | None:
    if len(reference.open) < 2:
        return None
    counts = Counter(answer.task for answer in reference.open)
    # A mean of one item has no interval: then the tasks are taken together.
    together = min(counts.values()) < 2

    def scores(run: MedBenchRun) -> list[Score]:
        return [
            Score(id=a.id, task="open answers" if together else a.task, conversation=a.id, score=a.recall)
            for a in run.open
        ]

    labels = (reference.label, candidate.label)
    return compare_scores(scores(reference), scores(candidate), labels=labels, margin_points=margin)


def after_thinking(text: str) -> str:
    """The answer proper: what follows a reasoning model's last `</think>`."""
    return text.rpartition("</think>")[2].strip()


def key_points(reference: str, other: Any = None) -> list[tuple[str, ...]]:
    """The points of a reference answer, each as its equivalent texts."""
    listed = other.get("key_points") if isinstance(other, dict) else None
    if isinstance(listed, list) and listed:
        return [tuple(map(str, p)) if isinstance(p, list) else (str(p),) for p in listed]
    phrases = _BREAKS.split(_ENUMERATION.sub("\n", reference))
    return [(phrase,) for phrase in dict.fromkeys(p.strip() for p in phrases) if len(_bare(phrase)) >= 2]


def _open(question: Question, said: str) -> OpenAnswer:
    points = key_points(question.label, question.row.get("other")) or [(question.label,)]
    bare = _bare(said)
    missing = tuple(p[0] for p in points if not any(_bare(text) in bare for text in p))
    return OpenAnswer(
        id=question.id,
        task=question.task,
        question=question.text,
        reference=question.label,
        points=len(points),
        held=len(points) - len(missing),
        missing=missing,
        text=said,
    )


def _bare(text: str) -> str:
    """Letters and digits only, in one width and case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _task(file: TaskFile, chosen: Sequence[ItemResult], open_answers: Sequence[OpenAnswer]) -> TaskShare:
    right = [r.correct for r in chosen if r.task == file.task]
    scores = [float(r) for r in right] + [a.recall for a in open_answers if a.task == file.task]
    return TaskShare(
        name=file.task,
        dimension=file.dimension,
        items=len(file.questions),
        labelled=len(scores),
        choices_right=sum(right) if right else None,
        score=sum(scores) / len(scores) if scores else None,
    )


def _dimension(name: str, tasks: Sequence[TaskShare]) -> TaskShare:
    own = [t for t in tasks if t.dimension == name]
    scores = [t.score for t in own if t.score is not None]
    return TaskShare(
        name=name,
        dimension=name,
        items=sum(t.items for t in own),
        labelled=sum(t.labelled for t in own),
        choices_right=None,
        # A dimension with an unmeasured task is not measured: its mean would be another quantity.
        score=sum(scores) / len(scores) if scores and len(scores) == len(own) else None,
    )
