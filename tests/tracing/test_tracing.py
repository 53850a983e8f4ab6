"""Which variables switch traces on, what a `traceparent` is, and that nothing grows without bound."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import trio

from mfs import children
from mfs.errors import StoreError
from mfs.tracing import beside, collector, export, settings
from mfs.tracing.beside import Beside
from mfs.tracing.requests import REQUESTS_MAX, Request, current, recording
from mfs.tracing.spans import ROWS_MAX, Context, Outbox, Row, parse_traceparent
from mfs.tracing.tracer import Tracer
from tests.servers.otlp import receiving
from tests.workers.rig import until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ROW: Row = [TRACE, SPAN, "", "load", 1, 10**18, 10**18 + 5, "", {}]
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "no"}, True),
    ],
)
def test_the_standard_variables_switch_traces_on_and_off(environment: dict[str, str], wanted: bool) -> None:
    assert settings.is_wanted(environment) is wanted
    assert Tracer(environment).is_on is wanted


def test_a_protocol_that_is_not_spoken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert not tracer.is_on
    assert "http/protobuf" in tracer.fault
    monkeypatch.setattr(settings, "_NEEDED", ("no_such_package.at_all",))
    assert "mfs[trace]" in Tracer(ENDPOINT).fault


def test_an_opentelemetry_that_cannot_be_used_is_a_fault_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
        tracer = Tracer(ENDPOINT)
        assert not tracer.is_on
        assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in tracer.fault
        assert tracer.begin("load", {}) is None
    tracer = Tracer(ENDPOINT)
    tracer._sampler = object()
    assert tracer.begin("load", {}) is None
    assert (tracer.is_on, "AttributeError" in tracer.fault) == (False, True)
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.trace.v1.trace_pb2", None)  # its import fails
    with pytest.raises(StoreError, match=r"cannot be used.*trace_pb2"):
        export.Exporter("mfs")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", Context(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", Context(TRACE, SPAN, False)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", Context(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-extra", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        ("", None),
        ("\r\nX: y", None),
    ],
)
def test_a_traceparent_is_read_as_w3c_says(text: str, found: Context | None) -> None:
    assert parse_traceparent(text) == found
    if found is not None and text.startswith("00"):
        assert found.traceparent == text


def test_a_sampler_decides_and_a_parent_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracer = Tracer(ENDPOINT)
    assert tracer.begin("load", {}) is None
    assert tracer.begin("load", {}, Context(TRACE, SPAN, False)) is None
    span = tracer.begin("load", {}, Context(TRACE, SPAN))
    assert span is not None
    assert span.context.trace_id == TRACE
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    tracer = Tracer(ENDPOINT)
    taken = sum(tracer.begin("load", {}) is not None for _ in range(400))
    assert 0 < taken < 400


def test_rows_that_nobody_takes_are_bounded() -> None:
    outbox = Outbox()
    for number in range(ROWS_MAX + 7):
        outbox.add([number])
    assert (len(outbox), outbox.dropped_count) == (ROWS_MAX, 7)
    with recording(f"00-{TRACE}-{SPAN}-01") as rows:
        for _ in range(REQUESTS_MAX + 5):
            with Request("GET", "http://o/x", "o", 80):
                pass
    assert len(rows) == REQUESTS_MAX


def test_requests_outside_an_order_are_sent_as_they_are() -> None:
    headers = {"Range": "bytes=0-1"}
    with Request("GET", "http://o/x", "o", 80) as request:
        assert request.headers(headers) is headers
    with recording(None) as rows, Request("GET", "http://o/x", "o", 80) as request:
        assert request.headers(headers) is headers
        assert current() is None
    assert not rows


def test_a_request_carries_the_id_of_its_own_span() -> None:
    with recording(f"00-{TRACE}-{SPAN}-01") as rows:
        assert current() == Context(TRACE, SPAN)
        with Request("GET", "http://o/x", "o", 80) as request:
            sent = request.headers({"Range": "bytes=0-1"})["traceparent"]
            request.status = 503
    [(trace, span, parent, *_, error, attributes)] = rows
    assert (trace, parent, sent) == (TRACE, SPAN, f"00-{TRACE}-{span}-01")
    assert (error, attributes["error.type"], attributes["http.response.status_code"]) == ("503", "503", 503)


async def test_a_collector_that_is_away_costs_its_batch_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer(ENDPOINT)
    sent: list[list[Row]] = []
    is_away = True

    async def send(rows: list[Row]) -> None:
        await trio.lowlevel.checkpoint()
        if is_away:
            raise StoreError("away at http://user:pass@collector/?token=abc")
        sent.append(rows)

    for number in range(3):
        tracer.outbox.add([number])
        await tracer.flush(send)
    is_away = False
    tracer.outbox.add([3])
    await tracer.flush(send)
    assert sent == [[[3]]]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "pass" not in caplog.text


def test_the_exporter_speaks_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        exporter = export.Exporter("mfs")
        exporter.export([
            [TRACE, SPAN, "", "load", 1, 10**18, 10**18 + 5, "", {"mfs.model": "m"}],
            [TRACE, SPAN[::-1], SPAN, "GET", 3, 10**18, 10**18 + 5, "TransientStoreError", {"a": [1, 2], "b": True}],
        ])  # fmt: skip
        receiver.status = 400
        with pytest.raises(StoreError, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
            exporter.export([[TRACE, SPAN, "", "load", 1, 0, 1, "", {}]])
        exporter.close()
    one, two = receiver.spans
    assert receiver.paths == {"/v1/traces"}
    assert (one.trace_id, one.span_id, one.parent_id, one.name, one.kind) == (TRACE, SPAN, "", "load", 1)
    assert (one.resource["service.name"], one.resource["deployment.environment"]) == ("mfs", "test")
    assert (two.parent_id, two.kind, two.error, two.attributes) == (
        SPAN, 3, "TransientStoreError", {"a": [1, 2], "b": True},
    )  # fmt: skip
    assert two.end_ns - two.start_ns == 5


@pytest.mark.parametrize("is_ill", ["hangs", "answers 503"])
def test_an_ill_collector_holds_an_exporter_up_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch, is_ill: str) -> None:
    monkeypatch.setattr(collector, "TIMEOUT_MAX_S", 0.3)
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
        if is_ill == "hangs":
            receiver.may_answer.clear()
        receiver.status = 503
        exporter = export.Exporter("mfs")
        with pytest.raises(StoreError, match="did not take them"):
            exporter.export([ROW])
        exporter.close()


async def test_who_is_cancelled_has_his_rows_taken_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        receiver.may_answer.clear()
        exporting = Beside()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exporting.send, [ROW])
            await until(lambda: receiver.requests_count > 0, "the request")
            nursery.cancel_scope.cancel()
        receiver.may_answer.set()
        await exporting.send([[*ROW[:3], "swap", *ROW[4:]]])
        await exporting.close()
    assert [span.name for span in receiver.spans] == ["load", "swap"]


@pytest.mark.parametrize("is_ill", ["hangs", "is killed"])
async def test_an_exporting_process_that_is_ill_costs_its_batch_and_is_replaced(
    monkeypatch: pytest.MonkeyPatch, is_ill: str
) -> None:
    monkeypatch.setattr(beside, "AGAIN_S", 0.0)
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        exporting = Beside()
        await exporting.send([])
        pid = exporting.pid
        assert pid is not None
        with monkeypatch.context() as patch:
            if is_ill == "hangs":
                patch.setattr(beside, "ANSWER_S", 0.1)
            os.kill(pid, signal.SIGSTOP if is_ill == "hangs" else signal.SIGKILL)
            with pytest.raises(StoreError, match="the process that exports traces"):
                await exporting.send([ROW])
        assert not Path(f"/proc/{pid}").exists()
        await exporting.send([ROW])
        monkeypatch.setattr(beside, "AGAIN_S", 3600.0)
        os.kill(exporting.pid or 0, signal.SIGKILL)
        for text in ("fails", "another is started in"):
            with pytest.raises(StoreError, match=text):
                await exporting.send([ROW])
        await exporting.close()
    assert [span.name for span in receiver.spans] == ["load"]


def test_an_exporter_whose_daemon_was_killed_ends_though_its_collector_does_not_answer() -> None:
    with receiving() as receiver, contextlib.ExitStack() as ends:
        receiver.may_answer.clear()
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            children.python("-m", "mfs.tracing.process", str(theirs.fileno()), "1"), pass_fds=(theirs.fileno(),),
            env=children.environment() | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url},
        )  # fmt: skip
        ends.callback(process.kill)
        theirs.close()
        ours.sendall(msgpack.packb([ROW]))
        ours.close()
        assert process.wait(timeout=60) == -signal.SIGALRM


async def test_what_the_exporter_says_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli")
    exporting = Beside()
    with pytest.raises(StoreError, match="'brotli': give gzip, deflate or none"):
        await exporting.send([])
    await exporting.close()


def test_a_collector_that_asks_to_wait_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setattr(collector, "_FIRST_PAUSE_S", 0.01)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.url}/own/path")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret%20one")
        exporter = export.Exporter("mfs")
        receiver.refuse_once = 503
        exporter.export([ROW])
        exporter.close()
    assert (receiver.requests_count, receiver.paths) == (2, {"/own/path"})
    assert receiver.headers["api-key"] == "secret one"
    assert [span.name for span in receiver.spans] == ["load"]
