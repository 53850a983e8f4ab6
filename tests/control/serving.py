"""A control server for tests: in a thread of its own, on a real Unix socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from mfs.control.api import DaemonApi
from mfs.control.server import ServerConfig, serve

DEFAULT = ServerConfig()


class ServerThread:
    """The server and its trio loop, seen from another thread."""

    def __init__(self, token: trio.lowlevel.TrioToken, cancel_scope: trio.CancelScope) -> None:
        self.token = token
        self._cancel_scope = cancel_scope

    def wait(self, event: trio.Event) -> None:
        """Wait for an event of the server's loop; the test's own timeout is the deadline."""
        trio.from_thread.run(event.wait, trio_token=self.token)

    def cancel_nowait(self) -> None:
        """End the server; to be called in its loop."""
        self._cancel_scope.cancel()

    def stop(self) -> None:
        trio.from_thread.run_sync(self._cancel_scope.cancel, trio_token=self.token)


@contextmanager
def serving(api: DaemonApi, path: Path, config: ServerConfig = DEFAULT) -> Iterator[ServerThread]:
    started: list[ServerThread] = []
    ready = threading.Event()
    failures: list[BaseException] = []

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, api, path, config)
            started.append(ServerThread(trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            ready.set()

    def thread() -> None:
        try:
            trio.run(run)
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    runner = threading.Thread(target=thread)
    runner.start()
    ready.wait()
    try:
        yield started[0]
    finally:
        if started and runner.is_alive():
            started[0].stop()
        runner.join()
        if failures:
            raise failures[0]
