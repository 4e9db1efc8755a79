"""Which checks see which damage: a quantized nano as produced, and three ways to harm it, all really served.

    python benchmarks/planted_damage.py [--per-task 100] [--passages 60] [--work DIR] [--json FILE]

(a) FP8 as produced; (b) one expert's scales doubled; (c) one layer's attention zeroed; (d) 2 % of the
recorded answers changed. BF16, (a), (b) and (c) are served by vLLM one after another (dequantized where the
processor has no FP8 kernel); (d) is (a) with its record altered. Every check states its bound beforehand:
gates by their defaults, alarms as recipes/nano.yaml names them. (a) must pass all; each of the others must
be found by at least one.

Some minutes on two cores; nothing else may run meanwhile. With --work, answers are kept there, and a run that
was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packager.artifact import MANIFEST_NAME, check
from packager.checkpoint.source import Checkpoint
from packager.errors import IntegrityFailure
from packager.nano import CHECKPOINT, language
from packager.proof.recompute import verify_against
from packager.proof.structure import check_structure
from packager.quantize import dequantize, diff, quantize
from packager.quantize.fidelity import LEDGER_NAME
from packager.recipe import QuantizeSpec, load_recipe
from packager.release.served import Served
from packager.serving import ServeSpec, fp8_runs_here
from validation.endpoint import Sampling, Target
from validation.fidelity import Bounds, RoutingAgreement, compare_routing, compare_scores
from validation.identity import OutputRun, collect_outputs, compare_outputs
from validation.prompt_logprobs import Passage, ScoredRun, Scoring, answers_as_passages, score_passages
from validation.tasks import AccuracyRun, Item, compare_accuracy, items_from, measure_accuracy
from validation.tasks.accuracy import share_of

MIN_SNR_DB = 30.0
"""As `quantize` demands of block FP8."""
BOUNDS = Bounds(
    **load_recipe(Path(__file__).parents[1] / "recipes/nano.yaml").validate_.fidelity.quantize.model_dump()
)
MARGIN_POINTS = 2.0
SIGNIFICANCE = 0.05
EXPERT = "model.layers.2.mlp.experts.3."
ATTENTION = "model.layers.1.attention."
FLIPPED = 0.02


@dataclass
class Said:
    """What a served checkpoint said."""

    accuracy: AccuracyRun
    outputs: OutputRun
    scores: ScoredRun
    again: ScoredRun | None = None


@dataclass
class Row:
    """One check: what it found in each case; None: it has nothing to look at there."""

    name: str
    bound: str
    cases: dict[str, tuple[str, bool] | None] = field(default_factory=dict)


def produce(folder: Path) -> Path:
    """The nano in block FP8, as the release makes it."""
    out = folder / "fp8"
    spec = QuantizeSpec()
    quantize(CHECKPOINT, out, spec, recipe_digest=spec.digest, progress=lambda _: None)
    return out


def harm(artifact: Path, out: Path, names: str, change: str) -> Path:
    """A copy of `artifact` in which the tensors whose names begin with `names` are changed.

    Args:
        change: `double scales` or `zero codes`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(artifact, out)
    changed = 0
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for name, tensor in tensors.items():
            is_scale = name.endswith(("weight_scale", "weight_scale_inv"))
            if name.startswith(names) and change == "double scales" and is_scale:
                tensors[name] = tensor * 2
                changed += 1
            elif name.startswith(names) and change == "zero codes" and tensor.dtype == torch.float8_e4m3fn:
                tensors[name] = torch.zeros(tensor.shape).to(torch.float8_e4m3fn)
                changed += 1
        save_file(tensors, shard, metadata=metadata)
    assert changed, f"nothing in {artifact} begins with {names}"
    return out


def cases(folder: Path) -> dict[str, Path]:
    """(a), (b) and (c)."""
    made = produce(folder)
    return {
        "a": made,
        "b": harm(made, folder / "expert-doubled", EXPERT, "double scales"),
        "c": harm(made, folder / "attention-zeroed", ATTENTION, "zero codes"),
    }


