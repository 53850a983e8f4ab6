"""Keys and tokens that are replaced while a source is in use: asked for again when they are refused, and only then."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import AccessError
from mfs.sources import SourceOptions, open_source, s3_access
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import list_tree, object_of, read
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error
from tests.servers.swift import SwiftServer

FILES = {"m/w.bin": ramp(5000), "m/x.bin": ramp(100, 7)}
COMMIT = "c" * 40


class Bucket:
    """Lets the key in that is `good`, whatever secret signs; others get `refusal`."""

    def __init__(self, folder: Path) -> None:
        self.good = "AKONE"
        self.refusal = s3_error(400, "ExpiredToken")
        self.file = folder / "credentials"
        self.server = ScriptedServer(self.answer)

    def answer(self, request: Request) -> Answer:
        if f"Credential={self.good}/" not in request.authorization:
            return self.refusal
        return s3_bucket(request, FILES)

    def write(self, key: str, profile: str = "default", secret: str = "s", token: str = "t") -> None:
        """What the shared credentials file says, exchanged as a rotation does it."""
        new = self.file.with_suffix(".new")
        new.write_text(
            f"[other]\naws_access_key_id = AKOTHER\naws_secret_access_key = s\n[{profile}]\naws_access_key_id = {key}\n"
            f"aws_secret_access_key = {secret}\naws_session_token = {token}\n"
        )
        new.rename(self.file)

    def rotate(self, key: str, **more: str) -> None:
        self.good = key
        self.write(key, **more)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(s3_access, "SEARCH_PAUSES", 0.0)
    bucket = Bucket(tmp_path)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(bucket.file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with bucket.server:
        yield bucket


@pytest.fixture
def opened(bucket: Bucket) -> Iterator[Callable[..., Source]]:
    sources: list[Source] = []

    def open_one(**options: Any) -> Source:
        sources.append(open_source("s3://b", SourceOptions(endpoint_url=bucket.server.url, **options)))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()


def check(source: Source) -> None:
    """A listing and a read."""
    found = list_tree(source)
    assert read(source, object_of(source, "m/w.bin", found["m/w.bin"]), 10, 4000) == ramp(3990, 10)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((400, code) for code in ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")),
        *((403, code) for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "")),
        (401, "Unauthorized"),
    ],
)
def test_refused_keys_are_looked_for_again(
    bucket: Bucket, opened: Callable[..., Source], status: int, code: str
) -> None:
    bucket.refusal = s3_error(status, code)
    bucket.rotate("AKONE")
    source = opened()
    found = list_tree(source)
    obj = object_of(source, "m/w.bin", found["m/w.bin"])
    for key in ("AKTWO", "AKTHREE"):
        bucket.rotate(key)
        assert read(source, obj, 10, 4000) == ramp(3990, 10)  # a read notices first
    bucket.rotate("AKFOUR")
    assert set(list_tree(source)) == set(found)  # a listing notices first


def test_a_named_profile_is_read_again(
    bucket: Bucket, opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.rotate("AKONE", profile="lab")
    by_option = opened(profile="lab")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    by_variable = opened()
    for key in ("AKONE", "AKTWO"):
        bucket.rotate(key, profile="lab")
        check(by_option)
        check(by_variable)


def test_keys_in_the_configuration_file_are_read_again(
    bucket: Bucket, opened: Callable[..., Source], tmp_path: Path
) -> None:
    source = opened()
    for key in ("AKONE", "AKTWO"):
        bucket.good = key
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n"
        (tmp_path / "config").write_text(text)
        check(source)


def test_a_program_that_gives_keys_is_run_again(bucket: Bucket, opened: Callable[..., Source], tmp_path: Path) -> None:
    key_file, count_file = tmp_path / "key", tmp_path / "runs"
    program = tmp_path / "give"
    program.write_text(
        f"#!{sys.executable} -S\nimport json\nopen({str(count_file)!r}, 'a').write('x')\n"
        f"key = open({str(key_file)!r}).read()\nprint(json.dumps({{'Version': 1, 'AccessKeyId': key, "
        f"'SecretAccessKey': 's', 'SessionToken': 't', 'Expiration': '2099-01-01T00:00:00Z'}}))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "config").write_text(f"[profile p]\ncredential_process = {program}\n")
    source = opened(profile="p")
    for key in ("AKONE", "AKTWO"):  # replaced long before they expire
        bucket.good = key
        key_file.write_text(key)
        check(source)
    assert count_file.read_text() == "xx"


def test_a_web_identity_is_exchanged_again_with_the_token_of_its_file(
    bucket: Bucket, opened: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("token-one")

    def exchange(request: Request) -> Answer:
        key = f"AK{(tmp_path / 'token').read_text().removeprefix('token-').upper()}"
        body = (
            "<AssumeRoleWithWebIdentityResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'>"
            f"<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>"
            "<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            "<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
            "</AssumeRoleWithWebIdentityResponse>"
        )
        return Answer(200, body.encode(), (("Content-Type", "text/xml"),))

    with ScriptedServer(exchange) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service.url)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        source = opened()
        check(source)
        (tmp_path / "token").write_text("token-two")
        bucket.good = "AKTWO"
        check(source)
        assert len(service.requests) == 2


def test_the_same_key_with_another_secret_or_token_is_signed_anew(
    bucket: Bucket, opened: Callable[..., Source]
) -> None:
    accepted = {"token": "t1"}

    def answer(request: Request) -> Answer:
        if request.headers.get("x-amz-security-token") != accepted["token"]:
            return s3_error(403, "SignatureDoesNotMatch")
        return s3_bucket(request, FILES)

    bucket.answer = answer  # type: ignore[method-assign]
    with ScriptedServer(answer) as server:
        bucket.write("AK", token="t1")
        source = open_source("s3://b", SourceOptions(endpoint_url=server.url))
        check(source)
        accepted["token"] = "t2"
        bucket.write("AK", token="t2")
        check(source)
        source.close()


def test_swift_agrees_about_a_secret_that_changed(
    swift: SwiftServer, s3_bucket: str, bucket: Bucket, opened: Callable[..., Source]
) -> None:
    swift.client().put_object(Bucket=s3_bucket, Key="a", Body=ramp(1000))
    bucket.write(swift.access_key, secret="wrong")
    bucket.file.write_text(re.sub("aws_session_token.*", "", bucket.file.read_text()))
    source = open_source(f"s3://{s3_bucket}", SourceOptions(endpoint_url=swift.endpoint))
    with pytest.raises(AccessError, match="SignatureDoesNotMatch"):
        list_tree(source)
    bucket.file.write_text(bucket.file.read_text().replace("wrong", swift.secret_key))
    found = list_tree(source)
    assert read(source, object_of(source, "a", found["a"])) == ramp(1000)
    source.close()


def test_a_refusal_that_stays_costs_one_request_and_few_searches(
    bucket: Bucket, opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_access, "SEARCH_PAUSES", 1e6)
    bucket.rotate("AKONE")
    source = opened()
    obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
    searches = []
    find = s3_access.S3Access._new_session
    monkeypatch.setattr(s3_access.S3Access, "_new_session", lambda access: searches.append(1) or find(access))
    bucket.good = "nobody's"
    before = len(bucket.server.requests)
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(read, source, obj, 0, 10) for _ in range(24)]
        assert all(isinstance(done.exception(), AccessError) for done in reads)
    assert len(bucket.server.requests) - before == 24
    assert len(searches) == 1


def test_many_readers_search_once_and_all_go_on(
    bucket: Bucket, opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.rotate("AKONE")
    source = opened()
    obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
    searches = []
    find = s3_access.S3Access._new_session
    monkeypatch.setattr(s3_access.S3Access, "_new_session", lambda access: searches.append(1) or find(access))
    bucket.rotate("AKTWO")
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(read, source, obj, 0, 10) for _ in range(24)]
        assert [done.result() for done in reads] == [ramp(10)] * 24
    assert len(searches) == 1


@pytest.mark.parametrize("said", ["", "[default]\n", "[default]\naws_access_key_id = AKTWO\n", "not an ini file"])
def test_a_file_caught_half_written_leaves_the_refusal_and_is_read_again(
    bucket: Bucket, opened: Callable[..., Source], said: str
) -> None:
    bucket.rotate("AKONE")
    source = opened()
    check(source)
    bucket.good = "AKTWO"
    bucket.file.write_text(said)
    with pytest.raises(AccessError, match="ExpiredToken"):
        list_tree(source)
    bucket.rotate("AKTWO")
    check(source)


# -- the Hub


class Hub:
    """A repository of one file that wants the token of the moment."""

    def __init__(self) -> None:
        self.good = "hf_one"
        self.refusal = Answer(401)
        self.server = ScriptedServer(self.answer)

    def answer(self, request: Request) -> Answer:
        if request.authorization != f"Bearer {self.good}":
            return self.refusal
        if "/resolve/" in request.path:
            return s3_bucket(request._replace(path="/b/m/w.bin"), FILES)
        if "/tree/" in request.path:
            return Answer(200, json.dumps([{"type": "file", "path": "w", "oid": "0" * 40, "size": 5000}]).encode())
        return Answer(200, json.dumps({"sha": COMMIT}).encode())


@pytest.mark.parametrize(
    "refusal",
    [Answer(401), Answer(403), Answer(404, headers=(("X-Error-Code", "RepoNotFound"),)),
     Answer(403, headers=(("X-Error-Code", "GatedRepo"),))],
    ids=lambda answer: str(answer.status),
)  # fmt: skip
def test_the_hubs_token_is_read_again(refusal: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    hub.refusal = refusal
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_one\n")
    with hub.server:
        source = open_source("hf://org/name", SourceOptions(endpoint_url=hub.server.url))
        obj = object_of(source, "w", list_tree(source)["w"])
        assert read(source, obj) == FILES["m/w.bin"]
        for token in ("hf_two", "hf_three"):
            hub.good = token
            (tmp_path / "token").write_text(token)
            assert read(source, obj, 5, 50) == ramp(45, 5)
        hub.good = "hf_four"
        (tmp_path / "token").write_text(hub.good)
        assert set(list_tree(source)) == {"w"}
        hub.good = "nobody's"
        before = len(hub.server.requests)
        with pytest.raises(Exception, match=r"hf auth login|the token in use may not"):
            list_tree(source)
        assert len(hub.server.requests) == before + 1
        source.close()


def test_a_token_that_was_told_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_one")
    with hub.server:
        source = open_source("hf://org/name", SourceOptions(endpoint_url=hub.server.url, token="hf_told"))
        with pytest.raises(AccessError):
            list_tree(source)
        assert {request.authorization for request in hub.server.requests} == {"Bearer hf_told"}
        source.close()


# -- HTTP


def test_netrc_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    good = {"password": "one"}
    index = json.dumps([{"name": "w", "type": "file", "mtime": "Fri, 02 Jan 2026 03:04:05 GMT", "size": 5000}]).encode()

    def answer(request: Request) -> Answer:
        wanted = base64.b64encode(f"u:{good['password']}".encode()).decode()
        if request.authorization != f"Basic {wanted}":
            return Answer(401)
        if request.path == "/d/":
            return Answer(200, index)
        found = s3_bucket(request._replace(path="/b/m/w.bin"), FILES)
        return found._replace(headers=(*found.headers, ("Last-Modified", "Fri, 02 Jan 2026 03:04:05 GMT")))

    def rotate(password: str) -> None:
        good["password"] = password
        (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login u password {password}\n")
        os.chmod(tmp_path / ".netrc", 0o600)

    with ScriptedServer(answer) as server:
        rotate("one")
        source = open_source(f"{server.url}/d/", SourceOptions())
        obj = object_of(source, "w", list_tree(source)["w"])
        rotate("two")
        assert read(source, obj, 5, 50) == ramp(45, 5)
        rotate("three")
        assert set(list_tree(source)) == {"w"}
        good["password"] = "nobody's"
        with pytest.raises(AccessError):
            read(source, obj, 5, 50)
        monkeypatch.setenv("NETRC", str(tmp_path / "named"))
        (tmp_path / "named").write_text("machine 127.0.0.1 login u password nobody's\n")
        assert read(source, obj, 5, 50) == ramp(45, 5)
        good["password"] = "five"
        (tmp_path / "named").write_bytes(b"machine 127.0.0.1 login u password f\xfcnf\n")
        with pytest.raises(AccessError):
            read(source, obj, 5, 50)
        source.close()
