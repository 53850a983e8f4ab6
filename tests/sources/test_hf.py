"""The Hub as a source, against the stand-in that the real huggingface_hub client passes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import AccessError, NotFoundError, TransientStoreError, UsageError
from mfs.fetch.transport import Transport
from mfs.sources import SourceOptions, hf, open_source
from mfs.sources.base import Source
from mfs.sources.hf_access import expiry_s, parse_hf_url
from mfs.testing import ramp
from mfs.testing.suite import SourceSuite, deadline, list_tree, object_of, read
from tests.servers.hub import HubServer
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_object


class HubOrigin:
    """A repository of its own; each change is a commit."""

    def __init__(self, hub: HubServer, name: str = "model", **facts: Any) -> None:
        self.hub = hub
        self.repo = f"{name}-{uuid.uuid4().hex[:8]}/weights"
        self.facts = facts
        self.files: dict[str, bytes] = {}
        self.opened: list[Source] = []

    def source(self, revision: str = "", **options: Any) -> Source:
        source = open_source(f"hf://{self.repo}{revision}", SourceOptions(endpoint_url=self.hub.endpoint, **options))
        self.opened.append(source)
        return source

    def put(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self.commit()

    def delete(self, path: str) -> None:
        del self.files[path]
        self.commit()

    def commit(self) -> str:
        return self.hub.commit(self.repo, self.files, **self.facts)

    def close(self) -> None:
        for source in self.opened:
            source.close()


@pytest.fixture
def origin(hub: HubServer) -> Iterator[HubOrigin]:
    origin = HubOrigin(hub)
    yield origin
    origin.close()


class TestHf(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, origin: HubOrigin) -> HubOrigin:
        return origin


def test_urls() -> None:
    assert parse_hf_url("hf://org/name") == ("org/name", "main")
    assert parse_hf_url("hf://gpt2@refs/pr/1") == ("gpt2", "refs/pr/1")
    assert open_source("hf://org/name@v2").identity == "hf://org/name"
    for url in ("hf://", "hf://a/b/c", "hf://org/..", "hf://org/name@", "hf://o r/n"):
        with pytest.raises(UsageError, match="hf://org/name"):
            open_source(url)


def test_large_files_have_digests_and_small_ones_blob_ids(origin: HubOrigin) -> None:
    origin.files = {"model.safetensors": ramp(3000), "config.json": b"{}"}
    commit = origin.commit()
    found = list_tree(origin.source())
    sha256 = hashlib.sha256(ramp(3000)).hexdigest()
    assert (found["model.safetensors"].digest, found["model.safetensors"].version) == (f"sha256:{sha256}", sha256)
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert (found["config.json"].digest, found["config.json"].version) == (None, blob)
    assert {entry.locator for entry in found.values()} == {commit}


def test_a_listing_takes_two_requests_and_a_page_more_where_it_is_long(hub: HubServer, origin: HubOrigin) -> None:
    origin.files = {f"d{i}/f": b"1" for i in range(10)}
    commit = origin.commit()
    hub.forget_stats()
    pages = dict(origin.source().list("", deadline_s=deadline()))
    assert len(pages) == 11
    assert hub.stats()["hub"] == 2
    hub.forget_stats()
    hub.set(page_entries=6)
    try:
        assert len(list_tree(origin.source(f"@{commit}"))) == 20
        assert hub.stats() == {"hub": 4, "tree": 4}
    finally:
        hub.set(page_entries=1000)


def test_a_moved_branch_shows_with_the_next_listing_and_old_objects_stay_readable(origin: HubOrigin) -> None:
    origin.put("w.safetensors", ramp(1000))
    source = origin.source()
    old = object_of(source, "w.safetensors", list_tree(source)["w.safetensors"])
    origin.put("w.safetensors", ramp(1000, 3))
    new = object_of(source, "w.safetensors", list_tree(source)["w.safetensors"])
    assert old.locator != new.locator
    assert read(source, old, 10, 20) == ramp(10, 10)
    assert read(source, new, 10, 20) == ramp(10, 13)


def test_addresses_are_asked_for_once_and_renewed_when_refused(hub: HubServer, origin: HubOrigin) -> None:
    origin.put("w.safetensors", ramp(100_000))
    source = origin.source()
    obj = object_of(source, "w.safetensors", list_tree(source)["w.safetensors"])
    hub.forget_stats()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: read(source, obj, i * 1000, i * 1000 + 1000), range(100)))
    assert b"".join(parts) == ramp(100_000)
    assert _requests(hub) == {"hub": 1, "resolve": 1, "cdn": 100}
    hub.expire_urls()
    hub.forget_stats()
    assert read(source, obj, 0, 10) == ramp(10)
    assert _requests(hub) == {"hub": 1, "resolve": 1, "cdn": 2, "refused": 1}


def test_an_address_that_does_not_come_keeps_nobody_from_other_files(
    origin: HubOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        origin.files[f"{number}.bin"] = ramp(1000, number)
    origin.commit()
    source = origin.source()
    files = list_tree(source)
    asked, go = threading.Event(), threading.Event()
    request = Transport.request

    def slow_for_one(self: Transport, url: str, **options: Any) -> Any:
        if url.endswith("/0.bin"):
            asked.set()
            assert go.wait(60)
        return request(self, url, **options)

    monkeypatch.setattr(Transport, "request", slow_for_one)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(read, source, object_of(source, "0.bin", files["0.bin"]), 0, 10)
        assert asked.wait(30)
        try:
            others = pool.submit(
                lambda: [read(source, object_of(source, f"{n}.bin", files[f"{n}.bin"]), 0, 10) for n in range(1, 40)]
            )
            assert others.result(timeout=20) == [ramp(10, n) for n in range(1, 40)]
        finally:
            go.set()
        assert slow.result() == ramp(10, 0)


def test_a_look_for_changes_asks_one_question_until_there_are_some(
    hub: HubServer, origin: HubOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin.put("w.safetensors", ramp(1000))
    source = origin.source()
    first = list_tree(source)
    hub.forget_stats()
    assert list_tree(source) == first
    assert (hub.stats()["hub"], hub.stats().get("tree", 0)) == (1, 0)
    origin.put("d/other", b"2")
    assert len(list_tree(source)) > len(first)
    monkeypatch.setattr(hf, "KEPT_NAMES_MAX", 1)
    origin.put("d/third", b"3")
    before = list_tree(source)
    hub.forget_stats()
    assert list_tree(source) == before
    assert hub.stats()["tree"] == 1


def _requests(hub: HubServer) -> dict[str, int]:
    """Without bytes, which are counted once they have been sent: we can be ahead of that."""
    return {name: count for name, count in hub.stats().items() if not name.endswith("_bytes")}


def test_small_files_keep_their_address_too(hub: HubServer, origin: HubOrigin) -> None:
    origin.put("config.json", ramp(1000))
    source = origin.source()
    obj = object_of(source, "config.json", list_tree(source)["config.json"])
    hub.forget_stats()
    for start in (0, 100, 200):
        assert read(source, obj, start, start + 100) == ramp(100, start)
    assert hub.stats()["resolve"] == 1
    assert hub.stats()["cached"] == 3


def test_the_token_opens_private_repositories_and_goes_to_the_hub_only(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    origin = HubOrigin(hub, private=True)
    origin.files = {"w.safetensors": ramp(1000), "config.json": b"{}"}
    origin.commit()
    with pytest.raises(NotFoundError, match=r"no such repository, or a private one.*HF_TOKEN"):
        list_tree(origin.source())
    (tmp_path / "token").write_text(f"{hub.token}\n")
    ways: list[dict[str, Any]] = [{"token": hub.token}, {}, {}]
    for way, variables in zip(
        ways, ({}, {"HF_TOKEN": hub.token}, {"HF_TOKEN_PATH": str(tmp_path / "token")}), strict=True
    ):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            source = origin.source(**way)
        found = list_tree(source)
        for path, content in origin.files.items():
            assert read(source, object_of(source, path, found[path])) == content  # the CDN refuses two authorisations
    with pytest.raises(AccessError, match="InvalidToken") as caught:
        list_tree(origin.source(token="hf_mistyped"))
    assert "hf_mistyped" not in str(caught.value) + repr(origin.opened[-1])
    origin.close()


def test_a_gated_repository_says_where_to_accept_its_licence(hub: HubServer) -> None:
    origin = HubOrigin(hub, gated=True)
    origin.put("w.safetensors", ramp(1000))
    commit = origin.commit()
    for token in (None, hub.other_token):
        source = origin.source(token=token)
        with pytest.raises(AccessError, match=f"accept its licence at {hub.endpoint}/{origin.repo}"):
            list_tree(source)
        pinned = origin.source(f"@{commit}", token=token)  # nothing is asked about a commit, so only reading can say it
        obj = object_of(pinned, "w.safetensors", list_tree(pinned)["w.safetensors"])
        with pytest.raises(AccessError, match=f"accept its licence at {hub.endpoint}/{origin.repo}"):
            read(pinned, obj, 0, 10)
    source = origin.source(token=hub.token)
    assert read(source, object_of(source, "w.safetensors", list_tree(source)["w.safetensors"])) == ramp(1000)
    origin.close()


def test_an_address_whose_host_has_died_is_asked_for_again() -> None:
    content, commit = ramp(1000), "c" * 40
    storage: list[str] = []

    def answer(request: Request) -> Answer:
        if "/tree/" in request.path:
            item = {"type": "file", "path": "w.bin", "size": len(content), "oid": "1" * 40}
            return Answer(200, json.dumps([item]).encode())
        return Answer(302, b"", (("Location", f"{storage[-1]}/w.bin?Expires=99999999999"),))

    def cdn() -> ScriptedServer:
        def send(request: Request) -> Answer:
            answer = s3_object(request, content)
            return answer._replace(headers=(*answer.headers, ("Connection", "close")))

        return ScriptedServer(send)

    with ScriptedServer(answer) as site, cdn() as second:
        source = open_source(f"hf://org/name@{commit}", SourceOptions(endpoint_url=site.url))
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        with cdn() as first:
            storage.append(first.url)
            assert read(source, obj, 0, 10) == content[:10]
        storage.append(second.url)
        assert read(source, obj, 50, 60) == content[50:60]
        source.close()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_address_that_has_died_before_its_time_is_asked_for_again(status: int) -> None:
    content, commit = ramp(1000), "c" * 40
    addresses = itertools.count()
    is_dead = threading.Event()

    def answer(request: Request) -> Answer:
        if "/tree/" in request.path:
            item = {"type": "file", "path": "w.bin", "size": len(content), "oid": "1" * 40}
            return Answer(200, json.dumps([item]).encode())
        if "/resolve/" in request.path:
            cdn = site.url.replace("127.0.0.1", "localhost")
            return Answer(302, b"", (("Location", f"{cdn}/{next(addresses)}?Expires=99999999999"),))
        if request.path == "/0" and is_dead.is_set():
            return Answer(status, b"<Error><Code>ExpiredToken</Code></Error>")
        return s3_object(request, content)

    with ScriptedServer(answer) as site:
        source = open_source(f"hf://org/name@{commit}", SourceOptions(endpoint_url=site.url))
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        assert read(source, obj, 0, 10) == content[:10]
        is_dead.set()
        assert read(source, obj, 50, 60) == content[50:60]
        assert next(addresses) == 2
        source.close()


def test_missing_revisions_and_repositories_are_named(hub: HubServer, origin: HubOrigin) -> None:
    origin.put("a", b"1")
    with pytest.raises(NotFoundError, match="no such branch, tag or commit"):
        list_tree(origin.source("@v99"))
    with pytest.raises(NotFoundError, match="no such repository"):
        list_tree(HubOrigin(hub, "nobody").source())


def test_rate_limits_are_waited_for_inside_the_deadline(hub: HubServer, origin: HubOrigin) -> None:
    origin.put("w.safetensors", ramp(1000))
    source = origin.source()
    hub.limit_rate(1, wait_s=1)
    obj = object_of(source, "w.safetensors", list_tree(source)["w.safetensors"])
    hub.limit_rate(1, wait_s=1, header="Retry-After")
    assert read(source, obj, 0, 10) == ramp(10)
    hub.limit_rate(1, wait_s=600, host="cdn")
    with pytest.raises(TransientStoreError, match=r"429.*asks to wait 600 s"):
        read(source, obj, 0, 10)
    hub.reject(0, 429, host="cdn")


def test_an_address_is_renewed_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    assert expiry_s("https://cdn/x?Expires=1003600&Signature=y") == 1_003_570
    assert expiry_s("https://cdn/x?Expires=1000010") == 1_000_009
    assert expiry_s("https://cdn/x?X-Amz-Date=19700112T134640Z&X-Amz-Expires=600") == 1_000_570
    assert expiry_s("https://hub/api/resolve-cache/x") == 1_000_570
    assert expiry_s("https://cdn/x?Expires=soon") == 1_000_570
