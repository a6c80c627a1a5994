"""The server's log: one JSON object per line on standard error. It contains no prompts, answers or API keys."""

from __future__ import annotations

import datetime
import json
import logging
import sys

logger = logging.getLogger("gptsmith.server")


class JsonFormatter(logging.Formatter):
    """Format a record as JSON: time, level, event, the entries of its `fields`, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def announce(text: str) -> None:
    """Write a line at any log level."""
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, text, (), None))


def configure_logging(level: str = "info") -> None:
    """Write this log, uvicorn's warnings and errors, and Python's warnings to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    others = ("uvicorn", "uvicorn.error", "py.warnings")
    for name, minimum in (("gptsmith.server", level.upper()), *((name, "WARNING") for name in others)):
        target = logging.getLogger(name)
        target.handlers, target.propagate = ([handler] if name != "uvicorn.error" else []), name == "uvicorn.error"
        target.setLevel(minimum)
