"""The one child of a holder: how it is started, how signals reach it, and how often another one may follow it.

`mfs.holder` and `gpuload.holder` are such parents. They must not fail and should cost little: nothing is imported here
but small modules.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""What is meant for the child."""

CRASHES_MAX, WITHIN_S = 5, 60.0
"""So many children may crash in so short a time; then one more is too many."""

_FIRST_PAUSE_S = 0.1  # doubled with each further crash; after the first there is none


class OneChild:
    """A child at most, to which our signals go; those that come while there is none, to the next."""

    def __init__(self) -> None:
        self.pid = 0
        self.was_told = False
        """A signal came: whatever the child does or dies of afterwards, it was to end."""
        self._pending: list[int] = []
        for number in SIGNALS:
            signal.signal(number, self._forward)

    def start(
        self, command: Sequence[str], prepare: Callable[[], None], environment: Mapping[str, str] | None = None
    ) -> int:
        """Run a command; returns a pidfd, which ends with it.

        prepare: called in the child. SIGNALS are blocked there, so that none is lost, or kills it, before it listens:
            it or the program unblocks them.
        environment: None: ours.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            try:
                prepare()
                os.execve(command[0], list(command), dict(os.environ if environment is None else environment))
            finally:
                os._exit(127)
        for number in self._pending:
            os.kill(self.pid, number)
        self._pending.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return os.pidfd_open(self.pid)

    def reap(self, process: int) -> tuple[int, int]:
        """Who it was, and its wait status; `process` is closed. Blocks while it lives."""
        os.close(process)
        pid, self.pid = self.pid, 0  # from here on the number may be another process's
        return pid, os.waitpid(pid, 0)[1]

    def _forward(self, number: int, frame: object) -> None:
        self.was_told = True
        if self.pid:
            os.kill(self.pid, number)
        else:
            self._pending.append(number)


class Crashes:
    """How often children crashed of late."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def may_go_on(self, *, has_served: bool) -> bool:
        """One has crashed; whether another may follow it, which it may at once: longer pauses are made here.

        has_served: one that never did counts, however long that took.
        """
        if has_served:
            self._at = [at for at in self._at if time.monotonic() - at < WITHIN_S]
        if len(self._at) == CRASHES_MAX:
            return False
        if self._at:
            time.sleep(_FIRST_PAUSE_S * 2 ** (len(self._at) - 1))
        self._at.append(time.monotonic())
        return True
