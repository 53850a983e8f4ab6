"""Volumes that ask for signatures, or for a cache that nodes share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mfs import children
from mfs.csi.volume import Limits, parse
from mfs.testing import ramp
from tests.csi.driver import Driver, workload
from tests.mount import touching
from tests.registry.keys import make_keys
from tests.servers.nginx import NginxServer
from tests.servers.node_cache import NginxCache


def test_of_a_registry_only_what_was_signed_with_the_key_is_shown(driver: Driver, models: Path) -> None:
    keys = make_keys(models.parent, "key")
    place = f"mfs+file://{models}/registry"
    for name, signed in (("signed", ("--sign", str(keys.private))), ("other", ())):
        command = children.python("-m", "mfs", "push", str(models / "llama"), f"{place}/{name}:v1", *signed)
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    pem = " ".join(keys.public.read_text().split("\n"))  # as a folded scalar of YAML has it
    target = driver.publish("a", {"source": place, "requireSignature": pem})
    with workload(target) as (pod, inside):
        assert pod.call(touching.read, f"{inside}/signed/v1/config.json") == b"{}"
        assert pod.call(touching.read_failure, f"{inside}/other/v1/config.json") in ("ENOENT", "EACCES")
    key_files = list((driver.place / "state" / "keys").iterdir())
    assert [file.read_bytes() for file in key_files] == [keys.public.read_bytes()]
    driver.unpublish("a")
    assert os.listdir(driver.place / "state" / "keys") == []


def test_a_volumes_bytes_come_through_its_cache(driver: Driver, tmp_path: Path) -> None:
    content = ramp(3 << 20)
    with NginxServer(tmp_path / "origin") as origin:
        (origin.files / "m").mkdir(parents=True)
        (origin.files / "m" / "w.bin").write_bytes(content)
        cache = NginxCache(tmp_path / "cache")
        cache.start()
        try:
            target = driver.publish("a", {"source": origin.url, "via": cache.url})
            with workload(target) as (pod, inside):
                assert pod.call(touching.read, f"{inside}/m/w.bin") == content
            assert any("/m/w.bin" in line for line in cache.lines())
            driver.unpublish("a")
        finally:
            cache.stop()


@pytest.mark.parametrize("name", ["via", "dragonfly"])
def test_the_nodes_cache_is_for_volumes_that_name_none(name: str) -> None:
    limits = Limits(via="http://node:1")
    plain = parse({"source": "s3://b"}, {}, limits)
    own = parse({"source": "s3://b", name: "http://mine:2"}, {}, limits)
    assert (plain.source.via, plain.is_isolated) == ("http://node:1", False)
    assert (getattr(own.source, name), own.is_isolated) == ("http://mine:2", True)
    assert own.source.via != "http://node:1"
    assert plain.key(b"salt") != own.key(b"salt") != parse({"source": "s3://b"}, {}, Limits()).key(b"salt")
