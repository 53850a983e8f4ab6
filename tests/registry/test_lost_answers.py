"""A conditional write whose answer is lost, and servers that know no conditions. FORMAT.md, "Conditional writes"."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mfs.errors import AccessError, TransientStoreError
from mfs.registry import s3_writing, tags
from mfs.registry.s3_store import S3Store
from mfs.sources.options import SourceOptions
from mfs.testing.suite import deadline
from tests.registry.places import S3Place
from tests.servers.chaos import ChaosProxy
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error
from tests.servers.swift import SwiftServer

KEY = "tags/llama/prod/0000000001"


class Bucket:
    """A truthful S3 server, but for what `before` and `after` say of a conditional write."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.before: Callable[[Request], Answer | None] = lambda request: None
        """Answers before anything is written."""
        self.after: Callable[[Request], Answer | None] = lambda request: None
        """Answers in place of success, after it was written."""
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Answer:
        key = request.path.removeprefix("/b/")
        with self._lock:
            if request.method == "PUT":
                is_new = request.headers.get("if-none-match") == "*"
                if is_new and not key.startswith("work/") and (said := self.before(request)):
                    return said
                if is_new and key in self.files:
                    return s3_error(412, "PreconditionFailed")
                self.files[key] = request.body
                if is_new and not key.startswith("work/") and (said := self.after(request)):
                    return said
                return Answer(200, b"", (("ETag", '"1"'),))
            if request.method == "DELETE":
                self.files.pop(key, None)
                return Answer(204)
            return s3_bucket(request, self.files)

    def writes(self, server: ScriptedServer) -> int:
        """How often the tag was asked to be written."""
        return sum(request.method == "PUT" and request.path.endswith(KEY) for request in server.requests)


class Once:
    """Says it once."""

    def __init__(self, answer: Answer) -> None:
        self._answers = [answer]

    def __call__(self, request: Request) -> Answer | None:
        return self._answers.pop() if self._answers else None


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def server(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with ScriptedServer(bucket.answer) as server:
        yield server


@pytest.fixture
def store(server: ScriptedServer) -> Iterator[S3Store]:
    store = S3Store("b", "", SourceOptions(endpoint_url=server.url))
    yield store
    store.close()


def test_written_and_the_answer_lost_it_is_ours(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    bucket.after = Once(s3_error(503, "SlowDown"))
    assert store.create(KEY, b"ours, token 1", deadline_s=deadline())
    assert bucket.writes(server) == 2
    assert bucket.files[KEY] == b"ours, token 1"


def test_not_written_and_the_answer_lost_it_is_written_then(
    bucket: Bucket, server: ScriptedServer, store: S3Store
) -> None:  # fmt: skip
    bucket.before = Once(s3_error(500, "InternalError"))
    assert store.create(KEY, b"ours, token 1", deadline_s=deadline())
    assert bucket.writes(server) == 2


def test_another_was_quicker_while_our_answer_was_lost(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    def quicker(request: Request) -> Answer | None:
        if KEY in bucket.files:
            return None
        bucket.files[KEY] = b"theirs, token 2"
        return s3_error(500, "InternalError")

    bucket.before = quicker
    assert not store.create(KEY, b"ours, token 1", deadline_s=deadline())
    assert bucket.files[KEY] == b"theirs, token 2"


def test_a_proxy_that_sends_twice_makes_no_loser(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    """It writes, and answers as the second of two equal requests is answered."""
    bucket.after = Once(s3_error(412, "PreconditionFailed"))
    assert store.create(KEY, b"ours, token 1", deadline_s=deadline())


def test_a_conflict_is_tried_again(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    """AWS's answer to two at the same moment, of which none is known to have won."""
    bucket.before = Once(s3_error(409, "ConditionalRequestConflict"))
    assert store.create(KEY, b"ours", deadline_s=deadline())
    assert bucket.writes(server) == 2


def test_what_was_there_and_is_gone_is_tried_again(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    bucket.before = Once(s3_error(412, "PreconditionFailed"))
    assert store.create(KEY, b"ours", deadline_s=deadline())


def test_a_server_that_never_answers_well_is_an_error_and_not_a_guess(bucket: Bucket, store: S3Store) -> None:
    store.is_conditional(deadline_s=deadline())
    bucket.after = lambda request: s3_error(500, "InternalError")
    bucket.before = lambda request: s3_error(500, "InternalError") if KEY in bucket.files else None
    with pytest.raises(TransientStoreError):
        store.create(KEY, b"ours", deadline_s=deadline(1))


def test_a_refusal_is_no_lost_answer(bucket: Bucket, server: ScriptedServer, store: S3Store) -> None:
    bucket.before = lambda request: s3_error(403, "AccessDenied")
    with pytest.raises(AccessError) as caught:
        store.create(KEY, b"ours", deadline_s=deadline())
    assert "s3:PutObject" in str(caught.value)
    assert bucket.writes(server) == 1


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_conditions(
    bucket: Bucket, store: S3Store, status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    truthful = bucket.answer

    def answer(request: Request) -> Answer:
        return s3_error(status, "NotImplemented") if "if-none-match" in request.headers else truthful(request)

    monkeypatch.setattr(bucket, "answer", answer)
    with ScriptedServer(answer) as server:
        store = S3Store("b", "", SourceOptions(endpoint_url=server.url))
        assert not store.is_conditional(deadline_s=deadline())
        assert not store.is_conditional(deadline_s=deadline())
        moved = tags.move(store, "llama", "prod", "1" * 64, how="tag", deadline_s=deadline())
        assert list(bucket.files) == [f"{KEY}.{moved.token}"]
        assert store.create("chunks/aa/b", b"x", deadline_s=deadline())
        assert not store.create("chunks/aa/b", b"y", deadline_s=deadline())
        store.close()
    assert sum("does not decide" in record.message for record in caplog.records) == 1


def test_the_network_takes_the_answer_away(
    swift: SwiftServer, s3_bucket: str, chaos: Callable[[str], ChaosProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real server: it is written, and the connection is reset before a byte of the answer came."""
    monkeypatch.setattr(s3_writing, "ANSWER_S", 5.0)
    proxy = chaos(swift.endpoint)
    place = S3Place(swift, s3_bucket, monkeypatch, endpoint=proxy.url)
    store = place.store()
    store.is_conditional(deadline_s=deadline())
    proxy.set(reset_after_bytes=0, faults_count=1)
    assert store.create(KEY, b"ours, token 1", deadline_s=deadline())
    assert proxy.stats().faults == 1
    assert place.get(KEY) == b"ours, token 1"
    store.close()
    place.close()
