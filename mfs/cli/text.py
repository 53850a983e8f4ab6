"""Texts of strangers made safe to print, and numbers made easy to read. Pure; imports nothing heavy."""

from __future__ import annotations

import json
import time
from typing import Any

from mfs.shown import clean as clean
from mfs.units import format_duration, format_size


def print_json(value: Any) -> None:
    """For machines: exact numbers, pure ASCII, one value."""
    print(json.dumps(value, indent=2))


def share(part: int, whole: int) -> str:
    """How much of a whole: '', '44 %', '100 %'; never 0 % for something nor 100 % for less than all."""
    if not part:
        return ""
    if part >= whole:
        return "100 %"
    return f"{min(99, max(1, round(100 * part / whole)))} %"


def size(value: int) -> str:
    return format_size(value)


def count(number: int, one: str, many: str = "") -> str:
    """'1 file', '2 files', '12,345 files'."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def rate(bytes_count: float, seconds: float) -> str:
    """'780 M/s'; '' where no time passed."""
    return f"{format_size(int(bytes_count / seconds))}/s" if seconds > 0 else ""


def ago(then: float | None, now: float | None = None) -> str:
    """'12s ago', 'never'."""
    if not then:
        return "never"
    return f"{format_duration((time.time() if now is None else now) - then)} ago"


def when(then: float) -> str:
    """A local date and time, to the minute; '' where nobody knows it (directories of a registry begin at zero)."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then)) if then >= 1 else ""