def file_checks(paths: dict[str, Path]) -> list[Row]:
    """The checks that read files and need no server. Afterwards (b) and (c) have no seal any more."""
    rows = [
        Row("verify (seal)", "hashes as sealed"),
        Row("quantize's ledger", f"every weight at {MIN_SNR_DB:g} dB or more"),
        Row("validate structure", "sound"),
        Row("verify --against", "codes and scales recomputed"),
        Row("diff, lowest SNR", f"{MIN_SNR_DB:g} dB or more"),
    ]
    seal, ledger, structure, proof, ratio = rows
    for case, path in paths.items():
        try:
            check(path)
            seal.cases[case] = ("as sealed", False)
        except IntegrityFailure:
            seal.cases[case] = ("altered", True)
            (path / MANIFEST_NAME).unlink()  # from here on as if it had never been sealed
        entries = [json.loads(line) for line in (path / LEDGER_NAME).read_text().splitlines()]
        lowest = min(entry["snr_db"] for entry in entries if entry.get("snr_db") is not None)
        ledger.cases[case] = (f"{lowest:.1f} dB", lowest < MIN_SNR_DB)
        found = check_structure(path, source=CHECKPOINT, read_data=True, engine=None)
        structure.cases[case] = (f"{len(found.problems)} problems", not found.sound)
        proved = verify_against(path, CHECKPOINT, sample=None)
        faults = len(proved.problems) + len(proved.mismatches)
        proof.cases[case] = (f"{faults} faults", not proved.sound)
        worst = diff(CHECKPOINT, path).differing[0]
        low = worst.snr_db is None or worst.snr_db < MIN_SNR_DB
        ratio.cases[case] = ("not finite" if worst.snr_db is None else f"{worst.snr_db:.1f} dB", low)
    return rows


def served_checks(reference: Said, candidates: dict[str, Said]) -> list[Row]:
    """The checks that compare what servers said."""
    rows: dict[str, Row] = {}

    def row(name: str, bound: str) -> Row:
        return rows.setdefault(name, Row(name, bound))

    for case, one in candidates.items():
        found = compare_scores(reference.scores, one.scores, again=reference.again, bounds=BOUNDS)
        for gate in found.alarms:
            row(f"fidelity: {gate.name}", f"{gate.comparison} {gate.bound:g}").cases[case] = (
                f"{gate.measured:.3g}" if "KL" in gate.name else f"{gate.measured:.4f}",
                gate.outcome == "fail",
            )
        same = compare_outputs(reference.outputs, one.outputs)
        far = sum(not d.near_tie for d in same.differences)
        row("identity: greedy answers like BF16's", "for information").cases[case] = (
            f"{same.identical} of {same.n}, {far} beyond a near tie",
            False,
        )
    for case, run in {name: one.accuracy for name, one in candidates.items()}.items():
        accuracy_checks(reference.accuracy, run, case, row)
    return list(rows.values())


def accuracy_checks(reference: AccuracyRun, run: AccuracyRun, case: str, row: Any) -> None:
    """Verdict, McNemar's test and the count of flips, of one case."""
    paired = compare_accuracy(reference, run, margin_points=MARGIN_POINTS).overall
    interval = f"{paired.difference_points:+.1f} ({paired.low_points:+.1f} to {paired.high_points:+.1f})"
    row("accuracy: verdict", f"not inferior by {MARGIN_POINTS:g} points").cases[case] = (
        f"{paired.verdict}, {interval}",
        paired.verdict == "inferior",
    )
    worse = paired.only_reference > paired.only_candidate
    row("accuracy: McNemar, exact", f"no loss at p < {SIGNIFICANCE:g}").cases[case] = (
        f"p = {paired.p_value:.2g}",
        worse and paired.p_value < SIGNIFICANCE,
    )
    row("flips, right to wrong / back", "for information").cases[case] = (
        f"{paired.only_reference} / {paired.only_candidate}",
        False,
    )


def flip(run: AccuracyRun, share: float, seed: int) -> AccuracyRun:
    """`run` with a share of all its answers changed from right to wrong, text and answer."""
    chance = random.Random(seed)
    right = [n for n, result in enumerate(run.results) if result.correct]
    chosen = set(chance.sample(right, round(share * len(run.results))))
    results = []
    for number, result in enumerate(run.results):
        if number in chosen:
            other = next(
                r.expected for r in run.results if r.task == result.task and r.expected != result.expected
            )
            text = result.text.replace(result.extracted or "", other)
            changed = {"extracted": other, "text": text, "correct": False}
            result = result.model_copy(update=changed)
        results.append(result)
    return run.model_copy(update={"results": tuple(results), "overall": share_of("all", results)})


