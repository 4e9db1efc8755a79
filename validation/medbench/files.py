"""MedBench's files: JSONL of {question, answer, other} by task, the same files with answers, and the upload.

    MedBench_LLM/MedSafety.jsonl     {"question": "…单选题…", "answer": "", "other": {"id": 4, "source": …}}
    MedBench_LLM/MedSafety/test.jsonl   is read as well

A choice is answered as `<D>` or `<A, B, C>` (the forms in the tasks' own descriptions), the rest as text. The
upload holds the same lines in the same order with `answer` filled, under the same names. An `id` may stand on
several lines with the options in another order, so a line is known by its place in its file.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from validation.document import digest_of
from validation.errors import MeasurementError
from validation.jsonl import read_jsonl
from validation.tasks.scoring import parse_choice

Form = Literal["choice", "text"]
Dimension = str
UNASSIGNED = "not assigned"
DIMENSIONS: Mapping[Dimension, tuple[str, ...]] = {
    "knowledge QA": ("MedExam", "MedHC", "MedMC", "MedSpeQA", "MedHG", "MedDG", "MedLitQA"),
    "language understanding": (
        "CMeEE", "CMeIE", "CHIP-CDEE", "CHIP-CDN", "CHIP-CTC", "SMDoc", "MedRxCheck", "MedChartQC",
    ),
    "language generation": ("IMCS-V2-MRG", "DBMHG", "MedPopular"),
    "complex reasoning": ("CMB-Clin", "CMB-Clin-extended", "DDx-basic", "DDx-advanced", "MedTreat"),
    "safety and ethics": ("MedSafety", "MedEthics", "DrugCA", "CriID"),
}  # fmt: skip
"""Tasks whose dimension its papers (arXiv:2407.10990, 2511.14439) and announcements name. Version 4 has more
tasks; which dimension each counts to is not published with the files, so they read "not assigned" unless the
user says (`dimensions`)."""
_REMEDY = 'A line is {"question": "…", "answer": "…", "other": {…}}.'
_GENERIC = re.compile(r"(test|dev|val|valid|data|questions?)", re.IGNORECASE)
_VERSION = re.compile(r"_V\d+(?=$|_)")
_OPTION = re.compile(r"^\s*([A-Z])\s*[.．、:：)）]", re.MULTILINE)
_ASKS_FOR_LETTERS = re.compile(
    r"选项字母|单选|多选|多项选择|单项选择|选择.{0,12}序号|正确回答的序号|以选项展示"
)
FOLDER_NAME = "MedBench_LLM"


@dataclass(frozen=True)
class Question:
    """One line of a task's file."""

    task: str
    line: int
    text: str
    label: str
    """The right answer, or empty."""
    form: Form
    row: Mapping[str, Any]
    """The line as read."""

    @property
    def id(self) -> str:
        """Task and line: what the data calls an id is not unique."""
        return f"{self.task}:{self.line}"


@dataclass(frozen=True)
class TaskFile:
    """One task."""

    task: str
    path: Path
    """Relative to the folder read."""
    dimension: Dimension
    digest: str
    """SHA-256 of the file's bytes."""
    questions: tuple[Question, ...]


def read_folder(folder: Path, dimensions: Mapping[str, str] | None = None) -> list[TaskFile]:
    """The tasks of a folder, by name.

    Args:
        folder: with `<task>.jsonl` or `<task>/*.jsonl`.
        dimensions: task to dimension, for tasks that `DIMENSIONS` does not know, or to overrule it.

    Raises:
        MeasurementError: no JSONL below the folder, a malformed line (named), or a task in two files.
    """
    paths = sorted(p for p in folder.rglob("*.jsonl") if p.is_file())
    if not paths:
        raise MeasurementError(
            f"{folder} holds no JSONL files",
            "Download the data set from https://medbench.opencompass.org.cn and unpack it there.",
        )
    files: dict[str, TaskFile] = {}
    for path in paths:
        own = path.relative_to(folder)
        task = own.stem if len(own.parts) == 1 or not _GENERIC.fullmatch(own.stem) else own.parts[-2]
        if task in files:
            raise MeasurementError(f"task {task} is in {files[task].path} and in {own}", "Remove one.")
        questions = tuple(_question(task, path, number, row) for number, row in read_jsonl(path, _REMEDY))
        if not questions:
            raise MeasurementError(f"{path} holds no questions", _REMEDY)
        files[task] = TaskFile(
            task=task,
            path=own,
            dimension=dimension_of(task, dimensions or {}),
            digest="sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
            questions=questions,
        )
    return [files[task] for task in sorted(files)]


