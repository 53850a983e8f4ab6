"""`gpuload load --explain`, and a swap's trace: gpuload's own pipeline with what the mount below says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuload.cli.explaining import combine
from gpuload.client.asking import load_resident
from gpuload.device.host import HostDevice
from gpuload.server.daemon import ServerConfig
from gpuload.testing import random_tensors, running_server, write
from mfs.testing.mounting import TestMount
from tests.gpuload.cli.test_cli import gpuload, socket_path  # noqa: F401
from tests.mount import origins
from tests.servers.nginx import NginxServer
from tests.servers.otlp import receiving

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def strip(*phases: str) -> dict[str, object]:
    return {"step_s": 1.0, "phases": list(phases)}


def test_what_is_read_is_divided_as_the_mount_says_and_adds_up() -> None:
    server = {"began_s": 102.0, "seconds": 6.0, "strip": strip("turn", "read", "read", "read", "read", "copy"),
              "phases": {"turn": 1.0, "open": 0.0, "read": 4.0, "hash": 0.0, "copy": 1.0, "other": 0.0}}  # fmt: skip
    mount = {"began_s": 101.0, "strip": strip("header", "page_cache", "origin", "origin", "ssd", "page_cache")}
    found = combine(100.0, 109.0, server, mount)
    assert found["seconds"] == pytest.approx(sum(found["phases"].values())) == 9.0
    assert found["phases"] == pytest.approx(
        {"turn": 1, "open": 1, "header": 1, "origin": 2, "ssd": 1, "read": 1, "copy": 1, "other": 1}, abs=0.1
    )
    assert combine(100.0, 109.0, server, None)["phases"] == {"turn": 1, "open": 2, "read": 4, "copy": 1, "other": 1}


def test_a_load_from_a_mount_is_explained_down_to_the_origin(
    nginx: NginxServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    socket_path: Path,  # noqa: F811
) -> None:
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
    origin = origins.WebOrigin(nginx)
    made = write(tmp_path / "w.safetensors", random_tensors(1, {"a": (4 << 20,), "b": (4 << 20,)}))
    origin.put_all({"m/w.safetensors": made.read_bytes()})
    with TestMount(tmp_path / "m", origin.url) as mount:
        path = mount.path / "m/w.safetensors"
        found = json.loads(gpuload("load", path, "--explain", "--json", socket_path=socket_path))["explained"]
        assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=1e-6)
        assert found["phases"].keys() & {"origin", "header"}
        assert found["mount"]["model"] == "m"
        assert found["mount"]["bytes"]["origin"] >= 16 << 20
        shown = gpuload("swap", path, "--name", "w", "--explain", socket_path=socket_path)
        assert any(line.split() == ["PHASE", "SECONDS", "SHARE"] for line in shown.splitlines())
        assert "in all" in shown
    gpuload("unload", "w", socket_path=socket_path)


def test_a_swap_and_what_the_mount_does_for_it_are_one_tree(
    nginx: NginxServer, config: ServerConfig, small_granules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-{SPAN}-01")
    origin = origins.WebOrigin(nginx)
    for name in ("a", "b"):
        tensors = random_tensors(ord(name), {f"l.{i}": (8, 2048) for i in range(6)})
        made = write(tmp_path / f"{name}.safetensors", tensors)
        (origin.root / name).mkdir()
        (origin.root / name / "w.safetensors").write_bytes(made.read_bytes())
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        with (
            TestMount(tmp_path / "m", origin.url) as mount,
            running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server,
        ):
            nginx.forget_requests()
            for name in ("a", "b"):
                path = mount.path / name / "w.safetensors"
                load_resident(path, "m", "cpu", is_swap=name == "b", socket_path=server.socket_path)
            for service in ("mfs", "gpuload"):  # both can send by now, and send the rest when they end
                assert mount.wait_for(lambda: any(s.resource["service.name"] == service for s in receiver.spans))  # noqa: B023
        asked = [request for request in nginx.requests() if request.path.endswith(".safetensors")]
    roots = {span.name: span for span in receiver.spans if span.parent_id == SPAN}
    assert set(roots) == {"load", "swap"}
    assert {root.trace_id for root in roots.values()} == {TRACE}
    swap = roots["swap"]
    assert swap.attributes["gpuload.bytes_copied"] == 6 * 8 * 2048 * 2
    below = [span for span in receiver.spans if span.parent_id == swap.span_id]
    assert {span.name for span in below} >= {"turn", "load"}
    assert {span.resource["service.name"] for span in receiver.spans} == {"mfs", "gpuload"}
    spans = receiver.by_id()
    assert asked
    for request in asked:
        assert receiver.root_of(spans[request.traceparent.split("-")[2]]).name in ("load", "swap")
