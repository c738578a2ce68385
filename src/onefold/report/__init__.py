"""Report: a run, or several, on one page that needs nothing else: no server, no script, no other file."""

from onefold.report.page import write

__all__ = ["write"]
