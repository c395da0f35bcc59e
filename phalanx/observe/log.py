"""Logging for every process: one line a record, as text for people or as JSON for machines.

Every line names the process that wrote it ("launcher", "server", "rank 2.0"), because the processes share one stream.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Literal, TextIO

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""What every record carries; the rest came in through `extra=` and is worth keeping in JSON."""


class TextFormatter(logging.Formatter):
    """`07:16:07.123 WARNING server: message`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s {process}: %(message)s", "%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC, ISO 8601), level, process, logger, message, extra fields, traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=repr).decode()


class QuietProbes(logging.Filter):
    """Drops access-log lines of endpoints that machines poll, so that a person can read the rest."""

    def __init__(self, paths: tuple[str, ...] = ("/health", "/ready", "/metrics", "/fault_tolerance/status")) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        # uvicorn's access records carry (client, method, path, http version, status).
        args = record.args
        return not (isinstance(args, tuple) and len(args) == 5 and str(args[2]).split("?")[0] in self._paths)


def set_up_logging(
    level: LogLevel = "info", style: LogFormat = "text", process: str = "launcher", stream: TextIO | None = None
) -> None:
    """Log everything of this process to `stream` (stderr by default), replacing earlier handlers. LOCAL.

    Libraries speak at the chosen level, too, but for those that narrate each request they make."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if style == "json" else TextFormatter(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.access").addFilter(QuietProbes())
