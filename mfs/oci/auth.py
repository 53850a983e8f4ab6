"""Being let in by a registry: what it challenges us for, tokens for it, each kept until shortly before it expires.

A password goes to the registry, and to the token server that the registry names; a token to the registry alone. Neither
goes over plain http where the registry itself is https.

Source: RFC 9110 §11.6.1 WWW-Authenticate, RFC 6750 §3; distribution's docs/spec/auth/token.md and oauth.md.
"""

from __future__ import annotations

import re
import threading
import time
from typing import NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from mfs.errors import AccessError, StoreError, TransientStoreError
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.oci.credentials import Credentials, find_credentials
from mfs.sources.bounds import parse_json

Scopes = tuple[str, ...]
"""Like ('repository:team/llama:pull',)."""

TOKEN_S_DEFAULT = 60.0
"""Life of a token that states none: what the specification says."""
_TOKEN_BYTES_MAX = 64 << 10
LOOK_PAUSES = 2.0
"""Shortest pause after a look for other credentials that found none, in times of what it took: a helper is a process,
and what asks is a read that was refused, of which there may be many."""
_TOKENS_MAX = 256

_CHALLENGE = re.compile(r"\s*,?\s*(Basic|Bearer)(?:\s+|$)", re.IGNORECASE)
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_VISIBLE = re.compile(r"[\x21-\x7e]+")


class Challenge(NamedTuple):
    """What a 401 asks for."""

    scheme: str
    """'basic' or 'bearer'."""
    realm: str = ""
    service: str = ""
    scopes: Scopes = ()


class _Token(NamedTuple):
    value: str
    expires_s: float
    """time.monotonic() value, a little before the token dies."""


def parse_challenge(values: list[str]) -> Challenge | None:
    """The challenge that we can meet, a bearer's before a password's; None if there is none."""
    found: list[Challenge] = []
    for value in values:
        value = value[:8192]
        at = 0
        while match := _CHALLENGE.match(value, at):
            at = match.end()
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(value, at):
                at = parameter.end()
                text = re.sub(r"\\(.)", r"\1", parameter[2]) if parameter[2] is not None else parameter[3]
                parameters.setdefault(parameter[1].lower(), text)
            scopes = tuple(parameters.get("scope", "").split())
            found.append(
                Challenge(match[1].lower(), parameters.get("realm", ""), parameters.get("service", ""), scopes)
            )
    found.sort(key=lambda challenge: challenge.scheme, reverse=True)
    return next((challenge for challenge in found if challenge.scheme == "basic" or challenge.realm), None)


