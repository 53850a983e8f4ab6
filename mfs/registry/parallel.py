"""Doing something for each of many in a few threads. For work that blocks; `mfs.several` is the same for trio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sized
from typing import Generic, TypeVar

T = TypeVar("T")

INTERRUPTED_S = 1.0
"""What is under way may end in this time after Ctrl-C: whatever computes does, what waits for a server need not."""


def for_each(
    items: Iterable[T], work: Callable[[T], object], *, at_once: int, stop: Callable[[], object] = lambda: None
) -> None:
    """Do `work` for each item, in their order, `at_once` of them at most under way; each is taken when its turn comes.

    stop: called once something has failed, or after Ctrl-C, from any thread: ends what is under way sooner.
    Raises: the first error of all. Nothing is begun after it, and what is under way goes to its end. Ctrl-C waits
    for that no longer than INTERRUPTED_S: it may take as long as a store's deadline. The rest ends with the process.
    """
    left, lock = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def take_turns() -> None:
        while not errors:
            try:
                with lock:
                    try:
                        item = next(left)
                    except StopIteration:
                        return
                work(item)
            except BaseException as error:
                errors.append(error)
                stop()

    count = min(at_once, len(items)) if isinstance(items, Sized) else at_once
    # Daemons, for which no exit of the process waits.
    threads = [threading.Thread(target=take_turns, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C, which comes to the main thread alone
        errors.append(error)
        stop()
        stop_s = time.monotonic() + INTERRUPTED_S
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0, stop_s - time.monotonic()))
        raise
    if errors:
        raise errors[0]


class Beside(Generic[T]):
    """A call for a pool's thread, which can be taken back while none has begun it; also where the pool could not start
    a thread for it (RuntimeError), and yet has it in its queue.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._is_taken = False
        self._ended = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def __call__(self) -> None:
        with self._lock:
            if self._is_taken:
                return
            self._is_taken = True
        try:
            self._result.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def withdraw(self) -> None:
        """It is not begun any more."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                self._ended.set()

    def wait(self) -> None:
        """Until it has ended, or was withdrawn."""
        self._ended.wait()

    def result(self) -> T:
        """What the call returned, once it has ended. Raises: what the call raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]
