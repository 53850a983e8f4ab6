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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.servers.process import PROJECT_ROOT, START_TIMEOUT_S, ServerError, ServerProcess, free_port

CALL_TIMEOUT_S = 20.0


class Remote:
    """The parent's end: starts `python -m module`, waits until it is ready, and calls its commands."""

    def __init__(
        self,
        module: str,
        *,
        log: Path,
        settings: Mapping[str, object],
        env: Mapping[str, str] | None = None,
        ready_s: float = START_TIMEOUT_S,
    ) -> None:
        """Start the module and return when it has taken its settings and listens. Raises: ServerError.

        env: added to this process's environment. ready_s: until it must be.
        """
        argv = [sys.executable, "-m", module, "--obey"]
        self.process = ServerProcess(module, argv, log=log, env=env, cwd=PROJECT_ROOT, pipe=True)
        self._lock = threading.Lock()
        self._buffer = b""
        self._exchange(settings, ready_s)

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


class RemoteServer(ABC):
    """A server in such a process: started, killed and started again on the same port."""

    def __init__(self, name: str, root: Path, port: int | None) -> None:
        """name: its own, in words and for its log below `root`. port: None takes a free one."""
        self.root = root
        self.port = port or free_port()
        self._name = name
        self._remote: Remote | None = None

    @abstractmethod
    def begin(self, log: Path) -> Remote:
        """Start the process; it listens on `port` when this returns."""

    def start(self) -> None:
        """Start, as if for the first time, and return when it listens. Raises: ServerError."""
        if self._remote:
            raise ServerError(f"the {self._name} is already running")
        self._remote = self.begin(self.root / f"{self._name.replace(' ', '-')}-{self.port}.log")

    def stop(self) -> None:
        """Kill it: its connections are cut, new ones get ECONNREFUSED. `start` brings it back on its port."""
        if self._remote:
            self._remote.stop()
            self._remote = None

    @property
    def running(self) -> Remote:
        """Raises: ServerError if it is not."""
        if self._remote is None:
            raise ServerError(f"the {self._name} is not running")
        return self._remote

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


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
