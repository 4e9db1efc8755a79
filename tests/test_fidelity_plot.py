"""The picture of the fidelity ledger."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from packager.quantize.fidelity import Figures, LedgerEntry
from packager.quantize.plot import ledger_svg

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = Figures(1.0, 1e-3, 0.0, 0.03, 0, 0, 0.5, 0.5)


def entry(layer: int, role: str, number: int, snr_db: float | None) -> LedgerEntry:
    made = LedgerEntry.of(f"model.layers.{layer}.mlp.{role}.{number}.weight", role, (128, 128), FIGURES)
    return replace(made, snr_db=snr_db)


def heights(entries: list[LedgerEntry], gate_db: float | None) -> tuple[dict[str, list[float]], float | None]:
    """Title of each mark -> y of its worst end, best end and median; and y of the gate."""
    root = ElementTree.fromstring(ledger_svg(entries, gate_db))
    marks = {}
    for group in root.iter(f"{SVG}g"):
        title, line, dot = (group.find(SVG + name) for name in ("title", "line", "circle"))
        assert title is not None and line is not None and dot is not None
        marks[str(title.text)] = [float(line.attrib["y1"]), float(line.attrib["y2"]), float(dot.attrib["cy"])]
    dashed = [line for line in root.iter(f"{SVG}line") if "stroke-dasharray" in line.attrib]
    return marks, float(dashed[0].attrib["y1"]) if dashed else None


def test_each_role_and_layer_has_a_mark_from_its_worst_weight_to_its_best() -> None:
    entries = [entry(0, "dense", 0, 31.0), *(entry(1, "expert", n, 29.0 + n) for n in range(3))]
    marks, gate = heights(entries, 30.0)
    assert list(marks) == [
        "dense, layer 0: 1 weights, worst 31.00 dB (model.layers.0.mlp.dense.0.weight)",
        "expert, layer 1: 3 weights, worst 29.00 dB (model.layers.1.mlp.expert.0.weight)",
    ]
    dense, (worst, best, middle) = marks.values()
    assert dense == [best, best, best], "31 dB each"
    assert best < middle < worst, "up is better"
    assert middle == gate, "30 dB each"


@pytest.mark.parametrize("entries", [[], [entry(0, "exact", 0, None)]], ids=["no weights", "no error at all"])
def test_a_ledger_without_a_figure_is_an_empty_picture(entries: list[LedgerEntry]) -> None:
    assert heights(entries, 30.0)[0] == {}
    assert heights(entries, None) == ({}, None)


def test_names_cannot_break_out_of_the_picture() -> None:
    odd = replace(entry(0, "<script>", 0, 31.0), name="model.layers.0.</title><script>")
    [title] = heights([odd], None)[0]
    assert title.endswith("(model.layers.0.</title><script>)")
    assert b"<script>" not in ledger_svg([odd], None)


def test_equal_ledgers_give_equal_bytes() -> None:
    entries = [entry(layer, "expert", n, 31.0 + n / 10) for layer in range(40) for n in range(4)]
    assert ledger_svg(entries, 30.0) == ledger_svg([replace(e) for e in entries], 30.0)
