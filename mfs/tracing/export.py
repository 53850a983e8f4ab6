"""Rows as OTLP, by OpenTelemetry's protobuf classes. Blocks: for `process`, and threads of who has no reader.

A row takes 6 to 10 µs (the SDK's encoder: 34), since most attributes were seen before and are kept as they go out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mfs.errors import StoreError
from mfs.tracing.spans import Row

_KNOWN_MAX = 4096
"""Attributes kept: names of files, addresses, statuses; a few hundred bytes each."""
_SMALL = 1 << 16
"""Numbers from here on are offsets and sizes, which come once."""

_SAMPLED = 1
"""As in `traceparent`."""

Encode = Callable[[Sequence[Row]], bytes]


class Exporter:
    """Where traces go, as the OTEL_ variables say. Calls one at a time."""

    def __init__(self, service: str, environment: Mapping[str, str] = os.environ) -> None:
        """service: what we are called where the environment does not say.

        Raises: StoreError if it says nonsense, or if OpenTelemetry cannot be imported.
        """
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what it says we say ourselves, once
        try:  # the imports too: versions that do not fit each other make them raise anything
            from mfs.tracing.collector import Collector

            self._encode = _encoder(service, environment)
            self._collector = Collector(environment)
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(
                f"OpenTelemetry cannot be used as the OTEL_ variables say: {type(error).__name__}: {error}"
            ) from error

    def export(self, rows: Sequence[Row]) -> None:
        """Send spans that have ended. Raises: StoreError if they were not taken in time."""
        if not rows:
            return
        try:
            self._collector.post(self._encode(rows))
        except StoreError:
            raise
        except Exception as error:  # of requests, or of a row that is none
            raise StoreError(f"the collector of traces: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._collector.close()


def _encoder(service: str, environment: Mapping[str, str]) -> Encode:
    """What makes a request of rows. Its imports, and who we are to the collector, take a tenth of a second."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
    from opentelemetry.sdk.resources import Resource as Found

    def value_of(value: Any) -> AnyValue:
        if isinstance(value, str):
            return AnyValue(string_value=value)
        if isinstance(value, bool):  # before int, which it is
            return AnyValue(bool_value=value)
        if isinstance(value, int):
            return AnyValue(int_value=value)
        if isinstance(value, float):
            return AnyValue(double_value=value)
        return AnyValue(array_value=ArrayValue(values=[value_of(part) for part in value]))

    @lru_cache(_KNOWN_MAX, typed=True)
    def known(name: str, value: str | int) -> KeyValue:
        return KeyValue(key=name, value=value_of(value))

    def attribute(name: str, value: Any) -> KeyValue:
        is_usual = isinstance(value, str) or (isinstance(value, int) and value < _SMALL)
        return known(name, value) if is_usual else KeyValue(key=name, value=value_of(value))

    def span(row: Row) -> Span:
        trace, identity, parent, name, kind, start_ns, end_ns, error, attributes = row
        return Span(
            trace_id=bytes.fromhex(trace), span_id=bytes.fromhex(identity), parent_span_id=bytes.fromhex(parent),
            name=name, kind=kind, start_time_unix_nano=start_ns, end_time_unix_nano=end_ns, flags=_SAMPLED,
            attributes=[attribute(*pair) for pair in attributes.items()],
            status=Status(code=Status.STATUS_CODE_ERROR, message=error) if error else None,
        )  # fmt: skip

    is_named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    found = Found.create({} if is_named else {"service.name": service}).attributes
    resource = Resource(attributes=[KeyValue(key=name, value=value_of(value)) for name, value in found.items()])
    scope = InstrumentationScope(name="mfs")

    def encode(rows: Sequence[Row]) -> bytes:
        spans = ScopeSpans(scope=scope, spans=[span(row) for row in rows])
        request = ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[spans])])
        return bytes(request.SerializeToString())

    return encode
