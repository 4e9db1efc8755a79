"""A synthetic clinical language whose every answer is known by construction, in English and Chinese.

Six tasks: `dose` (mg/kg times weight, worked in steps), `allergy` and `contraindication` (read from a
patient record, through the drug's class), `triage` (laboratory thresholds), `choice` (A-D) and `lookup`
(one value in a long record). An answer ends in a line `Answer: X` or `答案：X`.

What is held out is a *combination* (rate x weight, drug x allergies, test x value, question x options,
patient x value), chosen by the SHA-256 of its name, so a held-out item was never seen in any wording.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from packager.nano.formulary import CLASSES, LABS, NAMES, RATES, WEIGHTS, DrugClass, LabTest

SYSTEM = "detailed thinking off"
"""The system turn that the model line's chat template always ends with."""

LONGEST_RECORD = 42
"""Lines of the longest record within the trained length."""

MOST_PATIENTS = 24
"""Patients in one record, at any length."""

WARD = NAMES[:32]
"""The patients of records; few enough that every name is met often."""

RESERVED_TOKENS = 40
"""Tokens of a long item's question and response, beside its record."""

HELD_OUT_PERCENT = 20
CHINESE_SHARE = 0.3


@dataclass(frozen=True)
class Sample:
    """One question with its worked response; `key` names the combination that is held out or not."""

    task: str
    language: str
    key: str
    question: str
    response: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the combination belongs to the held-out side."""
        head = hashlib.sha256(f"{self.task}|{self.key}".encode()).digest()[:4]
        return int.from_bytes(head, "big") % 100 < HELD_OUT_PERCENT


def _finish(language: str, working: str, answer: str) -> str:
    marker = "Answer: " if language == "en" else "答案："
    return f"{working}\n{marker}{answer}"


def tenths(value: int) -> str:
    """A number of tenths as a decimal: 55 -> 5.5."""
    return f"{value // 10}.{value % 10}"


_DRUGS: tuple[tuple[DrugClass, tuple[str, str]], ...] = tuple((c, d) for c in CLASSES for d in c.drugs)


def dose(rng: random.Random, zh: bool) -> Sample:
    """Rate times weight, split into tens and units."""
    _, drug = rng.choice(_DRUGS)
    rate, weight = rng.choice(RATES), rng.choice(WEIGHTS)
    tens, units = weight // 10 * 10, weight % 10
    a, b = rate * tens, rate * units
    if zh:
        question = rng.choice(
            (
                f"{drug[1]} {rate} mg/kg，体重 {weight} kg。剂量是多少？",
                f"患者体重 {weight} kg，{drug[1]} 按 {rate} mg/kg 给药。总剂量？",
            )
        )
        working = f"{rate} x {tens} = {a}，{rate} x {units} = {b}，{a} + {b} = {a + b}。"
    else:
        question = rng.choice(
            (
                f"Weight {weight} kg. Order: {drug[0]} {rate} mg/kg. What is the dose?",
                f"{drug[0]} is given at {rate} mg/kg to a patient of {weight} kg. Total dose?",
                f"How many mg of {drug[0]} at {rate} mg/kg for {weight} kg?",
            )
        )
        working = f"{rate} x {tens} = {a}, {rate} x {units} = {b}, {a} + {b} = {a + b}."
    language = "zh" if zh else "en"
    answer = f"{a + b} mg"
    return Sample("dose", language, f"{rate}x{weight}", question, _finish(language, working, answer), answer)


def _record_header(rng: random.Random, zh: bool) -> str:
    name, age, weight = rng.choice(NAMES), rng.randrange(18, 95), rng.choice(WEIGHTS)
    return f"病历：{name}，{age} 岁，{weight} kg。" if zh else f"Record: {name}, age {age}, {weight} kg."


def allergy(rng: random.Random, zh: bool) -> Sample:
    """May a drug be given, with the allergies of this record? Half the records list the drug's class."""
    own, drug = rng.choice(_DRUGS)
    others = [c for c in CLASSES if c is not own]
    listed = rng.sample(others, rng.randrange(1, 4))
    conflict = rng.random() < 0.5
    if conflict:
        listed[rng.randrange(len(listed))] = own
    if zh:
        names = "、 ".join(c.zh for c in listed)
        question = f"{_record_header(rng, zh)}过敏： {names}。" + rng.choice(
            (f"可以使用 {drug[1]} 吗？", f"医嘱： {drug[1]}。是否允许？")
        )
        working = f"过敏： {names}。 {drug[1]} 属于 {own.zh}，" + ("冲突。" if conflict else "无冲突。")
        answer = "不可以" if conflict else "可以"
    else:
        names = " and ".join(c.en for c in listed)
        question = f"{_record_header(rng, zh)} Allergies: {names}. " + rng.choice(
            (f"May {drug[0]} be given?", f"Order: {drug[0]}. Is it allowed?")
        )
        working = f"Allergies: {names}. {drug[0]} is a {own.en}: " + (
            "conflict." if conflict else "no conflict."
        )
        answer = "no" if conflict else "yes"
    key = f"{drug[0]}|{'+'.join(sorted(c.en for c in listed))}"
    language = "zh" if zh else "en"
    return Sample("allergy", language, key, question, _finish(language, working, answer), answer)


