"""Evidence: each variant of the model is served in turn, measured, and judged against the recipe's gates.

Six servers, one after another, because two on one machine spoil each other's speed:

    BF16 source                     accuracy, twice: what flips anyway is the noise floor; benchmarks, rubrics
    quantized                       accuracy, benchmarks, rubrics; long records, the position limit lifted but
                                    no YaRN
    quantized + draft               accuracy, so that the cost of YaRN and that of the draft are told apart
    quantized + YaRN                accuracy, greedy texts, long records, speed without the draft
    quantized + YaRN + draft        accuracy, greedy texts, acceptance, speed with the draft
    dense baseline                  speed at the same answer lengths

The position limit changes no rotation, so the second server also stands for the quantized model at its own
length. Reports call it FP8, INT8 or INT4, after the recipe's scheme. An answer once given is kept in
`work/measurements`; a variant with nothing left to ask is not served at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import ArtifactWriter, Manifest, read_manifest
from packager.bailing.config import BailingConfig
from packager.errors import BadInput
from packager.recipe import GatesSpec, Recipe
from packager.release.benchmarks import Benchmarks, check_benchmarks, measure_benchmarks
from packager.release.fidelity import Fidelity
from packager.release.figures import stage_figures
from packager.release.pipeline import StageResult
from packager.release.rubrics import RubricEvidence, conclude_rubrics, rubric_measurement
from packager.release.served import Served
from packager.release.variants import Variants
from packager.release.verdicts import Verdicts, check_tasks, conclude, margin_points
from packager.release.workspace import Workspace

if TYPE_CHECKING:
    from validation.conduct import Conduct
    from validation.gates import Gate
    from validation.identity import IdentityResult
    from validation.longcontext import LongComparison, LongRun
    from validation.public_benchmarks import BenchmarkRun
    from validation.report import Report
    from validation.tasks import AccuracyComparison, AccuracyRun, Item
    from validation.throughput import ThroughputRun

Say = Callable[[str], None]
MULTIPLES = (1, 2, 4)
"""Lengths of long records, as multiples of the trained length."""
LONG_OUTPUT_TOKENS, NEEDLE_OUTPUT_TOKENS = 64, 160
"""Longest answer about a long record of the nano's; about one made for another model."""
DEPTHS = 5
"""Depths of needles in records made for a model."""


@dataclass(frozen=True)
class Questions:
    """What is asked: items with known answers, long records, and the prompts that speed is measured on."""

    items: Sequence[Item]
    long: Sequence[Item]

    def spread(self, count: int) -> list[Item]:
        """`count` items evenly spread over the list, so that each task has its share."""
        step = max(1, len(self.items) / max(1, count))
        return [self.items[int(at * step)] for at in range(min(count, len(self.items)))]


@dataclass(frozen=True)
class Measured:
    """All that was measured; None: not measured."""

    accuracy: tuple[AccuracyRun, ...]
    verdicts: Verdicts
    identity: IdentityResult | None
    long: tuple[LongRun, ...]
    long_comparison: LongComparison | None
    without_draft: ThroughputRun
    with_draft: ThroughputRun
    dense: ThroughputRun | None
    patch: AccuracyComparison
    """Short questions before and after the context was extended."""
    conduct: Conduct
    benchmarks: Benchmarks
    fidelity: Fidelity
    rubrics: RubricEvidence


def questions(recipe: Recipe, source: Path, trained_length: int) -> Questions:
    """The recipe's items: from its file, or the nano's own held-out language.

    A file without long records gets synthetic ones, by the model's own tokenizer.

    Args:
        recipe: names the items and how many.
        source: checkpoint whose tokenizer measures the length of long records.
        trained_length: tokens.

    Raises:
        BadInput: no items are named and the source is not the nano.
        MeasurementError: the items file is malformed, or long records cannot be made.
    """
    from validation.tasks import items_from, load_items

    spec = recipe.validate_
    if spec.items_file is not None:
        items = _of_tasks(load_items(Path(spec.items_file)), spec.tasks)
        long = [item for item in items if "multiple" in item.meta]
        short = [item for item in items if "multiple" not in item.meta]
        return Questions(short, long or _needles(recipe, source, trained_length))
    if not recipe.source.packaged:
        raise BadInput(
            "the recipe names no items to validate with",
            "Give validate.items_file: JSONL of {id, task, language, messages, answer, meta}.",
        )
    from tokenizers import Tokenizer

    from packager.nano import language

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    longest = recipe.context.length // trained_length
    rows = [
        row
        for multiple in MULTIPLES
        if spec.long_items and multiple <= longest
        for row in language.long_items(multiple, spec.long_items, spec.seed, tokens)
    ]
    items = items_from(language.heldout_items(spec.items_per_task, spec.seed))
    return Questions(_of_tasks(items, spec.tasks), items_from(rows) if rows else [])


