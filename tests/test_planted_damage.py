"""Planted damage is found, and FP8 as produced passes: the checks on real weights, with a forward of our own.

`benchmarks/planted_damage.py` does the same with vLLM servers and prints the table of which check sees what.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

from packager.bailing.layerwise import LayerwiseForward  # noqa: E402
from packager.checkpoint.source import Checkpoint  # noqa: E402
from packager.nano import CHECKPOINT, language  # noqa: E402
from validation.fidelity import FidelityResult, compare_scores  # noqa: E402
from validation.prompt_logprobs import Position, ScoredPassage, ScoredRun, Scoring  # noqa: E402

TOP = 20


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/planted_damage.py"
    spec = importlib.util.spec_from_file_location("planted_damage", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_damage"] = module
    spec.loader.exec_module(module)
    return module


def texts(count: int) -> list[tuple[list[int], int]]:
    """Held-out questions with their worked answers, as token ids, and where the answer begins."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    streams = [language.samples(task, "damage", held_out=True) for task in language.TASKS]
    found = []
    for number in range(count):
        sample = next(streams[number % len(streams)])
        system = f"<role>SYSTEM</role>{language.SYSTEM}<|role_end|>"
        asked = f"{system}<role>HUMAN</role>{sample.question}<|role_end|><role>ASSISTANT</role>"
        question, answer = (
            tokenizer.encode(text, add_special_tokens=False).ids
            for text in (asked, f"{sample.response}<|role_end|>")
        )
        found.append((question + answer, len(question)))
    return found


def scored(path: Path, prompts: list[tuple[list[int], int]], label: str) -> ScoredRun:
    """What a server of this checkpoint would say, from its logits in FP32."""
    checkpoint = Checkpoint.open(path)
    *_, states = LayerwiseForward(checkpoint).inputs([ids for ids, _ in prompts])
    with checkpoint.reader() as reader:
        kept = {
            name: torch.from_numpy(reader.bytes(checkpoint.tensors[name]))
            .view(torch.bfloat16)
            .reshape(checkpoint.tensors[name].shape)
            .float()
            for name in ("model.norm.weight", "lm_head.weight")
        }
    passages = []
    for number, ((ids, given), state) in enumerate(zip(prompts, states, strict=True)):
        normed = torch.nn.functional.rms_norm(state, state.shape[-1:], kept["model.norm.weight"], 1e-6)
        logprobs = torch.log_softmax(normed @ kept["lm_head.weight"].t(), -1)[given - 1 : -1]
        best = logprobs.topk(TOP)
        positions = tuple(
            Position(
                token=str(token),
                logprob=float(row[token]),
                top=tuple((str(i), p) for i, p in zip(ids_, values, strict=True)),
            )
            for token, row, ids_, values in zip(
                ids[given:], logprobs, best.indices.tolist(), best.values.tolist(), strict=True
            )
        )
        passages.append(
            ScoredPassage(id=str(number), context=tuple(map(str, ids[:given])), positions=positions)
        )
    return ScoredRun(
        label=label, subject=label, passages_digest="same", languages=("en",) * len(prompts),
        scoring=Scoring(top=TOP), concurrency=1, passages=tuple(passages),
    )  # fmt: skip


@pytest.mark.slow
def test_each_damage_is_found_by_a_named_check_and_fp8_as_produced_passes_all(tmp_path: Path) -> None:
    benchmark = _benchmark()
    paths = benchmark.cases(tmp_path)
    rows = {row.name: row for row in benchmark.file_checks(paths)}
    found = {case: {name for name, row in rows.items() if row.cases[case][1]} for case in paths}
    assert found["a"] == set()
    for case in ("b", "c"):
        assert found[case] == {"verify (seal)", "verify --against", "diff, lowest SNR"}

    prompts = texts(60)
    reference = scored(CHECKPOINT, prompts, "BF16")
    results = {
        case: compare_scores(reference, scored(path, prompts, case), bounds=benchmark.BOUNDS)
        for case, path in paths.items()
    }
    assert _raised(results["a"]) == set()
    assert "mean KL" in _raised(results["b"]) and "mean KL" in _raised(results["c"])
    assert compare_scores(reference, reference).overall.kl_max == 0.0

    agreement = benchmark.routing_row(paths, reference)
    assert not agreement.cases["a"][1] and agreement.cases["c"][1]


def _raised(result: FidelityResult) -> set[str]:
    return {gate.name for gate in result.raised}
