"""Loads of a real mount explain themselves: which reads waited, on what, and phases that add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mfs.config import SourceConfig
from mfs.loads import PHASES
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

MIB = 1 << 20
CONTENT = ramp(33 * MIB + 5)
DELAY_S = 0.3


def the_load(mount: TestMount, path: str = "m") -> dict[str, Any]:
    """The last load of a model, whose phases add up."""
    # a reader may have gone on before the daemon has heard of his bytes
    assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] == 0)
    found: dict[str, Any] = mount.client.loads(path)["loads"][-1]
    assert tuple(found["phases"]) == PHASES
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=1e-6)
    assert all(seconds >= 0 for seconds in found["phases"].values())
    assert set(found["strip"]["phases"]) <= set(PHASES)
    return found


def explained_through(proxy: ChaosProxy, origin: origins.Origin, folder: Path) -> dict[str, Any]:
    """The load of m/w.bin of an origin behind a proxy: one read from near, and one that DELAY_S separates from it."""
    with TestMount(folder, origin.url, source=origin.source, env=origin.env) as mount:
        mount.call(touching.hold, "w", str(mount.path / "m/w.bin"))
        assert mount.call(touching.held_read, "w", 0, 100) == CONTENT[:100]
        proxy.set(rtt_ms=1000 * DELAY_S)
        found = mount.call(touching.pread_direct, str(mount.path / "m/w.bin"), 4096, 16 * MIB)
        assert found == CONTENT[16 * MIB :][:4096]
        proxy.clear()
        mount.call(touching.release, "w")
        return the_load(mount)


def assert_names_the_slow_read(found: dict[str, Any]) -> None:
    assert found["model"] == "m"
    longest = max(found["reads"], key=lambda read: read["waited_s"])
    assert (longest["on"], longest["path"]) == ("origin", "m/w.bin")
    assert longest["start"] <= 16 * MIB < longest["stop"]
    assert longest["waited_s"] >= DELAY_S
    assert DELAY_S <= found["phases"]["origin"] <= found["seconds"]
    assert "origin" in found["strip"]["phases"]
    assert (found["bytes"]["ssd"], found["bytes"]["origin"] >= 2 * 4096) == (0, True)


def test_a_slow_web_server_is_named_with_the_reads_that_waited_for_it(nginx: NginxServer, tmp_path: Path) -> None:
    origin = origins.WebOrigin(nginx)
    origin.put_all({"m/w.bin": CONTENT})
    with ChaosProxy(nginx.url, tmp_path) as proxy:
        origin.url = origin.url.replace(nginx.url, proxy.url)
        assert_names_the_slow_read(explained_through(proxy, origin, tmp_path / "m"))


def test_a_slow_bucket_is_named_with_the_reads_that_waited_for_it(
    swift: SwiftServer, s3_bucket: str, tmp_path: Path
) -> None:
    origin = origins.S3Origin(swift, s3_bucket)
    origin.put_all({"m/w.bin": CONTENT})
    with ChaosProxy(swift.endpoint, tmp_path) as proxy:
        origin.source = {"endpoint_url": proxy.url}
        assert_names_the_slow_read(explained_through(proxy, origin, tmp_path / "m"))


def test_time_in_which_nobody_waits_is_the_page_caches(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put_all({"m/w.bin": CONTENT})
    mount = mounted(folder)
    path = str(mount.path / "m/w.bin")
    mount.call(touching.pread_direct, path, 4096, 0)
    time.sleep(DELAY_S)
    mount.call(touching.pread_direct, path, 4096, 0)
    found = the_load(mount)
    assert found["phases"]["page_cache"] >= DELAY_S
    assert found["files_count"] == 2
    assert found["bytes"]["ram"] >= 4096


def test_what_came_from_ssd_is_told_from_the_origin(folder: origins.FolderOrigin, tmp_path: Path) -> None:
    folder.put_all({"m/w.bin": CONTENT})
    for cause in ("origin", "ssd"):
        with TestMount(tmp_path / "m", folder.url) as mount:
            mount.call(touching.pread_direct, str(mount.path / "m/w.bin"), 4096, 8 * MIB)
            found = the_load(mount)
            assert {read["on"] for read in found["reads"] if read["stop"]} - {"ssd"} == {cause} - {"ssd"}
            assert found["phases"][cause] > 0
            assert found["bytes"][cause] >= 4096
    assert (found["phases"]["origin"], found["bytes"]["origin"]) == (0, 0)


def test_a_load_through_a_registry_shows_what_unpacking_took(tmp_path: Path, mounted: Mounted) -> None:
    origin = origins.RegistryOrigin(tmp_path / "registry")
    origin.put_all({"m/w.bin": CONTENT})
    mount = mounted(origin)
    mount.call(touching.pread_direct, str(mount.path / "m/w.bin"), 4096, 8 * MIB)
    found = the_load(mount)
    assert found["phases"]["decode"] > 0
    assert "decode" in {read["on"] for read in found["reads"]}


def test_a_header_that_comes_late_is_told_from_the_reads(liar: LiarServer, mounted: Mounted) -> None:
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (liar.files / "m").mkdir()
    (liar.files / "m/w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    mount = mounted(liar.url, cache_dir=None)
    liar.lie(Lie.SILENCE, pattern="/m/*.safetensors")
    reader = mount.outside()
    reader.start(touching.read, str(mount.path / "m/w.safetensors"))
    assert mount.wait_for(lambda: liar.lies_told() > 0)
    time.sleep(DELAY_S)
    liar.tell_truth()
    reader.finish()
    found = the_load(mount)
    assert found["phases"]["header"] >= DELAY_S
    assert found["phases"]["origin"] < found["phases"]["header"]
    assert max(found["reads"], key=lambda read: (read["waited_s"], read["on"] == "header"))["path"] == "m/w.safetensors"


def test_a_load_that_finds_no_room_in_ram_says_so(liar: LiarServer, tmp_path: Path) -> None:
    """All 16 slots are held by models of three sources that hang: another, which SSD has, waits for nothing else."""
    hung = [f"{source}/m{number}/w.bin" for source in "xyz" for number in range(6)]
    for path in ("x/e/w.bin", *hung):
        (liar.files / path).parent.mkdir(parents=True)
        (liar.files / path).write_bytes(CONTENT[: 9 * MIB])
    sources = [SourceConfig(f"{liar.url}{name}/", name) for name in "xyz"]
    settings: dict[str, Any] = {"sources": sources, "ram_bytes": 64 * MIB, "timeout_s": 60.0}
    with TestMount(tmp_path / "m", **settings) as mount:
        mount.call(touching.pread_direct, str(mount.path / "x/e/w.bin"), 4096, 0)
    with TestMount(tmp_path / "m", **settings) as mount:
        mount.call(touching.tree, str(mount.path))
        liar.lie(Lie.SILENCE, pattern="/?/m?/*.bin")
        hanging, reader = mount.outside(), mount.outside()
        hanging.start(touching.read_failures_together, [str(mount.path / path) for path in hung])
        assert mount.wait_for(lambda: mount.client.status()["ram"]["slots_free"] == 0)
        reader.start(touching.pread_direct, str(mount.path / "x/e/w.bin"), 4096, 0)
        assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] > len(hung))
        time.sleep(DELAY_S)
        liar.tell_truth()
        assert reader.finish() == CONTENT[:4096]
        assert hanging.finish() == [""] * len(hung)
        found = the_load(mount, "x/e")
    assert found["phases"]["slot"] >= DELAY_S
    assert found["phases"]["origin"] == 0
    assert "slot" in {read["on"] for read in found["reads"]}


class TestCommand:
    def explain(self, mount: TestMount, *arguments: object, status: int = 0) -> str:
        argv = [sys.executable, "-m", "mfs", "explain", *map(str, arguments)]
        env = os.environ | {"MFS_RUNTIME_DIR": str(mount.folder / "run")}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if not status else done.stderr

    def test_a_load_as_people_and_programs_read_it(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all({"m/w.bin": CONTENT, "n/w.bin": b"x"})
        mount = mounted(folder)
        assert self.explain(mount, mount.path, status=1).count("\n") == 1
        for name in ("n/w.bin", "m/w.bin"):
            mount.call(touching.pread_direct, str(mount.path / name), 4096, 0)
        lines = self.explain(mount, mount.path / "m").splitlines()
        assert lines[0].startswith("m  ")
        assert any(line.split() == ["PHASE", "SECONDS", "SHARE"] for line in lines)
        assert any(line.startswith("origin ") for line in lines)
        assert any(line.startswith("in all ") for line in lines)
        assert any("m/w.bin" in line and " origin " in line for line in lines)
        assert any(set(line) <= set("onhsd·rm?") and len(line) == 72 for line in lines), "the strip"
        [found] = json.loads(self.explain(mount, mount.path / "m/w.bin", "--json"))["loads"]
        assert found | {"is_over": True} == the_load(mount) | {"is_over": True}
        all_of = json.loads(self.explain(mount, mount.path, "--json", "--last", 9))["loads"]
        assert [one["model"] for one in all_of] == ["n", "m"]
        assert self.explain(mount, mount.path, "--json", "--html", "x", status=2).count("\n") == 1
        for missing in ("n/other", "other/w.bin"):
            assert "no such file or directory" in self.explain(mount, mount.path / missing, status=1)

    def test_one_file_that_needs_no_other(self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
        pytest.importorskip("mfs.page.timeline")
        folder.put_all({"m<b>/w.bin": CONTENT})
        mount = mounted(folder)
        mount.call(touching.pread_direct, str(mount.path / "m<b>/w.bin"), 4096, 0)
        self.explain(mount, mount.path, "--html", tmp_path / "e.html")
        page = (tmp_path / "e.html").read_text()
        assert "<svg" in page
        assert "m&lt;b&gt;" in page
        assert "m<b>" not in page
        assert "http://" not in page.replace("http://www.w3.org/", "")
        assert "https://" not in page
        nowhere = self.explain(mount, mount.path, "--html", tmp_path / "no/e.html", status=1)
        assert nowhere.count("\n") == 1
