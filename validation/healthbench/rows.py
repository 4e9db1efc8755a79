"""HealthBench's files and rubric files of the user's own: conversations, criteria with points, and labels.

One JSON object a line. HealthBench's rows (https://huggingface.co/datasets/openai/healthbench, MIT):
`prompt_id`, `prompt` [{role, content}], `rubrics` [{criterion, points, tags}], `example_tags`,
`ideal_completions_data`. A row of the user's own may say `id` for `prompt_id`, give `prompt` as one text,
and leave out tags; an item of `validation.tasks` of kind "rubric" is one too. The meta-evaluation's rows hold
a finished conversation, one criterion, and what physicians said of it: `prompt`, `completion`, `rubric`,
`category`, `binary_labels`, `anonymized_physician_ids`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from validation.document import Document, digest_of
from validation.endpoint import Message, Request
from validation.errors import MeasurementError
from validation.jsonl import read_jsonl

Subset = Literal["main", "hard", "consensus"]
FILES: Mapping[str, str] = {
    "main": "2025-05-07-06-14-12_oss_eval.jsonl",
    "hard": "hard_2025-05-08-21-00-10.jsonl",
    "consensus": "consensus_2025-05-09-20-00-46.jsonl",
    "meta": "2025-05-07-06-14-12_oss_meta_eval.jsonl",
}
"""Names of HealthBench's files as published: 5,000, 1,000, 3,671 conversations and the meta-evaluation."""


