"""Panels such as measurements bring to a report, with what a hostile model might have said in them."""

from __future__ import annotations

from validation.panel import Column, Panel, Table, Unfolding
from validation.report.plots import Group, Heat, Row, heat_map, intervals, share_scale

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
HOSTILE_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" onload="document.title=1"><script>document.title=1</script>'
    '<style>*{display:none}</style><foreignObject><img src="http://e.example/x"/></foreignObject>'
    '<a href="javascript:1"><rect width="5" height="5"/></a><image href="http://e.example/y"/>'
    '<use href="http://e.example/z.svg#a"/><rect id="kept" width="9" height="9" fill="url(http://e.example)" '
    'style="fill: red; position: fixed; background: url(http://e.example)"/><text>shown &lt;b&gt;</text></svg>'
)


def rubric_panel(subject: str, unfoldings: int = 3) -> Panel:
    """A measurement with two tables, a plot, texts, and a figure that was not measured."""
    plot = intervals("Themes", [Group("All", [Row("emergency", 0.62, "62 %", "one", 0.5, 0.7)])], share_scale())
    heat = heat_map("Heat", ["4K", "8K"], [("0 %", [Heat(1.0, "100 %", "80–100"), None])], across="tokens")
    return Panel(
        key="HealthBench main",
        title="HealthBench, main",
        summary=f"The model meets 61.2 % of the points. It said {HOSTILE}",
        tables=(
            Table(
                caption="By theme",
                columns=(
                    Column(name="Theme", kind="text"),
                    Column(name="Items"),
                    Column(name="Score", unit="%", digits=1),
                    Column(name="Difference", unit="points", digits=1),
                    Column(name="Judge agreement", digits=3),
                    Column(name="Length of the answers", unit="characters"),
                ),
                rows=(
                    ("emergency referrals", 1204, 61.25, -0.04, 0.712, 1830),
                    ("global health | 全球健康", 90, 9.75, -1.5, None, 2004),
                    ("hedging", 300, None, 12.0, 0.66, 951),
                    (HOSTILE, 7, 100.0, 0.5, 0.5, 12345),
                ),
            ),
            Table(
                caption="Every criterion",
                columns=(Column(name="Criterion", kind="text"), Column(name="Met")),
                rows=(("names the dose", 3), ("asks for pregnancy", 12), ("sends to hospital", 7)),
            ),
        ),
        unfoldings=tuple(
            Unfolding(
                line=f"Criterion {k}: names the emergency number",
                text=(("Answer", f"Call 120. {HOSTILE}"), ("Judgement", '{"criteria_met": true}')),
            )
            for k in range(unfoldings)
        ),
        plots=(("Bars: 95 % intervals.", str(plot)), ("Cells: share.", str(heat)), ("Hostile.", HOSTILE_SVG)),
        notes=("Scores of an unqualified judge do not count.",),
        conditions=(("Judge", "rule-based, qualified at a balanced F1 of 0.97"),),
        subjects=(subject,),
    )
