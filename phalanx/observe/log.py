"""Logging for every process: one line a record, as text for people or as JSON for machines.

Every line names the process that wrote it ("launcher", "server", "rank 2.0"), because the processes share one stream.
"""

from __future__ import annotations

import io
import logging
import os
import stat
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


class Unblocked:
    """A pipe to which lines are written whole or not at all, so that no rank waits for a reader that does not read.

    When there is room again, a line says how many were lost."""

    def __init__(self, pipe: io.RawIOBase, formatter: logging.Formatter) -> None:
        self._pipe, self._formatter, self._lost = pipe, formatter, 0

    @classmethod
    def of(cls, stream: TextIO, formatter: logging.Formatter) -> TextIO | Unblocked:
        """`stream` itself, unless it is a pipe. The pipe is opened anew: not to block is a property that all who share
        an open file would share. LOCAL, Linux."""
        try:
            number = stream.fileno()
            if not stat.S_ISFIFO(os.fstat(number).st_mode):
                return stream
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
            return cls(io.FileIO(os.open(f"/proc/self/fd/{number}", flags), "w"), formatter)
        except (OSError, ValueError):
            return stream

    def write(self, text: str) -> int:
        """Write a line if there is room for it. LOCAL."""
        notice = self._notice() + "\n" if self._lost else ""
        if self._pipe.write((notice + text).encode(errors="replace")) is None:
            self._lost += 1
        else:
            self._lost = 0
        return len(text)

    def _notice(self) -> str:
        said = {"name": __name__, "levelname": "WARNING", "msg": f"{self._lost} lines were lost: nobody read them"}
        return self._formatter.format(logging.makeLogRecord(said))

    def flush(self) -> None:
        """Nothing is kept back. LOCAL."""


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

    A pipe that is full loses lines; the process does not wait.
    Libraries speak at the chosen level, too, but for those that narrate each request they make."""
    formatter = JsonFormatter(process) if style == "json" else TextFormatter(process)
    handler = logging.StreamHandler(Unblocked.of(stream or sys.stderr, formatter))
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.access").addFilter(QuietProbes())