class RubricItem(Document):
    """One criterion; negative points mark something undesirable."""

    criterion: str = Field(min_length=1)
    points: int | float
    tags: tuple[str, ...] = ()

    @field_validator("points")
    @classmethod
    def _finite(cls, points: float) -> float:
        if isinstance(points, bool) or not math.isfinite(points):
            raise ValueError("points must be a finite number")
        return points

    @field_validator("tags")
    @classmethod
    def _once(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(tags)

    @property
    def text(self) -> str:
        """The criterion as the grader is shown it: points in brackets, then the text."""
        return f"[{self.points}] {self.criterion}"


class Example(Document):
    """One conversation to be continued, and the criteria its answer is held against."""

    prompt_id: str = Field(min_length=1)
    prompt: tuple[Message, ...] = Field(min_length=1)
    rubrics: tuple[RubricItem, ...] = Field(min_length=1)
    example_tags: tuple[str, ...] = ()
    ideal_completion: str | None = None
    """A physician's answer, where the row brings one."""

    @field_validator("example_tags")
    @classmethod
    def _once(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(tags)

    @property
    def request(self) -> Request:
        """The conversation as a question for an endpoint."""
        return Request(id=self.prompt_id, messages=self.prompt)


class MetaRow(Document):
    """A finished conversation, one criterion, and each physician's word on whether it is met."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    completion: str
    rubric: str = Field(min_length=1)
    category: str
    binary_labels: tuple[bool, ...] = Field(min_length=1)
    anonymized_physician_ids: tuple[str, ...]

    @model_validator(mode="after")
    def _one_physician_a_label(self) -> MetaRow:
        if len(self.anonymized_physician_ids) != len(self.binary_labels):
            raise ValueError("binary_labels and anonymized_physician_ids differ in length")
        return self


@dataclass(frozen=True)
class Rubrics:
    """Examples and where they come from."""

    name: str
    """What reports call them, such as "HealthBench hard"."""
    digest: str
    """SHA-256 of the file's bytes, `sha256:<hex>`."""
    examples: tuple[Example, ...]

    def sample(self, count: int | None, seed: int = 0) -> Rubrics:
        """`count` examples drawn without replacement, or all; the name says so, and the digest is another."""
        if count is None or count >= len(self.examples):
            return self
        chosen = random.Random(seed).sample(self.examples, count)
        return Rubrics(
            f"{self.name}, {count} of {len(self.examples)}",
            digest_of([self.digest, count, seed]),
            tuple(chosen),
        )


@dataclass(frozen=True)
class MetaRows:
    """Labelled rows to qualify a judge on, and where they come from."""

    name: str
    digest: str
    rows: tuple[MetaRow, ...]


def load_rubrics(path: Path, *, subset: Subset = "main", digest: str | None = None) -> Rubrics:
    """Examples of a rubric file, or of HealthBench's file for `subset` if `path` is a folder.

    Args:
        path: a JSONL file, or the folder that HealthBench was downloaded to.
        subset: which of HealthBench's files; of no account for a file.
        digest: `sha256:<hex>` that the file must have; None: any.

    Raises:
        MeasurementError: missing (says the command that gets it), malformed, or another file than named.
    """
    file = rubric_file(path, subset)
    name = f"HealthBench {subset}" if file.name == FILES[subset] else file.stem
    found, rows = _read(file, digest)
    return rubrics_from(rows, name=name, digest=found, source=str(file))


def rubrics_from(
    rows: Iterable[tuple[int, dict[str, Any]]], *, name: str, digest: str, source: str = "rows"
) -> Rubrics:
    """Examples from (line number, plain mapping) pairs.

    Raises:
        MeasurementError: a row is malformed, a prompt_id occurs twice, or there is no row.
    """
    examples: list[Example] = []
    seen: set[str] = set()
    for number, row in rows:
        with _where(source, number, '{"prompt_id", "prompt", "rubrics": [{"criterion", "points", "tags"}]}'):
            example = Example(
                prompt_id=row.get("prompt_id", row.get("id", "")),
                prompt=_turns(row.get("prompt", row.get("messages"))),
                rubrics=tuple(RubricItem.model_validate(r) for r in _rubrics(row)),
                example_tags=_example_tags(row),
                ideal_completion=(row.get("ideal_completions_data") or {}).get("ideal_completion"),
            )
        if example.prompt_id in seen:
            raise MeasurementError(f"{source}, line {number}: {example.prompt_id!r} occurs twice")
        seen.add(example.prompt_id)
        examples.append(example)
    if not examples:
        raise MeasurementError(f"{source} holds no rows")
    return Rubrics(name, digest, tuple(examples))


def load_meta(path: Path, *, digest: str | None = None) -> MetaRows:
    """Rows of a meta-evaluation file, or of HealthBench's if `path` is a folder.

    Raises:
        MeasurementError: see `load_rubrics`.
    """
    file = rubric_file(path, "meta")
    found, rows = _read(file, digest)
    made: list[MetaRow] = []
    shape = '{"prompt", "completion", "rubric", "category", "binary_labels", "anonymized_physician_ids"}'
    for number, row in rows:
        with _where(str(file), number, shape):
            made.append(
                MetaRow(
                    prompt=_turns(row.get("prompt")),
                    completion=row["completion"],
                    rubric=row["rubric"],
                    category=row["category"],
                    binary_labels=tuple(row["binary_labels"]),
                    anonymized_physician_ids=tuple(map(str, row["anonymized_physician_ids"])),
                )
            )
    if not made:
        raise MeasurementError(f"{file} holds no rows")
    return MetaRows(file.stem, found, tuple(made))


def rubric_file(path: Path, which: Subset | Literal["meta"]) -> Path:
    """The file itself, or HealthBench's file `which` if `path` is a folder.

    Raises:
        MeasurementError: it is not there; says the command that gets it.
    """
    path = path.expanduser()
    file = path / FILES[which] if path.is_dir() else path
    if not file.is_file():
        folder = path if path.is_dir() or path.suffix != ".jsonl" else path.parent
        raise MeasurementError(
            f"no rubric file at {file}",
            f"HealthBench's is got by: hf download openai/healthbench {FILES[which]} --repo-type dataset "
            f"--local-dir {folder}",
        )
    return file


def _read(file: Path, digest: str | None) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    rows = read_jsonl(file)
    found = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    if digest is not None and digest != found:
        raise MeasurementError(
            f"{file} is {found}, not {digest}", "Get the file that was named, or name this one beforehand."
        )
    return found, rows


def _rubrics(row: dict[str, Any]) -> Iterable[Any]:
    return row.get("rubrics") or (row.get("scoring") or {}).get("rubrics") or ()


def _example_tags(row: dict[str, Any]) -> tuple[str, ...]:
    """An item of `validation.tasks` has a task and a language instead of tags."""
    own = [
        f"{kind}:{row[name]}" for kind, name in (("theme", "task"), ("language", "language")) if name in row
    ]
    return tuple(row.get("example_tags") or own)


def _turns(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)


def _distinct(tags: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(tags)) != len(tags):
        raise ValueError("a tag occurs twice")
    return tags


@contextmanager
def _where(source: str, number: int, shape: str) -> Iterator[None]:
    """Turns a malformed row into one message that names file, line and field."""
    place, remedy = f"{source}, line {number}", f"A row is {shape}."
    try:
        yield
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(row)"
        raise MeasurementError(f"{place}: {field}: {first['msg']}", remedy) from None
    except KeyError as err:
        raise MeasurementError(f"{place}: {err.args[0]} is missing", remedy) from None
    except (TypeError, AttributeError) as err:
        raise MeasurementError(f"{place}: a field has the wrong type ({err})", remedy) from None
