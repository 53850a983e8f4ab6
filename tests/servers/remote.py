"""A server of our own in a process of its own, told what to do over its stdin: JSON lines down, JSON lines up.

The parent's half is `Remote`; the child's half is `obey`. The child ends when its stdin does, so it never outlives
its parent, whichever way the parent went.
"""

from __future__ import annotations

import json
import selectors
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.servers.process import PROJECT_ROOT, START_TIMEOUT_S, ServerProcess

CALL_TIMEOUT_S = 20.0


class Remote:
    """The parent's end: starts `python -m module`, waits until it is ready, and calls its commands."""

    def __init__(self, module: str, *, log: Path, settings: Mapping[str, object]) -> None:
        """Start the module and return when it has taken its settings and listens. Raises: ServerError."""
        argv = [sys.executable, "-m", module, "--obey"]
        self.process = ServerProcess(module, argv, log=log, cwd=PROJECT_ROOT, pipe=True)
        self._lock = threading.Lock()
        self._buffer = b""
        self._exchange(settings, START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, command: str, **arguments: object) -> Any:
        """Run one of the child's commands and return its result. Raises: ServerError if it fails or is silent."""
        return self._exchange({"command": command, "arguments": arguments}, CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Kill the child; connections under way are cut."""
        self.process.popen.kill()
        self.process.reap()

    def _exchange(self, message: Mapping[str, object], timeout_s: float) -> Any:
        with self._lock:
            try:
                stdin = self.process.popen.stdin
                assert stdin is not None
                stdin.write(json.dumps(message).encode() + b"\n")
                stdin.flush()
                answer = json.loads(self._read_line(timeout_s))
            except OSError as error:
                raise self.process.failure(f"does not answer ({error})") from error
        if "error" in answer:
            raise self.process.failure(f"refused {message}: {answer['error']}")
        return answer["result"]

    def _read_line(self, timeout_s: float) -> bytes:
        stdout = self.process.popen.stdout
        assert stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not ready.select(max(0.0, deadline_s - time.monotonic())):
                    raise TimeoutError(f"silent for {timeout_s:g} s")
                data = stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not data:
                    raise BrokenPipeError("its end of the pipe is closed")
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def read_settings() -> dict[str, Any]:
    """The child's first line: what `Remote` was given."""
    settings: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    return settings


def obey(commands: Mapping[str, Callable[..., object]]) -> None:
    """Say that the server is ready, then run commands until stdin ends."""
    _reply({"result": None})
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            _reply({"result": commands[message["command"]](**message["arguments"])})
        except Exception as error:  # the caller's mistake; it is told, and the server goes on
            _reply({"error": f"{type(error).__name__}: {error}"})


def _reply(message: Mapping[str, object]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()
