"""Fidelity in a release: what each variant thinks of the original's own answers, and the experts it uses.

BF16 answers the items; the variants then score these answers token by token. Each step is compared with the
one before it, so that its cost stands apart: the quantized model with BF16, YaRN with the quantized model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import BadInput
from packager.recipe import FidelitySpec

if TYPE_CHECKING:
    from packager.release.served import Served
    from validation.fidelity import Bounds, FidelityResult, RoutingAgreement
    from validation.panel import Panel
    from validation.prompt_logprobs import Passage, ScoredRun
    from validation.tasks import AccuracyRun, Item

CONCURRENCY = (8, 3)
"""Requests at once, and those of the reference's second scoring: other batches, other roundings."""


class Fidelity:
    """Scores variants in the order in which they are served.

    Args:
        spec: how many texts, and the bounds of the alarms.
        cache: folder of the scores.
        say: called with a line for each variant.
    """

    def __init__(self, spec: FidelitySpec, cache: Path, say: Callable[[str], None]) -> None:
        self._spec, self._cache, self._say = spec, cache, say
        self._passages: list[Passage] = []
        self._again: ScoredRun | None = None
        self._runs: list[ScoredRun] = []
        self.results: list[FidelityResult] = []
        self.routing: list[RoutingAgreement] = []

    def _bounds(self) -> Bounds:
        """The alarms' bounds of the step that is compared, as the recipe names them."""
        from validation.fidelity import Bounds

        step = self._spec.context if self.results else self._spec.quantize
        return Bounds(**step.model_dump())

    def reference(self, served: Served, answers: AccuracyRun, items: list[Item]) -> None:
        """Score the original's own answers with itself, twice.

        Args:
            answers: of the original to `items`, in their order, among others.
        """
        from validation.prompt_logprobs import Scoring, answers_as_passages, score_passages

        given = {result.id: result for result in answers.results}
        self._passages = answers_as_passages(items, [given[item.id] for item in items])
        if not self._passages:
            return
        target = served.target(self._cache)
        self._runs.append(score_passages(target, self._passages, concurrency=CONCURRENCY[0]))
        self._again = score_passages(
            target, self._passages, scoring=Scoring(repetition=1), concurrency=CONCURRENCY[1]
        )

    def candidate(self, served: Served) -> None:
        """Score with a variant and compare with the one before it."""
        from validation.fidelity import compare_scores
        from validation.prompt_logprobs import score_passages

        if not self._passages:
            return
        target = served.target(self._cache)
        run = score_passages(target, self._passages, concurrency=CONCURRENCY[0])
        again = self._again if len(self._runs) == 1 else None
        found = compare_scores(self._runs[-1], run, again=again, bounds=self._bounds())
        self._runs.append(run)
        self.results.append(found)
        self._say(
            f"  {found.candidate}: {found.overall.kl_mean:.2g} nats a token from {found.reference}, "
            f"{100 * found.overall.top1_agreement:.2f} % the same likeliest token"
        )

    def experts(self, source: Path, quantized: Path) -> None:
        """Compare the experts that the scored texts are sent to; see `expert_agreement`."""
        from validation.fidelity import Bounds

        if len(self._runs) < 2:
            return
        bounds = Bounds(**self._spec.quantize.model_dump())
        try:
            found = expert_agreement(
                self._runs[0], self._runs[1], source, quantized, self._spec.routing_texts, bounds
            )
        except BadInput as err:  # another architecture, or weights that are not read there: packed INT4
            self._say(f"  expert routing is not measured: {err.message}")
            return
        self.routing += [found] if found else []

    def panels(self) -> tuple[Panel, ...]:
        """What the report shows; nothing if nothing was scored."""
        from validation.fidelity import fidelity_panel

        return (fidelity_panel(self.results, self.routing),) if self.results else ()

    def alarms(self) -> tuple[str, ...]:
        """A sentence for each alarm that went off."""
        raised = [(r.candidate, r.reference, gate) for r in self.results for gate in r.raised]
        raised += [(r.candidate, r.reference, r.alarm) for r in self.routing if r.alarm.outcome == "fail"]
        return tuple(
            f"Fidelity alarm, {candidate} to {reference}: {gate.name} {gate.measured:.4g}, "
            f"bound {gate.bound:g}."
            for candidate, reference, gate in raised
        )


def expert_agreement(
    reference: ScoredRun, candidate: ScoredRun, source: Path, quantized: Path, texts: int, bounds: Bounds
) -> RoutingAgreement | None:
    """Which experts the first `texts` scored texts are sent to, by a forward of our own over stored weights.

    vLLM 0.32 returns them (`--enable-return-routed-experts`) with its second model runner alone, which has no
    CPU form. The forward holds one layer at a time.

    Returns:
        None if the model has no experts, or no texts are asked for.

    Raises:
        BadInput: a checkpoint that the forward does not read.
    """
    from packager.bailing.layerwise import LayerwiseForward
    from packager.checkpoint.source import Checkpoint
    from validation.fidelity import compare_routing

    prompts = [[int(token) for token in text.tokens] for text in reference.passages[:texts]]
    if not prompts:
        return None
    forwards = [LayerwiseForward(Checkpoint.open(path)) for path in (source, quantized)]
    one, other = (forward.routing(prompts) for forward in forwards)
    if not one:
        return None
    return compare_routing(
        list(one.values()),
        list(other.values()),
        list(one),
        names=(reference.label, candidate.label),
        subjects=(reference.subject, candidate.subject),
        source="a forward of our own in FP32 over the stored weights, activations not quantized",
        bounds=bounds,
    )
