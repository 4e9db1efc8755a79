"""The validation report: figures bound to what they were measured on, and four ways of writing it."""

from validation.environment import Environment, collect_environment
from validation.report.model import (
    Headline,
    Report,
    ReportInputs,
    StageFigures,
    Subject,
    build_report,
    read_report,
)
from validation.report.render import verdict, write_report

__all__ = [
    "Environment",
    "Headline",
    "Report",
    "ReportInputs",
    "StageFigures",
    "Subject",
    "build_report",
    "collect_environment",
    "read_report",
    "verdict",
    "write_report",
]
