"""The model card, in English and Chinese: written from the lock and the evidence, and from nothing else.

Every figure on it is a link into the report and names its place there (`packager.bundle.figures`). What
others have published is labelled as inherited, with its source; what was not measured is said to be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from packager.bundle.card_parts import PAGE, Said, Table, Term
from packager.bundle.card_settings import CardSettings
from packager.bundle.card_view import CardView, build_view
from packager.bundle.figures import REPORT, Figure, place
from packager.bundle.licensing import disagree_on
from packager.bundle.lock import REPORT_NAME, Lock
from packager.errors import BadInput
from packager.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry
    from jinja2 import Template

    from validation.longcontext import ContextClaim
    from validation.report import Report

Language = Literal["en", "zh"]
CARDS: dict[Language, str] = {"en": "README.md", "zh": "README.zh.md"}
RESULTS_FOLDER = ".eval_results"
"""Where the hub looks for evaluation results (https://huggingface.co/docs/hub/eval-results)."""

_TAGS = ("bailing_moe_v2", "mixture-of-experts", "yarn", "vllm")
_HUB_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0")
"""The identifiers that the hub knows; another licence is `other`, with its name beside it."""


def card_files(lock: Lock, evidence: Path) -> dict[str, str]:
    """Path in the bundle and text of all that the card is: both languages, and `.eval_results/`.

    Args:
        lock: with the card's settings.
        evidence: folder of the sealed evidence.

    Raises:
        BadInput: the evidence is not a report of this version, or the lock has no settings of a card.
    """
    if lock.card is None:
        raise BadInput("bundle.lock does not hold what its card says", "Assemble the bundle again.")
    view = build_view(lock, lock.card, read_evidence(evidence))
    made = {name: _written(view, language) for language, name in CARDS.items()}
    made["README.md"] = f"---\n{_metadata(view)}\n---\n\n{made['README.md']}"
    return made | {f"{RESULTS_FOLDER}/{name}": text for name, text in _evaluation_results(view)}


def measured_context(recipe: Recipe, evidence: Path) -> ContextClaim:
    """The recipe's context length against what the evidence measured of it.

    Raises:
        BadInput: the evidence is not a report of this version.
    """
    from validation.longcontext import context_claim

    report = read_evidence(evidence)
    return context_claim(recipe.context.length, report.long_context, recipe.gates.min_long_accuracy)


def license_note(settings: CardSettings, source: str) -> str:
    """The text of LICENSE-NOTE.md; `source`: what the weights were made from."""
    base, stated = settings.base_model or source, settings.upstream_licenses
    if settings.license is None:
        terms = "The licence of these weights has not been decided. Until it is, they may not be passed on."
    else:
        terms = (
            f"These weights, the draft head and the evidence are released under **{settings.license}**, "
            "as decided in the recipe of this release."
        )
        if settings.license_reason:
            terms += f" Decided so because: {settings.license_reason}"
    upstream = "".join(f"- {one.where}: {one.license}\n" for one in stated or ())
    return (
        f"# Licence\n\n{terms}\n\n"
        f"The weights derive from `{base}`; that model's own terms go on to bind whoever uses them. "
        "The software that made and serves this bundle, moe-packager, is not part of it; it is under "
        "Apache-2.0.\n" + (f"\nWhat `{source}` says of its licence:\n\n{upstream}" if upstream else "")
    )


def read_evidence(folder: Path) -> Report:
    """The report of a sealed evidence folder. Raises BadInput: not a report of this version."""
    from validation.errors import MeasurementError
    from validation.report import read_report

    try:
        return read_report(folder / REPORT_NAME)
    except MeasurementError as err:
        raise BadInput(err.message, err.remedy or "Validate again.") from None


# ---- words ---------------------------------------------------------------------------------------------


@cache
def _messages() -> dict[str, dict[str, Any]]:
    text = (files("packager.bundle") / "card_messages.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


class _Speaker:
    """Says messages, figures and names in one language, as Markdown that stays within its table cell."""

    def __init__(self, language: Language) -> None:
        self.messages = _messages()[language]
        self.terms = [(re.compile(pattern), text) for pattern, text in self.messages["terms"]]

    def message(self, key: str, **about: Any) -> str:
        return str(self.messages[key]).format(**about)

    def show(self, words: object) -> str:
        if isinstance(words, Figure):
            return self._figure(words)
        if isinstance(words, Said):
            return self.message(words.key, **{name: self.show(each) for name, each in words.about})
        return _cell(self._term(words.text) if isinstance(words, Term) else words)

    def names(self, names: Sequence[str]) -> str:
        return self.message("list").join(self.show(Term(name)) for name in names)

    def _term(self, text: str) -> str:
        for pattern, said in self.terms:
            if match := pattern.fullmatch(text):
                return match.expand(said)
        return text

    def _figure(self, figure: Figure) -> str:
        texts = figure.texts
        text = str(self.messages[figure.form]).format(*texts) if texts else self.message("not_measured")
        if texts and figure.unit:
            close = {"x": "×", "×": "×", "%": " %"}.get(figure.unit)
            unit = self.messages.get(f"unit_{figure.unit}", figure.unit)
            text += close or f" {unit}"
        return f'[{_cell(text)}]({figure.target} "{figure.place}")'

    def table(self, table: Table | None, instead: str = "") -> str:
        if table is None:
            return instead
        numeric = [all(isinstance(cell, Figure | int) or cell == "–" for cell in column)
                   for column in zip(*table.rows, strict=True)]  # fmt: skip
        lines = [
            self._line(table.columns),
            "|" + "".join("---:|" if flush else "---|" for flush in numeric),
            *(self._line(row) for row in table.rows),
        ]
        return "\n".join(lines)

    def _line(self, cells: Sequence[object]) -> str:
        return "| " + " | ".join(self.show(cell) for cell in cells) + " |"

    def claim(self, claim: ContextClaim) -> str:
        """How far the context was borne out, as a clause; empty if it was, wholly."""
        if claim.outcome == "measured":
            return self.message("claim_measured")
        if claim.measured is None:
            return self.message("claim_unread")
        bound = f"{100 * claim.min_accuracy:g}"
        nowhere = self.message("held_nowhere", bound=bound)
        held = self.message("held_to", bound=bound, tokens=claim.held) if claim.held else nowhere
        key = "claim_not_held" if claim.outcome == "not held" else "claim_beyond"
        return self.message(key, measured=claim.measured, held=held)


@cache
def _template() -> Template:
    """Compiled once: that takes longer than all else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("packager.bundle", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown, not HTML
    )
    environment.filters |= {"cell": _cell, "oneline": _oneline, "autolink": _autolink}
    return environment.get_template("card.md.jinja")


def _written(view: CardView, language: Language) -> str:
    speaker, settings = _Speaker(language), view.settings

    def prose(field: str) -> str:
        own = getattr(settings.zh, field) if language == "zh" else ""
        return str(own or getattr(settings, field)).strip()

    others = [name for name in view.reports if name not in (REPORT_NAME, "report.html")]
    links = ", ".join(f"[{name}](evidence/{name})" for name in others)
    text = _template().render(
        v=view,
        s=settings,
        t=speaker.message,
        show=speaker.show,
        terms=speaker.names,
        term=lambda text: speaker.show(Term(_oneline(text))),
        table=speaker.table,
        claim=speaker.claim,
        prose=prose,
        size=_size,
        also=speaker.message("also", links=links) if links else "",
        more=speaker.message("list").join(f"[{speaker.show(title)}]({to})" for title, to in view.sections),
        conflict=disagree_on(settings.license, settings.upstream_licenses or ()),
        extra="serve-cpu" if settings.commands[0].device == "cpu" else "serve",
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _cell(value: object) -> str:
    """Text that stays within its table cell and is no more than text: no link, no HTML, no code."""
    escaped = re.sub(r"[\\|\[\]`]", r"\\\g<0>", _oneline(value))
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def _oneline(value: object) -> str:
    return " ".join(str(value).split())


def _autolink(text: str) -> str:
    return f"<{text}>" if re.match(r"https?://\S+$", text) else text


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


# ---- metadata ------------------------------------------------------------------------------------------


def _metadata(view: CardView) -> str:
    from huggingface_hub import ModelCardData

    settings = view.settings
    fields: dict[str, Any] = {}
    if settings.license is not None:
        known = settings.license.lower() in _HUB_LICENSES
        fields = {"license": settings.license.lower() if known else "other"}
        if not known:
            fields |= {"license_name": settings.license, "license_link": "LICENSE-NOTE.md"}
    if settings.base_model:
        fields |= {"base_model": settings.base_model, "base_model_relation": "quantized"}
    data = ModelCardData(
        language=list(settings.languages),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[
            *_TAGS,
            settings.weights.lower(),
            *(("eagle3", "speculative-decoding") if view.has_draft else ()),
            *settings.tags,
        ],
        model_name=settings.served_name,
        eval_results=[_model_index(one, view) for one in _results(view)] or None,
        **fields,
    )
    return data.to_yaml()


@dataclass(frozen=True)
class _Result:
    """One task's result, in percent."""

    task: str
    items: float
    value: float
    where: str
    """Its place in the evidence."""
    label: str
    items_digest: str | None


def _results(view: CardView) -> Iterator[_Result]:
    """Tasks of the last accuracy run, the one closest to what users serve; then public benchmarks."""
    report = view.report
    if report.accuracy:
        last, run = len(report.accuracy) - 1, report.accuracy[-1]
        for at, share in enumerate(run.by_task):
            where = place(REPORT, "accuracy", last, "by_task", at, "accuracy", factor=100)
            value = round(100 * share.accuracy, 2)
            yield _Result(share.name, share.n, value, where, run.label, run.items_digest)
    for at, panel in enumerate(report.panels):
        if not panel.key.startswith("benchmarks-") or not panel.tables:
            continue
        names = [column.name for column in panel.tables[0].columns]
        if not {"task", "items", "accuracy"} <= set(names):
            continue
        task, items, accuracy = (names.index(name) for name in ("task", "items", "accuracy"))
        for row, cells in enumerate(panel.tables[0].rows):
            right, count = cells[accuracy], cells[items]
            if isinstance(right, int | float) and isinstance(count, int | float) and cells[task] != "all":
                where = place(REPORT, "panels", at, "tables", 0, "rows", row, accuracy)
                yield _Result(str(cells[task]), count, round(right, 2), where, panel.title, None)


def _source(view: CardView) -> tuple[str | None, str | None]:
    """Name and address of the report on the hub; none if the bundle goes elsewhere."""
    repository = view.settings.repository
    if repository is None:
        return None, None
    return "validation report", f"https://huggingface.co/{repository}/blob/main/{PAGE}"


def _model_index(result: _Result, view: CardView) -> EvalResult:
    from huggingface_hub import EvalResult

    known = view.settings.evaluation_sets.get(result.task)
    source_name, source_url = _source(view)
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=known.dataset if known else "held-out-items" if result.items_digest else "lm-eval",
        dataset_name=f"{result.task} ({result.items:g} items)",
        dataset_config=result.task,  # without it, the hub's library files all tasks under the first
        dataset_revision=known.revision if known else None,
        dataset_args={"items_digest": result.items_digest} if result.items_digest else None,
        metric_type="exact_match",
        metric_name=f"exact match, %, {result.label}",
        metric_value=result.value,
        metric_args={"evidence": result.where},
        source_name=source_name,
        source_url=source_url,
    )


def _evaluation_results(view: CardView) -> Iterator[tuple[str, str]]:
    """`.eval_results/`: a file for each benchmark of the hub that the recipe names."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    sets, conduct = view.settings.evaluation_sets, view.report.conduct
    source_name, source_url = _source(view)
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for result in _results(view):
        if known := sets.get(result.task):
            entry = EvalResultEntry(
                dataset_id=known.dataset,
                task_id=known.task_id,
                value=result.value,
                dataset_revision=known.revision,
                date=conduct.finished if conduct else None,
                notes=f"{result.label}, {result.items:g} items, exact match in %; {result.where}",
                source_name=source_name,
                source_url=source_url,
            )
            by_dataset.setdefault(known.dataset, []).append(entry)
    for dataset, entries in by_dataset.items():
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        yield f"{dataset.replace('/', '--')}.yaml", text
