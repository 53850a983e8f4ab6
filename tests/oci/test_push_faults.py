"""`mfs.oci.push` where the registry, what stands before it, or the person at the keyboard has ideas of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.errors import AccessError, NotFoundError, StoreError, TransientStoreError, UsageError
from mfs.oci import upload
from mfs.oci.client import RegistryClient
from mfs.oci.push import push
from mfs.oci.reference import parse_reference
from mfs.oci.referrers import BUNDLE, CARD, fallback_tag, list_referrers
from mfs.registry.push import Step
from mfs.registry.signing import Signer
from mfs.testing import ramp
from mfs.testing.suite import deadline
from tests.oci.artifacts import INDEX, MANIFEST, Repository
from tests.oci.gateway import Relay, gateway
from tests.oci.test_push import FILES, contents, write
from tests.registry.keys import make_keys
from tests.servers.docker_registry import DockerRegistry
from tests.servers.process import free_port
from tests.servers.scripted import Answer, Request, ScriptedServer
from tests.servers.tls import make_certificate

BIG = ramp(1_000_003, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", FILES)


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One blob of eleven pieces."""
    monkeypatch.setattr(upload, "PIECE_BYTES", 100_000)
    return write(tmp_path / "big", {"w.bin": BIG})


def through(server: ScriptedServer, repository: Repository) -> str:
    scheme, _, host = server.url.partition("://")
    return f"oci+{scheme}://{host}/{repository.name}"


def passing(request: Request, relay: Relay) -> Answer:
    return relay(request)


class TestCtrlC:
    def test_ends_what_is_being_sent(self, registry: DockerRegistry, repository: Repository, big: Path) -> None:
        is_over = threading.Event()
        pieces: list[Request] = []

        def answer(request: Request, relay: Relay) -> Answer:
            if request.method == "PATCH":
                pieces.append(request)
                if len(pieces) == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    is_over.wait(20)
            return relay(request)

        with gateway(registry, answer) as server:
            with pytest.raises(KeyboardInterrupt):
                push(big, f"{through(server, repository)}:v1")
            is_over.set()
        assert len(pieces) == 1

    def test_ends_hashing(
        self, registry: DockerRegistry, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "model").mkdir()
        with (tmp_path / "model/w.bin").open("wb") as file:
            file.truncate(40 << 20)
        is_closed, close = threading.Event(), RegistryClient.close

        def closed(client: RegistryClient) -> None:
            close(client)
            is_closed.set()

        monkeypatch.setattr(RegistryClient, "close", closed)
        steps: list[Step] = []

        def told(step: Step) -> None:
            steps.append(step)
            if step.path == "w.bin" and not is_closed.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                is_closed.wait(20)

        with pytest.raises(KeyboardInterrupt):
            push(tmp_path / "model", f"{repository.url}:v1", told=told)
        assert [step.path for step in steps] == ["", "w.bin"]


