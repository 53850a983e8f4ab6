"""Traces of a real mount: one tree from a load to every request that the origin saw, and no secret in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.otlp import Received, Receiver, receiving
from tests.servers.swift import SwiftServer

MIB = 1 << 20
CONTENT = ramp(21 * MIB + 5)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def environment(receiver: Receiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_SERVICE_NAME": "weights"}


def stop(mount: TestMount, receiver: Receiver) -> None:
    """End the mount, which has sent all spans then: once the first have come, for what sends them takes its time to
    start on a busy machine, and an end waits for it some seconds only.
    """
    assert mount.wait_for(lambda: bool(receiver.spans))
    mount.stop()


def named(receiver: Receiver, name: str) -> list[Received]:
    return [span for span in receiver.spans if span.name == name]


def assert_is_tree(receiver: Receiver) -> None:
    """Every span's parents came, up to a load; children lie within the trace of their root."""
    for span in receiver.spans:
        root = receiver.root_of(span)
        assert (root.name, root.parent_id, root.trace_id) == ("load", "", span.trace_id), span


def test_each_request_of_a_load_is_a_span_below_it(nginx: NginxServer, mounted: Mounted, receiver: Receiver) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT, "n/b.bin": CONTENT})
    origin.env = environment(receiver)
    mount = mounted(origin)
    nginx.forget_requests()
    for name in ("m/a.bin", "n/b.bin"):
        assert mount.call(touching.read, str(mount.path / name)) == CONTENT
    stop(mount, receiver)
    asked = [request for request in nginx.requests() if request.path.endswith(".bin")]
    gets = {span.span_id: span for span in named(receiver, "GET")}
    assert sum(request.sent_bytes for request in asked) >= 2 * len(CONTENT)
    for request in asked:
        _, trace_id, span_id, flags = request.traceparent.split("-")
        assert span_id in gets, (request, mount.log[-2000:])
        span = gets.pop(span_id)
        assert (span.trace_id, flags) == (trace_id, "01")
        assert span.attributes["http.request.header.range"] == [request.range]
        assert span.attributes["http.response.status_code"] == request.status == 206
        assert span.attributes["url.full"].endswith(request.path)
        root = receiver.root_of(span)
        assert root.attributes["mfs.model"] == request.path.split("/")[2]
    assert not gets, "spans of requests that nobody saw"
    assert_is_tree(receiver)
    assert {span.name for span in receiver.spans} >= {"load", "fetch", "read", "GET"}
    assert {span.attributes["mfs.model"] for span in named(receiver, "load")} == {"m", "n"}
    assert {span.resource["service.name"] for span in receiver.spans} == {"weights"}
    spans = receiver.by_id()
    assert {spans[span.parent_id].name for span in named(receiver, "fetch")} == {"load"}
    assert {spans[span.parent_id].attributes["mfs.from"] for span in named(receiver, "GET")} == {"origin"}
    assert "origin" in {span.attributes["mfs.waited_for"] for span in named(receiver, "read")}
    assert all(span.start_ns <= span.end_ns for span in receiver.spans)


def test_chunks_that_a_registry_is_asked_for_side_by_side_are_below_their_order(
    nginx: NginxServer, tmp_path: Path, mounted: Mounted, receiver: Receiver
) -> None:
    folder = nginx.files / tmp_path.name
    origin = origins.RegistryOrigin(folder)
    origin.put_all({"m/a.bin": CONTENT})
    origin.url = f"mfs+{nginx.url}{tmp_path.name}/llama:prod"
    origin.env = environment(receiver)
    mount = mounted(origin)
    found = mount.call(touching.pread_direct, str(mount.path / "m/a.bin"), 4 * MIB, 8 * MIB)
    assert found == CONTENT[8 * MIB : 12 * MIB]
    stop(mount, receiver)
    asked = [request for request in nginx.requests() if "/chunks/" in request.path and request.range]
    spans = receiver.by_id()
    assert len(asked) > 1
    for request in asked:
        assert receiver.root_of(spans[request.traceparent.split("-")[2]]).attributes["mfs.model"] == "m"
    assert "decode" in {span.attributes["mfs.waited_for"] for span in named(receiver, "read")}


def test_without_the_variables_nothing_is_sent(nginx: NginxServer, mounted: Mounted) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT})
    origin.env = {"OTEL_SERVICE_NAME": "weights", "OTEL_TRACES_SAMPLER": "always_on"}
    mount = mounted(origin)
    nginx.forget_requests()
    mount.call(touching.read, str(mount.path / "m/a.bin"))
    requests = [request for request in nginx.requests() if request.path.endswith(".bin")]
    assert requests
    assert {request.traceparent for request in requests} == {""}
    assert "opentelemetry" not in Path(f"/proc/{mount.pid}/maps").read_text()
    assert mount.client.status()["warnings"] == []


