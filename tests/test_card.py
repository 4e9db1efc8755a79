"""The model card: two languages, no figure that the evidence does not have, and all that is worse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from test_bundle import reseal
from test_report_page import CHROMIUM
from test_validation_report import sample_inputs
from tiny_bundle import Stages, make_stages, recipe

from packager.artifact import ArtifactWriter, read_manifest
from packager.bundle.card import card_files
from packager.bundle.card_check import card_problems, is_card
from packager.bundle.figures import differs, linked_figures
from packager.bundle.licensing import licence_statements
from packager.bundle.lock import read_lock
from packager.bundle.verify import verify_bundle
from packager.errors import BadInput, IntegrityFailure
from packager.recipe import QuantizeSpec, SchemeName
from validation.gates import at_least
from validation.report import Subject, build_report, write_report

MESSAGES = yaml.safe_load(
    (Path(__file__).parents[1] / "packager/bundle/card_messages.yaml").read_text(encoding="utf-8")
)
SETS = {
    "dose": {"dataset": "org/items", "task_id": "dose"},
    "allergy": {"dataset": "org/items", "task_id": "a"},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A release whose evidence has something of everything, some of it bad news."""
    root = tmp_path_factory.mktemp("stages")
    made = make_stages(root / "stages", bundle={"evaluation_sets": SETS})
    evidence = root / "stages/evidence"
    served = json.loads((evidence / "report.json").read_bytes())["subjects"][0]["digest"]
    inputs = read_manifest(evidence).inputs
    shutil.rmtree(evidence)
    measured = sample_inputs(root / "answers")
    *_, plain, drafted = measured.throughput
    slow = drafted.cells[1].model_copy(update={"output_tokens_per_s": 800.0})
    drafted = drafted.model_copy(update={"cells": (drafted.cells[0], slow)})
    report = build_report(
        measured.model_copy(
            update={
                "subjects": (*measured.subjects, Subject(name="tiny", digest=served)),
                "throughput": (measured.throughput[0], plain, drafted),
            }
        )
    )
    with ArtifactWriter(evidence, stage="evidence", recipe_digest="sha256:r", inputs=inputs) as writer:
        for path in write_report(report, evidence).values():
            writer.adopt(path.name)
        writer.seal({})
    return made


@pytest.fixture(scope="module")
def released(stages: Stages) -> Path:
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "bundle"))


def test_the_hub_library_reads_card_and_results_and_finds_the_measured_figures(released: Path) -> None:
    card = ModelCard.load(released / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "vllm")
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert (data["language"], data["pipeline_tag"]) == (["en", "zh"], "text-generation")
    assert {"fp8", "eagle3", "yarn"} < set(data["tags"])
    shares = json.loads((released / "evidence/report.json").read_bytes())["accuracy"][-1]["by_task"]
    measured = {share["name"]: round(100 * share["accuracy"], 2) for share in shares}
    results = card.data.eval_results
    assert {result.dataset_config: result.metric_value for result in results} == measured
    # The library files results under the first task's name where nothing tells their data sets apart.
    assert {result.dataset_name.split(" ")[0] for result in results} == measured.keys()
    assert results[0].source_url.endswith("rehearsal/tiny/blob/main/evidence/report.html")
    entries = parse_eval_result_entries(
        yaml.safe_load((released / ".eval_results/org--items.yaml").read_text(encoding="utf-8"))
    )
    assert all(isinstance(entry, EvalResultEntry) and entry.dataset_id == "org/items" for entry in entries)
    assert {entry.task_id: entry.value for entry in entries} == {
        "a": measured["allergy"],
        "dose": measured["dose"],
    }


