"""What YaRN does to the nano and to its draft, by context length; every figure from a real vLLM server.

    python benchmarks/draft_context.py [--recipe recipes/nano.yaml] [--items 200] [--seeds 1] [--json FILE]

Three questions, answered on the quantized nano (trained to 512 tokens, served to 2048):

- Is a draft better trained on the states of the YaRN target, or on those of the trained-length target and
  patched at export? Both drafts are trained on the same prompts and served on both targets, each time with
  the rotary embedding of the target. Acceptance length, from vLLM's own counters, on held-out questions of
  every task ("short") and on long records at 1x, 2x and 4x the trained length.
- What is read in long records without the patch and with it, and what does it cost short questions?
- How much faster does the draft decode at each length, one request at a time?

A quarter of an hour on two cores; nothing else may run meanwhile. With several seeds the drafts are trained
anew for each and acceptance lengths are given as mean and range. What the figures decided stands where the
draft's target is chosen, in packager/release/stages.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packager.artifact import read_manifest
from packager.context import extend, undo
from packager.draft.acceptance import acceptance_from_metrics
from packager.draft.stage import build
from packager.nano import CHECKPOINT, language
from packager.nano.architecture import TRAINED_LENGTH
from packager.quantize import dequantize, quantize
from packager.recipe import ContextSpec, Recipe, load_recipe
from packager.serving import Server, ServeSpec, fp8_runs_here
from validation.endpoint import Sampling, Target
from validation.longcontext import measure_long
from validation.tasks import Item, items_from, measure_accuracy
from validation.throughput import measure_decode_speed

MULTIPLES = (1, 2, 4)
SHORT = "short"


@dataclass
class Case:
    """One served pair of target and draft."""

    name: str
    target: Path
    draft: Path | None
    context: str
    """`trained` or `yarn`: the rotary embedding that is served."""
    trained_on: str | None = None
    """The target whose states the draft learned from."""
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Right answers of how many, by length."""
    acceptance: dict[str, float] = field(default_factory=dict)
    drafts: dict[str, int] = field(default_factory=dict)
    tokens_per_s: dict[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": self.name,
            "context": self.context,
            "draft_trained_on": self.trained_on,
            "right": self.right,
            "acceptance_length": self.acceptance,
            "verifications": self.drafts,
            "decode_tokens_per_s": self.tokens_per_s,
        }


