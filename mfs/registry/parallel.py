"""Doing something for each of many in a few threads. For work that blocks; `mfs.several` is the same for trio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sized
from typing import TypeVar

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
