"""Begins traces, and has what ended sent away by whoever can."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from mfs.errors import MfsError
from mfs.shown import mask
from mfs.tracing import settings
from mfs.tracing.spans import Context, Outbox, Row, Span, new_span_id, new_trace_id

logger = logging.getLogger(__name__)

BATCH_ROWS = 2048
"""Some 600 KB; a request costs as much as a hundred rows."""
_EVERY_S = 5.0
"""As the SDK's own processor."""
_LOOK_S = 1.0
_LAST_S = 5.0
"""For what is left at the end."""

Send = Callable[[list[Row]], Awaitable[Any]]
"""Exports rows; raises MfsError if that failed."""


class Tracer:
    """The traces of one process. Belongs to the trio thread."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Costs nothing where no traces are wanted. Otherwise reads the SDK's sampler: a tenth of a second."""
        self.outbox = Outbox()
        self.fault = ""
        """Why traces that are wanted cannot be had."""
        self._sampler: Any = None
        self._is_failing = False
        if settings.is_wanted(environment):
            try:
                self.fault = settings.fault(environment)
                if not self.fault:
                    from opentelemetry.sdk.trace import TracerProvider

                    self._sampler = TracerProvider(shutdown_on_exit=False).sampler
                    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # we say it ourselves, once
            except Exception as error:  # of a malformed variable, or of packages that do not fit each other
                self.fault = _fault(error)

    @property
    def is_on(self) -> bool:
        return self._sampler is not None

    def begin(self, name: str, attributes: dict[str, Any], parent: Context | None = None) -> Span | None:
        """The first span here of a trace, or of another's; None if nobody wants it."""
        if self._sampler is None:
            return None
        trace_id = parent.trace_id if parent is not None else new_trace_id()
        if not self._is_sampled(trace_id, name, attributes, parent):
            return None
        context = Context(trace_id, new_span_id())
        span = Span(self.outbox, name, context, parent.span_id if parent is not None else "")
        span.attributes.update(attributes)
        return span

    def _is_sampled(self, trace_id: str, name: str, attributes: dict[str, Any], parent: Context | None) -> bool:
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

        above = None
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
            known = SpanContext(int(trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
            above = set_span_in_context(NonRecordingSpan(known))
        try:
            found = self._sampler.should_sample(above, int(trace_id, 16), name, attributes=attributes)
            return bool(found.decision.is_sampled())
        except Exception as error:  # of one that somebody installed: who opens a file must not fail for it
            self._sampler, self.fault = None, _fault(error)
            logger.warning("%s", self.fault)
            return False

    async def run(self, send: Send) -> None:
        """Send what ended: a full batch, or what waited for _EVERY_S, or when no more comes. Until cancelled; then
        `flush` does the rest.
        """
        if self.is_on:
            await self._send(send)  # nothing yet: whoever exports imports what that takes
        sent_s, seen = trio.current_time(), 0
        while self.is_on:
            await trio.sleep(_LOOK_S)
            count, now_s = len(self.outbox), trio.current_time()
            if count and (count == seen or count >= BATCH_ROWS or now_s - sent_s >= _EVERY_S):
                while len(self.outbox):
                    await self._send(send)
                sent_s, count = now_s, 0
            seen = count

    async def flush(self, send: Send) -> None:
        """Send what is left, within seconds, and see what was under way taken."""
        with trio.move_on_after(_LAST_S, shield=True):
            while self.is_on:
                await self._send(send)
                if not len(self.outbox):
                    return

    async def _send(self, send: Send) -> None:
        try:
            await send(self.outbox.take(BATCH_ROWS))
        except MfsError as error:  # those are lost: whoever is away must not cost memory
            if not self._is_failing:
                logger.warning("traces cannot be exported, and are dropped until they can: %s", mask(str(error)))
            self._is_failing = True
        else:
            if self._is_failing:
                logger.warning("traces are exported again")
            self._is_failing = False


def _fault(error: Exception) -> str:
    said = f"{type(error).__name__}: {mask(str(error))}"
    return f"no traces: OpenTelemetry cannot be used as the OTEL_ variables say: {said}"