def test_both_languages_have_the_same_figures_and_each_is_that_of_the_evidence(released: Path) -> None:
    documents = {
        "report.json": json.loads((released / "evidence/report.json").read_bytes()),
        "bundle.lock": json.loads((released / "bundle.lock").read_bytes()),
    }
    found = {}
    for name in ("README.md", "README.zh.md"):
        figures = list(linked_figures((released / name).read_text(encoding="utf-8")))
        assert [(text, differs(text, place, documents)) for text, place in figures] == [
            (text, None) for text, _ in figures
        ]
        found[name] = [(re.findall(r"[-−+.\d]+", text), place) for text, place in figures]
    assert found["README.md"] == found["README.zh.md"]
    assert len(found["README.md"]) > 100
    pages = set(re.findall(r"\]\(([^ )]+) \"", (released / "README.md").read_text()))
    anchors = set(re.findall(r'id="([^"]+)"', (released / "evidence/report.html").read_text()))
    assert {page.partition("#")[2] for page in pages if "report.html" in page} <= anchors
    assert {page.partition("#")[0] for page in pages} <= {"evidence/report.html", "evidence/fidelity.jsonl"}
    assert "(README.zh.md)" in (released / "README.md").read_text()
    assert "(README.md)" in (released / "README.zh.md").read_text(encoding="utf-8")


def test_each_message_is_there_in_both_languages_with_the_same_fields() -> None:
    fields = {
        language: {
            key: sorted(re.findall(r"\{(\w+)\}", text)) for key, text in messages.items() if key != "terms"
        }
        for language, messages in MESSAGES.items()
    }
    assert fields["en"] == fields["zh"]
    for key, text in MESSAGES["zh"].items():
        if key != "terms" and re.search(r"[a-z]{3,} [a-z]{3,} [a-z]{3,}", text):
            pytest.fail(f"{key} is not Chinese: {text}")


def test_what_is_worse_and_what_was_not_measured_stands_on_the_card(released: Path) -> None:
    text = re.sub(r"\]\(evidence[^)]*\)", "]", (released / "README.md").read_text())
    limits = text[text.index("## Limits") : text.index("## Measured")]
    report = json.loads((released / "evidence/report.json").read_bytes())
    first, last = report["accuracy"][0], report["accuracy"][-1]
    lost = [a["name"] for a, b in zip(first["by_task"], last["by_task"], strict=True)
            if b["accuracy"] < a["accuracy"]]  # fmt: skip
    assert lost
    assert all(f"- task {name}: {last['label']} [" in limits for name in lost)
    assert "slower at concurrency 8: [800.0] tokens/s with it, [910.0] without" in limits
    assert "at concurrency 1" not in limits
    assert "- FP8 kernels: speed, and the rounding of activations" in limits
    assert "- public benchmarks" in limits
    assert "- serving on the hardware profile 1xgpu" in limits
    chinese = (released / "README.zh.md").read_text(encoding="utf-8")
    assert "并发 8 时使用草稿头反而更慢" in chinese
    lock = read_lock(released)
    assert lock.card is not None
    stricter = lock.model_copy(update={"card": lock.card.model_copy(update={"min_long_accuracy": 0.99})})
    read = card_files(stricter, released / "evidence")["README.md"]
    failing = [cell for cell in report["long_context"][-1]["grid"] if cell["accuracy"] < 0.99]
    assert failing
    assert read.count("the fact at [50 %]") == len(failing)
    assert read.count("are read below 99 %") == len(report["long_context"][-1]["by_multiple"])


def test_inherited_figures_are_labelled_with_their_source_and_text_stays_text(tmp_path: Path) -> None:
    inherited = [
        {"name": "HealthBench", "value": 62.5, "source": "https://huggingface.co/org/base"},
        {
            "name": "fast | <b>[very](http://x)",
            "value": "3x",
            "source": "a card",
            "conditions": "none stated",
        },
    ]
    stages = make_stages(tmp_path / "stages", bundle={"inherited": inherited})
    stages.bundle(tmp_path / "b")
    text = (tmp_path / "b/README.md").read_text()
    table = text[text.index("## Inherited, not measured here") : text.index("## Where every byte")]
    assert "| HealthBench | 62.5 | not stated | <https://huggingface.co/org/base> |" in table
    assert r"| fast \| &lt;b&gt;\[very\](http://x) | 3x | none stated | a card |" in table
    assert "HealthBench" not in text.replace(table, "").replace("(HealthBench and the like)", "")
    assert "62.5" in (tmp_path / "b/README.zh.md").read_text(encoding="utf-8")


