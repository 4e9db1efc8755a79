"""A measured draft as a file: versioned, typed, bound to the bytes it was measured on; and what reports show.

`draft evaluate --out FILE` writes it, `draft compare` and the recipe's `validate.draft_evaluations` read it.
It names the digests of target and draft, and how the draft was trained, so that two files can be laid side
by side and a reader sees what differs between their drafts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from packager.artifact import is_sealed, read_manifest, writing
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, read_json_object
from packager.draft.config import rope_of
from packager.draft.forms import flat_config
from packager.errors import BadInput
from validation.document import Document, digest_of
from validation.environment import Environment, collect_environment

if TYPE_CHECKING:
    from packager.draft.imported import DraftFindings
    from packager.release.draft_evaluation import DraftEvaluation, Prompts

KIND = "draft evaluation"
SCHEMA_VERSION = 2
TRAINING_NAME = "training.json"


class Acceptance(Document):
    """Acceptance by the engine's counters."""

    length: float
    """Tokens a verification yields, the target's own included."""
    per_position: tuple[float, ...]
    """Share of drafts accepted up to and including each position."""
    drafts: int
    accepted: int

    def standard_error(self, passes: int = 1) -> float:
        """Of `length`, from the spread of accepted tokens over the drafts of one pass.

        A draft with n tokens accepted counts in the first n rates, so the mean of n squared is the sum of
        (2 i - 1) rate_i. Drafts of one answer are alike, which this does not know: the truth is wider.
        `passes`: greedy passes that the counters cover; they repeat the same drafts.
        """
        mean = sum(self.per_position)
        square = sum((2 * at + 1) * rate for at, rate in enumerate(self.per_position))
        return math.sqrt(max(0.0, square - mean**2) / max(1.0, self.drafts / passes))


class Differing(Document):
    """An answer that is not that of the target without a draft."""

    id: str
    position: int
    gap_nats: float | None
    gap_at_least_nats: float | None
    near_tie: bool


class Identity(Document):
    """Greedy answers against those without a draft."""

    of: int
    identical: int
    share: float
    before_any_near_tie: int
    """Differences that do not start at a near tie of the target."""
    differences: tuple[Differing, ...]


class Cell(Document):
    """One concurrency or one context length."""

    tokens_per_s: float
    output_tokens: int
    seconds: float
    prompt_tokens: int
    """Median over the prompts."""
    acceptance: Acceptance | None = None
    identity: Identity | None = None


class Plain(Document):
    """The server without a draft."""

    num_speculative_tokens: Literal[0]
    by_concurrency: dict[int, Cell]
    by_context: dict[int, Cell]


class BreakEven(Document):
    """Concurrency at which the speed-up is 1."""

    concurrency: float | None
    pays_at_lowest: bool
    measured: tuple[int, int]
    """Lowest and highest concurrency measured."""
    text: str


class Predicted(Document):
    """Acceptance length that training predicted, against the served one."""

    predicted: float
    served: float
    difference: float
    alarm: bool


class Drafted(Acceptance):
    """A server with K draft tokens; its own acceptance is that of an untimed pass, group by group."""

    num_speculative_tokens: int
    by_concurrency: dict[int, Cell]
    by_context: dict[int, Cell]
    by_task: dict[str, Acceptance]
    by_language: dict[str, Acceptance]
    speedup: dict[int, float]
    context_speedup: dict[int, float]
    break_even: BreakEven
    predicted: Predicted | None


class Best(Document):
    """The fastest draft length at a concurrency; 0: none pays."""

    concurrency: int
    num_speculative_tokens: int
    speedup: float


class Measured(Document):
    """What exactly was measured, and where."""

    target: str
    """Digest of the target as it was served."""
    target_made_from: tuple[str, ...]
    """Digests of what it was made from: a dequantized target names the quantized one. Empty: not sealed."""
    draft: str
    draft_made_from: tuple[str, ...]
    draft_rope: dict[str, Any]
    """Rotary embedding of the draft: type, theta and scaling."""
    training: dict[str, Any] | None
    """How it was trained, by its training.json: `recipe` and what follows from it; None: not ours."""
    prompts: str
    """Digest of the prompts and of the long prompts, ids and messages."""
    environment: Environment


class DraftRecord(Document):
    """The whole evaluation."""

    kind: Literal["draft evaluation"]
    schema_version: Literal[2]
    target: str
    draft: str
    """Names of the folders."""
    form: str
    problems: tuple[str, ...]
    cannot_be_measured: tuple[str, ...]
    measured: Measured
    prompts: int
    max_response_tokens: int
    repeats: int
    concurrency: tuple[int, ...]
    without_draft: Plain
    with_draft: tuple[Drafted, ...]
    batch_noise: Identity
    best: tuple[Best, ...]
    serve: dict[str, Any]

    @property
    def subject(self) -> str:
        """Digest of target and draft together, as reports name what was served."""
        return f"{self.measured.target}+{self.measured.draft}"


