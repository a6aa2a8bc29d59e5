"""Render a run folder, or two for comparison, as one self-contained HTML page."""

from align.report.page import write_report

__all__ = ["write_report"]
