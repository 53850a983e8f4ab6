"""Synchronous at the door: an async load inside, an ordinary blocking call outside.

The load runs in a thread of its own with its own trio loop, so callers may stand in any thread, or inside any event
loop (which they block, as they would with safetensors).
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from gpuload.errors import first_error

T = TypeVar("T")


class Inside(Generic[T]):
    """One async function at work in its own thread."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpuload-load", daemon=True)
        self._thread.start()
        self._started.wait()

    def join(self) -> T:
        """The result, or the one error that ended the work. An interrupt cancels the work, waits, and rises."""
        try:
            self._thread.join()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def run_soon(self, call: Callable[[], object]) -> None:
        """Have the loop call it; not at all if the work has ended."""
        if self._token is not None:
            try:
                self._token.run_sync_soon(call)
            except trio.RunFinishedError:
                pass

    def cancel(self) -> None:
        """Cancel and wait until all of it has ended."""
        self.run_soon(self._scope.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._result = trio.run(self._main)
        except BaseException as error:
            self._error = first_error(error)
        finally:
            self._started.set()

    async def _main(self) -> T | None:
        self._token = trio.lowlevel.current_trio_token()
        self._started.set()
        with self._scope:
            return await self._work()
        return None


def run_inside(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work` to its end in its own thread and loop. Raises: the one error that ended it."""
    return Inside(work).join()
