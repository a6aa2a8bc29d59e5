"""One self-contained HTML page from a run's folder."""

from align.report.page import write_report

__all__ = ["write_report"]