class TestCard:
    """Of what is hung on a model a card is an extra, and a signature is not."""

    @pytest.mark.parametrize("status", [403, 404, 501])
    def test_a_registry_that_refuses_the_tag_of_referrers_gets_the_model_all_the_same(
        self, registry: DockerRegistry, repository: Repository, folder: Path, tmp_path: Path, status: int
    ) -> None:
        def answer(request: Request, relay: Relay) -> Answer:
            is_refused = request.method == "PUT" and "/manifests/sha256-" in request.path
            return Answer(status, b"no such tags here") if is_refused else relay(request)

        with gateway(registry, answer) as server:
            url = through(server, repository)
            signer = Signer(make_keys(tmp_path, "team").private)
            with pytest.raises((StoreError, AccessError, NotFoundError), match="no such tags here"):
                push(folder, f"{url}:signed", signer=signer)
            pushed = push(folder, f"{url}:v1")
        [warning] = pushed.warnings
        assert "the card could not be hung" in warning
        assert "no such tags here" in warning
        assert pushed.referrers == ()
        assert contents(f"{repository.url}:v1") == FILES
        with pytest.raises(NotFoundError):
            contents(f"{repository.url}:signed")

    def test_a_registry_that_drops_what_it_takes_is_told_from_other_writers(
        self, registry: DockerRegistry, repository: Repository, folder: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("mfs.oci.referrers._PAUSE_S_MAX", 0.01)

        def answer(request: Request, relay: Relay) -> Answer:
            is_index = request.method == "PUT" and "/manifests/sha256-" in request.path
            return Answer(201) if is_index else relay(request)

        with gateway(registry, answer) as server:
            [warning] = push(folder, f"{through(server, repository)}:v1").warnings
            assert "immutable" in warning
            (folder / "README.md").unlink()
            with pytest.raises(StoreError, match="immutable"):
                push(folder, f"{through(server, repository)}:v2",
                     signer=Signer(make_keys(tmp_path, "team").private))  # fmt: skip
        assert set(contents(f"{repository.url}:v1")) == set(FILES)

    def test_what_others_wrote_into_the_index_is_kept(self, repository: Repository, folder: Path) -> None:
        digest = push(folder, f"{repository.url}:v1").digest
        place = f"{repository.api}/manifests/{fallback_tag(digest)}"
        index = repository.request("GET", place, headers={"Accept": INDEX}).json()
        [card] = index["manifests"]
        theirs = {**card, "artifactType": "application/theirs", "urls": ["https://x"], "data": "e30=", "new": [1.5],
                  "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}}  # fmt: skip
        theirs["digest"] = digest
        theirs["size"] = len(repository.request("GET", f"{repository.api}/manifests/{digest}",
                                                headers={"Accept": MANIFEST}).content)  # fmt: skip
        index |= {"manifests": [theirs], "annotations": {"a": "b"}, "unknown": {"x": None}}
        repository.put_manifest(json.dumps(index).encode(), fallback_tag(digest), INDEX)
        push(folder, f"{repository.url}:v1")
        now = repository.request("GET", place, headers={"Accept": INDEX}).json()
        assert now == {**index, "manifests": [theirs, card]}


def test_the_tag_of_referrers_is_cut_as_the_specification_says() -> None:
    assert fallback_tag(f"sha256:{'a' * 64}") == f"sha256-{'a' * 64}"
    assert fallback_tag(f"sha512:{'b' * 128}") == f"sha512-{'b' * 64}"


def test_referrers_are_listed_page_by_page(registry: DockerRegistry, repository: Repository) -> None:
    def page(*numbers: int) -> bytes:
        entries = [{"mediaType": MANIFEST, "digest": f"sha256:{number:064}", "size": 9, "artifactType": kind}
                   for number in numbers for kind in (CARD, BUNDLE)]  # fmt: skip
        return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()

    def answer(request: Request, relay: Relay) -> Answer:
        if "/referrers/" not in request.path:
            return relay(request)
        if "last" in request.query:
            return Answer(200, page(3))
        link = f'<http://behind.example:81{request.path}?last=2>; rel="next"'
        return Answer(200, page(1, 2), (("Link", link),))

    with gateway(registry, answer) as server:
        client = RegistryClient(parse_reference(through(server, repository)))
        found = list_referrers(client, f"sha256:{'0' * 64}", CARD, deadline_s=deadline())
        client.close()
    assert [int(entry.digest[7:]) for entry in found] == [1, 2, 3]


class TestUploads:
    """To a registry behind something that ends TLS, limits what passes, or takes part of it."""

    @pytest.mark.parametrize("host", ["", "elsewhere.example"])
    def test_a_location_in_plain_http(
        self, registry: DockerRegistry, repository: Repository, folder: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, host: str,
    ) -> None:  # fmt: skip
        certificate = make_certificate(tmp_path / "tls")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.ca_file))

        def answer(request: Request, relay: Relay) -> Answer:
            status, body, headers = relay(request)
            if host:
                headers = tuple((name, value.replace("127.0.0.1", host)) for name, value in headers)
            return Answer(status, body, headers)

        with gateway(registry, answer, certificate) as server:
            url = f"{through(server, repository)}:v1"
            if host:
                with pytest.raises(StoreError, match=f"http://{host}:.*nothing is sent there"):
                    push(folder, url)
                return
            push(folder, url)
        assert contents(f"{repository.url}:v1") == FILES

    def test_smaller_pieces_where_they_are_too_large(
        self, registry: DockerRegistry, repository: Repository, big: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upload, "PIECE_BYTES_MIN", 20_000)
        (big / "small.bin").write_bytes(ramp(70_000))
        limit = 30_000

        def answer(request: Request, relay: Relay) -> Answer:
            is_refused = len(request.body) > limit and "/blobs/uploads/" in request.path
            return Answer(413, b"<html>nginx") if is_refused else relay(request)

        with gateway(registry, answer) as server:
            push(big, f"{through(server, repository)}:v1")
            assert contents(f"{repository.url}:v1")["w.bin"] == BIG
            limit = 10_000
            (big / "w.bin").write_bytes(BIG[::-1])
            with pytest.raises(StoreError, match=r"too large.*client_max_body_size"):
                push(big, f"{through(server, repository)}:v2")

    def test_part_of_a_piece(self, registry: DockerRegistry, repository: Repository, big: Path) -> None:
        def answer(request: Request, relay: Relay) -> Answer:
            if request.method == "PATCH":
                request = request._replace(body=request.body[: len(request.body) // 2 + 1])
            return relay(request)

        with gateway(registry, answer) as server:
            push(big, f"{through(server, repository)}:v1")
        assert contents(f"{repository.url}:v1") == {"w.bin": BIG}

    @pytest.mark.parametrize("says_where", [True, False])
    def test_out_of_order(self, registry: DockerRegistry, repository: Repository, big: Path, says_where: bool) -> None:
        """As after a piece that came and whose answer did not: the registry says 416, and where it stands."""
        patches: list[Request] = []

        def answer(request: Request, relay: Relay) -> Answer:
            if request.method != "PATCH":
                return relay(request)
            patches.append(request)
            done = relay(request)
            if len(patches) != 3:
                return done
            headers = done.headers if says_where else [pair for pair in done.headers if pair[0] == "location"]
            return Answer(416, b"", tuple(headers))

        with gateway(registry, answer) as server:
            push(big, f"{through(server, repository)}:v1")
        assert contents(f"{repository.url}:v1") == {"w.bin": BIG}
        assert len(patches) == (11 if says_where else 14)  # else 2.8 has forgotten the upload, since it moved on


class TestMounts:
    @pytest.fixture
    def other(self, registry: DockerRegistry, folder: Path) -> Iterator[Repository]:
        """A repository that has the same blobs."""
        other = Repository(registry)
        push(folder, f"{other.url}:v1")
        yield other
        other.close()

    def test_what_the_registry_has_anywhere_is_mounted_without_a_base(
        self, registry: DockerRegistry, repository: Repository, other: Repository, folder: Path
    ) -> None:
        """By distribution-spec 1.1, which docker-registry 2.8 does not know: here the gateway does."""

        def answer(request: Request, relay: Relay) -> Answer:
            if "mount" in request.query:
                request = request._replace(query={**request.query, "from": other.name})
            return relay(request)

        with gateway(registry, answer) as server:
            pushed = push(folder, f"{through(server, repository)}:v1")
        assert (pushed.mounted_bytes, pushed.sent_bytes) == (pushed.nbytes, 0)
        assert contents(f"{repository.url}:v1") == FILES

    def test_a_registry_that_does_not_know_that(
        self, registry: DockerRegistry, repository: Repository, folder: Path
    ) -> None:
        def answer(request: Request, relay: Relay) -> Answer:
            return Answer(400, b"from?") if "mount" in request.query else relay(request)

        with gateway(registry, answer) as server:
            pushed = push(folder, f"{through(server, repository)}:v1")
        assert (pushed.mounted_bytes, pushed.sent_bytes) == (0, pushed.nbytes)

    def test_a_base_that_one_may_not_read_together_with_pushing(
        self, registry: DockerRegistry, repository: Repository, other: Repository, folder: Path
    ) -> None:
        def answer(request: Request, relay: Relay) -> Answer:
            if request.path == "/token":
                allowed = other.name not in request.query["scope"]
                return Answer(200, b'{"token": "t"}') if allowed else Answer(403)
            if "from" in request.query and not request.authorization:
                return Answer(401, b"", (("WWW-Authenticate", f'Bearer realm="{server.url}/token"'),))
            return relay(request)

        with gateway(registry, answer) as server:
            url = through(server, repository)
            pushed = push(folder, f"{url}:v1", base=f"{other.name}:v1")
        assert (pushed.mounted_bytes, pushed.sent_bytes) == (0, pushed.nbytes)


class TestBeforeHashing:
    def said(self, folder: Path, url: str, **more: str) -> list[str]:
        """The phases that a push that fails went through."""
        steps: list[Step] = []
        with pytest.raises((StoreError, AccessError, NotFoundError, UsageError)):
            push(folder, url, told=steps.append, **more)  # type: ignore[arg-type]
        return [step.phase for step in steps]

    def test_nobody_there(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upload, "ACCESS_S", 1.0)
        steps: list[Step] = []
        with pytest.raises(TransientStoreError, match="whether it may be pushed to"):
            push(folder, f"oci://127.0.0.1:{free_port()}/m:v1", told=steps.append)
        assert {step.phase for step in steps} == {"waiting"}
        assert "trying again" in steps[0].path

    def test_somebody_who_lets_nobody_push(
        self, registry: DockerRegistry, repository: Repository, folder: Path
    ) -> None:
        def answer(request: Request, relay: Relay) -> Answer:
            return Answer(403) if request.method == "POST" else relay(request)

        with gateway(registry, answer) as server:
            assert self.said(folder, f"{through(server, repository)}:v1") == []

    def test_a_base_that_is_not_there(self, repository: Repository, folder: Path) -> None:
        push(folder, f"{repository.url}:v1")
        for base in ("no/such:v1", "no/such", f"{repository.name}:v2"):
            assert self.said(folder, f"{repository.url}:v2", base=base) == []

    def test_a_manifest_that_no_registry_takes(
        self, registry: DockerRegistry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mfs.oci.documents.REGISTRIES_TAKE_BYTES", 2000)
        with gateway(registry, passing) as server:
            with pytest.raises(UsageError, match="--modelcar"):
                push(folder, f"{through(server, repository)}:v1")
            assert server.requests == []
            push(folder, f"{through(server, repository)}:v1", modelcar=True)


class TestTimes:
    """Of an image's files: equal files are equal layers, whenever they were copied."""

    def layer(self, repository: Repository, tag: str) -> list[tarfile.TarInfo]:
        def get(path: str, kind: str = "") -> bytes:
            return bytes(repository.request("GET", f"{repository.api}/{path}", headers={"Accept": kind}).content)

        entry = json.loads(get(f"manifests/{tag}", INDEX))["manifests"][0]
        layer = json.loads(get(f"manifests/{entry['digest']}", MANIFEST))["layers"][0]
        with tarfile.open(fileobj=io.BytesIO(get(f"blobs/{layer['digest']}"))) as archive:
            return archive.getmembers()

    def test_copies_are_not_sent_again(
        self, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = push(folder, f"{repository.url}:v1", modelcar=True)
        for name in FILES:
            os.utime(folder / name)
        again = push(folder, f"{repository.url}:v2", modelcar=True)
        assert (again.digest, again.sent_bytes) == (first.digest, 0)
        assert {member.mtime for member in self.layer(repository, "v2")} == {0}
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        push(folder, f"{repository.url}:v3", modelcar=True)
        assert {member.mtime for member in self.layer(repository, "v3")} == {1_700_000_000}
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
            push(folder, f"{repository.url}:v4", modelcar=True)

    def test_of_a_modelpack_no_blob_holds_them(self, repository: Repository, folder: Path) -> None:
        push(folder, f"{repository.url}:v1")
        for name in FILES:
            os.utime(folder / name)
        assert push(folder, f"{repository.url}:v2").sent_bytes == 0


class TestCommand:
    def run(self, *args: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mfs", "push", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    @pytest.mark.parametrize("scheme", ["oci+http", "OCI"])
    def test_schemes(self, registry: DockerRegistry, repository: Repository, folder: Path, scheme: str) -> None:
        url = f"{scheme}://{registry.host}/{repository.name}:v1"
        assert "6 files" in self.run(folder, url).stdout
        assert contents(f"{repository.url}:v1") == FILES

    def test_what_is_left_out_or_not_taken_over_is_said(self, repository: Repository, folder: Path) -> None:
        (folder / ".git").mkdir()
        done = self.run(folder, f"{repository.url}:v1", "--base", "oci://elsewhere.example/m:v1", "--json")
        assert "left out, since their names begin with a dot: .git" in done.stderr
        assert "elsewhere.example" in done.stderr
        said = json.loads(done.stdout)
        assert said["left_out"] == [".git"]
        assert len(said["warnings"]) == 1
        done = self.run(folder, f"{repository.url}:v1", "--base", "no/such:v1", status=1)
        assert "no/such:v1: is not there" in done.stderr
