"""Whether traces are wanted: OpenTelemetry's own variables, and no others.

Source: OpenTelemetry Specification, "Environment Variable Specification" and "OTLP Exporter". What they say beyond
this `collector` reads (headers, certificates, timeouts), or the SDK by itself (the sampler, resource attributes).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.proto.trace", "requests")


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether somebody configured where traces go, and did not switch them off."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
    if exporters:
        return "otlp" in exporters
    return any(environment.get(name, "").strip() for name in _ENDPOINTS)


def fault(environment: Mapping[str, str]) -> str:
    """Why traces that are wanted cannot be had, with what to do; '' if they can."""
    protocol = next(filter(None, (environment.get(name, "").strip() for name in _PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        return f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: no traces; give the collector's address for http/protobuf"
    if any(not _is_installed(name) for name in _NEEDED):
        return "OTEL_ variables ask for traces, and OpenTelemetry is not installed: pip install 'mfs[trace]'"
    return ""


def inherited() -> str:
    """The `traceparent` of whatever this program is part of, '' for nothing: its current span, if it is traced by
    OpenTelemetry, else what its parent put into TRACEPARENT.
    """
    if "opentelemetry.trace" in sys.modules:  # else it has no span, and need not wait for the import
        context = sys.modules["opentelemetry.trace"].get_current_span().get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return os.environ.get("TRACEPARENT", "")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
