"""The report: everything a study found, in one HTML file."""

from lorascope.report.build import write_report
from lorascope.report.gather import ReportConfig

__all__ = ["ReportConfig", "write_report"]