def _replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        text = (bundle / name).read_text(encoding="utf-8")
        assert old in text
        (bundle / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return damage


def _other_renderer(bundle: Path) -> None:
    lock = json.loads((bundle / "bundle.lock").read_bytes())
    lock["card"]["renderer"] = "sha256:" + "0" * 64
    (bundle / "bundle.lock").write_text(json.dumps(lock))


def _better_result(bundle: Path) -> None:
    file = bundle / ".eval_results/org--items.yaml"
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries[0]["value"] = 99.9
    file.write_text(yaml.safe_dump(entries))


def _better_metadata(bundle: Path) -> None:
    text = (bundle / "README.md").read_text(encoding="utf-8")
    (bundle / "README.md").write_text(re.sub(r"value: [\d.]+", "value: 99.9", text, count=1))


SPEED = '[291.0](evidence/report.html#speed "report.json /throughput/2/cells/0/output_tokens_per_s")'
FIGURES: tuple[tuple[Callable[[Path], None], str], ...] = (
    (
        _replace("README.md", "[291.0]", "[391.0]"),
        r"README\.md: the figure '391\.0' .*output_tokens_per_s.* the evidence has 291",
    ),
    (_replace("README.zh.md", " %（", " %（9"), r"README\.zh\.md: the figure .* the evidence has"),
    (
        _replace("README.md", "/throughput/2/cells/0/output_tokens_per_s", "/throughput/9/cells/0"),
        r"README\.md: the figure '291\.0' .* report\.json has no /throughput/9",
    ),
    (_better_metadata, r"README\.md: the figure 99\.9 \(allergy"),
    (_better_result, r"org--items\.yaml: the figure 99\.9 \(a;"),
)
WORDS: tuple[tuple[Callable[[Path], None], str], ...] = (
    (_replace("README.md", SPEED, "391.0"), "follow from bundle.lock and the evidence: .*391.0"),
    (_replace("README.md", "\n- public benchmarks\n", "\n"), "follow from"),
    (_replace("README.md", "## Measured", "Safe for all patients.\n\n## Measured"), "Safe for all"),
    (_replace("README.md", "license: apache-2.0", "license: mit"), "its metadata differs"),
    (_replace("LICENSE-NOTE.md", "apache-2.0", "mit"), "LICENSE-NOTE"),
)


def _problems(bundle: Path, damage: Callable[[Path], None]) -> list[str]:
    """What is found wrong with the card after the damage, which is undone."""
    before = {
        path: path.read_bytes() for path in bundle.rglob("*") if is_card(path.relative_to(bundle).as_posix())
    }
    damage(bundle)
    found = card_problems(bundle, read_lock(bundle), read_manifest(bundle))
    for path, data in before.items():
        path.write_bytes(data)
    return found


def test_a_card_whose_figure_is_not_that_of_the_evidence_is_found_whoever_wrote_it(copy: Path) -> None:
    for _ in ("this release", "another"):
        assert _problems(copy, lambda _: None) == []
        for damage, message in FIGURES:
            found = _problems(copy, damage)
            assert re.search(message, "\n".join(found)), (message, found)
        _other_renderer(copy)


def test_a_card_of_this_release_is_word_for_word_what_follows_from_the_evidence(copy: Path) -> None:
    for damage, message in WORDS:
        found = _problems(copy, damage)
        assert re.search(message, "\n".join(found)), (message, found)
    _other_renderer(copy)
    # In the words of another release it stands, as long as its figures do.
    assert _problems(copy, _replace("README.md", "## Measured", "## What was measured")) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (FIGURES[0][0], FIGURES[0][1]),
        (lambda b: (b / "README.zh.md").unlink(), r"README\.zh\.md: missing"),
        (lambda b: (b / ".eval_results/more.yaml").write_text("[]"), "stray; it does not follow"),
        (_replace("bundle.lock", '"card"', '"cart"'), "bundle.lock is malformed: cart"),
    ],
)
def test_such_a_bundle_is_refused_though_sealed_and_signed_again(
    damage: Callable[[Path], None], message: str, copy: Path, stages: Stages
) -> None:
    damage(copy)
    reseal(copy, stages.private_key)
    with pytest.raises(IntegrityFailure, match=message):
        verify_bundle(copy, stages.public_key)


