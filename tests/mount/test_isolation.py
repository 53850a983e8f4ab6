"""A model, or a source, that hangs delays no other: each of the bounds they share has room left for the others.

The mounts here wait ten minutes before they give up. So whatever is answered while a model hangs did not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mfs.config import SourceConfig
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import touching, waiting
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer

MIB = 1 << 20
HANGING_COUNT = 64
WEIGHTS = ramp(5 * MIB + 3)
OTHER = {"cold.bin": ramp(9 * MIB + 5, 7), "mapped.bin": ramp(9 * MIB + 5, 11), "warm.bin": ramp(5 * MIB + 1, 13),
         "config.json": b"{}", "1/config.pbtxt": b"name: 'h'"}  # fmt: skip
FOR_EVER_S = 600.0


def publish(folder: Path, model: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        target = folder / model / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def publish_many(folder: Path, model: str, *, suffix: str = ".bin") -> list[str]:
    """Many names of the same bytes; returns their paths below `folder`."""
    publish(folder, model, {f"0{suffix}": WEIGHTS})
    names = [f"{model}/{number}{suffix}" for number in range(HANGING_COUNT)]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    return names


@contextmanager
def two_sources(tmp_path: Path, liar: LiarServer, nginx: NginxServer, **settings: float) -> Iterator[TestMount]:
    """a/ is the liar with model h, b/ an nginx with model h; h/warm.bin of both was read."""
    publish(liar.files, "h", OTHER)
    folder = nginx.files / tmp_path.name
    publish(folder, "h", OTHER)
    sources = [SourceConfig(liar.url, "a"), SourceConfig(f"{nginx.url}{tmp_path.name}/", "b")]
    with TestMount(tmp_path / "m", sources=sources, workers_count=2, **{"timeout_s": FOR_EVER_S} | settings) as mount:
        for source in "ab":
            mount.call(touching.read, str(mount.path / source / "h/warm.bin"))
        yield mount


def wait_for_readers(mount: TestMount, count: int) -> None:
    assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= count)


def use(mount: TestMount, model: str) -> None:
    """Everything that a server does with a model, cold and warm; each step must end while another model hangs."""
    path = mount.path / model
    assert mount.call(touching.tree, str(path)) == {name: len(content) for name, content in OTHER.items()}
    assert mount.call(touching.read, str(path / "1/config.pbtxt")) == OTHER["1/config.pbtxt"]
    mount.call(touching.drop_pages, str(path / "warm.bin"))
    assert mount.call(touching.read, str(path / "warm.bin")) == OTHER["warm.bin"]
    assert mount.call(touching.pread, str(path / "cold.bin"), 4096, 5 * MIB) == OTHER["cold.bin"][5 * MIB :][:4096]
    assert mount.call(touching.read, str(path / "cold.bin")) == OTHER["cold.bin"]
    for name in ("mapped.bin", "warm.bin"):
        assert mount.call(touching.map_file, str(path / name), "shared") == OTHER[name]


@pytest.mark.parametrize("how", [waiting.read_together, waiting.map_together], ids=["pread", "mmap"])
def test_a_model_that_hangs_delays_no_other_and_gets_its_bytes_when_it_recovers(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer, how: object
) -> None:
    names = publish_many(liar.files, "m")
    with two_sources(tmp_path, liar, nginx) as mount:
        liar.lie(Lie.SILENCE, pattern="/m/*.bin")
        hanging = mount.outside()
        hanging.start(how, [str(mount.path / "a" / name) for name in names])
        wait_for_readers(mount, HANGING_COUNT)
        use(mount, "a/h")
        use(mount, "b/h")
        assert hanging.is_busy()
        liar.tell_truth()
        assert hanging.finish(timeout_s=120) == [waiting.digest_of(WEIGHTS)] * HANGING_COUNT


def test_a_process_whose_threads_hang_in_one_model_maps_and_reads_another(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    """As a server of many models does: a fault that waits must not hold the memory map of its process."""
    names = publish_many(liar.files, "m")
    with two_sources(tmp_path, liar, nginx) as mount:
        liar.lie(Lie.SILENCE, pattern="/m/*.bin")
        mount.call(waiting.begin, waiting.map_together, [str(mount.path / "a" / name) for name in names])
        wait_for_readers(mount, HANGING_COUNT)
        use(mount, "a/h")
        liar.tell_truth()
        assert mount.call(waiting.end, timeout_s=120) == [waiting.digest_of(WEIGHTS)] * HANGING_COUNT


def test_opens_that_hang_on_a_models_headers_delay_no_other(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    names = publish_many(liar.files, "m", suffix=".safetensors")
    with two_sources(tmp_path, liar, nginx) as mount:
        liar.lie(Lie.SILENCE, pattern="/m/*.safetensors")
        hanging = mount.outside()
        hanging.start(waiting.read_together, [str(mount.path / "a" / name) for name in names])
        assert mount.wait_for(lambda: liar.lies_told() > 0)
        use(mount, "a/h")
        use(mount, "b/h")
        assert hanging.is_busy()
        liar.tell_truth()
        assert hanging.finish(timeout_s=120) == [waiting.digest_of(WEIGHTS)] * HANGING_COUNT


def test_listings_that_hang_delay_no_other_models_listing(tmp_path: Path, liar: LiarServer, nginx: NginxServer) -> None:
    for number in range(HANGING_COUNT):
        publish(liar.files, f"m/{number}", {"config.json": b"{}"})
    publish(liar.files, "g", OTHER)
    with two_sources(tmp_path, liar, nginx) as mount:
        assert len(mount.call(touching.list_names, str(mount.path / "a/m"))) == HANGING_COUNT
        liar.lie(Lie.SILENCE, pattern="/m/*")
        hanging = mount.outside()
        paths = [str(mount.path / f"a/m/{number}/config.json") for number in range(HANGING_COUNT)]
        hanging.start(waiting.stat_together, paths)
        assert mount.wait_for(lambda: liar.lies_told() >= 4)  # the share of one model
        use(mount, "a/g")  # whose directories nobody has looked into
        use(mount, "b/h")
        assert hanging.is_busy()
        liar.tell_truth()
        assert hanging.finish(timeout_s=120) == ["2"] * HANGING_COUNT


def test_a_source_that_hangs_keeps_what_it_has_shown_and_delays_no_other(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    names = publish_many(liar.files, "m")
    with two_sources(tmp_path, liar, nginx) as mount:
        shown = mount.call(touching.tree, str(mount.path / "a"))
        liar.lie(Lie.SILENCE)
        hanging = mount.outside()
        hanging.start(waiting.read_together, [str(mount.path / "a" / name) for name in names])
        wait_for_readers(mount, HANGING_COUNT)
        use(mount, "b/h")
        assert mount.call(touching.tree, str(mount.path / "a")) == shown
        warm = str(mount.path / "a/h/warm.bin")
        mount.call(touching.drop_pages, warm)
        assert mount.call(touching.read, warm) == OTHER["warm.bin"]
        assert mount.client.stat("b/h/warm.bin")["size"] == len(OTHER["warm.bin"])
        assert hanging.is_busy()
        liar.tell_truth()
        assert hanging.finish(timeout_s=120) == [waiting.digest_of(WEIGHTS)] * HANGING_COUNT


def test_a_model_that_hangs_fails_at_its_deadline_and_is_read_at_once_when_it_recovered(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    names = publish_many(liar.files, "m")
    with two_sources(tmp_path, liar, nginx, timeout_s=6.0) as mount:
        liar.lie(Lie.SILENCE, pattern="/m/*.bin")
        paths = [str(mount.path / "a" / name) for name in names]
        assert set(mount.call(waiting.read_together, paths, timeout_s=90)) == {"EIO"}
        liar.tell_truth()
        # One by one: the liar reads a whole file for each request, and all at once could take him six seconds.
        for path in paths[:3]:
            assert mount.call(touching.read, path) == WEIGHTS


def test_what_the_cache_holds_of_a_model_that_hangs_stays_readable(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    names = publish_many(liar.files, "h")
    with two_sources(tmp_path, liar, nginx) as mount:
        mount.wait_saved("a/h/warm.bin")
        mount.client.evict(["a/h/warm.bin"], "ram")
        liar.lie(Lie.SILENCE, pattern="/h/[0-9]*.bin")
        hanging = mount.outside()
        hanging.start(waiting.read_together, [str(mount.path / "a" / name) for name in names])
        wait_for_readers(mount, HANGING_COUNT)
        warm = str(mount.path / "a/h/warm.bin")
        mount.call(touching.drop_pages, warm)
        before = mount.origin_bytes
        assert mount.call(touching.read, warm) == OTHER["warm.bin"]
        assert mount.origin_bytes == before
        liar.tell_truth()
        assert hanging.finish(timeout_s=120) == [waiting.digest_of(WEIGHTS)] * HANGING_COUNT


def test_a_source_that_hangs_while_it_is_looked_at_keeps_no_news_of_another_back(
    tmp_path: Path, liar: LiarServer, nginx: NginxServer
) -> None:
    with two_sources(tmp_path, liar, nginx, refresh_s=1.0) as mount:
        liar.lie(Lie.SILENCE)
        assert mount.wait_for(lambda: liar.lies_told() > 0)  # a look has begun, and will not end
        for number in range(3):
            publish(nginx.files / tmp_path.name, f"new-{number}", {"config.json": b"{}"})
            names = str(mount.path / "b")
            assert mount.wait_for(lambda: f"new-{number}" in mount.call(touching.list_names, names))  # noqa: B023
        assert mount.call(touching.list_names, str(mount.path / "a")) == ["h"]
        liar.tell_truth()