def contraindication(rng: random.Random, zh: bool) -> Sample:
    """Is a drug contraindicated by the conditions of this record?"""
    own, drug = rng.choice(_DRUGS)
    listed = rng.sample([c for c in CLASSES if c is not own], rng.randrange(1, 4))
    conflict = rng.random() < 0.5
    if conflict:
        listed[rng.randrange(len(listed))] = own
    if zh:
        names = "、 ".join(c.avoid_zh for c in listed)
        question = f"{_record_header(rng, zh)}诊断： {names}。" + rng.choice(
            (f"患者可用 {drug[1]} 还是禁忌？", f"医嘱： {drug[1]}。有禁忌吗？")
        )
        working = f"诊断： {names}。 {drug[1]} 禁用于 {own.avoid_zh}，" + (
            "符合。" if conflict else "不符合。"
        )
        answer = "是" if conflict else "否"
    else:
        names = " and ".join(c.avoid_en for c in listed)
        question = f"{_record_header(rng, zh)} Conditions: {names}. " + rng.choice(
            (f"Is {drug[0]} contraindicated?", f"Order: {drug[0]}. Is it contraindicated?")
        )
        working = f"Conditions: {names}. {drug[0]} is avoided in {own.avoid_en}: " + (
            "listed." if conflict else "not listed."
        )
        answer = "yes" if conflict else "no"
    key = f"{drug[0]}|{'+'.join(sorted(c.avoid_en for c in listed))}"
    language = "zh" if zh else "en"
    return Sample("contraindication", language, key, question, _finish(language, working, answer), answer)


def triage(rng: random.Random, zh: bool) -> Sample:
    """Routine, urgent or emergency, by the test's two thresholds."""
    lab: LabTest = rng.choice(LABS)
    low, high = rng.choice(((lab.low, lab.urgent), (lab.urgent, lab.emergency), (lab.emergency, lab.high)))
    value = rng.randrange(low, high)
    level = (value >= lab.urgent) + (value >= lab.emergency)
    unit = f" {lab.unit}" if lab.unit else ""
    shown, urgent, emergency = tenths(value), tenths(lab.urgent), tenths(lab.emergency)
    if zh:
        question = f"{_record_header(rng, zh)}" + rng.choice(
            (f"{lab.zh} {shown}{unit}。如何分诊？", f"化验：{lab.zh} {shown}{unit}。分诊级别？")
        )
        compare = (f"{shown} < {urgent}", f"{urgent} <= {shown} < {emergency}", f"{shown} >= {emergency}")[
            level
        ]
        working = f"{lab.zh}：{urgent} 起紧急，{emergency} 起危急。{compare}。"
        answer = ("常规", "紧急", "危急")[level]
    else:
        question = f"{_record_header(rng, zh)} " + rng.choice(
            (f"{lab.en} {shown}{unit}. Triage?", f"Laboratory: {lab.en} {shown}{unit}. Which triage level?")
        )
        compare = (f"{shown} < {urgent}", f"{urgent} <= {shown} < {emergency}", f"{shown} >= {emergency}")[
            level
        ]
        working = f"{lab.en}: urgent from {urgent}, emergency from {emergency}. {compare}."
        answer = ("routine", "urgent", "emergency")[level]
    language = "zh" if zh else "en"
    return Sample(
        "triage", language, f"{lab.en}={value}", question, _finish(language, working, answer), answer
    )


