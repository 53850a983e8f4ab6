"""Rows as OTLP over HTTP, by OpenTelemetry's SDK. Blocks: for worker processes, and threads of who has no reader."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mfs.errors import StoreError
from mfs.tracing.spans import CLIENT, Row

TIMEOUT_MAX_S = 10.0
"""For one batch with all its attempts, also where the environment allows more: others wait behind it."""


class Exporter:
    """Where traces go, as the OTEL_ variables say. Calls may come from several threads, one at a time each."""

    def __init__(self, service: str, environment: Mapping[str, str] = os.environ) -> None:
        """service: what we are called where the environment does not say.

        Raises: StoreError if it says nonsense, or if OpenTelemetry cannot be imported.
        """
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what it says we say ourselves, once
        is_named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        try:  # the imports too: versions that do not fit each other make them raise anything
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope

            self._resource = Resource.create({} if is_named else {"service.name": service})
            self._exporter = OTLPSpanExporter(timeout=_timeout_s(environment))
            self._scope = InstrumentationScope("mfs")
        except Exception as error:
            raise StoreError(
                f"OpenTelemetry cannot be used as the OTEL_ variables say: {type(error).__name__}: {error}"
            ) from error

    def export(self, rows: Sequence[Row]) -> None:
        """Send spans that have ended. Raises: StoreError if they were not taken in time."""
        if not rows:
            return
        try:
            from opentelemetry.sdk.trace.export import SpanExportResult

            result = self._exporter.export([self._span(row) for row in rows])
        except Exception as error:  # of requests, or what a proxy answered
            raise StoreError(f"the collector of traces: {type(error).__name__}: {error}") from error
        if result is not SpanExportResult.SUCCESS:
            raise StoreError("the collector of traces did not take them; see OTEL_EXPORTER_OTLP_ENDPOINT")

    def _span(self, row: Row) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace, span, parent, name, kind, start_ns, end_ns, error, attributes = row
        sampled = TraceFlags(TraceFlags.SAMPLED)
        above = None
        if parent:
            above = SpanContext(int(trace, 16), int(parent, 16), is_remote=False, trace_flags=sampled)
        return ReadableSpan(
            name,
            context=SpanContext(int(trace, 16), int(span, 16), is_remote=False, trace_flags=sampled),
            parent=above,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.CLIENT if kind == CLIENT else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, error) if error else Status(),
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


def _timeout_s(environment: Mapping[str, str]) -> float:
    said = environment.get("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT") or environment.get("OTEL_EXPORTER_OTLP_TIMEOUT")
    try:
        return min(TIMEOUT_MAX_S, float(said or TIMEOUT_MAX_S))
    except ValueError:  # the SDK takes its default then, which is as long
        return TIMEOUT_MAX_S
