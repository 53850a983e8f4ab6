"""One child process with a log file: started, awaited with a deadline, and gone when its parent is.

Used by every server beside it; knows nothing of HTTP, S3 or mfs.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]

START_TIMEOUT_S = 60.0
"""Until a server must answer. Generous: two cores may be shared with a full test run."""

STOP_TIMEOUT_S = 10.0
"""Between SIGTERM and SIGKILL."""

LOG_TAIL_BYTES = 4096

# The kernel sends PDEATHSIG when the *thread* that forked ends (prctl(2)), so all forks happen on a thread that
# lives as long as the process: a server started from a short-lived worker thread must not die with that thread.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="server-spawner")

_handed_out: set[int] = set()


class ServerError(Exception):
    """A test server did not start, or died; the message ends with the tail of its log."""


class ServerProcess:
    """A child that the kernel kills when this process dies, with stdout and stderr in a log file."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pipe: bool = False,
    ) -> None:
        """Start `argv`.

        env: added to this process's environment.
        pipe: make stdin and stdout pipes (see `tests.servers.remote`); stderr still goes to the log.
        """
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        guarded = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        with log.open("ab") as out:
            start = _spawner.submit(
                subprocess.Popen,
                guarded,
                stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else out,
                stderr=out,
                env={**os.environ, **(env or {})},
                cwd=cwd,
            )
            self.popen: subprocess.Popen[bytes] = start.result(START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once `ready()` is true; stop the process and raise ServerError if it dies or the deadline passes."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if self.popen.poll() is not None:
                raise self.failure(f"exited with status {self.popen.returncode} before it answered")
            if time.monotonic() > deadline_s:
                self.stop()
                raise self.failure(f"did not answer within {timeout_s:g} s")
            time.sleep(0.02)

    def failure(self, what: str) -> ServerError:
        """An error saying `what`, with the tail of the log."""
        tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").rstrip()
        return ServerError(f"{self.name} {what}; its log {self.log} ends:\n{tail or '(empty)'}")

    def stop(self) -> None:
        """Terminate, kill if that takes too long, and reap. Harmless when already stopped."""
        if self.popen.poll() is None:
            self.popen.terminate()
        self.reap()

    def complete(self) -> None:
        """Wait until it has done its work and ended by itself. Raises: ServerError if it fails or the time is up."""
        try:
            self.popen.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.stop()
        if self.popen.returncode:
            raise self.failure(f"failed with status {self.popen.returncode}")

    def reap(self) -> None:
        """Wait for an end that was already asked for; kill after STOP_TIMEOUT_S."""
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """A loopback TCP port nobody listens on, below the kernel's ephemeral range.

    Below it, because a server that is stopped and started again on its port must not find it taken by some client's
    outgoing connection. Random, because several test runs may share a machine.
    """
    for _ in range(200):
        port = random.randrange(12_000, 32_000)
        if port in _handed_out:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _handed_out.add(port)
        return port
    raise ServerError("found no free TCP port between 12000 and 32000 in 200 attempts")


def answers_tcp(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def program_of_wheel(distribution: str, name: str) -> Path | None:
    """The program that a wheel brought into this environment, or None where there is none for this machine."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next((Path(str(file.locate())) for file in files if file.name == name), None)
    return found.resolve() if found and os.access(found, os.X_OK) else None


def wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM; for modules run on their own."""
    # Blocked first: a signal between printing "ready" and sigwait must not kill the process uncleanly.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)
