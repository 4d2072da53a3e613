"""Logs: what a long run reports, through Python's logger `tl_capacity`. It is silent until somebody listens, as
`tl-capacity --log json` does.

A record's figures, such as tokens done, stand beside its message, so that a program need not read sentences.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("tl_capacity")


class JsonLines(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `message`, and the record's figures."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        content = {
            "time": time,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        # ASCII, so that no control character, lone surrogate or line separator of somebody's text can break a line.
        return json.dumps(content, ensure_ascii=True)


def figures(**values: Any) -> dict[str, dict[str, Any]]:
    """A record's figures, to pass as `extra`."""
    return {"figures": values}


def ended_early(tokens: int, asked: int) -> str:
    """The message for a text with fewer tokens than were asked for."""
    return f"the text ended after {tokens:,} tokens, but {asked:,} were asked for: give a longer text, or ask for fewer"


def configure(as_json: bool, quiet: bool) -> None:
    """Set what goes to standard error: JSON lines, errors only, or Python's default. Replaces the previous setting."""
    handlers: list[logging.Handler] = []
    if as_json:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[0].setFormatter(JsonLines())
    log.handlers = handlers
    log.propagate = not handlers
    log.setLevel(logging.ERROR if quiet else logging.INFO if handlers else logging.NOTSET)
    logging.captureWarnings(as_json)
    logging.getLogger("py.warnings").handlers = handlers
    if quiet:
        warnings.simplefilter("ignore")


def bar_allowed() -> bool:
    """Whether a progress bar may be drawn: not if the log is written to the same place, or if quiet was asked for."""
    return not log.handlers and log.level <= logging.INFO
