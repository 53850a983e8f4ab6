"""Single keys from the terminal, without Enter, while a live view is shown."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from types import TracebackType

_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")
"""What arrows and function keys send: ECMA-48, 5.4."""


class Keys:
    """Keys as they are pressed, while this is open; none where standard input is no terminal."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[object] = []
        self._pressed = ""
        """Read and not given yet."""

    def __enter__(self) -> Keys:
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)  # Ctrl-C goes on to interrupt
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> str:
        """The next key, '' if none is pressed for so long; those that are no characters, arrows say, are none."""
        if self._pressed:
            return self._next()
        if self._fd < 0:
            time.sleep(seconds)
            return ""
        if not select.select([self._fd], [], [], seconds)[0]:
            return ""
        pressed = os.read(self._fd, 64).decode(errors="replace")
        if not pressed:  # the terminal is gone
            raise KeyboardInterrupt
        self._pressed = _SEQUENCE.sub("", pressed)
        return self._next()

    def _next(self) -> str:
        key, self._pressed = self._pressed[:1], self._pressed[1:]
        return key
