"""MedBench (https://medbench.opencompass.org.cn): read its files, answer them, check, pack the upload, score.

Ground truth stays on its server, so a run fills in answers for upload; what has labels is scored here too.
"""

from validation.medbench.files import DIMENSIONS, Question, TaskFile, check, pack, read_folder
from validation.medbench.run import MedBenchComparison, MedBenchRun, compare_medbench, measure_medbench
from validation.medbench.show import medbench_panel

__all__ = [
    "DIMENSIONS",
    "MedBenchComparison",
    "MedBenchRun",
    "Question",
    "TaskFile",
    "check",
    "compare_medbench",
    "measure_medbench",
    "medbench_panel",
    "pack",
    "read_folder",
]
