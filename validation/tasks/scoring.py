"""What an answer says and whether it is right: exact text, choices, quantities with tolerance and unit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from pydantic import model_validator

from validation.document import Document
from validation.errors import MeasurementError
from validation.tasks.quantities import Quantity, parse_quantity, quantity

Kind = Literal["exact", "choice", "numeric", "rubric"]

_MARKER = re.compile(r"(?:Answer|答案)\s*[:：][^\S\n]*([^\n]*)", re.IGNORECASE)
_STOPS = ".。"
_LETTERS = re.compile(r"[A-Z](?:(?:[\s,;、]|and|AND|和|与)*[A-Z])*")
_LETTER_AND_TEXT = re.compile(r"([A-Z])\s*[.):、](?![A-Z]\b).*", re.DOTALL)


class Scoring(Document):
    """How an item is scored beyond its kind."""

    tolerance: str = "0"
    """Of a numeric answer: `0.05`, in the unit of the answer, or `5%` of it. Both ends count as right."""
    unit: str = ""
    """Of a numeric answer whose text names none."""
    unit_optional: bool = False
    """Take a bare number as being in that unit. Off: a dose without its unit is wrong."""
    accept: tuple[str, ...] = ()
    """Of an exact answer: other right ones."""
    ignore_case: bool = False
    rubrics: tuple[dict[str, Any], ...] = ()
    """Of a rubric item: {criterion, points, tags}, for a judge."""

    @model_validator(mode="after")
    def _readable(self) -> Scoring:
        self.bounds(Fraction(1))
        return self

    def bounds(self, expected: Fraction, one: Fraction = Fraction(1)) -> tuple[Fraction, Fraction]:
        """Lowest and highest right value around `expected`; `one` is one unit, both in base units."""
        text = self.tolerance.strip()
        try:
            number = Fraction(Decimal(text.removesuffix("%")))
        except (ArithmeticError, ValueError):
            raise ValueError(f"tolerance {self.tolerance!r} is neither a number nor a percentage") from None
        if number < 0:
            raise ValueError("a tolerance is not negative")
        width = abs(expected) * number / 100 if text.endswith("%") else number * one
        return expected - width, expected + width


def check_scorable(kind: Kind, answer: str, scoring: Scoring) -> None:
    """Whether an item of this kind can be scored against this answer.

    Raises:
        ValueError: it cannot, with the reason.
    """
    if kind == "choice" and parse_choice(answer) is None:
        raise ValueError(f"the answer {answer!r} of a choice is not letters, such as B or A, C")
    if kind == "numeric":
        try:
            quantity(answer, scoring.unit)
        except MeasurementError as err:
            raise ValueError(f"{err.message}. {err.remedy}") from None
    if kind == "rubric" and not scoring.rubrics:
        raise ValueError("a rubric item needs scoring.rubrics: [{criterion, points, tags}]")


def score(kind: Kind, expected: str, text: str, scoring: Scoring | None = None) -> tuple[str | None, bool]:
    """What `text` answers (None: nothing readable) and whether that is right.

    Raises:
        MeasurementError: a rubric, which only a judge can score.
    """
    refuse_rubrics([kind])
    scoring = scoring or Scoring()
    said = extract_answer(text)
    if kind == "choice":
        # Chat models asked for a letter often give just the letter.
        letters = parse_choice(said if said is not None else text)
        return letters, letters is not None and letters == parse_choice(expected)
    if kind == "numeric":
        said = said if said is not None else normalise(text)
        return said, _within(said, expected, scoring)
    right = (expected, *scoring.accept)
    if scoring.ignore_case and said is not None:
        return said, any(is_correct(said.casefold(), one.casefold()) for one in right)
    return said, any(is_correct(said, one) for one in right)


def refuse_rubrics(kinds: Iterable[Kind]) -> None:
    """Raises:
    MeasurementError: one of the kinds is a rubric, which needs a judge.
    """
    if "rubric" in kinds:
        raise MeasurementError(
            "items of kind rubric are scored by a judge, not by their text",
            "Give them as {id, prompt, rubrics} to `packager validate healthbench --rows`.",
        )


def _within(said: str, expected: str, scoring: Scoring) -> bool:
    wanted = quantity(expected, scoring.unit)
    got = parse_quantity(said)
    if got is not None and not got.has_unit and wanted.has_unit and scoring.unit_optional:
        got = Quantity(got.value * wanted.scale, wanted.dimension)
    if got is None or got.dimension != wanted.dimension:
        return False
    low, high = scoring.bounds(wanted.value, wanted.scale)
    return low <= got.value <= high


def parse_choice(text: str) -> str | None:
    """The letters that `text` chooses, sorted, as `B` or `A, C`; None if it is anything else.

    Reads `B`, `(b)`, `B. aspirin`, `**B**`, `<A, C>`, `ACD`, `A和C`, `选B`, `\\boxed{D}`, full-width forms.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    boxed = re.fullmatch(r"\$*\\boxed\{(.*)\}\$*\.?", text)
    text = (boxed[1] if boxed else text).strip("*_`#<>()[]{}【】《》\"' \t\n.。:")
    text = re.sub(r"^(?:option|choice|选项?)\s*|\s*选?项$", "", text, flags=re.IGNORECASE)
    text = text.upper() if len(text) == 1 else text
    single = _LETTER_AND_TEXT.fullmatch(text)
    if single:
        return single[1]
    if not _LETTERS.fullmatch(text):
        return None
    letters = re.findall(r"[A-Z]", text.replace("and", " ").replace("AND", " "))
    return ", ".join(sorted(set(letters))) if len(set(letters)) == len(letters) else None


def extract_answer(text: str) -> str | None:
    """What follows the last `Answer:` or `答案：` up to the end of its line; None without a marker.

    Spaces around it and a trailing full stop are dropped: `Answer: 20 mg.` gives `20 mg`.
    """
    found = _MARKER.findall(text)
    return normalise(found[-1]) if found else None


def normalise(answer: str) -> str:
    """An answer without the spaces around it and without one trailing full stop."""
    answer = answer.strip()
    if answer.endswith(tuple(_STOPS)):
        answer = answer[:-1].rstrip()
    return answer


def is_correct(extracted: str | None, expected: str) -> bool:
    """Whether the extracted answer is exactly the expected one; no answer is wrong."""
    return extracted is not None and extracted == normalise(expected)
