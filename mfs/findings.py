"""What an examination of a machine finds: one thing looked at, how it stands, and what to do about it. Pure.

Both `mfs doctor` and `gpuload doctor` say what they find in these words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from mfs.shown import clean, mask


class Level(StrEnum):
    """How much one finding matters."""

    OK = "ok"
    NOTE = "note"
    """Works, with a limit somebody may care about."""
    WARNING = "warning"
    """Works, and will be slow, or fail under load."""
    FAULT = "fault"
    """Something that was asked for will fail."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """'kernel', 'cache: free space'."""
    level: Level
    value: str
    """What was found, for people."""
    advice: str = ""
    """What to do about it; '' where there is nothing to do."""

    def shown(self) -> dict[str, str]:
        """The four fields for eyes and scripts: secrets masked, one line each."""
        what, value, advice = (clean(mask(" ".join(text.split()))) for text in (self.what, self.value, self.advice))
        return {"what": what, "level": str(self.level), "value": value, "advice": advice}


def ok(what: str, value: str) -> Finding:
    """Nothing to do."""
    return Finding(what, Level.OK, value)


def note(what: str, value: str, advice: str = "") -> Finding:
    """See `Level.NOTE`."""
    return Finding(what, Level.NOTE, value, advice)


def warning(what: str, value: str, advice: str) -> Finding:
    """See `Level.WARNING`."""
    return Finding(what, Level.WARNING, value, advice)


def fault(what: str, value: str, advice: str) -> Finding:
    """See `Level.FAULT`."""
    return Finding(what, Level.FAULT, value, advice)


def has_fault(findings: Iterable[Finding]) -> bool:
    """Whether something that was asked for will fail."""
    return any(finding.level is Level.FAULT for finding in findings)
