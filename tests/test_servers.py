"""Each test server does what its module promises: the suites that stand on them may then trust them."""

from __future__ import annotations

import base64
import filecmp
import hashlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from huggingface_hub import HfApi, RepoFile, errors

from tests.servers import leftovers
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.process import PROJECT_ROOT, ServerError, ServerProcess
from tests.servers.swift import SwiftServer


def status(error: ClientError) -> int:
    code: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return code


class TestProcess:
    def test_a_server_that_cannot_start_shows_its_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServerError, match=r"(?s)sad exited with status 3.*no such port"):
            ServerProcess("sad", ["sh", "-c", "echo no such port; exit 3"], log=tmp_path / "log").wait_until(
                lambda: False
            )

    def test_servers_die_with_a_killed_test_run(self, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, sys; from tests.servers.swift import SwiftServer;"
            "server = SwiftServer(pathlib.Path(sys.argv[1])); server.start();"
            "print(*(process.pid for process in server._processes), flush=True); input()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with parent:
            assert parent.stdout
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 4
            before = {pid: line for pid, line in leftovers.processes().items() if pid not in pids}
            parent.send_signal(signal.SIGKILL)
        assert leftovers.settle_processes(before) == []


class TestLeftovers:
    def test_a_detached_daemon_is_found_and_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leftovers, "SETTLE_S", 0.1)
        before = leftovers.processes()
        # setsid and a parent that has gone: no descendant of this process any more.
        subprocess.run(["sh", "-c", "setsid sleep 3600 >/dev/null 2>&1 &"], check=True, timeout=20)
        (described,) = leftovers.settle_processes(before)
        assert re.fullmatch(r"process \d+: sleep 3600", described)
        monkeypatch.undo()
        assert leftovers.settle_processes(before) == []

    def test_a_server_that_came_back_is_not_new(self, nginx: NginxServer) -> None:
        before = leftovers.processes()
        nginx.stop()
        nginx.start()
        assert leftovers.processes() != before
        assert leftovers.settle_processes(before) == []

    def test_the_mount_of_a_killed_daemon_is_found_and_removed(self, tmp_path: Path) -> None:
        target = tmp_path / "mount \\ point"
        target.mkdir()
        code = "import pyfuse3, sys; pyfuse3.init(pyfuse3.Operations(), sys.argv[1], set()); print(flush=True); input()"
        daemon = subprocess.Popen(
            [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with daemon:
            assert daemon.stdout
            assert daemon.stdout.readline() == "\n"
            assert leftovers.fuse_mounts(tmp_path) == {str(target)}
            daemon.kill()
        assert leftovers.fuse_mounts(tmp_path) == {str(target)}
        assert leftovers.unmount(leftovers.fuse_mounts(tmp_path)) == [f"mount {target}"]
        assert leftovers.fuse_mounts(tmp_path) == set()


class TestSwift:
    def test_range_and_conditional_get(self, swift: SwiftServer, s3_bucket: str) -> None:
        client = swift.client()
        client.put_object(Bucket=s3_bucket, Key="a/b", Body=b"hello world")
        etag = client.head_object(Bucket=s3_bucket, Key="a/b")["ETag"]
        got = client.get_object(Bucket=s3_bucket, Key="a/b", Range="bytes=2-5", IfMatch=etag)
        assert got["Body"].read() == b"llo "
        assert got["ContentRange"] == "bytes 2-5/11"
        client.put_object(Bucket=s3_bucket, Key="a/b", Body=b"other bytes")
        with pytest.raises(ClientError) as caught:
            client.get_object(Bucket=s3_bucket, Key="a/b", IfMatch=etag)
        assert status(caught.value) == 412

    @pytest.mark.parametrize("wrong", [{"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "nobody"}])
    def test_wrong_signature_is_refused(self, swift: SwiftServer, s3_bucket: str, wrong: dict[str, str]) -> None:
        with pytest.raises(ClientError) as caught:
            swift.client(**wrong).list_objects_v2(Bucket=s3_bucket)
        assert status(caught.value) == 403

    def test_data_and_port_outlive_a_restart(self, swift: SwiftServer, s3_bucket: str) -> None:
        client = swift.client()
        client.put_object(Bucket=s3_bucket, Key="kept", Body=b"bytes")
        swift.stop()
        with pytest.raises(EndpointConnectionError):
            client.head_object(Bucket=s3_bucket, Key="kept")
        swift.start()
        assert client.get_object(Bucket=s3_bucket, Key="kept")["Body"].read() == b"bytes"

    def test_environ_is_enough_for_a_child(self, swift: SwiftServer, s3_bucket: str) -> None:
        code = "import boto3, sys; print([b['Name'] for b in boto3.client('s3').list_buckets()['Buckets']])"
        env = {**os.environ, **swift.environ()}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert s3_bucket in done.stdout, done.stderr


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


def fetch(
    url: str, *, context: ssl.SSLContext | None = None, follow: bool = True, **headers: str
) -> tuple[int, Message, bytes]:
    """Status, headers and body of one GET; statuses are no errors."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if not follow:
        handlers.append(_NoRedirect())
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


class TestNginx:
    @pytest.fixture(autouse=True)
    def files(self, nginx: NginxServer) -> Path:
        folder = nginx.files / "honest"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "a b ü%.bin").write_bytes(bytes(range(251)) * 40)
        nginx.forget_requests()
        return folder

    def test_lists_in_json(self, nginx: NginxServer) -> None:
        code, headers, body = fetch(nginx.url + "honest/")
        assert (code, headers.get_content_type()) == (200, "application/json")
        listed = {entry["name"]: (entry["type"], entry.get("size")) for entry in json.loads(body)}
        assert listed == {"sub": ("directory", None), "a b ü%.bin": ("file", 10_040)}

    def test_ranges_and_conditions(self, nginx: NginxServer) -> None:
        url = nginx.url + "honest/" + urllib.parse.quote("a b ü%.bin")
        code, headers, body = fetch(url, Range="bytes=250-252")
        assert (code, body, headers["Content-Range"]) == (206, b"\xfa\x00\x01", "bytes 250-252/10040")
        assert fetch(url, Range="bytes=0-1", If_Match=headers["ETag"])[0] == 206
        assert fetch(url, Range="bytes=0-1", If_Match='"0"')[0] == 412
        assert fetch(url, Range="bytes=20000-")[0] == 416

    def test_misbehaves_where_told(self, nginx: NginxServer) -> None:
        path = "honest/" + urllib.parse.quote("a b ü%.bin")
        code, _, body = fetch(nginx.url + "~no-ranges/" + path, Range="bytes=0-1")
        assert (code, len(body)) == (200, 10_040)
        basic = base64.b64encode(f"{nginx.user}:{nginx.password}".encode()).decode()
        assert fetch(nginx.url + "~private/" + path)[0] == 401
        assert fetch(nginx.url + "~private/" + path, Authorization=f"Basic {basic}")[0] == 200
        assert fetch(nginx.url + "~private/honest/", Authorization=f"Basic {basic}")[0] == 200
        assert fetch(nginx.url + "~forbidden/" + path)[0] == 403
        assert fetch(nginx.url + "~no-index/honest/")[0] == 403
        assert fetch(nginx.url + "~html-index/honest/")[1].get_content_type() == "text/html"
        assert fetch(nginx.url + "~moved/" + path)[0] == 200
        assert fetch(nginx.url + "~unavailable/" + path)[0] == 503
        assert fetch(nginx.url + "honest/missing")[0] == 404

    def test_tls_needs_our_authority(self, nginx: NginxServer) -> None:
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(nginx.tls_url + "honest/")
        trusting = ssl.create_default_context(cafile=str(nginx.ca_file))
        assert fetch(nginx.tls_url + "honest/", context=trusting)[0] == 200

    def test_counts_requests(self, nginx: NginxServer) -> None:
        url = nginx.url + "honest/" + urllib.parse.quote("a b ü%.bin")
        fetch(url, Range="bytes=0-99")
        fetch(url)
        fetch(nginx.url + "honest/")
        seen = nginx.requests("/honest/a b ü%.bin")
        assert [(r.status, r.range, r.sent_bytes) for r in seen] == [(206, "bytes=0-99", 100), (200, "", 10_040)]
        assert len(nginx.requests()) == 3

    def test_comes_back_on_its_port(self, nginx: NginxServer) -> None:
        nginx.stop()
        with pytest.raises(urllib.error.URLError, match="refused"):
            fetch(nginx.url)
        nginx.start()
        assert fetch(nginx.url + "honest/")[0] == 200


class TestHub:
    """The client here is the real huggingface_hub."""

    @pytest.fixture
    def api(self, hub: HubServer) -> HfApi:
        return HfApi(endpoint=hub.endpoint, token=False)

    def test_a_model_arrives_whole(self, hub: HubServer, api: HfApi, minilm_dir: Path, tmp_path: Path) -> None:
        local = {str(file.relative_to(minilm_dir)): file for file in minilm_dir.rglob("*") if file.is_file()}
        commit = hub.commit("whole/minilm", local)
        info = api.model_info("whole/minilm")
        assert (info.sha, info.private, info.gated) == (commit, False, False)
        assert sorted(sibling.rfilename for sibling in info.siblings or []) == sorted(local)
        got = Path(api.snapshot_download("whole/minilm", cache_dir=tmp_path, max_workers=2))
        assert got.name == commit
        for path, file in local.items():
            assert filecmp.cmp(got / path, file, shallow=False)

    def test_listings_come_in_pages(self, hub: HubServer, api: HfApi) -> None:
        hub.commit("pages/repo", {f"d{n % 3}/f{n}": bytes(n) for n in range(20)} | {"model.safetensors": b"12345"})
        hub.set(page_entries=4)
        hub.forget_stats()
        entries = {entry.path: entry for entry in api.list_repo_tree("pages/repo", recursive=True)}
        hub.set(page_entries=1000)
        assert hub.stats()["tree"] == 6
        assert len(entries) == 24
        weights = entries["model.safetensors"]
        assert isinstance(weights, RepoFile)
        assert weights.lfs
        assert weights.lfs.sha256 == hashlib.sha256(b"12345").hexdigest()
        assert weights.size == 5
        assert [entry.path for entry in api.list_repo_tree("pages/repo", "d0")] == [
            f"d0/f{n}" for n in sorted(range(0, 20, 3), key=str)
        ]

    def test_refs_move(self, hub: HubServer, api: HfApi) -> None:
        first = hub.commit("moving/repo", {"a": b"1"})
        second = hub.commit("moving/repo", {"a": b"2"})
        assert (api.model_info("moving/repo").sha, first != second) == (second, True)
        hub.move_ref("moving/repo", "main", first)
        assert api.model_info("moving/repo").sha == first
        assert api.model_info("moving/repo", revision=second).sha == second
        assert [branch.name for branch in api.list_repo_refs("moving/repo").branches] == ["main"]

    def test_refusals_are_the_hubs(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        hub.commit("refused/private", {"f": b"1"}, private=True)
        hub.commit("refused/gated", {"f": b"1"}, gated=True)
        hub.commit("refused/open", {"f": b"1"})
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("refused/missing")
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("refused/private")
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("refused/private", token=hub.other_token)
        assert api.model_info("refused/private", token=hub.token).private
        for token in (False, hub.other_token):
            with pytest.raises(errors.GatedRepoError):
                api.hf_hub_download("refused/gated", "f", cache_dir=tmp_path, token=token)
        assert Path(api.hf_hub_download("refused/gated", "f", cache_dir=tmp_path, token=hub.token)).read_bytes() == b"1"
        with pytest.raises(errors.RevisionNotFoundError):
            api.model_info("refused/open", revision="nope")
        with pytest.raises(errors.EntryNotFoundError):
            api.hf_hub_download("refused/open", "nope", cache_dir=tmp_path)

    def test_signed_addresses(self, hub: HubServer) -> None:
        hub.commit("signed/repo", {"w.safetensors": bytes(range(251)) * 2000, "config.json": b"{}"})
        code, headers, _ = fetch(f"{hub.endpoint}/signed/repo/resolve/main/w.safetensors", follow=False)
        assert code == 302
        url = headers["Location"]
        assert urllib.parse.urlsplit(url).hostname == "127.0.0.2"
        assert (headers["X-Linked-Size"], len(headers["X-Linked-Etag"])) == ("502000", 66)
        code, headers, body = fetch(url, Range="bytes=250-252")
        assert (code, body, headers["Content-Range"]) == (206, b"\xfa\x00\x01", "bytes 250-252/502000")
        assert fetch(url, Range="bytes=502000-")[0] == 416
        assert fetch(url, Authorization=f"Bearer {hub.token}")[0] == 400
        assert fetch(url.replace("Signature=", "Signature=0"))[0] == 403
        hub.expire_urls()
        assert fetch(url)[0] == 403
        hub.set(ttl_s=-1)
        _, headers, _ = fetch(f"{hub.endpoint}/signed/repo/resolve/main/w.safetensors", follow=False)
        hub.set(ttl_s=3600)
        assert (fetch(headers["Location"])[0], b"expired" in fetch(headers["Location"])[2]) == (403, True)
        code, headers, _ = fetch(f"{hub.endpoint}/signed/repo/resolve/main/config.json", follow=False)
        assert (code, headers["Location"].startswith("/api/resolve-cache/")) == (307, True)

    def test_rate_limit_counts_down(self, hub: HubServer) -> None:
        hub.commit("limited/repo", {"f": b"1"})
        url = f"{hub.endpoint}/api/models/limited/repo"
        hub.limit_rate(1, wait_s=7)
        code, headers, _ = fetch(url)
        assert (code, headers["RateLimit"], headers["Retry-After"]) == (429, '"api";r=0;t=7', None)
        hub.limit_rate(1, wait_s=7, header="Retry-After")
        assert fetch(url)[1]["Retry-After"] == "7"
        hub.reject(1, 503)
        assert [fetch(url)[0], fetch(url)[0]] == [503, 200]

    def test_comes_back_with_its_repositories(self, hub: HubServer, api: HfApi) -> None:
        commit = hub.commit("kept/repo", {"f": b"1"})
        hub.stop()
        with pytest.raises(urllib.error.URLError, match="refused"):
            fetch(hub.endpoint)
        hub.start()
        assert api.model_info("kept/repo").sha == commit


def test_minilm_is_the_real_model(minilm_dir: Path) -> None:
    assert (minilm_dir / "model.safetensors").stat().st_size == 90_868_376
    assert (minilm_dir / "tokenizer.json").exists()
