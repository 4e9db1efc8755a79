"""`packager validate fidelity`: two servers on the same prompts, compared text by text and token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.cli.validate_served import serving

if TYPE_CHECKING:
    from validation.endpoint import Progress, Target
    from validation.fidelity import Bounds, FidelityResult, RoutingAgreement
    from validation.gates import Gate
    from validation.identity import IdentityResult
    from validation.tasks import Item

Table = Callable[[Sequence[str], Sequence[Sequence[object]]], None]


@dataclass(frozen=True)
class Found:
    """What the two servers said."""

    identity: IdentityResult
    fidelity: FidelityResult | None
    """None: not asked for."""
    experts: RoutingAgreement | None = None

    @property
    def raised(self) -> list[Gate]:
        """The alarms that went off."""
        found = self.fidelity.raised if self.fidelity is not None else []
        return found + ([self.experts.alarm] if self.experts and self.experts.alarm.outcome == "fail" else [])


def measure(
    candidate: Target,
    items: Sequence[Item],
    options: dict[str, Any],
    *,
    label: str,
    concurrency: int,
    max_tokens: int,
    top: int,
    bounds: Bounds,
    progress: Progress,
    cache: Path,
    folders: tuple[Path, Path] | None = None,
    texts: int = 0,
) -> Found:
    """Ask the reference, stop its server if it is ours, then ask the candidate.

    The texts that both score are the questions with the reference's own greedy answers; the answers alone are
    judged. The reference scores them twice, the second time in other batches.

    Args:
        options: of the reference, see `served_options`.
        top: tokens listed at each position; 0: greedy texts are compared, nothing is scored.
        folders: checkpoints of reference and candidate, to compare the experts of `texts` scored texts.
    """
    from validation.endpoint import Sampling
    from validation.fidelity import compare_scores
    from validation.identity import collect_outputs, compare_outputs
    from validation.prompt_logprobs import Scoring, answers_as_passages, score_passages

    sampling = Sampling(max_tokens=max_tokens)
    scoring = Scoring(top=top or 1)
    asked: dict[str, Any] = {"concurrency": concurrency, "progress": progress}
    with serving(options, label=label, cache=cache, prefix="reference-") as target:
        reference = collect_outputs(target, items, sampling=sampling, **asked)
        if top:
            completions = target.ask([item.request for item in items], sampling)
            passages = answers_as_passages(items, completions)
            scores = score_passages(target, passages, scoring=scoring, **asked)
            again = score_passages(
                target,
                passages,
                scoring=scoring.model_copy(update={"repetition": 1}),
                concurrency=max(1, concurrency // 2 - 1),
                progress=progress,
            )
    identity = compare_outputs(reference, collect_outputs(candidate, items, sampling=sampling, **asked))
    if not top:
        return Found(identity, None)
    scored = score_passages(candidate, passages, scoring=scoring, **asked)
    experts = None
    if folders is not None and texts:
        from packager.release.fidelity import expert_agreement

        experts = expert_agreement(scores, scored, *folders, texts, bounds)
    return Found(identity, compare_scores(scores, scored, again=again, bounds=bounds), experts)


def show(found: Found, table: Table, echo: Callable[[str], None]) -> None:
    """Print what was found, for people."""
    result = found.identity
    echo(f"{result.identical} of {result.n} greedy answers are identical")
    if result.differences:
        table(
            ["prompt", "parts at token", "gap, nats", "near tie"],
            [
                [
                    d.id,
                    d.position,
                    "–" if d.gap_nats is None else f"{d.gap_nats:.3f}",
                    "yes" if d.near_tie else "no",
                ]
                for d in result.differences
            ],
        )
    if result.noise is not None:
        echo(
            f"log-probabilities of the same token differ by {result.noise.median:.2g} nats in the median, "
            f"{result.noise.p99:.2g} at the 99th percentile ({result.noise.tokens} tokens)"
        )
    fidelity = found.fidelity
    if fidelity is None:
        return
    echo("")
    slices = [fidelity.overall, *fidelity.by_language, *fidelity.by_position]
    slices += [fidelity.noise] if fidelity.noise is not None else []
    table(
        ["tokens at", "tokens", "KL mean", "p99", "largest", "top-1 same %", "perplexity", "reference's"],
        [
            [
                s.name,
                s.tokens,
                f"{s.kl_mean:.2g}",
                f"{s.kl_p99:.2g}",
                f"{s.kl_max:.2g}",
                f"{100 * s.top1_agreement:.2f}",
                f"{s.perplexity_candidate:.4f}",
                f"{s.perplexity_reference:.4f}",
            ]
            for s in slices
        ],
    )
    if found.experts is not None:
        echo(
            f"experts: {100 * found.experts.same_set:.1f} % of tokens and layers go to the same set, "
            f"Jaccard index {found.experts.jaccard:.3f}"
        )
    for gate in found.raised:
        echo(f"alarm: {gate.name} {gate.measured:.4g} {gate.unit}, bound {gate.bound:g}")
