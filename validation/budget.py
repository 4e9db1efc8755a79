"""What reading long prompts will cost, said before it is run: RULER, needles, any list of lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from validation.document import Document
from validation.errors import MeasurementError

RULER_TASKS: Mapping[str, int] = {
    "niah_single_1": 128,
    "niah_single_2": 128,
    "niah_single_3": 128,
    "niah_multikey_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "niah_multiquery": 128,
    "niah_multivalue": 128,
    "ruler_vt": 30,
    "ruler_cwe": 120,
    "ruler_fwe": 50,
    "ruler_qa_squad": 32,
    "ruler_qa_hotpot": 32,
}
"""The tasks of lm-eval's group `ruler` and the most tokens of an answer (`max_gen_toks` of each task's file)."""
RULER_SAMPLES = 500
"""Samples that lm-eval makes of each task and length, whatever is asked of them."""


class LengthBudget(Document):
    """The requests of one prompt length."""

    length: int
    """Tokens of prompt and answer together."""
    requests: int
    prompt_tokens: int
    output_tokens: int
    """At most: answers may be shorter."""
    hours: float
    """Of the whole server."""


class Budget(Document):
    """Tokens and hours of a run over several lengths."""

    what: str
    lengths: tuple[LengthBudget, ...]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    gpus: int

    @property
    def requests(self) -> int:
        """All requests."""
        return sum(one.requests for one in self.lengths)

    @property
    def prompt_tokens(self) -> int:
        """Tokens to be read."""
        return sum(one.prompt_tokens for one in self.lengths)

    @property
    def hours(self) -> float:
        """Hours of the server."""
        return sum(one.hours for one in self.lengths)

    @property
    def gpu_hours(self) -> float:
        """Hours of the server times its GPUs."""
        return self.hours * self.gpus

    @property
    def sentence(self) -> str:
        """The whole, in a sentence."""
        return (
            f"{self.what}: {self.requests:,} requests, {self.prompt_tokens / 1e6:,.1f} million prompt tokens; at "
            f"{self.prefill_tokens_per_s:,.0f} tokens/s read and {self.decode_tokens_per_s:,.0f} written "
            f"{_time(self.hours)}, {self.gpu_hours:.2g} GPU-hours on {self.gpus}"
        )


def budget(
    what: str,
    requests: Mapping[int, tuple[int, int]],
    *,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    gpus: int = 1,
) -> Budget:
    """What requests of several lengths take.

    Args:
        what: the name of the run.
        requests: prompt length in tokens -> (number of requests, output tokens of all of them together).
        prefill_tokens_per_s: prompt tokens that the whole server reads a second. Attention makes it fall with
            length: give the figure at the longest one, then the estimate errs on the safe side.
        decode_tokens_per_s: tokens that the whole server writes a second at the load used.
        gpus: GPUs that the server holds.

    Raises:
        MeasurementError: a speed or a number that is not positive.
    """
    if min(prefill_tokens_per_s, decode_tokens_per_s, gpus) <= 0:
        raise MeasurementError("speeds and GPUs must be positive")
    lines = []
    for length, (count, output) in sorted(requests.items()):
        if length < 1 or count < 1:
            raise MeasurementError(f"{count} requests of {length} tokens cannot be planned")
        read = count * length - output
        seconds = read / prefill_tokens_per_s + output / decode_tokens_per_s
        lines.append(
            LengthBudget(
                length=length,
                requests=count,
                prompt_tokens=read,
                output_tokens=output,
                hours=seconds / 3600,
            )
        )
    return Budget(
        what=what,
        lengths=tuple(lines),
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        gpus=gpus,
    )


def ruler_budget(
    lengths: Sequence[int],
    samples: int,
    *,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    gpus: int = 1,
    tasks: Sequence[str] = tuple(RULER_TASKS),
) -> Budget:
    """What lm-eval's RULER takes: tasks x lengths x samples.

    Raises:
        MeasurementError: a task that RULER does not have, more samples than it makes, or see `budget`.
    """
    unknown = sorted(set(tasks) - set(RULER_TASKS))
    if unknown or not tasks:
        raise MeasurementError(
            f"RULER has no task {', '.join(unknown) or '(none given)'}", f"It has: {', '.join(RULER_TASKS)}."
        )
    if not 1 <= samples <= RULER_SAMPLES:
        raise MeasurementError(
            f"RULER makes {RULER_SAMPLES} samples of a task and length; {samples} cannot be taken"
        )
    output = samples * sum(RULER_TASKS[task] for task in tasks)
    return budget(
        f"RULER, {len(tasks)} tasks of {samples} samples at each length",
        {length: (samples * len(tasks), output) for length in set(lengths)},
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        gpus=gpus,
    )


def ruler_commands(
    lengths: Sequence[int],
    samples: int,
    *,
    url: str,
    model: str,
    tokenizer: str,
    tasks: Sequence[str] = tuple(RULER_TASKS),
) -> list[list[str]]:
    """lm-eval's command lines, one a length.

    One run over several lengths would not do with a sample budget: lm-eval chains the samples of all lengths
    in one list, and `--limit` takes the first of them, all of one length (`niah_utils.py`, 0.4.13). It loads
    the tokenizer with remote code allowed (`common_utils.py`): name a local folder that holds no code. The
    tasks with essays, SQuAD and HotpotQA download their texts.
    """
    return [
        [
            "lm_eval",
            "--model=local-completions",
            f"--model_args=model={model},base_url={url.rstrip('/')}/v1/completions,tokenizer={tokenizer},"
            f"max_length={length},num_concurrent=4",
            f"--tasks={','.join(tasks)}",
            f'--metadata={{"max_seq_lengths":[{length}]}}',
            f"--limit={samples}",
            "--log_samples",
            f"--output_path=ruler-{length}",
        ]
        for length in sorted(set(lengths))
    ]


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