class Authenticator:
    """Authorization for the requests to one registry. Thread-safe."""

    def __init__(self, registry: str, base_url: str, transport: Transport) -> None:
        self._registry = registry
        self._is_https = urlsplit(base_url).scheme == "https"
        self._transport = transport
        self._guard = threading.Lock()
        """Around asking: one thread fetches a token, the others that want it wait for that."""
        self._challenge: Challenge | None = None
        self._credentials: Credentials | None = None
        self._look_again_s = 0.0
        """time.monotonic() from which it may be looked again, after a look that found nothing new."""
        self._tokens: dict[Scopes, _Token] = {}

    def header(self, scopes: Scopes, deadline_s: float) -> dict[str, str]:
        """The header to send with a request that needs these scopes; none before the registry has asked for one."""
        challenge = self._challenge
        if challenge is None:
            return {}
        return {"Authorization": self._authorize(challenge, scopes, deadline_s)}

    def answer(self, reply: Reply, scopes: Scopes, sent: dict[str, str], deadline_s: float) -> dict[str, str] | None:
        """After a 401: the header to try once more with, None if there is nothing else to try.

        sent: what `header` gave for the request that was refused.
        Raises: AccessError where nobody's credentials are known or they are refused; StoreError.
        """
        challenge = parse_challenge(reply.headers.get_all("WWW-Authenticate", []))
        if challenge is None:
            return None
        with self._locked(deadline_s):
            if challenge.scopes and challenge.scheme == "bearer":
                challenge = challenge._replace(scopes=())  # what a request needs it says itself, and more than this
            self._challenge = challenge
            used = sent.get("Authorization")
            known = self._tokens.get(scopes)
            if known and used == f"Bearer {known.value}":
                del self._tokens[scopes]
        credentials = self._credentials
        header = self._authorize(challenge, scopes, deadline_s)
        if header == used and self._look_again(credentials, deadline_s):
            header = self._authorize(challenge, scopes, deadline_s)
        return {"Authorization": header} if header != used else None

    def _authorize(self, challenge: Challenge, scopes: Scopes, deadline_s: float) -> str:
        """As `_authorization`; where we are refused, with what is known of us by then."""
        credentials = self._credentials
        try:
            return self._authorization(challenge, scopes, deadline_s)
        except AccessError:
            if not self._look_again(credentials or self._credentials, deadline_s):
                raise
            return self._authorization(challenge, scopes, deadline_s)

    def _authorization(self, challenge: Challenge, scopes: Scopes, deadline_s: float) -> str:
        known = self._tokens.get(scopes)
        if challenge.scheme == "bearer" and known and time.monotonic() < known.expires_s:
            return f"Bearer {known.value}"
        with self._locked(deadline_s):
            if self._credentials is None:
                self._credentials = find_credentials(self._registry, deadline_s=deadline_s)
            credentials = self._credentials
            if challenge.scheme == "basic":
                if not credentials.username:
                    raise AccessError(f"{self._registry}: wants a user and a password: `docker login {self._registry}`")
                return credentials.basic()
            if credentials.registry_token:
                return f"Bearer {credentials.registry_token}"
            known = self._tokens.get(scopes)
            if known and time.monotonic() < known.expires_s:
                return f"Bearer {known.value}"
            if len(self._tokens) >= _TOKENS_MAX:
                self._tokens.clear()
            token = self._fetch(challenge, scopes, credentials, deadline_s)
            self._tokens[scopes] = token
            return f"Bearer {token.value}"

    def _look_again(self, refused: Credentials | None, deadline_s: float) -> bool:
        """Whether there are other credentials than those refused; looks where they are kept, see LOOK_PAUSES."""
        with self._locked(deadline_s):
            if self._credentials != refused:
                return True  # somebody else has found them already
            started_s = time.monotonic()
            if started_s < self._look_again_s:
                return False
            found = find_credentials(self._registry, deadline_s=deadline_s)
            if found == self._credentials:
                now_s = time.monotonic()
                self._look_again_s = now_s + LOOK_PAUSES * (now_s - started_s)
                return False
            self._credentials = found
            self._tokens.clear()
            return True

    def _fetch(self, challenge: Challenge, scopes: Scopes, credentials: Credentials, deadline_s: float) -> _Token:
        """Ask the token server. Redirects are not followed: it is named as it is meant."""
        realm = challenge.realm
        try:
            shown = f"the token server {parse_target(realm).shown}"
        except StoreError as e:
            raise StoreError(f"{self._registry}: names its token server by {realm[:200]!r}: {e}") from e
        if self._is_https and urlsplit(realm).scheme != "https":
            raise StoreError(f"{self._registry}: names {shown}, which is not https: nothing is sent there")
        fields = [("service", challenge.service)] if challenge.service else []
        asked_s = time.monotonic()
        if credentials.identity_token:
            fields += [("client_id", "mfs"), ("grant_type", "refresh_token"), ("scope", " ".join(scopes)),
                       ("refresh_token", credentials.identity_token)]  # fmt: skip
            reply = self._transport.request(
                realm, method="POST", headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(fields).encode(), body_bytes_max=1 << 20, deadline_s=deadline_s,
            )  # fmt: skip
        else:
            query = urlencode([*fields, *(("scope", scope) for scope in scopes)], quote_via=quote)
            joined = f"{realm}{'&' if urlsplit(realm).query else '?'}{query}"
            headers = {"Authorization": credentials.basic()} if credentials.username else {}
            reply = self._transport.request(joined, headers=headers, body_bytes_max=1 << 20, deadline_s=deadline_s)
        if reply.status in TRANSIENT_STATUSES:
            raise TransientStoreError(f"{shown}: status {reply.status}", retry_after_s=wished_pause_s(reply.headers))
        if reply.status in (400, 401, 403):
            who = "the credentials known for it" if credentials else "anonymous clients"
            raise AccessError(
                f"{self._registry}: {shown} refuses {who} (status {reply.status}): `docker login {self._registry}`"
            )
        if reply.status != 200:
            raise StoreError(f"{self._registry}: {shown}: expected a token, got status {reply.status}")
        return _token_of(reply.body, asked_s, shown)

    def _locked(self, deadline_s: float) -> _Locked:
        return _Locked(self._guard, deadline_s, self._registry)


class _Locked:
    """A lock taken within a deadline."""

    def __init__(self, lock: threading.Lock, deadline_s: float, registry: str) -> None:
        self._lock, self._deadline_s, self._registry = lock, deadline_s, registry

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=max(0.0, self._deadline_s - time.monotonic())):
            raise TransientStoreError(f"{self._registry}: no token before the deadline")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _token_of(body: bytes, asked_s: float, shown: str) -> _Token:
    try:
        found = parse_json(body)
        value = found.get("token") or found.get("access_token")
        lasts = found.get("expires_in")
    except (ValueError, AttributeError):
        value = lasts = None
    if not isinstance(value, str) or len(value) > _TOKEN_BYTES_MAX or not _VISIBLE.fullmatch(value):
        raise StoreError(f"{shown}: expected a token as JSON, got something else")
    is_number = isinstance(lasts, int | float) and not isinstance(lasts, bool) and 0 < lasts < 10**9
    lasts_s = float(lasts) if is_number else TOKEN_S_DEFAULT
    # By our clock, from when we asked: theirs (`issued_at`) may be another, and what that costs is one more 401.
    return _Token(value, asked_s + lasts_s - min(10.0, lasts_s / 10))
