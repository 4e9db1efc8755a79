"""Needles in synthetic patient records: one fact to be found, at a chosen depth of a record of a chosen length.

Four kinds: `dose` (of a drug that is ordered once), `allergy` (the substance behind a reaction), `laboratory`
(the value of a test done once) and `later` (a drug whose dose two notes give differently: the later counts).
Records are in English or Chinese, their notes dated and in order, and everything else in them is about other
drugs, substances and tests, so the answer is right by construction. Nobody in them exists.

The length is counted by the tokenizer of the model that is measured. Same seed and tokenizer, same records.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from validation.errors import MeasurementError
from validation.tasks.items import Item, items_from

Kind = Literal["dose", "allergy", "laboratory", "later"]
KINDS: tuple[Kind, ...] = ("dose", "allergy", "laboratory", "later")
RESERVED_TOKENS = 320
"""Kept free for the chat template, the question and the answer."""
SHORTEST = 1024
"""Tokens; a shorter record is no test of a context."""

_DRUGS = (
    ("warfarin", "华法林"), ("metoprolol", "美托洛尔"), ("furosemide", "呋塞米"), ("ramipril", "雷米普利"),
    ("digoxin", "地高辛"), ("amiodarone", "胺碘酮"), ("prednisolone", "泼尼松龙"), ("levothyroxine", "左甲状腺素"),
    ("gabapentin", "加巴喷丁"), ("sertraline", "舍曲林"), ("allopurinol", "别嘌醇"), ("pantoprazole", "泮托拉唑"),
    ("simvastatin", "辛伐他汀"), ("amlodipine", "氨氯地平"), ("metformin", "二甲双胍"), ("tamsulosin", "坦索罗辛"),
    ("spironolactone", "螺内酯"), ("bisoprolol", "比索洛尔"), ("apixaban", "阿哌沙班"), ("quetiapine", "喹硫平"),
)  # fmt: skip
_TESTS = (
    ("ferritin", "铁蛋白", "µg/L", 12, 900), ("troponin T", "肌钙蛋白 T", "ng/L", 3, 400),
    ("procalcitonin", "降钙素原", "ng/mL", 1, 90), ("lactate", "乳酸", "mmol/L", 1, 14),
    ("lipase", "脂肪酶", "U/L", 10, 1200), ("ammonia", "血氨", "µmol/L", 11, 190),
    ("D-dimer", "D-二聚体", "µg/L", 90, 5000), ("uric acid", "尿酸", "µmol/L", 120, 700),
    ("albumin", "白蛋白", "g/L", 18, 52), ("haptoglobin", "结合珠蛋白", "g/L", 1, 4),
    ("sodium", "血钠", "mmol/L", 118, 158), ("creatinine", "肌酐", "µmol/L", 40, 480),
    ("haemoglobin", "血红蛋白", "g/L", 61, 170), ("calcium", "血钙", "mmol/L", 1, 4),
    ("bilirubin", "胆红素", "µmol/L", 3, 260), ("TSH", "促甲状腺激素", "mU/L", 1, 40),
)  # fmt: skip
_ALLERGENS = (
    ("amoxicillin", "阿莫西林"), ("ibuprofen", "布洛芬"), ("latex", "乳胶"), ("iodine contrast", "碘造影剂"),
    ("ceftriaxone", "头孢曲松"), ("codeine", "可待因"), ("peanut", "花生"), ("chlorhexidine", "氯己定"),
    ("clindamycin", "克林霉素"), ("vancomycin", "万古霉素"), ("shellfish", "贝类"), ("adhesive tape", "医用胶布"),
)  # fmt: skip
_REACTIONS = (("a rash", "皮疹"), ("swelling of the lips", "口唇肿胀"), ("wheezing", "喘息"), ("hives", "荨麻疹"))
_NAMES = (
    ("Morgan", "林晓"), ("Okafor", "陈默"), ("Lindqvist", "周岚"), ("Haddad", "王蕾"), ("Novak", "赵宁"),
    ("Iyer", "孙越"), ("Castell", "吴桐"), ("Brandt", "郑舟"),
)  # fmt: skip
_WRITERS = (("Nursing", "护理"), ("Ward round", "查房"), ("Physiotherapy", "理疗"), ("On call", "值班"))
_QUIET = (
    (
        "slept well, no complaints; walked {a} m along the corridor with one stop.",
        "wound edges dry, dressing changed, next change in {b} days.",
        "ate {a} % of the meal, drank {c} mL; no nausea.",
        "blood pressure {d}/{e} mmHg, pulse {f} a minute, afebrile.",
        "family visited; discharge to be talked over again in {b} days.",
        "pain {g} of 10 at rest, eases on changing position.",
        "fluid balance plus {c} mL; legs no more swollen than yesterday.",
        "chest clear on the left, fine crackles on the right, oxygen saturation {h} %.",
        "seen together with the social worker; papers for the rehabilitation clinic are filled in.",
        "lines checked, site {b} clean; the old one was taken out without trouble.",
    ),
    (
        "夜间睡眠可，无不适主诉；沿走廊步行 {a} 米，中途休息一次。",
        "切口边缘干燥，已换药，{b} 天后再换。",
        "进食 {a} %，饮水 {c} mL，无恶心。",
        "血压 {d}/{e} mmHg，脉搏 {f} 次/分，体温正常。",
        "家属探视；{b} 天后再讨论出院事宜。",
        "静息时疼痛评分 {g} 分，变换体位后缓解。",
        "液体平衡 +{c} mL；下肢水肿较昨日无加重。",
        "左肺呼吸音清，右肺可闻细湿啰音，血氧饱和度 {h} %。",
        "与社工共同查看患者；康复医院的申请材料已填写。",
        "检查管路，{b} 号置管处清洁；旧管已顺利拔除。",
    ),
)  # fmt: skip
_ASK = (
    "\n\nQuestion: {}\nAnswer from the record above alone. End with a line `Answer: X`, where X is only what is "
    "asked for, written as in the record.",
    "\n\n问题：{}\n只根据以上病历作答。最后一行写“答案：X”，X 只写所问内容，与病历中的写法一致。",
)  # fmt: skip


class _Needle(NamedTuple):
    """The note that holds the answer, what is asked, and an earlier note that it overrides."""

    note: str
    question: str
    answer: str
    earlier: str | None
    superseded: str | None
    hidden: str
    """The drug, test or substance that no other note may mention."""


def needle_items(
    lengths: Sequence[int],
    *,
    trained_length: int,
    tokens: Callable[[str], int],
    depths: int = 5,
    per_cell: int = 8,
    kinds: Sequence[Kind] = KINDS,
    languages: Sequence[Literal["en", "zh"]] = ("en", "zh"),
    seed: int = 0,
) -> list[Item]:
    """`per_cell` items for each length and depth; kinds and languages take turns within a cell.

    Args:
        lengths: tokens of prompt and answer together.
        trained_length: tokens; recorded with each item as `multiple`.
        tokens: counts the tokens of a text.
        depths: how many, evenly from 0 (start of the record) to 1 (its end).
        per_cell: best a multiple of kinds x languages, so that all cells ask the same.

    Raises:
        MeasurementError: a length below `SHORTEST`, or fewer than one depth or item.
    """
    if not lengths or min(lengths) < SHORTEST or depths < 1 or per_cell < 1 or not kinds or not languages:
        raise MeasurementError(
            f"needles need lengths of {SHORTEST} tokens or more, and a depth, an item and a kind at least"
        )
    rows = []
    for length in sorted(set(lengths)):
        for level in range(depths):
            depth = level / (depths - 1) if depths > 1 else 0.5
            for number in range(per_cell):
                kind = kinds[number % len(kinds)]
                zh = languages[number // len(kinds) % len(languages)] == "zh"
                rng = random.Random(f"needle|{seed}|{length}|{level}|{number}")
                rows.append(_row(rng, kind, zh, length, depth, number, trained_length, tokens))
    return items_from(rows)


def token_counter(folder: Path) -> Callable[[str], int]:
    """Counts tokens by the `tokenizer.json` of a checkpoint's folder, special tokens left out.

    Raises:
        MeasurementError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise MeasurementError(
            f"{folder} has no tokenizer.json", "Give the folder of the model that is served; lengths are its."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises a bare Exception
        raise MeasurementError(f"cannot read {path}: {err}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _row(
    rng: random.Random,
    kind: Kind,
    zh: bool,
    length: int,
    depth: float,
    number: int,
    trained_length: int,
    tokens: Callable[[str], int],
) -> dict[str, Any]:
    needle = _needle(rng, kind, zh)
    question = _ASK[zh].format(needle.question)
    record = _record(rng, needle, zh, depth, length - RESERVED_TOKENS, tokens)
    whole, rest = divmod(length, trained_length)
    meta = {
        "kind": kind,
        "length": length,
        "multiple": length / trained_length if rest else whole,
        "depth": round(depth, 4),
        "context_tokens": tokens(record + question),
    }
    if needle.superseded is not None:
        meta["superseded"] = needle.superseded
    return {
        "id": f"{kind}-{length}-{100 * depth:.0f}-{number}",
        "task": "record",
        "language": "zh" if zh else "en",
        "messages": [{"role": "user", "content": record + question}],
        "answer": needle.answer,
        "meta": meta,
    }


def _dose(rng: random.Random) -> str:
    return f"{rng.randrange(5, 400) / 2:g} mg"


def _needle(rng: random.Random, kind: Kind, zh: bool) -> _Needle:
    if kind == "laboratory":
        english, chinese, unit, low, high = rng.choice(_TESTS)
        name = chinese if zh else english
        answer = f"{rng.randrange(10 * low, 10 * high) / 10:g} {unit}"
        note = f"化验：{name} {answer}。" if zh else f"Laboratory: {name} {answer}."
        question = (
            f"{name}的结果是多少（含单位）？" if zh else f"What was the {name}, with its unit?"
        )
        return _Needle(note, question, answer, None, None, name)
    if kind == "allergy":
        name, reaction = rng.choice(_ALLERGENS)[zh], rng.choice(_REACTIONS)[zh]
        note = (
            f"入院补充史：数年前使用或接触{name}后出现{reaction}。"
            if zh
            else f"History completed: {name} was followed by {reaction} some years ago."
        )
        question = "患者对哪种物质过敏？" if zh else "To which substance did the patient react?"
        return _Needle(note, question, name, None, None, name)
    name, answer = rng.choice(_DRUGS)[zh], _dose(rng)
    if kind == "dose":
        note = f"医嘱：{name} {answer}，每日一次。" if zh else f"Order: {name} {answer} once daily."
        question = f"{name}的剂量是多少？" if zh else f"What dose of {name} was ordered?"
        return _Needle(note, question, answer, None, None, name)
    before = answer
    while before == answer:
        before = _dose(rng)
    text = "用药核对：{} {}，每日一次。" if zh else "Medication review: {} {} once daily."
    question = (
        f"按最新的记录，{name}目前的剂量是多少？"
        if zh
        else f"By the latest note, what is the present dose of {name}?"
    )
    return _Needle(text.format(name, answer), question, answer, text.format(name, before), before, name)


def _filler(rng: random.Random, zh: bool, hidden: str) -> str:
    """A note that says nothing of what is asked."""
    draw = rng.random()
    if draw < 0.2:
        name = rng.choice([d[zh] for d in _DRUGS if d[zh] != hidden])
        dose = _dose(rng)
        return f"医嘱：{name} {dose}，每日一次。" if zh else f"Order: {name} {dose} once daily."
    if draw < 0.4:
        test = rng.choice([t for t in _TESTS if t[zh] != hidden])
        value = f"{rng.randrange(10 * test[3], 10 * test[4]) / 10:g} {test[2]}"
        return f"化验：{test[1]} {value}。" if zh else f"Laboratory: {test[0]} {value}."
    numbers = {
        "a": rng.randrange(10, 100), "b": rng.randrange(2, 9), "c": rng.randrange(100, 1800),
        "d": rng.randrange(95, 175), "e": rng.randrange(50, 100), "f": rng.randrange(50, 120),
        "g": rng.randrange(1, 9), "h": rng.randrange(88, 100),
    }  # fmt: skip
    writer, said = rng.choice(_WRITERS)[zh], rng.choice(_QUIET[zh]).format(**numbers)
    return f"{writer}：{said}" if zh else f"{writer}: {said}"


def _record(
    rng: random.Random, needle: _Needle, zh: bool, depth: float, budget: int, tokens: Callable[[str], int]
) -> str:
    """A record of at most `budget` tokens, and no more than 2 % under it."""
    name, born = rng.choice(_NAMES)[zh], rng.randrange(1930, 2004)
    head = f"病历：{name}，{born} 年出生。\n" if zh else f"Patient record: {name}, born {born}.\n"
    start = datetime(2021, 1, 1) + timedelta(minutes=rng.randrange(500_000))
    steps = [timedelta(minutes=rng.randrange(20, 400)) for _ in range(64)]

    def text(notes: Sequence[str]) -> str:
        lines, at = [head], start
        for number, note in enumerate(notes):
            at += steps[number % len(steps)]
            lines.append(f"{at:%Y-%m-%d %H:%M} {note}\n")
        return "".join(lines)

    own = [needle.note] if needle.earlier is None else [needle.earlier, needle.note]
    before = rng.random()

    def placed(fillers: Sequence[str]) -> list[str]:
        where = round(depth * len(fillers))
        notes = [*fillers[:where], needle.note, *fillers[where:]]
        if needle.earlier is not None:
            notes.insert(int(before * (where + 1)), needle.earlier)
        return notes

    sample = [_filler(rng, zh, needle.hidden) for _ in range(64)]
    a_line = max(1.0, (tokens(text([*sample, *own])) - tokens(head)) / (len(sample) + len(own)))
    fillers = sample
    # The count of lines that fits, from what lines take on average; then corrected until it does.
    for _ in range(20):
        spare = budget - tokens(text(placed(fillers)))
        if 0 <= spare <= max(0.02 * budget, 2 * a_line):
            break
        change = int(spare / a_line) if spare > 0 else int(spare / a_line) - 1
        if change >= 0:
            fillers = fillers + [_filler(rng, zh, needle.hidden) for _ in range(max(1, change))]
        else:
            fillers = fillers[: max(0, len(fillers) + change)]
    while fillers and tokens(text(placed(fillers))) > budget:
        fillers = fillers[:-1]
    return text(placed(fillers))
