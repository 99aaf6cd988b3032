"""One JSON object a line. What clients send never stands in it: no texts, no names that are not this server's own."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

LOGGER = logging.getLogger("incipit.serve")


class Lines(logging.Formatter):
    """A record as a JSON object: time, level, event, and the fields that were given as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        told: dict[str, Any] = {
            "time": stamp,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            told["error"] = type(record.exc_info[1]).__name__
            told["at"] = where(record.exc_info[1])
        return json.dumps(told, ensure_ascii=False, default=str)


def where(error: BaseException) -> list[str]:
    """File, line and function of every frame; not the message, which may hold what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]


def tell(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """One line of the log."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)


def turn_on(stream: TextIO | None = None, quiet: bool = False) -> Callable[[], None]:
    """Write the server's log to a stream (stderr), JSON lines; returns what undoes it. quiet: warnings only."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Lines())
    loggers = [LOGGER, logging.getLogger("uvicorn.error")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or logger is not LOGGER else logging.INFO)

    def undo() -> None:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    return undo
