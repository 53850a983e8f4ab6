"""Trying again: what, how often, how long."""

from __future__ import annotations

import email.utils
import http.client
import threading
import time

import pytest

from mfs.errors import ChangedError, StoreError, TransientStoreError
from mfs.fetch.retry import HOLD_S_MAX, Hold, Rest, wished_pause_s, with_retries
from mfs.fetch.told import listener, watching
from mfs.types import ByteRange


def failing(times: int, error: Exception) -> tuple[list[float], object]:
    calls: list[float] = []

    def attempt() -> str:
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise error
        return "done"

    return calls, attempt


def test_what_may_pass_is_tried_again() -> None:
    calls, attempt = failing(3, TransientStoreError("reset"))
    assert with_retries(attempt, what="x", deadline_s=time.monotonic() + 20) == "done"  # type: ignore[arg-type]
    assert len(calls) == 4


@pytest.mark.parametrize("error", [ChangedError("c"), StoreError("s"), ValueError("v")])
def test_what_will_not_pass_is_not(error: Exception) -> None:
    calls, attempt = failing(3, error)
    with pytest.raises(type(error)):
        with_retries(attempt, what="x", deadline_s=time.monotonic() + 20)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_the_last_message_says_how_often_how_long_and_why() -> None:
    calls, attempt = failing(1000, TransientStoreError("connection refused"))
    deadline_s = time.monotonic() + 0.3
    with pytest.raises(TransientStoreError) as caught:
        with_retries(attempt, what="s3://b/k: bytes 0-9", deadline_s=deadline_s)  # type: ignore[arg-type]
    assert len(calls) >= 2
    assert str(caught.value).startswith(f"s3://b/k: bytes 0-9: given up after {len(calls)} attempts in 0.")
    assert str(caught.value).endswith("s: connection refused")
    assert all(call < deadline_s for call in calls)


def test_what_came_is_not_asked_for_again() -> None:
    out = bytearray(10)
    rest = Rest(ByteRange(100, 110), memoryview(out))
    asked: list[ByteRange] = []

    def read(span: ByteRange, view: memoryview) -> str:
        asked.append(span)
        assert len(view) == len(span)
        came = min(4, len(span))
        view[:came] = bytes(range(span.start, span.start + came))
        if came < len(span):
            error = TransientStoreError("reset")
            error.received_bytes = came if len(asked) != 2 else 0
            raise error
        return "done"

    deadline_s = time.monotonic() + 20
    assert with_retries(lambda: rest.take(read), what="x", deadline_s=deadline_s) == "done"
    assert asked == [ByteRange(start, 110) for start in (100, 104, 104, 108)]
    assert out == bytes(range(100, 110))


@pytest.mark.parametrize("is_exact", [True, False])
def test_who_watches_is_told_of_all_that_came_where_that_is_exact_by_itself(is_exact: bool) -> None:
    told: list[int] = []

    def read(span: ByteRange, view: memoryview) -> None:
        if (arrived := listener()) is not None:
            arrived(3)
        error = TransientStoreError("reset")
        error.received_bytes = 4
        raise error

    with watching(told.append):
        rest = Rest(ByteRange(100, 110), memoryview(bytearray(10)), is_exact=is_exact)
        for _ in range(2):
            with pytest.raises(TransientStoreError):
                rest.take(read)
        assert listener() is None
    assert told == ([3, 4, 7, 8] if is_exact else [])


def test_a_wish_beyond_the_deadline_is_not_waited_for() -> None:
    _, attempt = failing(1, TransientStoreError("429", retry_after_s=3600))
    with pytest.raises(TransientStoreError, match=r"1 attempt in .*the server asks to wait 3600 s") as caught:
        with_retries(attempt, what="x", deadline_s=time.monotonic() + 20)  # type: ignore[arg-type]
    assert caught.value.retry_after_s == 3600


def test_a_pause_ends_when_the_source_is_closed() -> None:
    _, attempt = failing(1, TransientStoreError("429", retry_after_s=3600))
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StoreError, match="closed"):
        with_retries(attempt, what="x", deadline_s=time.monotonic() + 9000, stopped=stopped)  # type: ignore[arg-type]


def test_what_one_was_asked_holds_for_all_for_as_long() -> None:
    hold = Hold("the Hub")
    for nothing in (None, 0.0):
        hold.note(nothing)
        hold.check()
    hold.note(60.0)
    hold.note(1.0)
    with pytest.raises(TransientStoreError, match="the Hub asks to wait") as caught:
        hold.check()
    assert caught.value.retry_after_s is not None
    assert 1.0 < caught.value.retry_after_s <= 60.0
    hold.note(1e9)
    with pytest.raises(TransientStoreError) as caught:
        hold.check()
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s <= HOLD_S_MAX
    hold._until_s = time.monotonic()
    hold.check()


@pytest.mark.parametrize(
    ("name", "value", "wished_s"),
    [
        ("Retry-After", "7", 7.0),
        ("retry-after", email.utils.formatdate(0, usegmt=True), 0.0),
        ("Retry-After", "soon", None),
        ("RateLimit", '"api";r=0;t=55', 55.0),
        ("RateLimit", '"api";r=12;t=55', None),
        ("X", "1", None),
    ],
)
def test_what_servers_ask_for(name: str, value: str, wished_s: float | None) -> None:
    headers = http.client.HTTPMessage()
    headers[name] = value
    assert wished_pause_s(headers) == wished_s
