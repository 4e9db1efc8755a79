"""Public benchmarks by the names lm-eval gives them, asked of a served model through this package's client.

lm-eval's own HTTP client is not used: it keeps no answer until all are there, so a killed run starts over; it
needs the model's tokenizer at hand to score multiple choice; and it has no bound on a server that drips. Its
task definitions, prompts, filters and metrics are used unchanged (`EndpointLM` is an `lm_eval.api.model.LM`).
"""

from validation.public_benchmarks.load import TaskData, describe, load_tasks
from validation.public_benchmarks.run import (
    BenchmarkRun,
    Style,
    TaskScore,
    compare_benchmarks,
    measure_benchmarks,
)
from validation.public_benchmarks.show import benchmarks_panel

__all__ = [
    "BenchmarkRun",
    "Style",
    "TaskData",
    "TaskScore",
    "benchmarks_panel",
    "compare_benchmarks",
    "describe",
    "load_tasks",
    "measure_benchmarks",
]
