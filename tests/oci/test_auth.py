"""Who may read and push: passwords, tokens and helpers, against a registry and a token server that mean it."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import AccessError, StoreError
from mfs.fetch.route import Cache
from mfs.fetch.transport import Transport
from mfs.oci import auth, credentials
from mfs.oci.auth import Authenticator, Challenge, Scopes, parse_challenge
from mfs.oci.credentials import Credentials, find_credentials
from mfs.oci.push import push
from mfs.sources import SourceOptions, open_source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from tests.oci.artifacts import PASSWORD, USER, Repository
from tests.servers.docker_registry import DockerRegistry, TokenServer
from tests.servers.node_cache import NginxCache
from tests.servers.token_site import IDENTITY_TOKEN

Login = Callable[..., None]


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """`login(auths={...}, credsStore=...)` writes config.json."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))

    def write(**config: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config))

    return write


def with_password(host: str, password: str = PASSWORD) -> dict[str, Any]:
    return {host: {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}}


@pytest.fixture
def private(htpasswd_registry: DockerRegistry) -> Iterator[Repository]:
    repository = Repository(htpasswd_registry, secret=PASSWORD)
    repository.manifest([repository.file("w.bin", ramp(1000))])
    yield repository
    repository.close()


@pytest.fixture
def guarded(token_registry: DockerRegistry, tokens: TokenServer) -> Iterator[Repository]:
    repository = Repository(token_registry, secret=PASSWORD)
    repository.manifest([repository.file("w.bin", ramp(10_000))])
    tokens.forget_requests()
    yield repository
    tokens.set(ttl_s=60, is_known=True, password=PASSWORD)
    repository.close()


def reads(repository: Repository) -> bytes:
    source = open_source(f"{repository.url}:v1")
    try:
        return read(source, object_of(source, "w.bin", list_tree(source)["w.bin"]), 0, 1000)
    finally:
        source.close()


