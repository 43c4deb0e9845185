"""The report of one unlearning run: a single HTML file that needs neither network nor script."""

from salun_core.report.context import Ancestor, ReportContext
from salun_core.report.render import render_report, write_report

__all__ = ["Ancestor", "ReportContext", "render_report", "write_report"]
