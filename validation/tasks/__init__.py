"""Tasks with known answers: items, scoring, accuracy, and two models compared on the same items."""

from validation.tasks.accuracy import AccuracyRun, ItemResult, Share, accuracy_of, measure_accuracy, share_of
from validation.tasks.comparison import AccuracyComparison, Flip, Paired, compare_accuracy
from validation.tasks.items import Item, items_digest, items_from, load_items
from validation.tasks.scoring import extract_answer, is_correct

__all__ = [
    "AccuracyComparison",
    "AccuracyRun",
    "Flip",
    "Item",
    "ItemResult",
    "Paired",
    "Share",
    "accuracy_of",
    "compare_accuracy",
    "extract_answer",
    "is_correct",
    "items_digest",
    "items_from",
    "load_items",
    "measure_accuracy",
    "share_of",
]