def measured(target: Path, draft: Path, prompts: Prompts, long_prompts: Prompts) -> Measured:
    """Identify what is about to be measured; every byte of target and draft is read.

    Raises:
        IntegrityFailure: a sealed artifact was altered. BadInput: not a checkpoint.
    """
    training = read_json_object(draft / TRAINING_NAME) if (draft / TRAINING_NAME).is_file() else None
    return Measured(
        target=Checkpoint.open(target).digest(),
        target_made_from=_made_from(target),
        draft=Checkpoint.open(draft).digest(),
        draft_made_from=_made_from(draft),
        draft_rope=rope_of(flat_config(read_json_object(draft / CONFIG_NAME))),
        training=training,
        prompts=digest_of(
            [[[one.get("id"), one["messages"]] for one in part] for part in (prompts, long_prompts)]
        ),
        environment=collect_environment(),
    )


def record_of(
    result: DraftEvaluation, bound: Measured, found: DraftFindings, *, target: str, draft: str
) -> DraftRecord:
    """The record of an evaluation; `target` and `draft` are the names that readers see."""
    return DraftRecord.model_validate(
        {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "target": target,
            "draft": draft,
            "form": found.form,
            "problems": found.problems,
            "cannot_be_measured": found.obstacles,
            "measured": bound,
            **result.as_dict(),
        }
    )


def write_record(path: Path, record: DraftRecord) -> None:
    """Write the record as JSON, at once. Raises BadInput where it cannot be written."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def _made_from(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(read_manifest(folder).inputs.values())) if is_sealed(folder) else ()


def read_record(path: Path) -> DraftRecord:
    """Read what `draft evaluate --out` wrote.

    Raises:
        BadInput: missing, malformed, or of another version.
    """
    document = read_json_object(path)
    if document.get("kind") != KIND or document.get("schema_version") != SCHEMA_VERSION:
        found = f"{document.get('kind')!r}, version {document.get('schema_version')}"
        raise BadInput(
            f"{path} is not a draft evaluation of version {SCHEMA_VERSION} but {found}",
            "Measure again: packager draft evaluate TARGET DRAFT --out FILE.",
        )
    try:
        return DraftRecord.model_validate(document)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(
            f"{path} is not a draft evaluation: {where}: {first['msg']}",
            "Measure again: packager draft evaluate TARGET DRAFT --out FILE.",
        ) from None


def require_alike(records: Sequence[DraftRecord]) -> None:
    """Raise BadInput unless all were measured on the same target with the same prompts and settings."""
    first = records[0]
    for other in records[1:]:
        for what, ours, theirs in (
            ("target", first.measured.target, other.measured.target),
            ("prompts", first.measured.prompts, other.measured.prompts),
            ("longest answer", first.max_response_tokens, other.max_response_tokens),
        ):
            if ours != theirs:
                raise BadInput(
                    f"{first.draft} and {other.draft} were not measured alike: the {what} differs "
                    f"({ours} and {theirs})",
                    "Measure them on one target, with the same --prompts, --count and --max-response-tokens.",
                )


def labels(records: Iterable[DraftRecord]) -> list[str]:
    """A name for each draft: its folder's, with the start of its digest where another has the same."""
    found = list(records)
    names = [one.draft for one in found]
    return [
        one.draft if names.count(one.draft) == 1 else f"{one.draft} ({one.measured.draft[7:15]})"
        for one in found
    ]


def differing_settings(records: Sequence[DraftRecord]) -> dict[str, tuple[str, ...]]:
    """What differs between the drafts' making, by name of the setting; one text for each draft."""
    flat = [_settings(one.measured) for one in records]
    names = sorted({name for one in flat for name in one})
    rows = {name: tuple(one.get(name, "–") for one in flat) for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _settings(found: Measured) -> dict[str, str]:
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = _brief(str(value))

    walk("", {k: v for k, v in (found.training or {}).items() if k != "recipe"})
    walk("", (found.training or {}).get("recipe") or {})
    walk("rope", found.draft_rope)
    if found.draft_made_from:
        flat["made from"] = ", ".join(_brief(one) for one in found.draft_made_from)
    return flat


def _brief(text: str) -> str:
    return text[:19] if text.startswith("sha256:") else text
