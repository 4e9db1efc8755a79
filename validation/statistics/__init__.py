"""Statistics of two models on the same items: intervals, tests, verdicts, and what a sample can show."""

from validation.statistics.pairs import (
    Interval,
    Verdict,
    beyond_margin_p,
    loss_p,
    mcnemar_exact,
    n_to_decide,
    non_inferiority,
    normal_quantile,
    paired_difference,
    paired_score,
    wilson,
)
from validation.statistics.power import chance_to_pass, detectable_difference, items_to_find
from validation.statistics.scores import MeanDifference, clusters_to_decide, detectable_mean, paired_means
from validation.statistics.several import holm

__all__ = [
    "Interval",
    "MeanDifference",
    "Verdict",
    "beyond_margin_p",
    "chance_to_pass",
    "clusters_to_decide",
    "detectable_difference",
    "detectable_mean",
    "holm",
    "items_to_find",
    "loss_p",
    "mcnemar_exact",
    "n_to_decide",
    "non_inferiority",
    "normal_quantile",
    "paired_difference",
    "paired_means",
    "paired_score",
    "wilson",
]
