"""The draft's vocabulary: the target tokens that responses really use, and what that leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packager.errors import BadInput


@dataclass(frozen=True)
class VocabularyMap:
    """Which target tokens the draft can propose."""

    target_ids: tuple[int, ...]
    """Target token of each draft token, ascending and distinct."""
    target_size: int
    """Vocabulary of the target."""

    @property
    def offsets(self) -> list[int]:
        """`d2t` as engines store it: target id minus draft id, for each draft id."""
        return [target - draft for draft, target in enumerate(self.target_ids)]

    @property
    def reachable(self) -> list[bool]:
        """`t2d` as engines store it: for each target id whether the draft can propose it."""
        known = set(self.target_ids)
        return [token in known for token in range(self.target_size)]


def choose_vocabulary(counts: Mapping[int, int], size: int, target_size: int) -> VocabularyMap:
    """The `size` most frequent tokens; ties and free places go to the lowest ids, so the choice is
    reproducible.

    Raises:
        BadInput: no counts, a counted token outside the target's vocabulary, or `size` larger than it.
    """
    if size > target_size:
        raise BadInput(
            f"a draft vocabulary of {size} is larger than the target's {target_size}",
            "Lower draft.vocab_size.",
        )
    if not counts:
        raise BadInput("no response tokens to choose a draft vocabulary from")
    if (outside := max(counts)) >= target_size or min(counts) < 0:
        raise BadInput(f"responses hold token {outside}, beyond the target's vocabulary of {target_size}")
    ranked = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    chosen = set(ranked)
    free = (token for token in range(target_size) if token not in chosen)
    ranked += [next(free) for _ in range(size - len(ranked))]
    return VocabularyMap(tuple(sorted(ranked)), target_size)


def count_tokens(responses: Iterable[Sequence[int]]) -> Counter[int]:
    """Occurrences of each token in the responses."""
    counts: Counter[int] = Counter()
    for response in responses:
        counts.update(response)
    return counts


def coverage(records: Iterable[Mapping[str, Any]], vocabulary: VocabularyMap, key: str) -> dict[str, float]:
    """Share of response tokens that the draft can propose, for each value of the records' field `key`.

    An uncovered token is always rejected by the target, so this bounds the acceptance rate.
    """
    known = set(vocabulary.target_ids)
    covered: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for record in records:
        name, ids = str(record[key]), record["response_ids"]
        total[name] += len(ids)
        covered[name] += sum(token in known for token in ids)
    return {name: covered[name] / total[name] for name in sorted(total) if total[name]}