def say(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


def targets(recipe: Recipe, work: Path) -> tuple[Path, Path]:
    """The quantized nano as it is served here, at its trained length and with YaRN."""
    fp8 = work / "fp8"
    quantize(CHECKPOINT, fp8, recipe.quantize, recipe_digest="sha256:0", progress=lambda _: None)
    served = fp8
    if not fp8_runs_here(recipe.quantize.scheme)[0]:
        served = work / "trained"
        dequantize(fp8, served)
    extend(served, work / "yarn", recipe.context, recipe_digest="sha256:0")
    return served, work / "yarn"


def drafts(recipe: Recipe, trained: Path, yarn: Path, work: Path, seed: int) -> dict[tuple[str, str], Path]:
    """Both drafts with both rotary embeddings: (trained on, served with) -> folder."""
    spec = recipe.draft.model_copy(update={"seed": seed})
    found: dict[tuple[str, str], Path] = {}
    for on, target in (("trained", trained), ("yarn", yarn)):
        out = work / f"draft-{on}-{seed}"
        prompts = language.prompts(spec.prompts)
        build(
            target,
            out,
            spec,
            prompts,
            recipe_digest="sha256:0",
            inputs={},
            workdir=work / f"prepared-{on}",
            progress=lambda line: say(f"  {line}") if "predicted" in line else None,
        )
        found[on, on] = out
        say(f"draft on the {on} target, seed {seed}: trained")
    other = work / f"draft-trained-{seed}-patched"
    extend(found["trained", "trained"], other, ContextSpec(length=recipe.context.length), recipe_digest="x")
    found["trained", "yarn"] = other
    other = work / f"draft-yarn-{seed}-undone"
    undo(found["yarn", "yarn"], other, recipe_digest="x")
    found["yarn", "trained"] = other
    return found


def measure(case: Case, short: list[Item], long: dict[int, list[Item]], recipe: Recipe, work: Path) -> None:
    """Serve the case and fill in its figures; the trained embedding is served with its limit lifted."""
    lift = {"max_position_embeddings": recipe.context.length} if case.context == "trained" else {}
    spec = ServeSpec(
        case.target,
        draft=case.draft,
        num_speculative_tokens=recipe.draft.num_speculative_tokens,
        max_model_len=recipe.context.length,
        hf_overrides=lift,
    )
    # A draft has no limit to lift: with the trained embedding it is asked up to that length only.
    lengths = [m for m in MULTIPLES if case.draft is None or case.context == "yarn" or m == 1]
    with Server(spec, work / "logs" / f"{case.name}.log") as server:
        target = Target(server.url, "model", f"sha256:{case.name}", case.name, work / "answers")

        def counted(name: str, ask: Any) -> None:
            before = server.metrics()
            right, n = ask()
            case.right[name] = (right, n)
            if case.draft is not None:
                report = acceptance_from_metrics(before, server.metrics())
                case.acceptance[name], case.drafts[name] = round(report.length, 4), report.drafts

        def ask_short() -> tuple[int, int]:
            sampling = Sampling(max_tokens=recipe.validate_.max_output_tokens, top_logprobs=None)
            overall = measure_accuracy(target, short, sampling=sampling).overall
            return overall.correct, overall.n

        def ask_long(multiple: int) -> tuple[int, int]:
            share = measure_long(target, long[multiple], trained_length=TRAINED_LENGTH).by_multiple[0]
            return share.correct, share.n

        counted(SHORT, ask_short)
        for multiple in lengths:
            counted(f"{multiple}x", lambda multiple=multiple: ask_long(multiple))
            if case.context == "yarn":
                chosen = [[m.model_dump() for m in i.request.messages] for i in long[multiple][:12]]
                speed = measure_decode_speed(target, chosen, output_tokens=64, repeats=3)
                case.tokens_per_s[f"{multiple}x"] = round(speed.tokens_per_s, 1)
    say(f"{case.name}: right {case.right}, acceptance {case.acceptance}, tokens/s {case.tokens_per_s}")


def table(cases: list[Case]) -> str:
    """The figures as Markdown; a dash is what was not measured."""
    names = [SHORT, *(f"{m}x" for m in MULTIPLES)]
    lines = ["right answers | " + " | ".join(names), "|".join(["---"] * 5)]
    for case in cases:
        if case.draft is None:
            cells = ["{} of {}".format(*case.right[n]) if n in case.right else "–" for n in names]
            lines.append(f"rotary {case.context} | " + " | ".join(cells))
    lines += ["", "acceptance length | " + " | ".join(names), "|".join(["---"] * 5)]
    groups: dict[tuple[str | None, str], list[Case]] = {}
    for case in cases:
        if case.draft is not None:
            groups.setdefault((case.trained_on, case.context), []).append(case)
    for (on, context), group in groups.items():
        cells = []
        for name in names:
            found = [case.acceptance[name] for case in group if name in case.acceptance]
            spread = f" ({min(found):.3f}–{max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "–")
        lines.append(f"draft of the {on} target, served {context} | " + " | ".join(cells))
    lines += ["", "decoding, tokens/s | " + " | ".join(names[1:]), "|".join(["---"] * 4)]
    for case in cases:
        if case.tokens_per_s:
            lines.append(f"{case.name} | " + " | ".join(str(case.tokens_per_s[n]) for n in names[1:]))
    return "\n".join(lines)


def main() -> None:
    """Run everything and print the table; the same as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/nano.yaml"))
    parser.add_argument("--items", type=int, default=200, help="long records per length")
    parser.add_argument("--short-items", type=int, default=40, help="held-out questions per task")
    parser.add_argument("--steps", type=int, help="training steps of a draft, instead of the recipe's")
    parser.add_argument("--prompts", type=int, help="prompts of a draft, instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, dest="out")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    changes = {name: value for name in ("steps", "prompts") if (value := getattr(options, name))}
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update=changes)})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        trained, yarn = targets(recipe, work)
        short = items_from(language.heldout_items(options.short_items))
        long = {m: items_from(language.long_items(m, options.items)) for m in MULTIPLES}
        cases = [Case("trained", trained, None, "trained"), Case("yarn", yarn, None, "yarn")]
        for seed in range(options.seeds):
            for (on, context), draft in drafts(recipe, trained, yarn, work, seed).items():
                target = yarn if context == "yarn" else trained
                cases.append(Case(f"draft-{on}-served-{context}-{seed}", target, draft, context, on))
        for case in cases:
            measure(case, short, long, recipe, work)
        print(table(cases))
        if options.out:
            document = {
                "machine": {"served": "native" if fp8_runs_here()[0] else "dequantized"},
                "draft": recipe.draft.model_dump(mode="json"),
                "seeds": options.seeds,
                "predicted": {
                    path.name: read_manifest(path).metrics["predicted_acceptance"]
                    for path in sorted(work.glob("draft-*"))
                    if "predicted_acceptance" in read_manifest(path).metrics
                },
                "cases": [case.document() for case in cases],
            }
            options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    BEGAN = time.monotonic()
    main()
