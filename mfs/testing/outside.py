"""A process that touches a mount on a test's behalf, so that a hang cannot wedge the test run.

A process that waits for a FUSE answer cannot be killed; only the end of the connection frees it. So the test calls
functions here, in a child, with a deadline: when it passes, the caller's `on_hang` ends the connection.
"""

from __future__ import annotations

import pickle
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")


class HungError(Exception):
    """A call was not answered within its deadline; the mount was aborted to free it."""


class Outside:
    """Calls module-level functions in one child process, one at a time. Start several for parallel readers."""

    def __init__(self, *, on_hang: Callable[[], None] = lambda: None, cwd: Path | None = None) -> None:
        """on_hang: called when a deadline passes, before the child is killed. cwd: from where modules are found."""
        self._on_hang = on_hang
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mfs.testing.outside"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd
        )
        self._buffer = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, function: Callable[..., T], *args: Any, timeout_s: float = 30.0) -> T:
        """`function(*args)` over there. Raises what it raised, HungError after `timeout_s`, EOFError if it died."""
        self.start(function, *args)
        result: T = self.finish(timeout_s=timeout_s)
        return result

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call; `finish` waits for it."""
        assert self._process.stdin is not None
        _write(self._process.stdin, (function, args))

    def finish(self, *, timeout_s: float = 30.0) -> Any:
        """The result of the call begun last; see `call`."""
        outcome, error = self._receive(timeout_s)
        if error is not None:
            raise error
        return outcome

    def is_busy(self, *, for_s: float = 0.0) -> bool:
        """Whether the call begun last has no answer yet, having waited `for_s` for one."""
        assert self._process.stdout is not None
        if self._buffer:
            return False
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            return not ready.select(for_s)

    def close(self) -> None:
        """End the child; if it hangs, `on_hang` is called."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._on_hang()
                self._process.wait(10)

    def _receive(self, timeout_s: float) -> tuple[Any, BaseException | None]:
        stdout = self._process.stdout
        assert stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            while not self._is_whole():
                if not ready.select(max(0.0, deadline_s - time.monotonic())):
                    self._on_hang()
                    self._process.kill()
                    raise HungError(f"no answer within {timeout_s:g} s")
                data = stdout.read1(1 << 20)  # type: ignore[attr-defined]
                if not data:
                    raise EOFError(f"the process outside ended with status {self._process.wait(10)}")
                self._buffer += data
        (length,) = _LENGTH.unpack_from(self._buffer)
        outcome: tuple[Any, BaseException | None] = pickle.loads(memoryview(self._buffer)[8 : 8 + length])
        self._buffer = self._buffer[8 + length :]
        return outcome

    def _is_whole(self) -> bool:
        return len(self._buffer) >= 8 and len(self._buffer) >= 8 + _LENGTH.unpack_from(self._buffer)[0]


def _write(pipe: IO[bytes], value: object) -> None:
    body = pickle.dumps(value)
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def main() -> None:
    """Answer calls until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a called function prints must not break the protocol
    sys.path.insert(0, "")
    while head := source.read(_LENGTH.size):
        function, args = pickle.loads(source.read(_LENGTH.unpack(head)[0]))
        try:
            answer: tuple[Any, BaseException | None] = (function(*args), None)
        except Exception as error:
            answer = (None, error)
        _write(sink, answer)


if __name__ == "__main__":
    main()
