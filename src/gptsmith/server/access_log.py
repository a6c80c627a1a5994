"""The server's log: one JSON object a line, on standard error. No prompts, no answers, no keys."""

from __future__ import annotations

import datetime
import json
import logging
import sys

journal = logging.getLogger("gptsmith.server")


class JsonFormatter(logging.Formatter):
    """time, level, event, and whatever the record's `fields` hold."""

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


def write_journal(level: str = "info") -> None:
    """Have this log, and uvicorn's complaints, written to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, least in (("gptsmith.server", level.upper()), ("uvicorn", "WARNING"), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = ([handler] if name != "uvicorn.error" else []), name == "uvicorn.error"
        logger.setLevel(least)
