"""Where a registry redirects to: storage that dies is asked for anew, and nothing leaves https."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mfs.errors import StoreError, TransientStoreError
from mfs.oci.client import RegistryClient
from mfs.oci.reference import parse_reference
from mfs.oci.upload import Uploader
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from tests.oci.artifacts import ARTIFACT, CONFIG, MANIFEST, RAW, digest_of
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_object
from tests.servers.tls import Certificate, make_certificate

CONTENT = ramp((9 << 20) + 5)
"""More than a server that does no ranges is forgiven."""


class Redirecting:
    """A registry of one file that redirects to whatever `storage` names, and what that answers."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        layer = {"mediaType": RAW, "digest": digest_of(CONTENT), "size": len(CONTENT),
                 "annotations": {"org.cncf.model.filepath": "w.bin"}}  # fmt: skip
        self.manifest = json.dumps({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT,
            "config": {"mediaType": CONFIG, "digest": digest_of(b"{}"), "size": 2}, "layers": [layer],
        }).encode()  # fmt: skip
        self.asked_count = 0
        self.storage = ""
        self.head_status = 307
        self._stack = ExitStack()
        server = ScriptedServer(self._answer)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.cert_file, certificate.key_file)
            server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        self._stack.enter_context(server)
        self.url = f"oci://{server.url.partition('://')[2]}/team/m"
        if certificate:
            self.url = self.url.replace("oci://", "oci+https://")

    def open_storage(self, answer: Callable[[Request], Answer] | None = None) -> str:
        server = self._stack.enter_context(ScriptedServer(answer or (lambda request: s3_object(request, CONTENT))))
        return server.url

    def _answer(self, request: Request) -> Answer:
        if "/manifests/" in request.path:
            if request.method == "HEAD" and self.head_status != 200:
                return Answer(self.head_status, b"", (("Location", f"{self.storage}/manifest"),))
            return Answer(200, self.manifest, (("Content-Type", MANIFEST),))
        self.asked_count += 1
        return Answer(307, b"", (("Location", f"{self.storage}/blob?Expires=99999999999"),))

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def registry() -> Iterator[Redirecting]:
    registry = Redirecting()
    yield registry
    registry.close()


@pytest.fixture
def source(registry: Redirecting) -> Iterator[Source]:
    source = open_source(f"{registry.url}:v1")
    yield source
    source.close()


def _closes(request: Request) -> Answer:
    """So that no connection outlives its server."""
    answer = s3_object(request, CONTENT)
    return answer._replace(headers=(*answer.headers, ("Connection", "close")))


def _no_ranges(request: Request) -> Answer:
    return Answer(200, CONTENT)


def _other_size(request: Request) -> Answer:
    return s3_object(request, CONTENT[:-1])


def _refuses(request: Request) -> Answer:
    return Answer(501)


@pytest.mark.parametrize("fault", [None, _no_ranges, _other_size, _refuses])
def test_storage_that_dies_is_asked_for_anew(
    registry: Redirecting, source: Source, fault: Callable[[Request], Answer] | None
) -> None:
    state: dict[str, Callable[[Request], Answer] | None] = {}
    with ScriptedServer(lambda request: (state.get("fault") or _closes)(request)) as first:
        registry.storage = first.url
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        assert read(source, obj, 0, 10) == CONTENT[:10]
        state["fault"] = fault
        registry.storage = registry.open_storage()
        if fault:
            assert read(source, obj, 50, 60) == CONTENT[50:60]
    assert read(source, obj, 70, 80) == CONTENT[70:80]
    assert registry.asked_count == 2


def test_a_head_that_is_redirected_says_that_a_blob_is_there(registry: Redirecting) -> None:
    registry.storage = registry.open_storage(lambda request: Answer(403))  # what is signed is a GET
    client = RegistryClient(parse_reference(f"{registry.url}:v1"))
    assert Uploader(client, open_source("/")).has(digest_of(CONTENT), "x")
    client.close()


@pytest.mark.parametrize("status", [307, 405, 501])
def test_a_head_of_a_manifest_that_is_not_answered_is_a_get(registry: Redirecting, source: Source, status: int) -> None:
    registry.storage = registry.open_storage(lambda request: Answer(403))
    registry.head_status = status
    assert list_tree(source).keys() == list_tree(source).keys() == {"w.bin"}


class TestTls:
    @pytest.fixture
    def registry(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redirecting]:
        certificate = make_certificate(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.ca_file))
        registry = Redirecting(certificate)
        yield registry
        registry.close()

    def test_nothing_is_sent_to_storage_without_it(self, registry: Redirecting) -> None:
        asked: list[Request] = []

        def answer(request: Request) -> Answer:
            asked.append(request)
            return s3_object(request, CONTENT)

        registry.storage = registry.open_storage(answer)
        source = open_source(f"{registry.url}:v1", SourceOptions())
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        with pytest.raises(StoreError, match=f"is https and redirects to {registry.storage}, which is not") as caught:
            read(source, obj, 0, 10, deadline_s=deadline(3))
        assert not isinstance(caught.value, TransientStoreError)
        assert not asked
        source.close()

    def test_a_registry_that_calls_itself_http_is_meant(self) -> None:
        client = RegistryClient(parse_reference("oci://reg.example:8443/team/m"))
        for there in ("http://reg.example/x?a=b", "http://reg.example:8443/x?a=b"):
            assert client.settled(there) == "https://reg.example:8443/x?a=b"
        assert client.settled("https://cdn.example/y") == "https://cdn.example/y"
        for there in ("http://reg.example:9000/x", "http://cdn.example/x"):
            with pytest.raises(StoreError, match="which is not"):
                client.settled(there)
        client.close()
        plain = RegistryClient(parse_reference("oci+http://reg.example/team/m"))
        assert plain.settled("http://cdn.example/x") == "http://cdn.example/x"
        plain.close()
