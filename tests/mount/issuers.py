"""Who issues credentials that are soon good for nothing: one of each kind, with an origin that takes nothing older.

What was issued in this turn and the one before is taken, as STS, a Hub and a kubelet issue a new credential before the
last has expired; a reader that keeps what it has is refused. Turns are the test's, not the clock's.
"""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path

from mfs.testing import ramp
from tests.oci.artifacts import ARTIFACT, CONFIG, MANIFEST, RAW, digest_of
from tests.servers.scripted import Answer, Request, s3_bucket, s3_error

SIZE = 4_000_000
CONTENT = ramp(SIZE)
NAME = "w.bin"
_TIME = "Fri, 02 Jan 2026 03:04:05 GMT"


class Issuer:
    """Credentials, each good for two turns."""

    def __init__(self) -> None:
        self._issued: dict[str, int] = {}
        self._guard = threading.Lock()
        self.turn = 0
        self.refused_count = 0

    def issue(self) -> str:
        with self._guard:
            word = f"AK{len(self._issued) + 1}X"
            self._issued[word] = self.turn
            return word

    def is_good(self, word: str) -> bool:
        good = self.turn - self._issued.get(word, -2) < 2
        self.refused_count += not good
        return good


class Bucket(Issuer):
    """S3, for keys in a file."""

    def answer(self, request: Request) -> Answer:
        if request.path.startswith("/sts"):
            return sts_answer(self.issue())
        key = request.authorization.partition("Credential=")[2].partition("/")[0]
        if not self.is_good(key):
            return s3_error(400, "ExpiredToken")
        return s3_bucket(request, {NAME: CONTENT})


class Hub(Issuer):
    """A repository of one file, for a token in a file."""

    def answer(self, request: Request) -> Answer:
        if not self.is_good(request.authorization.removeprefix("Bearer ")):
            return Answer(401)
        if "/resolve/" in request.path:
            return s3_bucket(request._replace(path=f"/b/{NAME}"), {NAME: CONTENT})
        if "/tree/" in request.path:
            return Answer(200, json.dumps([{"type": "file", "path": NAME, "oid": "0" * 40, "size": SIZE}]).encode())
        return Answer(200, json.dumps({"sha": "c" * 40}).encode())


class Folder(Issuer):
    """A web server, for a password in ~/.netrc."""

    def answer(self, request: Request) -> Answer:
        if not self.is_good(password_of(request)):
            return Answer(401)
        if request.path == "/d/":
            return Answer(200, json.dumps([{"name": NAME, "type": "file", "mtime": _TIME, "size": SIZE}]).encode())
        found = s3_bucket(request._replace(path=f"/b/{NAME}"), {NAME: CONTENT})
        return found._replace(headers=(*found.headers, ("Last-Modified", _TIME)))


class Registry(Issuer):
    """An OCI registry, for a password in docker's config.json."""

    def answer(self, request: Request) -> Answer:
        if not self.is_good(password_of(request)):
            return Answer(401, headers=(("WWW-Authenticate", 'Basic realm="r"'),))
        if "/manifests/" in request.path:
            layer = {"mediaType": RAW, "digest": digest_of(CONTENT), "size": SIZE,
                     "annotations": {"org.cncf.model.filepath": NAME}}  # fmt: skip
            config = {"mediaType": CONFIG, "digest": digest_of(b"{}"), "size": 2}
            manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT, "config": config,
                        "layers": [layer]}  # fmt: skip
            body = json.dumps(manifest).encode()
            more = (("Content-Type", MANIFEST), ("Docker-Content-Digest", digest_of(body)))
            return Answer(200, body, more)
        if "/blobs/" in request.path:
            return s3_bucket(request._replace(path=f"/b/{NAME}"), {NAME: CONTENT})
        return Answer(200, b"{}")


def password_of(request: Request) -> str:
    text = base64.b64decode(request.authorization.removeprefix("Basic ") or b"").decode()
    return text.partition(":")[2]


def sts_answer(key: str) -> Answer:
    """An answer of AssumeRoleWithWebIdentity; by their own word, keys live long."""
    body = (
        "<AssumeRoleWithWebIdentityResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'>"
        f"<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>"
        "<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
        "<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
        "</AssumeRoleWithWebIdentityResponse>"
    )
    return Answer(200, body.encode(), (("Content-Type", "text/xml"),))


def put(file: Path, text: str) -> None:
    """As a rotation does it: whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.chmod(0o600)
    new.rename(file)
