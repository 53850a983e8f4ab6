"""The requests of one order, in the process that makes them: each a span, whose `traceparent` goes with it.

Which order a thread works for is a context variable: who hands parts of it to other threads copies the context.
Source: W3C Trace Context; OpenTelemetry's semantic conventions for HTTP client spans.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from mfs.tracing.spans import CLIENT, Context, Row, new_span_id, parse_traceparent, wall_ns

REQUESTS_MAX = 256
"""Of one order: it asks for 4 MiB, so for more of them something is wrong; those after them are not told."""


class _Order:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.rows: list[Row] = []


_order: ContextVar[_Order | None] = ContextVar("order", default=None)


@contextmanager
def recording(traceparent: str | None) -> Iterator[list[Row]]:
    """Requests made in here, by this context, are spans below `traceparent`: rows as in `spans`, bounded."""
    context = parse_traceparent(traceparent) if traceparent else None
    if context is None:
        yield []
        return
    order = _Order(context)
    token = _order.set(order)
    try:
        yield order.rows
    finally:
        _order.reset(token)


def current() -> Context | None:
    """The trace that this thread works for, for logs."""
    order = _order.get()
    return order.context if order is not None else None


class Request:
    """One request on its way, as a context: ended by leaving it."""

    __slots__ = ("_attributes", "_name", "_order", "_since_s", "_span_id", "status")

    def __init__(self, method: str, shown: str, host: str, port: int) -> None:
        """shown: the URL without what lets anybody in."""
        self._order = _order.get()
        self.status = 0
        """Of the answer, once there is one."""
        if self._order is not None:
            self._name = method
            self._span_id = new_span_id()
            self._attributes: dict[str, Any] = {
                "http.request.method": method, "url.full": shown, "server.address": host, "server.port": port,
            }  # fmt: skip

    def headers(self, others: Mapping[str, str]) -> Mapping[str, str]:
        """The request's headers, with the one that tells the origin who asks."""
        if self._order is None:
            return others
        if "Range" in others:
            self._attributes["http.request.header.range"] = [others["Range"]]
        mine = Context(self._order.context.trace_id, self._span_id)
        return {**others, "traceparent": mine.traceparent}

    def __enter__(self) -> Request:
        if self._order is not None:
            self._since_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        order = self._order
        if order is None or len(order.rows) >= REQUESTS_MAX:
            return
        if self.status:
            self._attributes["http.response.status_code"] = self.status
        failed = kind.__name__ if kind is not None else str(self.status) if self.status >= 400 else ""
        if failed:
            self._attributes["error.type"] = failed
        order.rows.append([
            order.context.trace_id, self._span_id, order.context.span_id, self._name, CLIENT, wall_ns(self._since_s),
            time.time_ns(), failed, self._attributes,
        ])  # fmt: skip
