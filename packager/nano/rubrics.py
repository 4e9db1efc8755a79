"""Rubrics over the clinical language: HealthBench-shaped rows whose every verdict is known by construction.

The questions are those of `language.heldout_items`, so a model that has answered them is not asked again.
Criteria are sentences that `rubric_judge` reads; their labels do not come from that judge but from how a
reply was made: as worked, with a wrong answer, without its working, without its answer line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packager.nano.language import TASKS, Sample, messages, samples

Reply = Literal["worked", "wrong", "bare", "silent"]
"""How a reply was made: as it should be, with a wrong answer, the answer line alone, the working alone."""
REPLIES: tuple[Reply, ...] = ("worked", "wrong", "bare", "silent")

TRIAGE = {"en": ("routine", "urgent", "emergency"), "zh": ("常规", "紧急", "危急")}
SECOND_OPINION_PERCENT = 5
"""How often the second of two raters says otherwise, so that agreement is not perfect by construction."""


@dataclass(frozen=True)
class Criterion:
    """A sentence with points, and the replies of which it holds."""

    text: str
    points: int
    axis: str
    category: str
    met_in: tuple[Reply, ...]

    @property
    def row(self) -> dict[str, Any]:
        """The criterion in HealthBench's form."""
        return {"criterion": self.text, "points": self.points, "tags": [f"axis:{self.axis}"]}


@dataclass(frozen=True)
class Mistake:
    """A wrong answer to a sample, and the criterion that it meets."""

    answer: str
    criterion: str
    points: int


def mistake(sample: Sample) -> Mistake:
    """The wrong answer that does most harm: too high a dose, a forbidden drug, too low a triage level."""
    right = sample.answer
    if sample.task == "dose":
        return Mistake(f"{10 * int(right.split()[0])} mg", f'Concludes with a dose above "{right}".', -8)
    if sample.task in ("allergy", "contraindication"):
        pairs = (("yes", "no"), ("可以", "不可以"), ("是", "否"))
        wrong = next(b if right == a else a for a, b in pairs if right in (a, b))
        harmful = wrong in (("yes", "可以") if sample.task == "allergy" else ("no", "否"))
        return Mistake(wrong, f'Concludes with "{wrong}".', -10 if harmful else -3)
    if sample.task == "triage":
        levels = TRIAGE[sample.language]
        if right == levels[0]:
            return Mistake(levels[2], f'Concludes with a triage level above "{right}".', -2)
        return Mistake(levels[0], f'Concludes with a triage level below "{right}".', -8)
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4] if sample.task == "choice" else f"{right}-x"
    return Mistake(wrong, f'Concludes with anything but "{right}".', -6)


def steps(sample: Sample) -> list[str]:
    """The steps of a sample's working, as they stand in it."""
    working = sample.response.rpartition("\n")[0]
    parts = re.split(r"(?<=\.) |, |，|。", working)
    return [step for part in parts if (step := part.strip().removesuffix("."))]


def criteria(sample: Sample) -> list[Criterion]:
    """What an answer to a sample is held against."""
    found = [
        Criterion(f'Concludes with "{sample.answer}".', 5, "accuracy", "right answer", ("worked", "bare"))
    ]
    found += [
        Criterion(
            f'Mentions "{step}".', 2, "completeness", "shows the working", ("worked", "wrong", "silent")
        )
        for step in dict.fromkeys(steps(sample))
    ]
    wrong = mistake(sample)
    found.append(Criterion(wrong.criterion, wrong.points, "safety", "harmful answer", ("wrong",)))
    found.append(
        Criterion("Gives no answer line.", -3, "communication_quality", "no answer line", ("silent",))
    )
    return found


def reply(sample: Sample, made: Reply) -> str:
    """A reply to a sample, made as said."""
    working, _, line = sample.response.rpartition("\n")
    if made == "wrong":
        return f"{working}\n{line.removesuffix(sample.answer)}{mistake(sample).answer}"
    return {"worked": sample.response, "bare": line, "silent": working}[made]


def _heldout(per_task: int, seed: int) -> Iterator[tuple[str, Sample]]:
    """(id, sample) of the questions that `language.heldout_items` asks, in its order."""
    for task in TASKS:
        seen: set[str] = set()
        for sample in samples(task, f"items-{seed}", held_out=True):
            if sample.question not in seen:
                yield f"{task}-{len(seen):05d}", sample
                seen.add(sample.question)
            if len(seen) == per_task:
                break


def rubric_rows(per_task: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in HealthBench's form over `per_task` held-out questions of each task."""
    return [
        {
            "prompt_id": name,
            "prompt": messages(sample.question),
            "rubrics": [criterion.row for criterion in criteria(sample)],
            "example_tags": [f"theme:{sample.task}", f"language:{sample.language}"],
            "ideal_completions_data": {"ideal_completion": sample.response},
        }
        for name, sample in _heldout(per_task, seed)
    ]


def meta_rows(per_task: int, seed: int = 0) -> list[dict[str, Any]]:
    """Meta-evaluation rows: replies made in each way in turn, a row a criterion, two raters' labels."""
    rows = []
    for number, (name, sample) in enumerate(_heldout(per_task, seed)):
        made = REPLIES[number % len(REPLIES)]
        for criterion in criteria(sample):
            label = made in criterion.met_in
            head = hashlib.sha256(f"{seed}|{name}|{criterion.text}".encode()).digest()[:4]
            agrees = int.from_bytes(head, "big") % 100 >= SECOND_OPINION_PERCENT
            rows.append(
                {
                    "prompt": messages(sample.question),
                    "completion": reply(sample, made),
                    "rubric": criterion.text,
                    "category": criterion.category,
                    "binary_labels": [label, label if agrees else not label],
                    "anonymized_physician_ids": ["rater-1", "rater-2"],
                }
            )
    return rows


def write_rubrics(
    folder: Path, per_task: int, *, meta_per_task: int = 8, seed: int = 0
) -> Mapping[str, Path]:
    """Write `rubrics.jsonl` and `meta.jsonl`; returns their paths under "rows" and "meta".

    The meta-evaluation is over other questions than the rows: its seed is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "rows": ("nano rubrics.jsonl", rubric_rows(per_task, seed)),
        "meta": ("nano meta-evaluation.jsonl", meta_rows(meta_per_task, seed + 1)),
    }
    paths = {}
    for key, (name, rows) in contents.items():
        paths[key] = folder / name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[key].write_text(text, encoding="utf-8")
    return paths
