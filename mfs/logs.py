"""How a process of ours logs: lines for people on a terminal, one JSON object a line everywhere else.

    {"time": "2026-11-30T01:02:03.456Z", "level": "WARNING", "process": "worker", "pid": 7, "logger": "mfs.…",
     "message": …, "trace_id": …, "span_id": …, "exception": …}

The last three where there is something to say. Secrets are masked in both (`mfs.shown`). What does not come from us,
the words of libfuse or of a Python that crashes, stands between as it is.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from mfs.shown import clean, mask

_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class TraceIds(NamedTuple):
    """A span, as its ids stand in logs: lower-case hex."""

    trace_id: str
    span_id: str


current_trace: Callable[[], TraceIds | None] = lambda: None  # noqa: E731
"""The span that the caller is in. Set once by whoever traces in this process."""


class LogFormatter(logging.Formatter):
    """One line a record, whatever was put into it, and behind it the lines of a traceback; secrets masked."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        trace = current_trace()
        line = clean(mask(super().formatMessage(record)))
        return line if trace is None else f"{line} trace={trace.trace_id}"

    def formatException(self, ei: _ErrorInfo) -> str:
        return _masked_lines(super().formatException(ei))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; secrets masked."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, str | int | None] = {
            "time": f"{seconds}.{int(record.created % 1 * 1000):03d}Z", "level": record.levelname,
            "process": self._who, "pid": record.process, "logger": record.name,
            "message": clean(mask(record.getMessage())),
        }  # fmt: skip
        trace = current_trace()
        if trace is not None:
            said |= trace._asdict()
        if record.exc_info:
            said["exception"] = _masked_lines(self.formatException(record.exc_info))
        return json.dumps(said, ensure_ascii=False)


def _masked_lines(text: str) -> str:
    return "\n".join(clean(mask(line)) for line in text.splitlines())


def message_of(line: str) -> str:
    """What a line of a log says to a person: the message of one in JSON, any other as it stands."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line.strip()


def set_up_logging(level: str, who: str, form: str = "auto") -> None:
    """Log to standard error. who: 'mfs', 'worker', as it stands in each line beside the process's number.

    form: 'text', 'json', or 'auto' for what standard error is.
    """
    handler = logging.StreamHandler()
    if form == "json" or (form == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter(who))
    else:
        handler.setFormatter(LogFormatter(f"%(asctime)s %(levelname)s {who}[%(process)d] %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