def test_the_card_names_the_weights_of_the_recipes_scheme(tmp_path: Path) -> None:
    stages, said = make_stages(tmp_path / "stages"), {}
    for scheme in get_args(SchemeName):
        quantized = stages.recipe.model_copy(update={"quantize": QuantizeSpec(scheme=scheme)})
        replace(stages, recipe=quantized).bundle(tmp_path / scheme)
        card = ModelCard.load(tmp_path / scheme / "README.md")
        [said[scheme]] = {"fp8", "int8", "int4"} & set(card.data.to_dict()["tags"])
        assert f"{said[scheme].upper()} rounding of weights is in the figures" in card.text
        assert f"not those of {said[scheme].upper()} kernels" in card.text
        assert ("that of activations is not" in card.text) == (scheme != "int4-g128")  # they stay BF16
    assert said == {"fp8-block": "fp8", "fp8-channel": "fp8", "int4-g128": "int4", "w8a8": "int8"}


def test_gates_and_override_are_shown_on_the_card(tmp_path: Path) -> None:
    gates = (at_least("acceptance length", 1.1, 2.5), at_least("speed", None, 200.0))
    stages = make_stages(tmp_path / "stages", gates=gates)
    stages.bundle(tmp_path / "plain")
    plain = re.sub(r"\[([^]]*)\]\(evidence[^)]*\)", r"\1", (tmp_path / "plain/README.md").read_text())
    assert "| acceptance length | 1.1 | at least 2.5 | FAILED |" in plain
    assert "| speed | not measured | at least 200 | not measured |" in plain
    assert "### Speed\n\nNot measured." in plain
    assert "- the gate “speed”" in plain
    stages.bundle(tmp_path / "overridden", override="a preview for testers")
    text = (tmp_path / "overridden/README.md").read_text()
    assert "Recorded reason: a preview for testers" in text
    assert "Failed: acceptance length." in text
    assert "记录在案的理由：a preview for testers" in (tmp_path / "overridden/README.zh.md").read_text(
        "utf-8"
    )
    assert verify_bundle(tmp_path / "overridden").lock.gates.publishable
    with pytest.raises(BadInput, match="made from something else"):
        stages.bundle(tmp_path / "plain", override="a preview for testers")