def choice(rng: random.Random, zh: bool) -> Sample:
    """Four drugs of four classes: which one is of a class, or avoided in a condition?"""
    classes = rng.sample(CLASSES, 4)
    drugs = [rng.choice(c.drugs) for c in classes]
    right = rng.randrange(4)
    letter, wanted, drug = "ABCD"[right], classes[right], drugs[right]
    by_class = rng.random() < 0.5
    if zh:
        options = "".join(f" {n} {d[1]}" for n, d in zip("ABCD", drugs, strict=True))
        if by_class:
            question = f"下列哪个属于 {wanted.zh}？{options}"
            working = f"属于 {wanted.zh} 的是 {drug[1]} {letter}。"
        else:
            question = f"对 {wanted.avoid_zh} 患者应避免哪个？{options}"
            working = f"对 {wanted.avoid_zh} 禁用 {drug[1]} {letter}。"
    else:
        options = "".join(f" {n} {d[0]}" for n, d in zip("ABCD", drugs, strict=True))
        if by_class:
            question = f"Which of these is a {wanted.en}?{options}"
            working = f"The {wanted.en} is {drug[0]} {letter}."
        else:
            question = f"Which of these is avoided in {wanted.avoid_en}?{options}"
            working = f"Avoided in {wanted.avoid_en}: {drug[0]} {letter}."
    key = f"{'class' if by_class else 'avoid'}|{wanted.en}|{'+'.join(d[0] for d in drugs)}"
    language = "zh" if zh else "en"
    return Sample("choice", language, key, question, _finish(language, working, letter), letter)


@dataclass(frozen=True)
class Entry:
    """A record's line about one patient: what is found there, and the name of that combination."""

    name: str
    text: str
    answer: str
    key: str


def _medication(rng: random.Random, zh: bool, count: int) -> list[Entry]:
    """`Name drug` of `count` different patients."""
    drugs = [rng.choice(_DRUGS)[1] for _ in range(count)]
    return [
        Entry(name, f"{name} {drug[zh]}", drug[zh], f"{name}|{drug[0]}")
        for name, drug in zip(rng.sample(WARD, count), drugs, strict=True)
    ]


def _measurement(rng: random.Random, zh: bool) -> str:
    lab, hour = rng.choice(LABS), rng.randrange(24)
    value = tenths(rng.randrange(lab.low, lab.high))
    return f"{hour:02d}:00 {lab.zh} {value}" if zh else f"{hour:02d}:00 {lab.en} {value}"


_QUESTIONS = (("What does {} receive?", "Find the drug of {}."), ("{} 使用什么药？", "请查 {} 的用药。"))
"""English, then Chinese."""


@dataclass(frozen=True)
class WardRecord:
    """A long record: lines about patients, each named once, among measurements of nobody in particular."""

    lines: tuple[Entry | str, ...]
    zh: bool

    @classmethod
    def draw(cls, rng: random.Random, zh: bool, longest: int) -> WardRecord:
        """2 to `longest` lines in random order, up to MOST_PATIENTS of them about a patient each."""
        count = rng.randrange(2, longest + 1)
        named = rng.randrange(2, min(count, MOST_PATIENTS) + 1)
        lines: list[Entry | str] = [*_medication(rng, zh, named)]
        lines += [_measurement(rng, zh) for _ in range(count - named)]
        rng.shuffle(lines)
        return cls(tuple(lines), zh)

    @property
    def text(self) -> str:
        """The record as it stands before the question."""
        head = "病房记录：\n" if self.zh else "Ward record:\n"
        return head + "".join((line if isinstance(line, str) else line.text) + "\n" for line in self.lines)

    @property
    def entries(self) -> list[Entry]:
        """The lines that a question can be about."""
        return [line for line in self.lines if isinstance(line, Entry)]

    def ask(self, rng: random.Random, entry: Entry) -> Sample:
        """The question about one entry; it does not repeat the record."""
        question = rng.choice(_QUESTIONS[self.zh]).format(entry.name)
        language = "zh" if self.zh else "en"
        response = _finish(language, entry.text, entry.answer)
        return Sample("lookup", language, entry.key, question, response, entry.answer)