def dimension_of(task: str, chosen: Mapping[str, str]) -> Dimension:
    """The dimension that a task counts to; variants (`MedRxCheck_SCQ`, `MedSafety_V4`) go with their task."""
    whole = _VERSION.sub("", task)
    for name in (task, whole, whole.split("_")[0]):
        if name in chosen:
            return chosen[name]
        for dimension, tasks in DIMENSIONS.items():
            if name.replace("Med-Exam", "MedExam") in tasks:
                return dimension
    return UNASSIGNED


def data_digest(files: Sequence[TaskFile]) -> str:
    """Digest of all files: which questions were asked, in which order."""
    return digest_of({file.task: file.digest for file in files})


def _question(task: str, path: Path, line: int, row: dict[str, Any]) -> Question:
    question, answer = row.get("question"), row.get("answer", "")
    if not isinstance(question, str) or not question.strip():
        raise MeasurementError(f"{path}, line {line}: no question", _REMEDY)
    if answer is not None and not isinstance(answer, str):
        raise MeasurementError(f"{path}, line {line}: the answer is not text", _REMEDY)
    label = (answer or "").strip()
    return Question(task, line, question, label, _form(question, label), row)


def _form(question: str, label: str) -> Form:
    """A choice if its label is letters, or if it lists options and asks for letters."""
    if label:
        return "choice" if parse_choice(label) else "text"
    options = len(set(_OPTION.findall(question)))
    return "choice" if options >= 2 and _ASKS_FOR_LETTERS.search(question) else "text"


def written(form: Form, said: str) -> str:
    """A model's answer in MedBench's form: `<A, C>` if letters can be read from it, else its text.

    Of a choice, the last line that is only letters counts, or what follows the last 答案： in the text.
    """
    text = said.strip()
    if form == "text":
        return text
    from validation.tasks.scoring import extract_answer

    bracketed = re.findall(r"<\s*([A-Z](?:\s*[,，、]\s*[A-Z])*)\s*>", text)
    marked = extract_answer(text)
    for candidate in (bracketed[-1] if bracketed else None, marked, text, *reversed(text.split("\n"))):
        letters = parse_choice(candidate) if candidate else None
        if letters:
            return f"<{letters}>"
    return text


def check(files: Sequence[TaskFile], answers: Mapping[str, str]) -> list[str]:
    """What is wrong with the answers, a sentence each: one missing or empty, a choice that is no choice.

    Args:
        answers: by `Question.id`.
    """
    faults = []
    known = {question.id for file in files for question in file.questions}
    faults += [f"{key}: an answer to no question" for key in sorted(set(answers) - known)]
    for file in files:
        for question in file.questions:
            answer = answers.get(question.id)
            if answer is None or not answer.strip():
                faults.append(f"{file.path}, line {question.line}: no answer")
            elif question.form == "choice" and not re.fullmatch(r"<[A-Z](, [A-Z])*>", answer):
                faults.append(f"{file.path}, line {question.line}: {_short(answer)!r} is not <D> or <A, B>")
    return faults


def pack(files: Sequence[TaskFile], answers: Mapping[str, str], out: Path, *, faulty: bool = False) -> Path:
    """Write the upload: the same lines with `answer` filled. The same answers give the same bytes.

    Args:
        faulty: pack although `check` finds faults; the text of the model stands where no letters were read.

    Raises:
        MeasurementError: the answers are faulty, or the file cannot be written.
    """
    faults = check(files, answers)
    if faults and not faulty:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise MeasurementError(
            "not packed: " + "; ".join(faults[:5]) + more,
            "Pack them as they are with --accept-faults; the server counts them as wrong.",
        )
    temporary = out.with_name(out.name + ".tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                lines = [
                    json.dumps({**q.row, "answer": answers.get(q.id, "")}, ensure_ascii=False)
                    for q in file.questions
                ]
                entry = zipfile.ZipInfo(f"{FOLDER_NAME}/{file.path.as_posix()}")
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, "".join(line + "\n" for line in lines))
        temporary.replace(out)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise MeasurementError(f"cannot write {out}: {err.strerror}") from None
    return out


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
