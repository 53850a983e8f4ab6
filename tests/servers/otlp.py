"""Where traces go: a receiver of OTLP over HTTP, which decodes what comes by OpenTelemetry's own protobuf classes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Received(NamedTuple):
    """One span as it was sent."""

    trace_id: str
    span_id: str
    parent_id: str
    """'' for a root."""
    name: str
    kind: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    start_ns: int
    end_ns: int
    error: str


class Receiver:
    """What has come so far, and how to answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""
        self.spans: list[Received] = []
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.status = 200
        """Of the next answers."""
        self.refuse_once = 0
        """A status for the next answer alone."""
        self.headers: dict[str, str] = {}
        """Of the last request."""
        self.may_answer = threading.Event()
        """Cleared, requests come in and hang."""
        self.may_answer.set()
        self.requests_count = 0

    def by_id(self) -> dict[str, Received]:
        return {span.span_id: span for span in self.spans}

    def root_of(self, span: Received) -> Received:
        """The end of a span's parent chain; itself where its parent never came."""
        known = self.by_id()
        while span.parent_id in known:
            span = known[span.parent_id]
        return span

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
        from opentelemetry.proto.trace.v1.trace_pb2 import Status

        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        self.bodies.append(body)
        self.paths.add(path)
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            for span in (span for scope in group.scope_spans for span in scope.spans):
                failed = span.status.code == Status.STATUS_CODE_ERROR
                self.spans.append(Received(
                    span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, span.kind,
                    _plain(span.attributes), resource, span.start_time_unix_nano, span.end_time_unix_nano,
                    (span.status.message or "error") if failed else "",
                ))  # fmt: skip


def _plain(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver at a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests_count += 1
            receiver.headers = dict(self.headers)
            receiver.may_answer.wait()
            status, receiver.refuse_once = receiver.refuse_once or receiver.status, 0
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if status == 200:
                receiver.take(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.may_answer.set()
            server.shutdown()
            thread.join()
