"""A web server's folder as a source, against nginx."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import (
    AccessError,
    ChangedError,
    IntegrityError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
)
from mfs.sources import open_source
from mfs.sources.base import Source
from mfs.sources.http_listing import add_autoindex, add_manifest
from mfs.sources.tree import TreeBuilder
from mfs.testing import ramp
from mfs.testing.suite import SourceSuite, deadline, list_tree, object_of, read
from mfs.types import EntryKind
from tests.servers import web
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer


class HttpOrigin:
    """A folder of its own on nginx. Each write has a time of its own: nginx tells versions apart by whole seconds."""

    def __init__(self, base: str, files: Path) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.base = base
        self.root = files / self.name
        self.root.mkdir(parents=True)
        self.seconds = 1_767_225_600
        self.opened: list[Source] = []

    def source(self, prefix: str = "", suffix: str = "", base: str = "") -> Source:
        source = open_source(f"{base or self.base}{prefix}{self.name}/{suffix}")
        self.opened.append(source)
        return source

    def put(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.seconds += 1
        os.utime(target, (self.seconds, self.seconds))

    def delete(self, path: str) -> None:
        (self.root / path).unlink()

    def close(self) -> None:
        for source in self.opened:
            source.close()


@pytest.fixture
def origin(nginx: NginxServer) -> Iterator[HttpOrigin]:
    origin = HttpOrigin(nginx.url, nginx.files)
    yield origin
    origin.close()


class TestAutoindex(SourceSuite):
    @pytest.fixture
    def origin(self, origin: HttpOrigin) -> HttpOrigin:
        return origin


class ManifestOrigin(HttpOrigin):
    """The same folder, described by a manifest that is rewritten with every change."""

    fields: tuple[str, ...] = ("etag", "mtime")

    def put(self, path: str, content: bytes) -> None:
        super().put(path, content)
        self.write_manifest()

    def delete(self, path: str) -> None:
        super().delete(path)
        self.write_manifest()

    def write_manifest(self) -> None:
        files = [self.describe(f) for f in sorted(self.root.rglob("*")) if f.is_file() and f.parent != self.root]
        files += [self.describe(f) for f in self.root.iterdir() if f.is_file() and f.suffix != ".json"]
        (self.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))

    def describe(self, file: Path) -> dict[str, Any]:
        status = file.stat()
        facts = {
            "etag": f'"{int(status.st_mtime):x}-{status.st_size:x}"',
            "mtime": int(status.st_mtime),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        described = {field: facts[field] for field in self.fields}
        return {"path": str(file.relative_to(self.root)), "size": status.st_size, **described}


class ManifestOriginByTime(ManifestOrigin):
    fields = ("sha256", "mtime")


class TestManifest(SourceSuite):
    @pytest.fixture(params=[ManifestOrigin, ManifestOriginByTime])
    def origin(self, nginx: NginxServer, request: pytest.FixtureRequest) -> Iterator[HttpOrigin]:
        origin = request.param(nginx.url, nginx.files)
        yield origin
        origin.close()


def test_a_manifest_gives_the_whole_tree_in_two_requests_and_digests(nginx: NginxServer) -> None:
    origin = ManifestOriginByTime(nginx.url, nginx.files)
    origin.put("a/b/c.bin", b"123")
    origin.put("top", b"1")
    nginx.forget_requests()
    source = origin.source()
    pages = dict(source.list("", deadline_s=deadline()))
    assert set(pages) == {"", "a", "a/b"}
    (entry,) = pages["a/b"]
    assert entry.digest == f"sha256:{hashlib.sha256(b'123').hexdigest()}"
    assert len(nginx.requests()) == 2
    named = origin.source(suffix="mfs-manifest.json")
    assert named.identity == source.identity
    assert dict(named.list("a", deadline_s=deadline())).keys() == {"a", "a/b"}
    assert len(nginx.requests()) == 3
    origin.close()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files": {}}',
        '{"files": [{"path": "a"}]}',
        '{"files": [{"path": "a", "size": -1}]}',
        '{"files": [{"path": "a", "size": 1, "sha256": "xyz"}]}',
        '{"files": [{"path": 1, "size": 1}]}',
        '{"files": [7]}',
        '{"files": [{"path": "a", "size": 1, "etag": [1]}]}',
        "[" * 100_000,
        '{"files": [{"path": "a", "size": 1, "sha256": ' + "[" * 900 + "]" * 900 + "}]}",
    ],
)
def test_a_bad_manifest_is_named_with_what_is_wrong(origin: HttpOrigin, text: str) -> None:
    (origin.root / "mfs-manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"mfs-manifest\.json: (expected|none of its files can be shown: 1 name)"):
        list_tree(origin.source())


@pytest.mark.parametrize("facts", [{}, {"sha256": hashlib.sha256(b"123").hexdigest()}], ids=["size alone", "sha256"])
def test_what_a_manifest_does_not_state_is_asked_of_the_server(
    origin: HttpOrigin, facts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def write_manifest(*names: str) -> None:
        files = [{"path": name, "size": 3, **facts} for name in names]
        (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))

    origin.put("m/w.bin", b"123")
    write_manifest("m/w.bin", "m/gone.bin")
    source = origin.source()
    found = list_tree(source)
    old = object_of(source, "m/w.bin", found["m/w.bin"])
    assert read(source, old) == b"123"
    assert "1 files" in caplog.text
    with pytest.raises(IntegrityError, match=r"m/gone\.bin: neither ETag nor date"):
        read(source, object_of(source, "m/gone.bin", found["m/gone.bin"]))
    origin.put("m/w.bin", b"456")
    write_manifest("m/w.bin")
    with pytest.raises(ChangedError):
        read(source, old)
    new = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
    assert read(source, new) == b"456"
    assert facts or new.version != old.version


def test_a_file_whose_validators_do_not_come_costs_itself_and_not_the_listing(liar: LiarServer) -> None:
    origin = HttpOrigin(liar.url, liar.files)
    files = [{"path": name, "size": 3} for name in ("good.bin", "busy.bin")]
    for item in files:
        origin.put(str(item["path"]), b"123")
    (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))
    liar.lie(Lie.STATUS, pattern="*busy.bin", status=503, retry_after_s=0)
    source = origin.source()
    ((_, entries),) = source.list("", deadline_s=deadline(1))
    found = {entry.name: entry for entry in entries}
    assert read(source, object_of(source, "good.bin", found["good.bin"])) == b"123"
    with pytest.raises(IntegrityError, match=r"busy\.bin"):
        read(source, object_of(source, "busy.bin", found["busy.bin"]))
    origin.close()


def test_a_manifest_cannot_reach_outside(origin: HttpOrigin) -> None:
    files = [{"path": path, "size": 1, "mtime": 1} for path in ("../x", "/etc/passwd", "a//b", "a\nb", "good")]
    (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))
    assert set(list_tree(origin.source())) == {"good", "a"}


@pytest.mark.parametrize(
    ("fields", "year"),
    [
        ({"mtime": 10**11}, 2262),
        ({"mtime": 1767323045000}, 1970),
        ({"mtime": -1}, 1970),
        ({"mtime": 1.5e9 + 0.75}, 2017),
        ({"mtime": "0001-01-01T00:00:00Z"}, 1970),
        ({"mtime": "2300-01-01"}, 2262),
        ({"mtime": "Fri, 02 Jan 2026 03:04:05 GMT"}, 2026),
        ({"mtime": "soon"}, 1970),
        ({"mtime": [1]}, 1970),
        ({"mtime": True}, 1970),
        ({"size": 1e0}, 1970),
        ({"size": "1"}, 1970),
        ({"size": "one"}, None),
        ({"size": 1.5}, None),
        ({"size": -1}, None),
        ({"size": None}, None),
        ({"size": 2**63}, None),
        ({"size": 2**64}, None),
        ({"size": 10**5000}, None),
        ({"etag": "e" * 10**6}, None),
        ({"etag": 5}, None),
        ({"path": "d/" * 10_000 + "x"}, None),
        ({"path": "x" * 256}, None),
        ({"path": None}, None),
    ],
)
def test_an_odd_entry_of_a_manifest_costs_itself_alone(fields: dict[str, Any], year: int | None) -> None:
    tree = TreeBuilder("t", "")
    with without_digits_limit():
        files = [{"path": "odd", "size": 1} | fields, {"path": "good", "size": 1}]
        body = json.dumps({"files": files}).encode()
    add_manifest(tree, body, "t")
    ((_, entries),) = tree.pages()
    shown = {entry.name: 1970 + entry.mtime_ns // (31_556_952 * 10**9) for entry in entries}
    assert shown == {"good": 1970} | ({"odd": year} if year else {})


@contextlib.contextmanager
def without_digits_limit() -> Iterator[None]:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


def test_an_odd_entry_of_an_index_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    good = {"name": "good", "type": "file", "size": 5, "mtime": "Fri, 31 Dec 9999 23:59:59 GMT"}
    odd = [{**good, "name": f"{i}", "size": -i} for i in range(1, 1000)]
    tree = TreeBuilder("t", "")
    add_autoindex(tree, json.dumps([*odd, 7, {}, {"name": 5}, good]).encode(), "t")
    ((_, entries),) = tree.pages()
    assert [entry.name for entry in entries] == ["good"]
    assert len(caplog.messages) == 1
    assert "1002 names" in caplog.text
    assert len(caplog.text) < 1000
    for body in (b"[1, 2]", b"[{}]", b"[" * 100_000):
        with pytest.raises(StoreError, match="expected nginx's JSON index"):
            add_autoindex(TreeBuilder("t", ""), body, "t")


def test_the_url_may_come_without_a_slash_and_with_raw_characters(nginx: NginxServer, origin: HttpOrigin) -> None:
    origin.put("mo del/é", b"1")
    for suffix in ("mo del", "mo%20del/"):
        source = origin.source(suffix=suffix)
        assert set(list_tree(source)) == {"é"}
        assert source.identity == f"{nginx.url}{origin.name}/mo%20del/"


@pytest.mark.parametrize("url", ["http://", "http://h:x/", "http://h/?a=b", "http://h/#x"])
def test_urls_without_a_meaning_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="http"):
        open_source(url)


def test_a_server_without_ranges_is_said_so(origin: HttpOrigin) -> None:
    """A small file is taken from the answer with all of it; of a large one that would be a waste for each read."""
    origin.put("w.bin", ramp(1000))
    origin.put("large.bin", ramp(9 << 20))
    source = origin.source("~no-ranges/")
    small, large = (object_of(source, name, list_tree(source)[name]) for name in ("w.bin", "large.bin"))
    assert read(source, small) == ramp(1000)
    assert read(source, small, 10, 20) == ramp(1000)[10:20]
    with pytest.raises(StoreError, match="no range support"):
        read(source, large, 10, 20)


@pytest.mark.parametrize(
    ("prefix", "error", "text"),
    [
        ("~html-index/", StoreError, "autoindex_format json"),
        ("~no-index/", AccessError, "autoindex_format json"),
        ("~forbidden/", AccessError, "403"),
        ("~private/", AccessError, "user and a password"),
        ("~nothing/", NotFoundError, "404"),
    ],
)
def test_folders_that_cannot_be_listed_say_what_to_do(
    origin: HttpOrigin, prefix: str, error: type[Exception], text: str
) -> None:
    origin.put("w.bin", b"1")
    with pytest.raises(error, match=text):
        list_tree(origin.source(prefix))


def test_a_folder_without_an_index_serves_by_its_manifest(origin: HttpOrigin) -> None:
    origin.put("w.bin", b"123")
    files = [{"path": "w.bin", "size": 3, "mtime": origin.seconds}]
    (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))
    source = origin.source("~no-index/")
    assert read(source, object_of(source, "w.bin", list_tree(source)["w.bin"])) == b"123"


def test_credentials_from_the_url_and_from_netrc_stay_hidden(
    nginx: NginxServer, origin: HttpOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin.put("w.bin", b"123")
    base = nginx.url.replace("//", f"//{nginx.user}:{nginx.password}@")
    source = origin.source("~private/", base=base)
    assert read(source, object_of(source, "w.bin", list_tree(source)["w.bin"])) == b"123"
    assert nginx.password not in source.identity + repr(source)
    wrong = origin.source("~private/", base=base.replace(nginx.password, "hunter2"))
    with pytest.raises(AccessError) as caught:
        list_tree(wrong)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError) as refused:
        open_source("http://user:hunter2@host/?x")
    assert "hunter2" not in str(refused.value)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login {nginx.user} password {nginx.password}\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set(list_tree(origin.source("~private/"))) == {"w.bin"}


def test_redirects_are_followed(origin: HttpOrigin) -> None:
    origin.put("m/w.bin", ramp(1000))
    source = origin.source("~moved/")
    obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
    assert read(source, obj, 5, 15) == ramp(10, 5)


def test_tls_is_checked_against_the_trusted_certificates(
    nginx: NginxServer, origin: HttpOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin.put("w.bin", ramp(5 << 20))
    with pytest.raises(StoreError, match=r"certificate not trusted.*SSL_CERT_FILE"):
        list_tree(origin.source(base=nginx.tls_url))
    for variable in ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, str(nginx.ca_file))
            source = origin.source(base=nginx.tls_url)
            assert read(source, object_of(source, "w.bin", list_tree(source)["w.bin"])) == ramp(5 << 20)
    with pytest.raises(StoreError, match="does not speak TLS"):
        list_tree(origin.source(base=nginx.url.replace("http", "https")))


@pytest.mark.parametrize("lie", [Lie.CHANGED, Lie.SHRUNK, Lie.GROWN, Lie.OTHER_TOTAL])
def test_an_object_that_changed_is_a_changed_error(liar: LiarServer, lie: Lie) -> None:
    origin = ManifestOrigin(liar.url, liar.files)
    origin.put("w.bin", ramp(1000))
    etag = _etag(liar, f"{origin.name}/w.bin")
    files = [{"path": "w.bin", "size": 1000, "etag": etag}]
    (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))
    source = origin.source()
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    assert read(source, obj) == ramp(1000)
    liar.lie(lie, pattern="*.bin")
    with pytest.raises(ChangedError, match=r"w\.bin"):
        read(source, obj, 600, 900)
    origin.close()


def test_a_server_that_ignores_conditions_is_caught_by_its_etag(liar: LiarServer) -> None:
    origin = ManifestOrigin(liar.url, liar.files)
    origin.put("w.bin", ramp(1000))
    files = [{"path": "w.bin", "size": 1000, "etag": _etag(liar, f"{origin.name}/w.bin")}]
    (origin.root / "mfs-manifest.json").write_text(json.dumps({"files": files}))
    source = origin.source()
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    liar.lie(Lie.NEW_ETAGS, pattern="*.bin")
    with pytest.raises(ChangedError, match="ETag"):
        read(source, obj, 0, 10)
    origin.close()


def _etag(liar: LiarServer, path: str) -> str:
    import urllib.request

    with urllib.request.urlopen(liar.url + path) as answer:
        return str(answer.headers["ETag"])


def test_a_busy_server_is_asked_again(liar: LiarServer) -> None:
    origin = HttpOrigin(liar.url, liar.files)
    origin.put("w.bin", ramp(1000))
    source = origin.source()
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    liar.lie(Lie.STATUS, status=503, retry_after_s=0, count=3)
    assert read(source, obj, 1, 9) == ramp(8, 1)
    assert liar.lies_told() == 3
    for status in (507, 509, 520, 524, 599):
        liar.lie(Lie.STATUS, status=status, count=1)
        assert read(source, obj, 1, 9) == ramp(8, 1)
    liar.lie(Lie.STATUS, status=501)
    with pytest.raises(StoreError, match=r"unexpected status 501|does not keep"):
        read(source, obj, 1, 9)
    liar.lie(Lie.STATUS, status=503, retry_after_s=3600)
    with pytest.raises(TransientStoreError, match="asks to wait 3600 s"):
        read(source, obj, 1, 9)
    origin.close()


@pytest.mark.parametrize("manifest", ["", "mfs-manifest.json"])
def test_a_server_of_one_connection_at_a_time_is_not_left_waiting_on_an_idle_one(manifest: str) -> None:
    """Such a one answers nothing while it waits for the first request of a connection that was opened ahead."""
    served: list[bytes] = []

    class Site(web.Handler):
        protocol_version = "HTTP/1.0"

        def handle(self) -> None:
            super().handle()
            served.append(self.raw_requestline)

        def do_GET(self) -> None:
            listing = {"files": [{"path": "w.bin", "size": 4, "etag": "v"}]}
            found = json.dumps(listing).encode() if self.path.endswith(".json") else b"1234"
            self.answer(200 if self.path != "/" else 404, found, [("ETag", '"v"')])

    with http.server.HTTPServer(("127.0.0.1", 0), Site) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        source = open_source(f"http://127.0.0.1:{server.server_port}/{manifest}")
        assert read(source, object_of(source, "w.bin", list_tree(source)["w.bin"])) == b"1234"
        source.close()
        server.shutdown()
        serving.join()
    assert len(served) >= 2
    assert all(served)


def test_what_is_neither_file_nor_directory_is_left_out(origin: HttpOrigin) -> None:
    origin.put("good", b"1")
    os.mkfifo(origin.root / "pipe")
    os.close(os.open(os.fsencode(origin.root) + b"/latin-\xe9", os.O_CREAT | os.O_WRONLY))
    found = list_tree(origin.source())
    assert [(path, entry.kind) for path, entry in found.items()] == [("good", EntryKind.FILE)]