def _needles(recipe: Recipe, source: Path, trained_length: int) -> list[Item]:
    """Records made by the model's tokenizer, `long_items` a length, where the recipe's file has none."""
    from validation.needles import needle_items, token_counter

    lengths = [m * trained_length for m in MULTIPLES if m * trained_length <= recipe.context.length]
    if not recipe.validate_.long_items or not lengths:
        return []
    return needle_items(
        lengths,
        trained_length=trained_length,
        tokens=token_counter(source),
        depths=DEPTHS,
        per_cell=max(1, recipe.validate_.long_items // DEPTHS),
        seed=recipe.validate_.seed,
    )


def _of_tasks(items: list[Item], tasks: tuple[str, ...] | None) -> list[Item]:
    """The items of the tasks named.

    Raises:
        BadInput: a task named has no item.
    """
    if tasks is None:
        return items
    missing = sorted(set(tasks) - {item.task for item in items})
    if missing:
        known = ", ".join(sorted({item.task for item in items}))
        raise BadInput(
            f"validate.tasks names {', '.join(missing)}, of which there are no items", f"Known: {known}."
        )
    return [item for item in items if item.task in tasks]


def first_question(recipe: Recipe) -> Item:
    """The question that the downloaded bundle is asked: of the first task by name, in English if any is."""
    from validation.tasks import items_from, load_items

    spec = recipe.validate_
    if spec.items_file is not None:
        items = load_items(Path(spec.items_file))
    else:
        from packager.nano import language

        items = items_from(language.heldout_items(1, spec.seed + 1))
    items = _of_tasks(items, spec.tasks)
    english = [item for item in items if item.language == "en"] or items
    return min(english, key=lambda item: item.task)


def dense_baseline(recipe: Recipe, workspace: Workspace, source: Path) -> Path | None:
    """The dense checkpoint whose speed is compared; the nano's is made from its seed when needed."""
    named = recipe.validate_.dense_baseline
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_dir():
            raise BadInput(f"the dense baseline {named} is not a folder", "Correct validate.dense_baseline.")
        return path
    if not recipe.source.packaged:
        return None
    from packager.nano.dense import write_dense

    out = workspace.work / "dense"
    if not (out / "config.json").is_file():
        write_dense(out, recipe.validate_.seed, tokenizer=source, length=recipe.context.length)
    return out


def measure(recipe: Recipe, workspace: Workspace, variants: Variants, say: Say) -> Measured:
    """Serve and measure every variant; what was measured before is not measured again."""
    from validation.bench_client import BenchClient
    from validation.conduct import Stopwatch
    from validation.endpoint import Sampling
    from validation.identity import collect_outputs, compare_outputs
    from validation.longcontext import compare_long, measure_long
    from validation.noise import measure_noise
    from validation.tasks import compare_accuracy, measure_accuracy
    from validation.throughput import measure_throughput

    spec, weights = recipe.validate_, recipe.quantize.weights
    trained = BailingConfig.load(variants.source).max_position_embeddings
    asked = questions(recipe, variants.source, trained)
    check_tasks(recipe.gates, asked.items)
    check_benchmarks(spec.benchmarks)
    cache = workspace.work / "measurements"
    sampling = Sampling(max_tokens=spec.max_output_tokens, seed=spec.seed)
    longest_answer = LONG_OUTPUT_TOKENS if recipe.source.packaged else NEEDLE_OUTPUT_TOKENS
    long_sampling = Sampling(max_tokens=longest_answer, seed=spec.seed)
    same, speed = asked.spread(spec.identity_prompts), asked.spread(spec.throughput_prompts)
    watch = Stopwatch()

    fidelity = Fidelity(spec.fidelity, cache, say)

    def accuracy(served: Served) -> AccuracyRun:
        with watch.step(f"accuracy, {served.label}", served.subject):
            run = measure_accuracy(served.target(cache), asked.items, sampling=sampling)
        say(f"  {served.label}: {run.overall.correct} of {run.overall.n} right")
        return run

    def benchmarks(served: Served) -> tuple[BenchmarkRun, ...]:
        if not spec.benchmarks:
            return measure_benchmarks(spec.benchmarks, served.target(cache), say)
        with watch.step(f"benchmarks, {served.label}", served.subject):
            return measure_benchmarks(spec.benchmarks, served.target(cache), say)

    def long_records(served: Served, label: str) -> LongRun | None:
        if not asked.long:
            return None
        with watch.step(f"long records, {label}", served.subject):
            return measure_long(
                served.target(cache, label), asked.long, trained_length=trained, sampling=long_sampling
            )

    with BenchClient() as bench, rubric_measurement(recipe, cache, sampling, say) as rubrics:

        def throughput(served: Served, match: ThroughputRun | None = None) -> ThroughputRun:
            with watch.step(f"speed, {served.label}", served.subject):
                run = measure_throughput(
                    served.target(cache),
                    tokenizer=served.tokenizer,
                    prompts=speed,
                    concurrency=spec.concurrency,
                    output_tokens=spec.throughput_output_tokens,
                    bench=bench,
                    match=match,
                    seed=spec.seed,
                )
            first = run.cells[0]
            say(f"  {served.label}: {first.output_tokens_per_s:.0f} tokens/s at {first.concurrency}")
            return run

        with variants.bf16() as served:
            bf16 = accuracy(served)
            before = benchmarks(served)
            with watch.step(f"token distributions, {served.label}", served.subject):
                fidelity.reference(served, bf16, asked.spread(spec.fidelity.texts))
            if rubrics is not None:
                with watch.step(f"rubrics, {served.label}", served.subject):
                    rubrics.measure(served)
            noise = None
            if spec.noise_floor:
                margin = margin_points(recipe.gates)
                with watch.step(f"noise floor, {served.label}", served.subject):
                    noise = measure_noise(served.target(cache), asked.items, bf16, margin_points=margin)
                say(f"  {served.label} again: {noise.flips} of {bf16.overall.n} flip without any change")
        with variants.fp8(limit=recipe.context.length) as served:
            fp8 = accuracy(served)
            after = benchmarks(served)
            with watch.step(f"token distributions, {served.label}", served.subject):
                fidelity.candidate(served)
            if rubrics is not None:
                with watch.step(f"rubrics, {served.label}", served.subject):
                    rubrics.measure(served)
            long_before = long_records(served, f"{weights}, no YaRN")
        alone = None
        if spec.whole_matrix and recipe.context.length > trained:
            with variants.drafted_as_trained() as served:
                alone = accuracy(served)
        with variants.context() as served:
            context = accuracy(served)
            fidelity.candidate(served)
            reference = collect_outputs(served.target(cache), same, sampling=sampling)
            long_after = long_records(served, f"{weights}, YaRN")
            without_draft = throughput(served)
        with variants.draft() as served:
            drafted = accuracy(served)
            candidate = collect_outputs(served.target(cache), same, sampling=sampling)
            with_draft = throughput(served)
        dense_path = dense_baseline(recipe, workspace, variants.source)
        dense = None
        if dense_path is not None:
            with variants.dense(dense_path) as served:
                dense = throughput(served, match=without_draft)

    fidelity.experts(variants.source, workspace.fp8)
    long = tuple(run for run in (long_before, long_after) if run is not None)
    runs = (bf16, fp8, context, drafted)
    return Measured(
        accuracy=runs if alone is None else (bf16, fp8, alone, context, drafted),
        verdicts=conclude(recipe.gates, weights, runs, noise, alone),
        identity=compare_outputs(reference, candidate) if same else None,
        long=long,
        long_comparison=compare_long(*long) if len(long) == 2 else None,
        without_draft=without_draft,
        with_draft=with_draft,
        dense=dense,
        patch=compare_accuracy(fp8, context, margin_points=margin_points(recipe.gates)),
        conduct=watch.conduct(),
        benchmarks=Benchmarks.compare(spec.benchmarks, before, after, margin_points(recipe.gates)),
        fidelity=fidelity,
        rubrics=conclude_rubrics(recipe.gates, rubrics),
    )


def judge(spec: GatesSpec, found: Measured) -> tuple[Gate, ...]:
    """Each figure against its bound; a figure without a bound is reported, not gated."""
    from validation.gates import at_least, at_most
    from validation.throughput import compare_throughput

    first = found.verdicts.comparisons[0]
    fp8 = first.overall
    single, drafted = found.without_draft.cells[0], found.with_draft.cells[0]
    acceptance = drafted.acceptance.length if drafted.acceptance else None
    identity = found.identity
    speedup = compare_throughput(found.without_draft, found.with_draft)[0].ratio
    to_dense = compare_throughput(found.dense, found.with_draft)[0].ratio if found.dense else None
    at = f"at concurrency {single.concurrency}"
    longest = found.long[1].longest_passing_tokens(spec.min_long_accuracy) if len(found.long) == 2 else None
    unexplained = sum(not d.near_tie for d in identity.differences) if identity else None
    return (
        at_most(
            f"accuracy lost by {first.candidate} against BF16",
            0.0 - fp8.difference_points,  # a sign alone would make -0 of no difference
            spec.max_accuracy_loss_points,
            "points",
            f"interval of the difference {fp8.low_points:+.1f} to {fp8.high_points:+.1f}; {fp8.verdict}",
        ),
        *found.verdicts.gates(spec),
        *found.benchmarks.gates(spec),
        *found.rubrics.gates(spec),
        at_least(
            "greedy outputs identical with and without the draft",
            identity.identical_fraction if identity else None,
            spec.min_identical_fraction,
        ),
        at_most(
            "outputs that differ before any near tie",
            unexplained,
            None if spec.min_identical_fraction is None else 0,
        ),
        at_least(f"acceptance length {at}", acceptance, spec.min_acceptance_length, "tokens"),
        at_least(f"speed with the draft over without {at}", speedup, spec.min_draft_speedup, "x"),
        at_least(f"output speed {at}", drafted.output_tokens_per_s, spec.min_tokens_per_second, "tokens/s"),
        at_least(f"speed over the dense baseline {at}", to_dense, spec.min_ratio_to_dense, "x"),
        at_least(
            f"longest record read at {spec.min_long_accuracy:.0%} or better",
            longest,
            spec.min_long_context_tokens,
            "tokens",
        ),
    )


def collect_evidence(
    recipe: Recipe,
    workspace: Workspace,
    variants: Variants,
    before: Sequence[StageResult],
    inputs: Mapping[str, str],
    recipe_digest: str,
    say: Say,
) -> Manifest:
    """Measure, judge, and seal the report in `evidence/`, whether the gates are passed or not."""
    from packager.release.draft_measured import measure_draft
    from packager.release.draft_panels import draft_panels, records_for
    from validation.report import (
        ReportInputs,
        StageFigures,
        Subject,
        build_report,
        collect_environment,
        short_context_panel,
        write_report,
    )

    files = [Path(file).expanduser() for file in recipe.validate_.draft_evaluations]
    given = records_for(files, target=read_manifest(workspace.context).digest)
    draft = read_manifest(workspace.draft).digest
    if not recipe.validate_.draft_tokens:
        draft_panels(given, draft=draft)  # what does not fit is refused before hours of measuring
    found = measure(recipe, workspace, variants, say)
    trained = BailingConfig.load(variants.source).max_position_embeddings
    asked = questions(recipe, variants.source, trained)
    own = measure_draft(recipe, workspace, variants, asked, trained, say)
    evaluated, panels = draft_panels([*([own] if own else []), *given], draft=draft)
    alarms = acceptance_alarms(
        next((stage.metrics for stage in before if stage.name == "draft"), {}),
        found.with_draft,
        recipe.draft.num_speculative_tokens,
    )
    alarms += found.fidelity.alarms()
    for line in alarms:
        say(f"  {line}")
    runs = {run.subject: run.label for run in (*found.accuracy, *((found.dense,) if found.dense else ()))}
    report = build_report(
        ReportInputs(
            title=recipe.name,
            subjects=(
                *(Subject(name=label, digest=digest) for digest, label in runs.items()),
                *evaluated,
            ),
            weights_served=variants.weights_served,
            weights_note=variants.why_dequantized,
            environment=collect_environment(),
            accuracy=found.accuracy,
            comparisons=found.verdicts.comparisons,
            identity=(found.identity,) if found.identity else (),
            long_context=found.long,
            long_comparison=found.long_comparison,
            throughput=tuple(run for run in (found.without_draft, found.with_draft, found.dense) if run),
            throughput_baseline=found.dense.label if found.dense else None,
            gates=judge(recipe.gates, found),
            panels=(
                *found.verdicts.panels(recipe.gates),
                *found.benchmarks.panels(),
                *found.rubrics.panels(),
                short_context_panel(found.patch, found.long_comparison),
                *panels,
                *found.fidelity.panels(),
            ),
            conduct=found.conduct,
            stages=tuple(
                StageFigures(
                    stage=stage.name,
                    digest=stage.manifest.digest,
                    seconds=stage.seconds,
                    figures=stage_figures(stage),
                )
                for stage in before
            ),
            notes=(
                f"{recipe.quantize.weights} without YaRN was served with its position limit lifted, which "
                "changes no rotation.",
                *alarms,
            ),
        )
    )
    with ArtifactWriter(
        workspace.evidence, stage="validate", recipe_digest=recipe_digest, inputs=dict(inputs)
    ) as writer:
        for path in write_report(report, workspace.evidence).values():
            writer.adopt(path.name)
        return writer.seal(
            summary(report, found)
            | {
                "speculation": own.serve["speculation"]
                if own
                else speculation(found.without_draft, found.with_draft, recipe.draft.num_speculative_tokens)
            }
        )


def acceptance_alarms(drafted: Mapping[str, Any], served: ThroughputRun, tokens: int) -> tuple[str, ...]:
    """A sentence if the served acceptance length is not what training predicted (the draft's metrics)."""
    from packager.draft.speedup import ALARM_SHARE, agreement

    acceptance = served.cells[0].acceptance
    found = agreement(drafted, tokens, acceptance.length) if acceptance else None
    if found is None or not found.alarm:
        return ()
    return (
        f"Acceptance length predicted in training {found.predicted:.2f}, served {found.served:.2f}: over "
        f"{ALARM_SHARE:.0%} apart. Layer ids, positions or weights differ in serving, or the prompts do.",
    )


def speculation(without: ThroughputRun, drafted: ThroughputRun, tokens: int) -> list[dict[str, int]]:
    """Draft tokens by batch for the serve settings: none where the draft made serving slower."""
    from packager.draft.speedup import schedule
    from validation.throughput import compare_throughput

    ratios = compare_throughput(without, drafted)
    best = {one.concurrency: tokens if one.ratio > 1 else 0 for one in ratios}
    return [one.model_dump(exclude_none=True) for one in schedule(best)] if best else []


def summary(report: Report, found: Measured) -> dict[str, Any]:
    """The figures that a table of stages needs, for the manifest; the report has all of them."""
    fp8 = found.verdicts.comparisons[0].overall
    plain, drafted = found.without_draft.cells[0], found.with_draft.cells[0]
    return {
        "outcome": report.outcome,
        "gates": [gate.model_dump(mode="json") for gate in report.gates],
        "weights_served": report.weights_served,
        "accuracy": {run.label: [run.overall.correct, run.overall.n] for run in report.accuracy},
        "weights": found.verdicts.comparisons[0].candidate,
        "fp8_difference_points": [fp8.difference_points, fp8.low_points, fp8.high_points],
        "identical": [found.identity.identical, found.identity.n] if found.identity else None,
        "long_records": {
            run.label: {str(share.multiple): [share.correct, share.n] for share in run.by_multiple}
            for run in found.long
        },
        "acceptance_length": drafted.acceptance.length if drafted.acceptance else None,
        "concurrency": plain.concurrency,
        "tokens_per_s": {
            "without_draft": plain.output_tokens_per_s,
            "with_draft": drafted.output_tokens_per_s,
            "dense": found.dense.cells[0].output_tokens_per_s if found.dense else None,
        },
    } | found.verdicts.summary()
