"""Logs: lines for people on a terminal, JSON everywhere else; masked, and with the trace that is current."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys

import pytest

from mfs import logs
from mfs.logs import JsonFormatter, LogFormatter, TraceIds, message_of

CANARY = "C4nary"


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("mfs.somewhere", logging.WARNING, __file__, 1, message, arguments, info)


def test_a_record_is_one_line_of_json_without_secrets() -> None:
    try:
        raise ValueError(f"GET https://u:{CANARY}@h/?X-Amz-Signature={CANARY}\n\x1b[2J")
    except ValueError as error:
        line = JsonFormatter("worker").format(
            record('it "failed" at %s\nERROR forged', f"s3://{CANARY}@h/é", error=error)
        )
    assert "\n" not in line
    assert CANARY not in line
    said = json.loads(line)
    assert said["message"] == 'it "failed" at s3://***@h/é\\nERROR forged'
    assert (said["level"], said["process"], said["pid"], said["logger"]) == (
        "WARNING",
        "worker",
        os.getpid(),
        "mfs.somewhere",
    )
    assert said["exception"].splitlines()[-1] == "\\x1b[2J"
    assert "trace_id" not in said
    assert message_of(line) == said["message"]


def test_the_current_trace_stands_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "current_trace", lambda: TraceIds("ab" * 16, "cd" * 8))
    said = json.loads(JsonFormatter("mfs").format(record("x")))
    assert (said["trace_id"], said["span_id"]) == ("ab" * 16, "cd" * 8)
    assert LogFormatter("%(message)s").format(record("x")) == f"x trace={'ab' * 16}"


def test_a_line_that_is_no_json_of_ours_is_a_message_itself() -> None:
    for line in ("fuse: bad mount point", "7", '{"level": "ERROR"}', "[]"):
        assert message_of(f" {line}\n") == line


@pytest.mark.parametrize(("form", "on_terminal", "is_json"), [
    ("auto", True, False), ("auto", False, True), ("text", False, False), ("json", True, True),
])  # fmt: skip
def test_the_form_is_what_was_asked_for_or_what_standard_error_is(form: str, on_terminal: bool, is_json: bool) -> None:
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    begin = f"from mfs.logs import set_up_logging; set_up_logging('INFO', 'mfs', {form!r})"
    program = f"import logging; {begin}; logging.warning('hello')"
    subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert said.startswith("{") == is_json
    assert "hello" in said
