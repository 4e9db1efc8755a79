"""Each tensor of a checkpoint meets one rule (quantize, keep or drop), or an error lists all that do not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from packager.checkpoint.header import TensorInfo
from packager.errors import BadInput
from packager.layouts.declaration import FLOATS, NEVER_QUANTIZED, Do, Expected, Role
from packager.recipe import Prediction, TensorRule

_SEPARATE = 40
"""Up to so many problems are listed one by one; more are folded where only indices differ."""
_MOST_LINES = 2000
"""Of one error; a header can hold millions of names."""


@dataclass(frozen=True)
class Decisions:
    """What becomes of every tensor of a checkpoint."""

    layout: dict[str, Expected]
    """All tensors that are there, in model order; those that only a recipe knows come last."""
    do: dict[str, Do]

    def those(self, do: Do) -> list[Expected]:
        """The tensors with that decision, in model order."""
        return [want for name, want in self.layout.items() if self.do[name] is do]

    @property
    def written(self) -> list[Expected]:
        """All that are not dropped, in model order."""
        return [want for name, want in self.layout.items() if self.do[name] is not Do.DROP]


def decide(
    expected: Iterable[Expected],
    found: Mapping[str, TensorInfo],
    *,
    rules: Sequence[TensorRule] = (),
    mtp: Prediction = "drop",
    origin: str,
) -> Decisions:
    """Decide every tensor of a checkpoint: by the recipe's rule for it, else by `mtp`, else by its role.

    A rule that keeps a tensor takes it as it is, known or not, of whatever shape; one that drops it also
    makes do with its absence; one that quantizes it wants it to fit its place.

    Raises:
        BadInput: tensors that are unknown, missing, misshapen or ill-typed; rules that match nothing, the
            same tensor, or quantize what engines never load quantized; matrices that engines join, decided
            apart. All are listed.
    """
    layout = {want.name: want for want in expected}
    faults = dict(_faults(layout.values(), found))
    problems, ruled = _matches(rules, layout, found)
    decisions = Decisions({}, {})
    for name, want in layout.items():
        rule = ruled.get(name)
        if name not in found:
            if name in faults and (rule is None or rule.do != "drop"):
                problems.append(faults[name])
            continue
        decisions.layout[name] = want
        if rule is not None:
            decisions.do[name] = Do(rule.do)
            problems.extend(_objections(rule, want, found[name], faults.get(name)))
            continue
        do = want.decision
        if want.mtp and (mtp == "drop" or (mtp == "keep" and do is Do.QUANTIZE)):
            do = Do(mtp)
        if name in faults:
            problems.append(faults[name])
        elif want.role is Role.FUSED_EXPERTS and do is not Do.DROP:
            problems.append(f"not quantized: {name}: {NEVER_QUANTIZED[want.role]}")
        decisions.do[name] = do
    for name, info in found.items():
        if name in layout:
            continue
        if name not in ruled:
            problems.append(faults[name])
            continue
        want = Expected(name, Role.OTHER, info.shape, (info.dtype,))
        decisions.layout[name], decisions.do[name] = want, Do(ruled[name].do)
        problems.extend(_objections(ruled[name], want, info, None))
    problems.extend(_torn_groups(decisions))
    _refuse(problems, origin)
    return decisions


def _matches(
    rules: Sequence[TensorRule], layout: Mapping[str, Expected], found: Mapping[str, TensorInfo]
) -> tuple[list[str], dict[str, TensorRule]]:
    """Problems of the rules themselves, and the rule of each tensor that has one."""
    problems: list[str] = []
    ruled: dict[str, TensorRule] = {}
    for rule in rules:
        hits = [name for name in {**layout, **found} if rule.matches(name)]
        if not hits:
            problems.append(f"rule {rule.tensors!r} matches no tensor")
        for name in hits:
            if name in ruled:
                problems.append(
                    f"{name}: both rule {ruled[name].tensors!r} and rule {rule.tensors!r} match it"
                )
            ruled[name] = rule
    return problems, ruled


def _objections(rule: TensorRule, want: Expected, info: TensorInfo, fault: str | None) -> Iterator[str]:
    """Why a rule cannot have its way with a tensor."""
    place = f"rule {rule.tensors!r} cannot {rule.do} {want.name}"
    if rule.do == "drop":
        return
    if info.dtype not in FLOATS:
        yield f"{place}: it is {info.dtype}; only {', '.join(FLOATS)} are carried over"
    elif rule.do == "quantize":
        if want.role in NEVER_QUANTIZED:
            yield f"{place}: {NEVER_QUANTIZED[want.role]}"
        elif fault is not None:
            yield fault
        elif len(info.shape) != 2 or not want.name.endswith(".weight"):
            yield f"{place}: only matrices whose name ends in .weight have a scale"


def _torn_groups(decisions: Decisions) -> Iterator[str]:
    groups: defaultdict[str, dict[Do, str]] = defaultdict(dict)
    for name, want in decisions.layout.items():
        if want.group:
            groups[want.group].setdefault(decisions.do[name], name)
    for group, ways in groups.items():
        if len(ways) > 1:
            parts = ", ".join(f"{do} {name}" for do, name in ways.items())
            yield f"decided apart: engines load {group} as one matrix ({parts})"


def _faults(expected: Iterable[Expected], found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """Name and description of each tensor that is missing, misshapen, ill-typed or unknown."""
    known: set[str] = set()
    for want in expected:
        known.add(want.name)
        have = found.get(want.name)
        if have is None:
            if not want.optional:
                yield want.name, f"missing: {want.name} {list(want.shape)}"
        elif have.shape != want.shape:
            shapes = f"{list(have.shape)}, expected {list(want.shape)}"
            yield want.name, f"wrong shape: {want.name} is {shapes}"
        elif have.dtype not in want.dtypes:
            yield (
                want.name,
                f"wrong dtype: {want.name} is {have.dtype}, expected {' or '.join(want.dtypes)}",
            )
    for name in found:
        if name not in known:
            yield name, f"unknown: {name} {list(found[name].shape)}"


def layout_problems(expected: Iterable[Expected], found: Mapping[str, TensorInfo]) -> list[str]:
    """Missing, unknown, misshapen and ill-typed tensors, one line each."""
    return [line for _, line in _faults(expected, found)]


def require_layout(expected: Iterable[Expected], found: Mapping[str, TensorInfo], origin: str) -> None:
    """Raise BadInput, listing every problem, unless the tensors are exactly those expected."""
    _refuse(layout_problems(expected, found), origin)


def _refuse(problems: list[str], origin: str) -> None:
    if not problems:
        return
    lines = problems if len(problems) <= _SEPARATE else _folded(problems)
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"… and {len(lines) - _MOST_LINES} lines more"]
    raise BadInput(
        f"{origin}: {len(problems)} tensors do not fit its config.json:\n"
        + "\n".join(f"  {line}" for line in lines),
        "Check that config.json belongs to these weights; `quantize.rules` in a recipe decides single ones.",
    )


def _folded(problems: list[str]) -> list[str]:
    """Lines that differ in indices alone as one, where these run over all combinations of their ranges."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for problem in problems:
        kinds[re.sub(r"(?<=\.)\d+(?=\.)", "{}", problem)].append(problem)
    lines: list[str] = []
    for kind, alike in kinds.items():
        found = [[int(index) for index in re.findall(r"(?<=\.)(\d+)(?=\.)", line)] for line in alike]
        ranges = [sorted(set(places)) for places in zip(*found, strict=True)]
        combinations = 1
        for places in ranges:
            combinations *= len(places)
            combinations *= places == list(range(places[0], places[-1] + 1))
        if len(alike) == 1 or combinations != len(alike):
            lines.extend(alike)
            continue
        parts = kind.split("{}")
        spans = [f"{{{p[0]}-{p[-1]}}}" if len(p) > 1 else str(p[0]) for p in ranges]
        text = "".join(part + span for part, span in zip(parts, [*spans, ""], strict=True))
        lines.append(f"{text} ({len(alike)} tensors)")
    return lines
