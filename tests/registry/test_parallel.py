"""Calls beside each other: begun once or withdrawn, and never after that."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mfs.registry.parallel import Beside


def test_what_is_withdrawn_does_not_begin_and_what_has_begun_is_waited_for() -> None:
    begun, may_end = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> str:
        begun.set()
        may_end.wait()
        done.append("first")
        return "one"

    calls = [Beside(first), Beside(lambda: done.append("second"))]
    with ThreadPoolExecutor(1) as pool:  # the second waits for the only thread
        for call in calls:
            pool.submit(call)
        begun.wait()
        for call in calls:
            call.withdraw()
        may_end.set()
        for call in calls:
            call.wait()
        assert done == ["first"]
        assert calls[0].result() == "one"
    assert done == ["first"]


def test_errors_come_with_the_result() -> None:
    def fails() -> None:
        raise ValueError("no")

    call = Beside(fails)
    call()
    call.wait()
    with pytest.raises(ValueError, match="no"):
        call.result()