PAGE = """<!doctype html><meta charset="utf-8"><style>
body{margin:0;font:16px/1.5 "Segoe UI","Noto Sans",Helvetica,Arial,sans-serif}
article{box-sizing:border-box;width:1012px;padding:32px}
table{border-collapse:collapse;display:block;width:max-content;max-width:100%%;overflow:auto}
th,td{border:1px solid #d1d9e0;padding:6px 13px} pre{overflow:auto}
</style><article>%s</article><script>
addEventListener("load",()=>{document.title=JSON.stringify({
tables:[...document.querySelectorAll("table")].map(t=>t.scrollWidth-t.clientWidth),
links:document.querySelectorAll("td a[title]").length,page:document.documentElement.scrollWidth,
images:[...document.images].map(i=>i.naturalWidth>0)})})</script>"""
"""GitHub's measures: the column, the table that scrolls where it is too wide."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_card_in_a_browser_has_no_table_wider_than_the_column(
    name: str, copy: Path, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    (copy / "evidence/fidelity.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    )
    text = re.sub(r"\A---\n.*?\n---\n", "", (copy / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    page = copy / "page.html"
    page.write_text(PAGE % MarkdownIt("commonmark").enable("table").render(text), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1012,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--hide-scrollbars",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    match = re.search(r"<title>(.*?)</title>", done.stdout)
    assert match, done.stderr
    found = json.loads(match[1])
    assert found["tables"] and set(found["tables"]) == {0}
    assert found["page"] <= 1012
    assert found["images"] == [True]
    # Every figure of a table became a link that says where it stands.
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert found["links"] == sum(len(list(linked_figures(line))) for line in lines)


# --- the licence ---

UPSTREAM: dict[str, Any] = {
    "README.md": "---\nlicense: apache-2.0\n---\n# Model\n\nWe submit.\n\n## License\n\nMIT License\n",
    "LICENSE": "Apache License\n  Version 2.0, January 2004\n",
}


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A source that contradicts itself, as AntAngelMed's repository does."""
    (tmp_path / "source").mkdir()
    for name, text in UPSTREAM.items():
        (tmp_path / "source" / name).write_text(text)
    return tmp_path / "source"


def test_every_place_where_a_source_names_a_licence_is_read(upstream: Path) -> None:
    said = {(one.where, one.license) for one in licence_statements(upstream)}
    assert said == {
        ("README.md, metadata", "apache-2.0"), ("README.md, text", "mit"), ("LICENSE", "apache-2.0"),
    }  # fmt: skip
    (upstream / "README.md").write_text("# Model\n\nThe MIT hospital's admission data. No terms here.\n")
    assert [one.where for one in licence_statements(upstream)] == ["LICENSE"]


def test_a_contradictory_licence_must_be_decided_in_the_recipe_and_is_shown(
    upstream: Path, tmp_path: Path
) -> None:
    stages = make_stages(tmp_path / "stages")
    for undecided, wanted in (({"license": None}, "bundle.license"), ({}, "bundle.license_reason")):
        with pytest.raises(BadInput, match=wanted) as caught:
            stages.bundle(tmp_path / "b", recipe=recipe(bundle=undecided), source=upstream)
        assert "README.md, text: mit" in caught.value.message
        assert not (tmp_path / "b").exists()
    decided = recipe(bundle={"license_reason": "its authors said so"})
    stages.bundle(tmp_path / "b", recipe=decided, source=upstream)
    text = (tmp_path / "b/README.md").read_text()
    assert "do not agree:\n\n| where | licence |\n|---|---|\n| README.md, metadata | apache-2.0 |\n" in text
    assert "| README.md, text | mit |" in text
    assert "because: its authors said so" in text
    assert "README.md, text: mit" in (tmp_path / "b/LICENSE-NOTE.md").read_text()
    verify_bundle(tmp_path / "b")


def test_a_licence_other_than_the_sources_needs_a_reason_and_the_same_none(
    upstream: Path, tmp_path: Path
) -> None:
    (upstream / "README.md").write_text("---\nlicense: mit\n---\n")
    (upstream / "LICENSE").unlink()
    stages = make_stages(tmp_path / "stages")
    with pytest.raises(BadInput, match=r"metadata: mit; this recipe: apache-2\.0"):
        stages.bundle(tmp_path / "b", source=upstream)
    stages.bundle(tmp_path / "b", recipe=recipe(bundle={"license": "mit"}), source=upstream)
    assert "What the source says of its licence:" in (tmp_path / "b/README.md").read_text()


def test_a_licence_that_is_not_decided_is_said_to_be_so(tmp_path: Path) -> None:
    make_stages(tmp_path / "stages").bundle(tmp_path / "b", recipe=recipe(bundle={"license": None}))
    assert "has not been decided" in (tmp_path / "b/LICENSE-NOTE.md").read_text()
    card = ModelCard.load(tmp_path / "b/README.md")
    assert card.data.license is None
    assert "Not decided; see" in card.text