def routing(reference: Path, candidate: Path, scores: ScoredRun, label: str) -> RoutingAgreement:
    """Expert choices of both on the scored texts, from a forward of our own."""
    from packager.bailing.layerwise import LayerwiseForward

    prompts = [[int(token) for token in passage.tokens] for passage in scores.passages]
    one, other = (LayerwiseForward(Checkpoint.open(path)).routing(prompts) for path in (reference, candidate))
    return compare_routing(
        [one[n] for n in one], [other[n] for n in one], list(one),
        names=("BF16", label), subjects=("bf16", label), source="a forward of our own in FP32", bounds=BOUNDS,
    )  # fmt: skip


def routing_row(paths: dict[str, Path], scores: ScoredRun) -> Row:
    """Agreement of expert choices with BF16."""
    found = {case: routing(CHECKPOINT, path, scores, case) for case, path in paths.items()}
    bound = next(iter(found.values())).alarm.bound
    row = Row("fidelity: experts shared", f"Jaccard index {bound:g} or more")
    for case, one in found.items():
        row.cases[case] = (f"{one.jaccard:.4f}", one.alarm.outcome == "fail")
    return row


@contextmanager
def serving(path: Path, work: Path, label: str) -> Iterator[Target]:
    """A checkpoint, dequantized if need be; its server starts at the first question that is not answered."""

    def spec() -> ServeSpec:
        model = path
        if path != CHECKPOINT and not fp8_runs_here()[0]:
            model = work / f"{path.name}-bf16"
            if not (model / "config.json").is_file():
                dequantize(path, model)
        return ServeSpec(model=model)

    digest = Checkpoint.open(path).digest()
    served = Served(label, digest, CHECKPOINT, work / f"{label}.log", spec, lambda _: None)
    with served.running():
        yield served.target(work / "answers")


def ask(
    path: Path, work: Path, label: str, items: Sequence[Item], passages: list[Passage] | None, count: int
) -> tuple[Said, list[Passage]]:
    """Everything that is asked of one server."""
    began = time.monotonic()
    with serving(path, work, label) as target:
        sampling = Sampling(max_tokens=128)
        accuracy = measure_accuracy(target, items, sampling=sampling)
        outputs = collect_outputs(target, items, sampling=sampling)
        again = None
        step = max(1, len(items) // count)
        passages_given = passages or answers_as_passages(items[::step], accuracy.results[::step])
        scores = score_passages(target, passages_given)
        if passages is None:
            again = score_passages(target, passages_given, scoring=Scoring(repetition=1), concurrency=3)
    print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return Said(accuracy, outputs, scores, again), passages_given


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The table of checks, in Markdown."""
    lines = [
        "| check | bound | " + " | ".join(f"({n})" for n in names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for row in rows:
        cells = []
        for name in names:
            found = row.cases.get(name)
            cells.append("–" if found is None else f"**{found[0]}**" if found[1] else found[0])
        lines.append(f"| {row.name} | {row.bound} | " + " | ".join(cells) + " |")
    found_by = {n: [r.name for r in rows if (cell := r.cases.get(n)) and cell[1]] for n in names}
    lines += ["", *(f"({n}): {'; '.join(by) or 'passes all'}" for n, by in found_by.items())]
    return "\n".join(lines)


def main() -> int:
    """Run, print the table; 1 unless (a) passes all and (b) to (d) are found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--passages", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        items = items_from(language.heldout_items(options.per_task, 0))
        paths = cases(work / "checkpoints")
        rows = file_checks(paths)
        reference, passages = ask(CHECKPOINT, work, "BF16", items, None, options.passages)
        said = {
            case: ask(path, work, case, items, passages, options.passages)[0] for case, path in paths.items()
        }
        rows += served_checks(reference, said)
        rows.append(routing_row(paths, reference.scores))
        by_name = {row.name: row for row in rows}
        changed = flip(said["a"].accuracy, FLIPPED, seed=1)
        accuracy_checks(reference.accuracy, changed, "d", lambda name, _: by_name[name])
        noise = compare_scores(reference.scores, said["a"].scores, again=reference.again).noise
    names = ("a", "b", "c", "d")
    print(f"{len(items)} items, {len(passages)} texts; bold: found\n")
    print(table(rows, names))
    if noise is not None:
        print(
            f"\nBF16 against itself in another batch: mean KL {noise.kl_mean:.2g} nats, "
            f"p99 {noise.kl_p99:.2g}, same likeliest token {noise.top1_agreement:.4f}"
        )
    if options.json:
        options.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1))
    found = {n: any(cell[1] for r in rows if (cell := r.cases.get(n))) for n in names}
    return 0 if found == {"a": False, "b": True, "c": True, "d": True} else 1


if __name__ == "__main__":
    sys.exit(main())
