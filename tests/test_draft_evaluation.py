"""What an evaluation says of its measurements: JSON, settings to serve with, the table on a terminal."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from packager.cli import run
from packager.cli.draft_breakeven import _print_breakeven
from packager.cli.draft_evaluate import _print_evaluation
from packager.draft.acceptance import AcceptanceReport, Evaluation
from packager.draft.speedup import Agreement, needed_acceptance
from packager.draft.validator import validate_draft
from packager.errors import BadInput
from packager.nano import language
from packager.recipe import SpeculationRange, load_recipe
from packager.release.draft_breakeven import Breakeven, Level, Point, write_untrained
from packager.release.draft_evaluation import Cell, DraftEvaluation, Identity, Plan, ServerRun
from packager.release.draft_measured import measure_draft
from packager.release.draft_panels import comparison_panel, draft_panels, records_for
from packager.release.draft_record import (
    SCHEMA_VERSION,
    Acceptance,
    DraftRecord,
    Measured,
    measured,
    read_record,
)
from packager.release.evidence import Questions, acceptance_alarms, speculation
from packager.release.variants import Variants
from packager.release.workspace import Workspace
from packager.serving import ServeSpec
from validation import throughput
from validation.endpoint import TokenOutput
from validation.environment import collect_environment
from validation.identity import Difference, TokenSequence, first_difference
from validation.report import ReportInputs, build_report
from validation.tasks import items_from
from validation.throughput import Spread, ThroughputRun


def _difference(near: bool) -> Difference:
    other = -1.05 if near else -4.0
    reference = TokenSequence(
        id="dose-3",
        text="ab",
        finish_reason="stop",
        tokens=(
            TokenOutput(token="token_id:5", logprob=-0.1, top=(("token_id:5", -0.1),)),
            TokenOutput(token="token_id:6", logprob=-1.0, top=(("token_id:6", -1.0), ("token_id:9", other))),
        ),
    )
    found = first_difference(reference, ["token_id:5", "token_id:9"], "ac")
    assert found is not None
    return found


def _report(rates: tuple[float, ...]) -> AcceptanceReport:
    return AcceptanceReport(1000, round(1000 * sum(rates)), rates)


def _run(tokens: int, speeds: dict[int, float], by_context: dict[int, float]) -> ServerRun:
    report = _report(tuple(round(0.8**n, 4) for n in range(1, tokens + 1)))
    difference = _difference(near=tokens == 7)
    return ServerRun(
        tokens,
        {
            level: Cell(1000, 1000 / speed, report, Identity(60, (difference,)))
            for level, speed in speeds.items()
        },
        {length: Cell(100, 100 / speed, report) for length, speed in by_context.items()},
        Evaluation(report, {"dose": report, "lookup": report}, {"en": report, "zh": report}),
    )


@pytest.fixture
def found() -> DraftEvaluation:
    """K = 3 is best at 1, none at 64; at 2048 tokens it is slower."""
    plan = Plan(ServeSpec(Path("target")), Path("draft"), [{}] * 60, (3, 7), (1, 16, 64), 128, 2, (512, 2048))
    without = ServerRun(
        0,
        {level: Cell(1000, 1000 / speed) for level, speed in {1: 100.0, 16: 800.0, 64: 1600.0}.items()},
        {512: Cell(100, 1.0), 2048: Cell(100, 1.25)},
        None,
    )
    runs = (
        _run(3, {1: 150.0, 16: 1000.0, 64: 1500.0}, {512: 140.0, 2048: 70.0}),
        _run(7, {1: 140.0, 16: 700.0, 64: 1000.0}, {512: 120.0, 2048: 60.0}),
    )
    return DraftEvaluation(plan, without, runs, Identity(60, ()), {3: Agreement(3.0, 2.8)})


def test_settings_draft_where_it_pays_and_nowhere_else(found: DraftEvaluation) -> None:
    assert found.best == {1: (3, 1.5), 16: (3, 1.25), 64: (0, 1.0)}
    settings = found.serve_settings()
    assert settings == {
        "speculation": [
            {"max_concurrency": 32, "num_speculative_tokens": 3},
            {"num_speculative_tokens": 0},
        ],
        "speculation_max_context": 512,
    }
    for one in settings["speculation"]:
        SpeculationRange.model_validate(one)


def test_the_document_holds_every_figure_once_and_is_json(found: DraftEvaluation) -> None:
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert list(document) == [
        "prompts", "max_response_tokens", "repeats", "concurrency", "without_draft", "with_draft",
        "batch_noise", "best", "serve",
    ]  # fmt: skip
    three, seven = document["with_draft"]
    assert three["num_speculative_tokens"] == 3
    assert three["speedup"] == {"1": 1.5, "16": 1.25, "64": 0.9375}
    assert three["context_speedup"] == pytest.approx({"512": 1.4, "2048": 0.875})
    assert three["break_even"]["concurrency"] == pytest.approx(48.5, abs=0.5)
    assert three["predicted"]["alarm"] is True
    assert seven["predicted"] is None
    assert three["by_task"]["dose"]["per_position"] == [0.8, 0.64, 0.512]
    identity = three["by_concurrency"]["16"]["identity"]
    assert (identity["identical"], identity["of"], identity["before_any_near_tie"]) == (59, 60, 1)
    assert seven["by_concurrency"]["16"]["identity"]["before_any_near_tie"] == 0


def test_the_table_fits_eighty_columns_and_says_what_matters(
    found: DraftEvaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_evaluation(found, [])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert ".80 .64 .51 .41 .33 .26 .21" in said
    assert "K=3: about 48" in said
    assert "ALARM" in said
    assert "59/60" in said
    assert "speculation_max_context: 512" in said
    assert "3 of them from a near tie" in said  # those of K = 7


def _throughput(label: str, speeds: dict[int, float]) -> ThroughputRun:
    spread = Spread(median=1.0, mean=1.0, p99=1.0)
    cells = [
        throughput.Cell(
            concurrency=level, requests=1, completed=1, failed=0, input_tokens=1, output_tokens=1,
            duration_s=1.0, output_tokens_per_s=speed, total_tokens_per_s=speed, ttft_ms=spread,
            tpot_ms=spread, itl_ms=spread, acceptance=None, output_lengths=(1,),
        )
        for level, speed in speeds.items()
    ]  # fmt: skip
    return ThroughputRun(
        label=label, subject=label, prompts=1, prompts_digest="sha256:0", output_tokens=1, lengths="natural",
        matched_to=None, cells=tuple(cells),
    )  # fmt: skip


def test_a_release_drafts_only_where_it_measured_a_gain() -> None:
    without = _throughput("plain", {1: 100.0, 8: 400.0})
    assert speculation(without, _throughput("draft", {1: 140.0, 8: 390.0}), 4) == [
        {"max_concurrency": 2, "num_speculative_tokens": 4},
        {"num_speculative_tokens": 0},
    ]
    assert speculation(without, _throughput("draft", {1: 140.0, 8: 410.0}), 4) == [
        {"num_speculative_tokens": 4}
    ]
    assert speculation(without, _throughput("draft", {16: 1.0}), 4) == []


def test_a_report_says_when_serving_is_not_what_training_predicted() -> None:
    def served(length: float) -> ThroughputRun:
        accepted = throughput.Acceptance(
            length=length, per_position=(), drafts=10, draft_tokens=30, accepted_tokens=20
        )
        run = _throughput("draft", {1: 100.0})
        return run.model_copy(update={"cells": (run.cells[0].model_copy(update={"acceptance": accepted}),)})

    metrics = {"predicted_acceptance": {"by_tokens": {"3": [0.8, 0.7, 0.5]}}}
    [alarm] = acceptance_alarms(metrics, served(2.5), 3)
    assert "predicted in training 3.00, served 2.50" in alarm
    assert acceptance_alarms(metrics, served(2.95), 3) == ()
    assert acceptance_alarms({}, served(2.5), 3) == ()
    assert acceptance_alarms(metrics, _throughput("plain", {1: 100.0}), 3) == ()


def test_a_difference_knows_how_near_the_tie_was() -> None:
    near, far = _difference(near=True), _difference(near=False)
    assert (near.position, near.near_tie, round(near.gap_nats or 0, 3)) == (1, True, 0.05)
    assert (far.position, far.near_tie, round(far.gap_nats or 0, 3)) == (1, False, 3.0)
    assert near.agreed_text == "a"


# ---- as a file, compared, in a report -------------------------------------------------------------------


def _document(found: DraftEvaluation, target: str, draft: str, **training: Any) -> dict[str, Any]:
    """What `draft evaluate --out` writes, for a draft trained so."""
    rates = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    bound = Measured(
        target=f"sha256:{target}",
        target_made_from=("sha256:context",),
        draft=f"sha256:{draft}",
        draft_made_from=(f"sha256:{target}",),
        draft_rope=rates,
        training={"recipe": {"steps": 400, **training}, "bf16_matmul": True},
        prompts="sha256:prompts",
        environment=collect_environment(),
    )
    return {
        "kind": "draft evaluation", "schema_version": SCHEMA_VERSION, "target": "served", "draft": draft,
        "form": "midlayer", "problems": [], "cannot_be_measured": [],
        "measured": bound.model_dump(mode="json"), **found.as_dict(),
    }  # fmt: skip


def _written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(DraftRecord.model_validate(document).model_dump_json(indent=1), encoding="utf-8")
    return path


def test_an_evaluation_is_bound_to_the_bytes_of_target_and_draft(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from draft_data import SPEC, TARGET, write_target

    target, draft = write_target(tmp_path / "target"), write_untrained(tmp_path / "draft", TARGET, SPEC)
    prompts = [{"id": "a", "messages": [{"role": "user", "content": "hm"}]}]
    bound = measured(target, draft, prompts, [])
    assert bound.draft_rope["factor"] == 4.0
    assert bound.training is None
    assert measured(target, draft, [], prompts).prompts != bound.prompts
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = measured(target, draft, prompts, [])
    assert changed.draft != bound.draft
    assert (changed.target, changed.prompts) == (bound.target, bound.prompts)


def test_the_file_reads_back_as_it_was_and_another_version_is_refused(
    found: DraftEvaluation, tmp_path: Path
) -> None:
    document = json.loads(json.dumps(_document(found, "t", "mine")))
    path = _written(tmp_path / "mine.json", document)
    assert read_record(path) == DraftRecord.model_validate(document)
    assert read_record(path).with_draft[0].by_concurrency[16].identity.identical == 59
    path.write_text(json.dumps(document | {"schema_version": 1}), encoding="utf-8")
    with pytest.raises(BadInput, match=r"version 2 but 'draft evaluation', version 1"):
        read_record(path)
    path.write_text(json.dumps(document | {"extra": 1}), encoding="utf-8")
    with pytest.raises(BadInput, match="extra"):
        read_record(path)


def test_a_standard_error_is_that_of_the_tokens_accepted_in_a_draft() -> None:
    accepted = [0, 1, 3, 3, 2, 0, 3, 1]
    rates = tuple(sum(n >= at for n in accepted) / len(accepted) for at in (1, 2, 3))
    one = Acceptance(length=1 + sum(rates), per_position=rates, drafts=8, accepted=sum(accepted))
    assert one.standard_error() == pytest.approx(statistics.pstdev(accepted) / 8**0.5)
    # Three greedy passes over the same prompts know no more than one.
    again = one.model_copy(update={"drafts": 24, "accepted": 3 * sum(accepted)})
    assert again.standard_error(passes=3) == pytest.approx(one.standard_error())


def test_drafts_are_compared_if_they_were_measured_alike(
    found: DraftEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16 = _written(tmp_path / "a.json", _document(found, "t", "bf16", states_dtype="bfloat16"))
    fp8 = _written(tmp_path / "b.json", _document(found, "t", "fp8", states_dtype="float8"))
    assert run(["draft", "compare", str(bf16), str(fp8)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "fp8 against bf16 at K=3: +0.000" in said.replace("\n", " ")
    assert re.search(r"states_dtype +bfloat16 +float8", said)
    assert "steps" not in said, "what does not differ is not shown"

    for change, fault in (
        (("measured", "target"), "the target differs"),
        (("measured", "prompts"), "the prompts differs"),
        (("max_response_tokens",), "the longest answer differs"),
    ):
        document = json.loads(fp8.read_text())
        place = document
        for key in change[:-1]:
            place = place[key]
        place[change[-1]] = 7 if change[-1] == "max_response_tokens" else "sha256:other"
        with pytest.raises(BadInput, match=fault):
            comparison_panel([read_record(bf16), DraftRecord.model_validate(document)])
    assert run(["draft", "compare", str(bf16)]) == BadInput.exit_code


def test_a_release_shows_what_was_measured_on_its_own_bytes_and_nothing_else(
    found: DraftEvaluation, tmp_path: Path
) -> None:
    """`target_made_from` names the context that the dequantized target came from."""
    own = _written(tmp_path / "own.json", _document(found, "t", "own", states_dtype="bfloat16"))
    other = _written(tmp_path / "other.json", _document(found, "t", "other", states_dtype="float8"))
    records = records_for([own, other], target="sha256:context")
    subjects, panels = draft_panels(records, draft="sha256:own")
    assert [panel.key for panel in panels] == ["draft-evaluation", "drafts-compared"]
    assert "more than 5 % apart" in " ".join(panels[0].notes)
    inputs = ReportInputs(
        title="x",
        subjects=subjects,
        panels=panels,
        weights_served="native",
        environment=collect_environment(),
    )
    assert build_report(inputs).panels == panels
    for row in panels[0].tables[0].rows:
        if row[:2] == (7, 16):
            assert row[3] == pytest.approx(700 / 800)
            break
    else:
        pytest.fail("no row for K = 7 at 16")
    assert draft_panels([], draft="sha256:own") == ((), ())
    asked = records[0].measured.model_copy(update={"prompts": "sha256:the release's"})
    _, three = draft_panels([records[0].model_copy(update={"measured": asked}), *records], draft="sha256:own")
    assert [panel.key for panel in three] == ["draft-evaluation", "draft-evaluation-1", "drafts-compared"]
    with pytest.raises(BadInput, match="not on this release's"):
        records_for([own], target="sha256:elsewhere")
    with pytest.raises(BadInput, match="this release's draft"):
        draft_panels(records[1:], draft="sha256:own")


def test_what_a_release_measured_of_its_draft_is_not_measured_again(
    found: DraftEvaluation, tmp_path: Path
) -> None:
    """The same target, draft, prompts and settings; a measurement would need an engine."""
    pytest.importorskip("torch")
    from draft_data import SPEC, TARGET, write_target

    workspace = Workspace(tmp_path)
    workspace.work.mkdir()
    write_target(workspace.context)
    write_untrained(workspace.draft, TARGET, SPEC)
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "nano.yaml")
    variants = Variants(recipe, workspace, tmp_path, "sha256:0", "", lambda _: None)
    items = items_from(language.heldout_items(1))
    rows = [item.model_dump(mode="json", exclude={"answer", "meta"}) for item in items]
    document = _document(found, "t", "draft") | {
        "measured": measured(workspace.context, workspace.draft, rows, []).model_dump(mode="json")
    }
    _written(workspace.work / "draft-evaluation.json", document)
    settings = {"draft_tokens": (7, 3), "concurrency": (64, 16, 1), "identity_prompts": 99}
    asked = recipe.model_copy(update={"validate_": recipe.validate_.model_copy(update=settings)})
    said: list[str] = []
    kept = measure_draft(asked, workspace, variants, Questions(items, []), 512, said.append)
    assert kept == DraftRecord.model_validate(document)
    assert said == []
    assert measure_draft(recipe, workspace, variants, Questions(items, []), 512, said.append) is None


# ---- before training --------------------------------------------------------------------------------------


def test_an_untrained_draft_has_the_shape_of_a_trained_one(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from draft_data import SPEC, TARGET

    assert validate_draft(write_untrained(tmp_path / "draft", TARGET, SPEC), TARGET) == []


def test_what_a_draft_must_reach_is_told_by_concurrency(capsys: pytest.CaptureFixture[str]) -> None:
    def level(without: float, speeds: tuple[float, ...]) -> Level:
        points = tuple(Point(x, x, y) for x, y in zip((1.0, 2.5, 4.0), speeds, strict=True))
        return Level(without, points, needed_acceptance([(p.served, p.tokens_per_s) for p in points]))

    found = Breakeven(3, {1: level(100.0, (80.0, 200.0, 320.0)), 16: level(900.0, (300.0, 750.0, 1200.0))})
    needed = found.as_dict()["by_concurrency"]
    assert needed["1"]["needed_length"] == pytest.approx({"1": 1.25, "1.5": 1.875})
    assert needed["16"]["points"][2]["speedup"] == pytest.approx(4 / 3)
    _print_breakeven(found)
    said = capsys.readouterr().out
    assert "1.25" in said
    assert "1.88" in said
    assert "3.00" in said
    assert "out of reach" in said  # 1.5x at 16 would need 4.5 of at most 4