class TestPasswords:
    def test_the_right_one_opens(self, private: Repository, login: Login) -> None:
        login(auths=with_password(private.registry.host))
        assert reads(private) == ramp(1000)
        login(auths={f"https://{private.registry.host}/v2/": {"username": USER, "password": PASSWORD}})
        assert reads(private) == ramp(1000)

    def test_a_wrong_one_and_none_are_refused_with_what_to_do(self, private: Repository, login: Login) -> None:
        host = private.registry.host
        for auths in ({}, with_password(host, "mistyped"), with_password("other")):
            login(auths=auths)
            with pytest.raises(AccessError, match=f"docker login {host}") as caught:
                reads(private)
            assert "mistyped" not in str(caught.value)

    def test_one_that_was_changed_is_looked_for_again(
        self, private: Repository, login: Login, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "LOOK_PAUSES", 0.0)
        login(auths=with_password(private.registry.host, "old"))
        source = open_source(f"{private.url}:v1")
        with pytest.raises(AccessError):
            list_tree(source)
        login(auths=with_password(private.registry.host))
        assert set(list_tree(source)) == {"w.bin"}
        source.close()

    def test_a_push_too(self, private: Repository, login: Login, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m/w.bin.json").write_bytes(b"{}")
        with pytest.raises(AccessError):
            push(tmp_path / "m", f"{private.url}:v2")
        login(auths=with_password(private.registry.host))
        assert push(tmp_path / "m", f"{private.url}:v2").files_count == 1


class TestThroughACache:
    """What lets us in, and a cache that nodes share (`mfs.fetch.route`)."""

    @pytest.mark.parametrize("is_here", [True, False])
    def test_a_token_goes_to_one_on_this_node_and_no_password_to_any(
        self, is_here: bool, guarded: Repository, private: Repository, login: Login, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        if not is_here:
            monkeypatch.setattr(Cache, "is_private", False)
        tokens_seen: list[str] = []
        asked = Authenticator.header

        def header(self: Authenticator, scopes: Scopes, deadline_s: float) -> dict[str, str]:
            found = asked(self, scopes, deadline_s)
            tokens_seen.extend(found.values())
            return found

        monkeypatch.setattr(Authenticator, "header", header)
        login(auths=with_password(guarded.registry.host) | with_password(private.registry.host))
        with NginxCache(tmp_path / "cache") as cache:
            for repository, goes_through in ((guarded, is_here), (private, False)):
                before = len(cache.answers())
                for _ in range(2):
                    source = open_source(f"{repository.url}:v1", SourceOptions(via=cache.url))
                    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
                    assert read(source, obj, 0, 1000) == ramp(1000)
                    source.close()
                expected = ["MISS", "HIT"] if goes_through else []
                assert cache.answers(at_least=before + len(expected))[before:] == expected
            assert any(token.startswith("Bearer ") for token in tokens_seen)
            assert any(token.startswith("Basic ") for token in tokens_seen)
            traces = cache.traces()
        for token in tokens_seen:
            assert token.partition(" ")[2].encode() not in traces


class TestTokens:
    def test_anonymous_tokens_open_what_is_public(self, token_registry: DockerRegistry, tokens: TokenServer) -> None:
        public = Repository(token_registry, f"pub/m-{time.time_ns()}", secret=PASSWORD)
        public.manifest([public.file("w.bin", ramp(1000))])
        tokens.forget_requests()
        assert reads(public) == ramp(1000)
        assert [request["user"] for request in tokens.requests()] == [""]
        public.close()

    def test_one_token_serves_many_reads(self, guarded: Repository, tokens: TokenServer, login: Login) -> None:
        login(auths=with_password(guarded.registry.host))
        source = open_source(f"{guarded.url}:v1")
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        assert b"".join(read(source, obj, at, at + 1000) for at in range(0, 10_000, 1000)) == ramp(10_000)
        assert tokens.requests() == [
            {"method": "GET", "scopes": [f"repository:{guarded.name}:pull"], "user": USER}]  # fmt: skip
        source.close()

    def test_a_token_is_renewed_before_it_expires(self, guarded: Repository, tokens: TokenServer, login: Login) -> None:
        login(auths=with_password(guarded.registry.host))
        tokens.set(ttl_s=1)
        source = open_source(f"{guarded.url}:v1")
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        until_s = time.monotonic() + 20
        while len(tokens.requests()) < 3 and time.monotonic() < until_s:
            assert read(source, obj, 0, 1000) == ramp(1000)
        assert len(tokens.requests()) >= 3
        source.close()

    def test_a_token_that_is_refused_is_replaced_once(
        self, guarded: Repository, tokens: TokenServer, login: Login
    ) -> None:
        login(auths=with_password(guarded.registry.host))
        source = open_source(f"{guarded.url}:v1")
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        for server in (tokens, guarded.registry):  # another key: what was given under the old one is worth nothing
            server.stop()
            server.start()
        assert read(source, obj, 0, 1000) == ramp(1000)
        assert len(tokens.requests()) == 1
        source.close()

    def test_an_identity_token_is_exchanged(self, guarded: Repository, tokens: TokenServer, login: Login) -> None:
        login(auths={guarded.registry.host: {"auth": "", "identitytoken": IDENTITY_TOKEN}})
        assert reads(guarded) == ramp(1000)
        assert [request["method"] for request in tokens.requests()] == ["POST"]

    def test_who_is_refused_is_told_what_to_do(self, guarded: Repository, tokens: TokenServer, login: Login) -> None:
        with pytest.raises(AccessError, match="docker login"):
            reads(guarded)
        login(auths=with_password(guarded.registry.host, "mistyped"))
        with pytest.raises(AccessError, match=r"refuses the credentials known for it.*docker login") as caught:
            reads(guarded)
        assert "mistyped" not in str(caught.value)

    def test_pushing_asks_for_that_right(
        self, guarded: Repository, tokens: TokenServer, login: Login, tmp_path: Path
    ) -> None:
        login(auths=with_password(guarded.registry.host))
        (tmp_path / "m").mkdir()
        (tmp_path / "m/config.json").write_bytes(b"{}")
        base = f"oci://{guarded.registry.host}/team/base:v1"
        push(tmp_path / "m", base)
        tokens.forget_requests()
        push(tmp_path / "m", f"{guarded.url}:v2", base=base)
        scopes = {tuple(request["scopes"]) for request in tokens.requests()}
        own = f"repository:{guarded.name}:pull,push"
        assert scopes == {(own,), ("repository:team/base:pull",), (own, "repository:team/base:pull")}

    def test_a_token_server_that_is_away_is_waited_for(
        self, guarded: Repository, tokens: TokenServer, login: Login
    ) -> None:
        login(auths=with_password(guarded.registry.host))
        source = open_source(f"{guarded.url}:v1")
        tokens.stop()
        with pytest.raises(StoreError, match="given up after"):
            list(source.list("", deadline_s=deadline(0.5)))
        tokens.start()
        guarded.registry.stop()
        guarded.registry.start()  # it reads the token server's certificate at its start
        assert set(list_tree(source)) == {"w.bin"}
        source.close()

    def test_nothing_is_sent_over_http_for_a_registry_of_https(self, login: Login) -> None:
        login(auths=with_password("reg.example"))
        transport = Transport()
        asked = Authenticator("reg.example", "https://reg.example", transport)
        challenge = Challenge("bearer", "http://127.0.0.1:9/token", "s")
        with pytest.raises(StoreError, match="not https: nothing is sent there"):
            asked._authorize(challenge, ("repository:a:pull",), deadline())
        transport.close()

    @pytest.mark.parametrize("realm", ["/token", "token.example", "ftp://reg.example/token", "https://[::1/token"])
    def test_a_token_server_without_an_address_is_said_of_its_registry(self, login: Login, realm: str) -> None:
        login(auths=with_password("reg.example"))
        transport = Transport()
        asked = Authenticator("reg.example", "https://reg.example", transport)
        with pytest.raises(StoreError, match=r"reg\.example: names its token server by '.*': .*expected"):
            asked._authorize(Challenge("bearer", realm, "s"), ("repository:a:pull",), deadline())
        transport.close()


class TestHelpers:
    @pytest.fixture
    def helper(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """`helper(script)`: a credential helper named 'test' on PATH."""
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

        def make(script: str) -> None:
            path = folder / "docker-credential-test"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

        return make

    def test_a_store_or_one_for_this_registry(
        self, private: Repository, login: Login, helper: Callable[[str], None], tmp_path: Path
    ) -> None:
        answer = json.dumps({"ServerURL": "x", "Username": USER, "Secret": PASSWORD})
        helper(f"[ \"$1\" = get ] || exit 1\ncat > {tmp_path}/asked\necho '{answer}'")
        for config in ({"credsStore": "test"}, {"credHelpers": {private.registry.host: "test"}}):
            login(**config)
            assert reads(private) == ramp(1000)
            assert (tmp_path / "asked").read_text() == private.registry.host

    def test_one_that_knows_nothing_leaves_the_file(
        self, private: Repository, login: Login, helper: Callable[[str], None]
    ) -> None:
        helper("echo 'credentials not found in native keychain'; exit 1")
        login(credsStore="test", auths=with_password(private.registry.host))
        assert reads(private) == ramp(1000)

    def test_one_that_hangs_is_ended_with_its_children(
        self, login: Login, helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(credentials, "HELPER_S", 0.3)
        helper("sleep 300 & sleep 300")
        login(credsStore="test")
        assert not find_credentials("reg.example", deadline_s=deadline())
        assert "did not answer" in caplog.text

    @pytest.mark.parametrize("script", ["echo no json", "echo '[]'", "echo '{}'", "echo '{\"Username\": 7}'"])
    def test_one_that_talks_nonsense(self, login: Login, helper: Callable[[str], None], script: str) -> None:
        helper(script)
        login(credsStore="test")
        assert not find_credentials("reg.example", deadline_s=deadline())

    def test_names_that_are_no_programs(self, login: Login, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("../evil", "a b", "x" * 65, "nowhere"):
            login(credsStore=name)
            assert not find_credentials("reg.example", deadline_s=deadline())
        assert "is no name of a credential helper" in caplog.text
        assert "cannot be run" in caplog.text


def test_what_the_file_says(login: Login, tmp_path: Path) -> None:
    def found(registry: str = "reg.example:5000") -> Credentials:
        return find_credentials(registry, deadline_s=deadline())

    assert not found()
    login(auths={"https://index.docker.io/v1/": {"auth": base64.b64encode(b"u:p:q").decode()}})
    assert found("docker.io") == Credentials("u", "p:q")
    assert not found()
    login(auths={"reg.example:5000": {"registrytoken": "abc"}})
    assert found().registry_token == "abc"
    assert "abc" not in repr(found())
    host = "reg.example:5000"
    odds: list[Any] = [[], {"auths": 7}, {"auths": {host: 7}}, {"auths": {host: {"auth": "%%"}}}]
    for odd in odds:
        (tmp_path / "docker/config.json").write_text(json.dumps(odd))
        assert not found()
    (tmp_path / "docker/config.json").write_text("{")
    assert not found()


def test_a_key_that_is_exact_comes_first_and_letters_may_be_large(login: Login) -> None:
    host = "reg.example:5000"
    login(auths={f"https://{host}/v2/": {"username": "other"}, host.upper(): {"username": "third"},
                 host: {"username": "exact"}})  # fmt: skip
    assert find_credentials(host, deadline_s=deadline()).username == "exact"
    login(auths={"REG.example:5000": {"username": "large"}})
    assert find_credentials(host, deadline_s=deadline()).username == "large"


@pytest.mark.parametrize("kind", ["registrytoken", "identitytoken"])
def test_a_token_that_no_header_can_hold_is_the_files_fault(
    private: Repository, login: Login, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    login(auths={private.registry.host: {kind: "geheim\N{LATIN SMALL LETTER U WITH DIAERESIS}"}})
    with pytest.raises(AccessError, match="docker login"):
        reads(private)
    assert "config.json: what it has for" in caplog.text
    assert "geheim" not in caplog.text


def test_challenges() -> None:
    bearer = 'Bearer realm="https://a/t?x=1",service="s \\"q\\"", scope="repository:a/b:pull,push repository:c:pull"'
    assert parse_challenge([bearer]) == Challenge(
        "bearer", "https://a/t?x=1", 's "q"', ("repository:a/b:pull,push", "repository:c:pull"))  # fmt: skip
    assert parse_challenge(["Basic realm=x"]) == Challenge("basic", "x")
    assert parse_challenge(["Negotiate", "Basic", "Bearer realm=https://a/t"]) == Challenge("bearer", "https://a/t")
    assert parse_challenge(['basic realm="a", Bearer realm="https://b"']) == Challenge("bearer", "https://b")
    for nothing in ([], [""], ["Negotiate abc"], ["Bearer service=x"], ["Bearer realm"], ["," * 9000]):
        assert parse_challenge(nothing) is None