def told_of(origin: origins.Origin, receiver: Receiver, folder: Path) -> bytes:
    """All that was sent of one load, which is a tree; its bytes were read aright."""
    with TestMount(folder, origin.url, source=origin.source, env=origin.env | environment(receiver)) as mount:
        assert mount.call(touching.read, str(mount.path / "m/a.bin")) == CONTENT
        stop(mount, receiver)
    assert_is_tree(receiver)
    assert named(receiver, "fetch")
    return b"".join(receiver.bodies)


def assert_tells_no_secret(sent: bytes, *secrets: str) -> None:
    for secret in (*secrets, "X-Amz-Signature", "Signature=", "Authorization", "token="):
        assert secret.encode() not in sent, secret


def test_s3s_signatures_hold_and_no_key_is_told(
    swift: SwiftServer, s3_bucket: str, tmp_path: Path, receiver: Receiver
) -> None:
    origin = origins.S3Origin(swift, s3_bucket)
    origin.put_all({"m/a.bin": CONTENT})
    sent = told_of(origin, receiver, tmp_path / "m")
    assert named(receiver, "GET")
    assert_tells_no_secret(sent, origin.env["AWS_SECRET_ACCESS_KEY"], origin.env["AWS_ACCESS_KEY_ID"])


def test_a_hubs_signed_addresses_hold_and_no_token_is_told(hub: HubServer, tmp_path: Path, receiver: Receiver) -> None:
    origin = origins.HubOrigin(hub)
    origin.put_all({"m/a.bin": CONTENT})
    sent = told_of(origin, receiver, tmp_path / "m")
    assert named(receiver, "GET")
    assert_tells_no_secret(sent, hub.token)


def test_a_user_in_the_url_is_not_told(nginx: NginxServer, tmp_path: Path, receiver: Receiver) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT})
    user = f"{nginx.user}:{nginx.password}"
    origin.url = origin.url.replace(nginx.url, f"{nginx.url}~private/").replace("://", f"://{user}@")
    sent = told_of(origin, receiver, tmp_path / "m")
    assert named(receiver, "GET")
    assert_tells_no_secret(sent, user, base64.b64encode(user.encode()).decode())


def test_a_folder_is_read_and_not_asked(tmp_path: Path, receiver: Receiver) -> None:
    origin = origins.RegistryOrigin(tmp_path / "registry")
    origin.put_all({"m/a.bin": CONTENT})
    told_of(origin, receiver, tmp_path / "m")
    assert not named(receiver, "GET")


def test_a_collector_that_is_away_delays_and_fails_nothing(
    nginx: NginxServer, mounted: Mounted, receiver: Receiver
) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT})
    origin.env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    mount = mounted(origin)
    assert mount.call(touching.read, str(mount.path / "m/a.bin")) == CONTENT
    assert mount.wait_for(lambda: "traces cannot be exported" in mount.log)
    mount.stop()
    assert mount.log.count("traces cannot be exported") == 1


def test_a_mount_is_handed_over_while_its_collector_does_not_answer(
    nginx: NginxServer, mounted: Mounted, receiver: Receiver
) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT, "n/b.bin": CONTENT})
    origin.env = environment(receiver)
    receiver.may_answer.clear()
    mount = mounted(origin)
    assert mount.call(touching.read, str(mount.path / "m/a.bin")) == CONTENT
    assert mount.wait_for(lambda: receiver.requests_count > 0)
    mount.hand_over()
    receiver.may_answer.set()
    assert mount.call(touching.read, str(mount.path / "n/b.bin")) == CONTENT
    assert mount.wait_for(lambda: "n" in {span.attributes["mfs.model"] for span in named(receiver, "load")})


def test_an_origin_that_fails_shows_in_the_tree_and_the_log_names_it(
    nginx: NginxServer, mounted: Mounted, receiver: Receiver
) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/a.bin": CONTENT})
    origin.env = environment(receiver)
    mount = mounted(origin, log_level="debug", log_format="json")
    mount.alarms_expected.append("Traceback")  # what was refused, and where
    assert mount.call(touching.tree, str(mount.path)) == {"m/a.bin": len(CONTENT)}
    (origin.root / "m/a.bin").write_bytes(b"another")
    assert mount.call(touching.read_failure, str(mount.path / "m/a.bin")) == "ESTALE"
    stop(mount, receiver)
    assert_is_tree(receiver)
    failed = [span for span in named(receiver, "fetch") if span.error]
    assert failed
    assert all("a.bin" in span.error for span in failed)
    lines = [json.loads(line) for line in mount.log.splitlines() if line.startswith("{")]
    told = [line for line in lines if line["process"] == "worker" and "trace_id" in line]
    assert {span.trace_id for span in failed} <= {line["trace_id"] for line in told}
    assert {line["span_id"] for line in told} <= set(receiver.by_id())
    assert {span.attributes.get("http.response.status_code") for span in named(receiver, "GET")} <= {412, 416, 206}
