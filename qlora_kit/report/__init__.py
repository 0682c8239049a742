"""A run's report: `write_report(run_dir)` makes report.html, one self-contained file."""

from qlora_kit.report.page import write_report

__all__ = ["write_report"]