def lookup(rng: random.Random, zh: bool) -> Sample:
    """One patient's drug in a record of up to the longest length."""
    record = WardRecord.draw(rng, zh, LONGEST_RECORD)
    asked = record.ask(rng, rng.choice(record.entries))
    return replace(asked, question=record.text + asked.question)


TASKS: dict[str, Callable[[random.Random, bool], Sample]] = {
    "dose": dose,
    "allergy": allergy,
    "contraindication": contraindication,
    "triage": triage,
    "choice": choice,
    "lookup": lookup,
}


def samples(task: str, seed: int | str, *, held_out: bool) -> Iterator[Sample]:
    """An endless seeded stream of one task's samples from one side of the split."""
    rng = random.Random(f"{task}|{seed}|{held_out}")
    while True:
        sample = TASKS[task](rng, rng.random() < CHINESE_SHARE)
        if sample.held_out == held_out:
            yield sample


def messages(question: str) -> list[dict[str, str]]:
    """The chat messages of a question, with the system turn the model line expects."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _item(sample: Sample, number: int, meta: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{sample.task}-{meta['multiple']}x" if "multiple" in meta else sample.task
    return {
        "id": f"{prefix}-{number:05d}",
        "task": sample.task,
        "language": sample.language,
        "messages": messages(sample.question),
        "answer": sample.answer,
        "meta": {"combination": sample.key, **meta},
    }


def heldout_items(per_task: int, seed: int = 0) -> list[dict[str, Any]]:
    """`per_task` held-out items of every task, distinct questions, in the items format of `validation`."""
    items: list[dict[str, Any]] = []
    for task in TASKS:
        seen: set[str] = set()
        for sample in samples(task, f"items-{seed}", held_out=True):
            if sample.question not in seen:
                seen.add(sample.question)
                items.append(_item(sample, len(seen) - 1, {}))
            if len(seen) == per_task:
                break
    return items


def prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` distinct prompts of the training side, tasks in turn, to train a draft on."""
    streams = {task: samples(task, f"prompts-{seed}", held_out=False) for task in TASKS}
    names, seen, found = list(TASKS), set[str](), list[dict[str, Any]]()
    while len(found) < count:
        task = names[len(found) % len(names)]
        sample = next(streams[task])
        if sample.question in seen:
            continue
        seen.add(sample.question)
        found.append(
            {
                "id": f"prompt-{len(found):05d}",
                "task": task,
                "language": sample.language,
                "messages": messages(sample.question),
            }
        )
    return found


def _shipped_token_count() -> Callable[[str], int]:
    from tokenizers import Tokenizer

    from packager.nano import CHECKPOINT

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def long_items(
    multiple: int, count: int, seed: int = 0, tokens: Callable[[str], int] | None = None
) -> list[dict[str, Any]]:
    """Held-out `lookup` items whose record fills `multiple` times the trained length, depths spread evenly.

    Args:
        multiple: how many times the trained length, prompt and response together.
        count: number of items.
        seed: of the items' randomness.
        tokens: counts the tokens of a text; None: by the shipped tokenizer.
    """
    from packager.nano.architecture import TRAINED_LENGTH, render

    tokens = tokens or _shipped_token_count()
    rng = random.Random(f"long-{multiple}-{seed}")
    budget = multiple * TRAINED_LENGTH
    items: list[dict[str, Any]] = []
    while len(items) < count:
        depth = len(items) / max(count - 1, 1)
        zh = rng.random() < CHINESE_SHARE
        entries = _medication(rng, zh, MOST_PATIENTS)
        lines: list[Entry | str] = [*entries]
        room = budget - RESERVED_TOKENS - tokens(render(WardRecord(tuple(lines), zh).text))
        while (room := room - tokens((other := _measurement(rng, zh)) + "\n")) >= 0:
            lines.append(other)
        rng.shuffle(lines)
        wanted = rng.choice(entries)
        lines.remove(wanted)
        lines.insert(round(depth * len(lines)), wanted)
        record = WardRecord(tuple(lines), zh)
        asked = record.ask(rng, wanted)
        if not asked.held_out:
            continue
        sample = replace(asked, question=record.text + asked.question)
        meta = {
            "multiple": multiple,
            "depth": round(depth, 4),
            "context_tokens": tokens(render(sample.question)),
        }
        items.append(_item(sample, len(items), meta))
    return items
