"""Every source that uses the network, through a network that fails: exact bytes or an error in time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mfs.errors import ChangedError, MfsError, TransientStoreError
from mfs.fetch.told import telling
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from mfs.types import ObjectId
from tests.oci.artifacts import Repository
from tests.servers.chaos import ChaosProxy
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

SIZE = 3 << 20

Reached = tuple[Source, ObjectId, ChaosProxy]


@pytest.fixture(params=["s3", "http", "hf", "oci"])
def reached(
    request: pytest.FixtureRequest,
    swift: SwiftServer,
    s3_bucket: str,
    nginx: NginxServer,
    hub: HubServer,
    registry: DockerRegistry,
    chaos: Callable[[str], ChaosProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reached]:
    """A source whose every byte crosses a chaos proxy, and an object of it."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", swift.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", swift.secret_key)
        client = swift.client()
        client.put_object(Bucket=s3_bucket, Key="m/w.txt", Body=ramp(SIZE))
        client.close()
        proxy = chaos(swift.endpoint)
        source = open_source(f"s3://{s3_bucket}", SourceOptions(endpoint_url=proxy.url))
    elif request.param == "http":
        folder = nginx.files / "faults" / "m"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "w.txt").write_bytes(ramp(SIZE))
        proxy = chaos(nginx.url)
        source = open_source(f"{proxy.url}faults/")
    elif request.param == "oci":
        repository = Repository(registry, "faults/model")
        repository.manifest([repository.file("m/w.txt", ramp(SIZE))])
        repository.close()
        proxy = chaos(registry.url)
        source = open_source(f"oci+{proxy.url}/faults/model:v1")
    else:
        # Small enough for git, so that the bytes come from the hub itself and not from a CDN beside the proxy.
        hub.commit("faults/model", {"m/w.txt": ramp(90_000)})
        proxy = chaos(hub.endpoint)
        source = open_source("hf://faults/model", SourceOptions(endpoint_url=proxy.url))
    found = list_tree(source)
    yield source, object_of(source, "m/w.txt", found["m/w.txt"]), proxy
    source.close()


@pytest.mark.parametrize("fault", ["reset_after_bytes", "truncate_after_bytes"])
@pytest.mark.parametrize("after_bytes", [0, 50, 40_000])
def test_cut_answers_are_fetched_again_and_exact(reached: Reached, fault: str, after_bytes: int) -> None:
    source, obj, proxy = reached
    proxy.set(**{fault: after_bytes}, faults_count=3)
    assert read(source, obj) == ramp(obj.size)


def test_cut_answers_are_fetched_again_by_many_threads(reached: Reached) -> None:
    source, obj, proxy = reached
    proxy.set(reset_after_bytes=3000, faults_count=12)
    step = obj.size // 24
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: read(source, obj, start, start + step), range(0, 24 * step, step)))
    assert b"".join(parts) == ramp(24 * step)


@pytest.mark.parametrize("fault", ["reset_after_bytes", "truncate_after_bytes"])
def test_who_never_sends_all_of_it_is_read_on_where_he_broke_off(reached: Reached, fault: str) -> None:
    source, obj, proxy = reached
    proxy.set(**{fault: obj.size // 8})
    assert read(source, obj) == ramp(obj.size)
    assert proxy.stats().faults >= 8


def test_what_is_read_on_is_of_the_version_that_broke_off(
    nginx: NginxServer, chaos: Callable[[str], ChaosProxy]
) -> None:
    file = nginx.files / "replaced" / "w.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(ramp(SIZE))
    os.utime(file, (1e9, 1e9))  # nginx's ETag is size and second
    proxy = chaos(nginx.url)
    source = open_source(f"{proxy.url}replaced/")
    obj = object_of(source, "w.txt", list_tree(source)["w.txt"])
    proxy.set(truncate_after_bytes=SIZE // 2, faults_count=1)
    told: list[TransientStoreError] = []

    def replace(error: TransientStoreError) -> None:
        told.append(error)
        file.write_bytes(ramp(SIZE, 1))

    with telling(replace), pytest.raises(ChangedError):
        read(source, obj)
    assert [error.received_bytes > 0 for error in told] == [True]
    source.close()


def test_refused_connections_are_tried_again(reached: Reached) -> None:
    source, obj, proxy = reached
    proxy.stop()
    proxy.start()
    proxy.set(refuse=True, faults_count=2)
    assert read(source, obj, 100, 200) == ramp(100, 100)


@pytest.mark.parametrize("after_bytes", [0, 40_000])
def test_a_stall_ends_at_the_deadline_and_the_source_recovers(reached: Reached, after_bytes: int) -> None:
    source, obj, proxy = reached
    proxy.set(stall_after_bytes=after_bytes)
    with pytest.raises(TransientStoreError, match=r"w\.txt"):
        read(source, obj, deadline_s=deadline(0.5))
    proxy.clear()
    assert read(source, obj) == ramp(obj.size)


def test_listings_are_tried_again_too(reached: Reached) -> None:
    source, _, proxy = reached
    proxy.set(reset_after_bytes=60, faults_count=3)
    assert set(list_tree(source)) == {"m", "m/w.txt"}


def test_a_dead_origin_fails_a_listing_by_the_deadline(reached: Reached) -> None:
    source, _, proxy = reached
    proxy.stop()
    with pytest.raises(MfsError, match=r"given up after \d+ attempts? in .*(refused|no complete answer)"):
        list(source.list("", deadline_s=deadline(0.5)))
    proxy.start()
    assert set(list_tree(source)) == {"m", "m/w.txt"}
