"""The release's own draft at several draft lengths, as `draft evaluate` measures any draft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packager.artifact import read_manifest
from packager.errors import BadInput
from packager.recipe import Recipe
from packager.release.draft_record import DraftRecord, measured, read_record, record_of, write_record
from packager.release.pipeline import Say
from packager.release.variants import Variants
from packager.release.workspace import Workspace

if TYPE_CHECKING:
    from packager.release.evidence import Questions
    from validation.tasks import Item

LONG_PROMPTS = 12
"""Long records of each length; decoding behind them is slow where the context is long."""
REPEATS = 2
"""Timed passes: the draft length to serve with is chosen by them."""


def measure_draft(
    recipe: Recipe, workspace: Workspace, variants: Variants, asked: Questions, trained: int, say: Say
) -> DraftRecord | None:
    """Measure the draft at the recipe's `validate.draft_tokens`; None if it names none.

    `trained` is the length, in tokens, whose multiples the long records of `asked` have.

    What was measured is kept in `work/draft-evaluation.json` and taken from there while target, draft,
    prompts, settings and machine are the same.

    Raises:
        BadInput, RemoteFailure: as `evaluate_draft`.
    """
    from packager.draft.imported import look_at
    from packager.release.draft_evaluation import Plan, evaluate_draft
    from packager.serving import ServeSpec

    spec = recipe.validate_
    if not spec.draft_tokens:
        return None
    multiples = sorted({int(one.meta["multiple"]) for one in asked.long})
    long: list[Mapping[str, Any]] = []
    for multiple in multiples:
        long += [_prompt(one) for one in asked.long if one.meta["multiple"] == multiple][:LONG_PROMPTS]
    target = variants.servable(workspace.context)
    plan = Plan(
        ServeSpec(target, tensor_parallel=variants.tensor_parallel),
        workspace.draft,
        [_prompt(one) for one in asked.spread(max(spec.identity_prompts, spec.throughput_prompts))],
        tokens=tuple(sorted(set(spec.draft_tokens))),
        concurrency=tuple(sorted(set(spec.concurrency))),
        max_tokens=spec.max_output_tokens,
        repeats=REPEATS,
        contexts=tuple(trained * multiple for multiple in multiples),
        long_prompts=long,
    )
    bound = measured(target, workspace.draft, plan.prompts, plan.long_prompts)
    kept = workspace.work / "draft-evaluation.json"
    if kept.is_file():
        try:
            record = read_record(kept)
        except BadInput:
            record = None  # of another version
        wanted = (plan.tokens, plan.concurrency, plan.max_tokens)
        if record and record.measured == bound and _settings(record) == wanted:
            return record
    found = look_at(workspace.draft, target)
    result = evaluate_draft(plan, read_manifest(workspace.draft).metrics, lambda line: say(f"  {line}"))
    record = record_of(result, bound, found, target=workspace.context.name, draft=workspace.draft.name)
    write_record(kept, record)
    return record


def _settings(record: DraftRecord) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    lengths = tuple(run.num_speculative_tokens for run in record.with_draft)
    return lengths, record.concurrency, record.max_response_tokens


def _prompt(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "task": item.task,
        "language": item.language,
        "messages": [message.model_dump() for message in item.messages],
    }
