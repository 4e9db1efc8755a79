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
from validation.report.patch import short_context_panel
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
    "short_context_panel",
    "verdict",
    "write_report",
]
