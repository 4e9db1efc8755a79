"""Greedy output of two servers of the same weights: is it the same, and where not, did a near tie decide?

Speculative decoding is meant to change speed only. In exact arithmetic greedy output is identical; in
floating point the verifier computes K+1 positions in one pass of another shape, sums come in another order,
and where two tokens are almost equally likely the other one can win. A difference is harmless exactly if it
starts there.
"""

from __future__ import annotations

from collections.abc import Sequence

from validation.document import Document
from validation.endpoint import Progress, Sampling, Target, TokenOutput
from validation.errors import MeasurementError
from validation.tasks.items import Item, items_digest

NEAR_TIE_NATS = 0.125
"""Log-probability gap up to which two tokens count as tied.

Engines compute logits in BF16, whose spacing is 0.125 for magnitudes from 16 to 32 and 0.0625 from 8 to 16:
a gap of 0.125 is one or two units in the last place, which another order of summation can turn round. The
likelier token then has at most 53 % of what the two share.
"""


class TokenSequence(Document):
    """One greedy answer, token by token."""

    id: str
    text: str
    finish_reason: str
    tokens: tuple[TokenOutput, ...]


class OutputRun(Document):
    """Greedy answers of one server."""

    schema_version: int = 1
    label: str
    subject: str
    items_digest: str
    sampling: Sampling
    outputs: tuple[TokenSequence, ...]


class Difference(Document):
    """Where two answers part."""

    id: str
    position: int
    """Index of the first token that differs; an end of the answer counts as a token."""
    agreed_text: str
    """The common beginning of both texts."""
    reference_token: str
    candidate_token: str
    gap_nats: float | None
    """How much likelier the reference found its own token than the candidate's; None: not among its
    alternatives, or one of the two answers ended here."""
    gap_at_least_nats: float | None
    """With no gap: the least it can be, since the candidate's token is below all listed alternatives."""
    near_tie: bool
    reference_text: str
    candidate_text: str


class Noise(Document):
    """|difference| in log-probability (nats) of the same token after the same beginning on both servers."""

    tokens: int
    median: float
    p99: float
    largest: float


class IdentityResult(Document):
    """Greedy outputs of two servers compared."""

    schema_version: int = 1
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    items_digest: str
    sampling: Sampling
    near_tie_nats: float
    n: int
    identical: int
    identical_fraction: float
    differences: tuple[Difference, ...]
    all_near_ties: bool
    """Whether every difference starts at a near tie; true when there is none."""
    noise: Noise | None


def collect_outputs(
    target: Target,
    items: Sequence[Item],
    *,
    concurrency: int = 8,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> OutputRun:
    """Greedy answers with token log-probabilities; shares its cache with `measure_accuracy`.

    Raises:
        MeasurementError: the sampling is not greedy, or the server returns no log-probabilities.
        ServerUnreachable: see `Endpoint.complete`.
    """
    sampling = sampling or Sampling()
    if sampling.temperature != 0.0 or not sampling.top_logprobs:
        raise MeasurementError("output identity needs temperature 0 and at least one top log-probability")
    completions = target.ask([i.request for i in items], sampling, concurrency=concurrency, progress=progress)
    outputs = []
    for completion in completions:
        if completion.tokens is None:
            raise MeasurementError(
                f"the server of {target.label} returns no log-probabilities",
                "Identity needs them to find near ties.",
            )
        outputs.append(
            TokenSequence(
                id=completion.id,
                text=completion.text,
                finish_reason=completion.finish_reason,
                tokens=completion.tokens,
            )
        )
    return OutputRun(
        label=target.label,
        subject=target.subject,
        items_digest=items_digest(items),
        sampling=sampling,
        outputs=tuple(outputs),
    )


def compare_outputs(
    reference: OutputRun, candidate: OutputRun, *, near_tie_nats: float = NEAR_TIE_NATS
) -> IdentityResult:
    """Compare two runs over the same items token by token.

    Raises:
        MeasurementError: the runs differ in items or sampling, or are empty.
    """
    if reference.items_digest != candidate.items_digest or reference.sampling != candidate.sampling:
        raise MeasurementError(f"{reference.label} and {candidate.label} did not answer the same questions")
    if not reference.outputs:
        raise MeasurementError("no outputs to compare")
    differences: list[Difference] = []
    noise: list[float] = []
    for a, b in zip(reference.outputs, candidate.outputs, strict=True):
        found = first_difference(a, [t.token for t in b.tokens], b.text, near_tie_nats=near_tie_nats)
        agreed = len(a.tokens) if found is None else found.position
        noise += [abs(x.logprob - y.logprob) for x, y in zip(a.tokens[:agreed], b.tokens, strict=False)]
        if found is not None:
            differences.append(found)
    n = len(reference.outputs)
    return IdentityResult(
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        items_digest=reference.items_digest,
        sampling=reference.sampling,
        near_tie_nats=near_tie_nats,
        n=n,
        identical=n - len(differences),
        identical_fraction=(n - len(differences)) / n,
        differences=tuple(differences),
        all_near_ties=all(d.near_tie for d in differences),
        noise=_noise(noise),
    )


_END = "(end)"


def first_difference(
    reference: TokenSequence,
    tokens: Sequence[str],
    text: str,
    *,
    near_tie_nats: float = NEAR_TIE_NATS,
) -> Difference | None:
    """Where another answer to the same question parts from `reference`; None: nowhere.

    Args:
        reference: with log-probabilities, which tell how near a tie was.
        tokens: of the other answer, named as those of `reference` are (`token_id:17`).
        text: of the other answer.
    """
    position = _first_difference([t.token for t in reference.tokens], tokens)
    return None if position is None else _difference(reference, tokens, text, position, near_tie_nats)


def _first_difference(a: Sequence[str], b: Sequence[str]) -> int | None:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def _difference(
    a: TokenSequence, tokens: Sequence[str], text: str, position: int, near_tie_nats: float
) -> Difference:
    ours = a.tokens[position] if position < len(a.tokens) else None
    theirs = tokens[position] if position < len(tokens) else _END
    gap = bound = None
    if ours is not None:
        listed = dict(ours.top)
        if theirs in listed:
            gap = ours.logprob - listed[theirs]
        elif theirs != _END and listed:
            bound = ours.logprob - min(listed.values())
    agreed = 0
    while agreed < min(len(a.text), len(text)) and a.text[agreed] == text[agreed]:
        agreed += 1
    return Difference(
        id=a.id,
        position=position,
        agreed_text=a.text[:agreed],
        reference_token=ours.token if ours is not None else _END,
        candidate_token=theirs,
        gap_nats=gap,
        gap_at_least_nats=bound,
        near_tie=gap is not None and gap <= near_tie_nats,
        reference_text=a.text,
        candidate_text=text,
    )


def _noise(values: list[float]) -> Noise | None:
    if not values:
        return None
    values.sort()
    last = len(values) - 1
    return Noise(
        tokens=len(values),
        median=values[round(0.5 * last)],
        p99=values[round(0.99 * last)],
        largest=values[last],
    )
