"""The token server's own process: JSON web tokens as distribution's registry takes them (RS256, with its x5c chain).

Run by `tests.servers.docker_registry.TokenServer`. Besides passwords it takes the identity token IDENTITY_TOKEN.
"""

from __future__ import annotations

import base64
import datetime
import json
import secrets
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from tests.servers import remote, web

IDENTITY_TOKEN = "identity-of-alice"


class Site:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.user, self.password = settings["user"], settings["password"]
        self.service, self.issuer = settings["service"], settings["issuer"]
        self.ttl_s = 60.0
        self.is_known = True
        self.log: list[dict[str, Any]] = []
        self.guard = threading.Lock()
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mfs-token")])
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self.key.public_key())
            .serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )  # fmt: skip
        (Path(settings["root"]) / "token.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.chain = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()

    def token(self, user: str, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            allowed = [
                action for action in actions.split(",") if user or (action == "pull" and name.startswith("pub/"))
            ]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [self.chain]}
        claims = {
            "iss": self.issuer, "sub": user, "aud": self.service, "exp": now + int(self.ttl_s), "nbf": now - 10,
            "iat": now, "jti": secrets.token_hex(8), "access": access,
        }  # fmt: skip
        signed = f"{_encoded(json.dumps(head).encode())}.{_encoded(json.dumps(claims).encode())}"
        signature = self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_encoded(signature)}"

    # Commands of the parent.

    def set(self, *, ttl_s: float | None = None, is_known: bool | None = None, password: str | None = None) -> None:
        self.ttl_s = self.ttl_s if ttl_s is None else ttl_s
        self.is_known = self.is_known if is_known is None else is_known
        self.password = self.password if password is None else password

    def requests(self) -> list[dict[str, Any]]:
        return self.log

    def forget(self) -> None:
        self.log = []


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


SITE: Site


class _Handler(web.Handler):
    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        user = ""
        authorization = self.headers.get("Authorization", "")
        if authorization.startswith("Basic "):
            user, _, password = base64.b64decode(authorization[6:]).decode().partition(":")
            if (user, password) != (SITE.user, SITE.password):
                return self._refuse("GET", query.get("scope", []))
        return self._grant("GET", user, [one for scope in query.get("scope", []) for one in scope.split()])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        form = urllib.parse.parse_qs(body.decode())
        scopes = form.get("scope", [""])[0].split()
        if form.get("grant_type") != ["refresh_token"] or form.get("refresh_token") != [IDENTITY_TOKEN]:
            return self._refuse("POST", scopes)
        return self._grant("POST", SITE.user, scopes)

    def _refuse(self, method: str, scopes: list[str]) -> None:
        SITE.log.append({"method": method, "scopes": scopes, "user": None})
        self.answer(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}')

    def _grant(self, method: str, user: str, scopes: list[str]) -> None:
        SITE.log.append({"method": method, "scopes": scopes, "user": user})
        name = "access_token" if method == "POST" else "token"
        found: dict[str, Any] = {name: SITE.token(user, scopes)}
        if SITE.is_known:
            found["expires_in"] = int(SITE.ttl_s)
        self.answer(200, json.dumps(found).encode(), [("Content-Type", "application/json")])


def main() -> None:
    global SITE
    settings = remote.read_settings()
    SITE = Site(settings)
    web.serve(_Handler, "127.0.0.1", settings["port"])
    remote.obey({"set": SITE.set, "requests": SITE.requests, "forget": SITE.forget})


if __name__ == "__main__":
    main()
