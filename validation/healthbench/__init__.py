"""HealthBench and rubrics of the user's own: answers graded criterion by criterion by a qualified judge."""

from validation.healthbench.grading import Judge, Judgement, Question, grader_prompt
from validation.healthbench.panel import rubric_panel
from validation.healthbench.qualification import MIN_BALANCED_F1, Qualification, qualify
from validation.healthbench.rows import (
    FILES,
    Example,
    MetaRow,
    MetaRows,
    RubricItem,
    Rubrics,
    Subset,
    load_meta,
    load_rubrics,
    rubric_file,
)
from validation.healthbench.run import (
    RubricComparison,
    RubricRun,
    compare_rubrics,
    measure_rubrics,
    rubric_gates,
)
from validation.healthbench.swap import JudgeSwap, compare_judges

__all__ = [
    "FILES",
    "MIN_BALANCED_F1",
    "Example",
    "Judge",
    "JudgeSwap",
    "Judgement",
    "MetaRow",
    "MetaRows",
    "Qualification",
    "Question",
    "RubricComparison",
    "RubricItem",
    "RubricRun",
    "Rubrics",
    "Subset",
    "compare_judges",
    "compare_rubrics",
    "grader_prompt",
    "load_meta",
    "load_rubrics",
    "measure_rubrics",
    "qualify",
    "rubric_file",
    "rubric_gates",
    "rubric_panel",
]
