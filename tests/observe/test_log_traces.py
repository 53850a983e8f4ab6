"""A line of the log leads to the trace that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from tests.mount import origins
from tests.mount.conftest import Mounted
from tests.observe.readers import error_of, read_chunks
from tests.servers.nginx import NginxServer
from tests.servers.otlp import receiving


def test_what_a_worker_logs_of_a_failing_fetch_names_its_span(nginx: NginxServer, mounted: Mounted) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": bytes(9 << 20)})
    with receiving() as receiver:
        origin.env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        mount = mounted(origin, log_level="debug", log_format="json")
        mount.alarms_expected = ["fill failed"]  # with its traceback, at this level
        path = str(mount.path / "m" / "a.bin")
        assert mount.call(read_chunks, path, [0]) == 0
        Path(origin.root, "m", "a.bin").write_bytes(b"another")
        assert mount.call(error_of, path)
        assert mount.wait_for(lambda: any(span.error for span in receiver.spans))
        mount.stop()
        known = {(span.trace_id, span.span_id) for span in receiver.spans}
    said = [json.loads(line) for line in mount.log.splitlines()]
    failed = [line for line in said if line["process"] == "worker" and line["message"] == "fill failed"]
    assert failed
    assert {(line["trace_id"], line["span_id"]) for line in failed} <= known
    assert all("a.bin" in line["exception"] for line in failed)
    assert not any("trace_id" in line for line in said if line["logger"] == "__main__" and line["process"] == "mfs")
