"""The report: figures of every result, and one self-contained HTML page that shows them in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.report.page import find_snippets as find_snippets
    from tl_capacity.report.page import report_page as report_page
    from tl_capacity.report.page import write_report as write_report
    from tl_capacity.report.results import Results as Results
    from tl_capacity.report.story import ReportSettings as ReportSettings

# Who only wants a figure in a notebook loads no template.
__getattr__, __all__ = lazily(__name__, __file__)
