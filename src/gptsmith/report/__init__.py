"""The report of a run: one self-contained HTML page, and the figures in it."""

from gptsmith.report.page import write_report
from gptsmith.run_directory import Run, read_metrics, read_run

__all__ = ["Run", "read_metrics", "read_run", "write_report"]
