"""What an oci:// address names. Pure.

    oci://harbor.example/team/llama:v3                  a tag
    oci://harbor.example/team/llama@sha256:<hex>        a manifest
    oci://harbor.example/team/llama                     a repository: its tags are directories
    oci://localhost:5000/llama:v3                       plain http, as for docker, since nobody is between
    oci+http://10.0.0.7:5000/llama:v3                   plain http, said
    oci+https://localhost:5443/llama:v3                 TLS, said

Source: distribution-spec 1.1, "Pulling manifests" for names; docker.io's defaults as in docker's reference grammar.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from mfs.errors import UsageError
from mfs.shown import mask_url

SCHEMES = ("oci", "oci+http", "oci+https")

HUB = "docker.io"
_HUB_NAMES = frozenset({HUB, "index.docker.io", "registry-1.docker.io"})
_HUB_API = "https://registry-1.docker.io"
_REPOSITORY_MAX = 255

_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.ASCII)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[([0-9A-Fa-f:.]+)\])(?::(\d{{1,5}}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """One repository, and what of it is meant."""

    registry: str
    """'host' or 'host:port', as credentials are kept by it."""
    base_url: str
    """Where its API is: 'https://host:port'."""
    repository: str
    tag: str | None = None
    digest: str | None = None
    """Wins over a tag, which then only says what somebody called it."""

    @property
    def identity(self) -> str:
        """The repository, whatever the tag: blobs of all its tags are the same blobs. Reached over plain http it is
        another than over https, since anybody on the way may have written what came so.
        """
        web = urlsplit(self.base_url).scheme
        scheme = "oci" if web == _usual_scheme(self.registry) else f"oci+{web}"
        return f"{scheme}://{self.registry}/{self.repository}"

    @property
    def name(self) -> str | None:
        """What a manifest is asked by, None for the repository as a whole."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.identity}{tag}{f'@{self.digest}' if self.digest else ''}"


def parse_reference(url: str) -> Reference:
    """Take an oci:// address apart. Raises: UsageError."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        raise _fault(url, f"expected {SCHEMES[0]}://host[:port]/repository[:tag]")
    registry, _, path = rest.partition("/")
    if "@" in registry:
        raise _fault(url, "a user or password does not stand here: `docker login` keeps them in ~/.docker/config.json")
    if not _is_host(registry):
        raise _fault(url, "expected a host, and a port if it has one, after oci://")
    path, at, digest = path.rstrip("/").partition("@")
    path, colon, tag = path.partition(":")
    if at and not is_digest(digest):
        raise _fault(url, "behind '@' expected sha256: and 64 hexadecimal digits")
    if colon and not is_tag(tag):
        raise _fault(url, f"{tag!r} is no tag; expected up to 128 letters, digits, '.', '_' and '-'")
    registry = registry.lower()
    if registry in _HUB_NAMES and "/" not in path and path:
        path = f"library/{path}"
    if not is_repository(path):
        raise _fault(url, f"{path!r} is no repository; expected lower-case names with '/' between them")
    if registry in _HUB_NAMES:
        return Reference(HUB, _HUB_API, path, tag or None, digest or None)
    web = {"oci+http": "http", "oci+https": "https"}.get(scheme) or _usual_scheme(registry)
    return Reference(registry, f"{web}://{registry}", path, tag or None, digest or None)


def is_repository(text: str) -> bool:
    return len(text) <= _REPOSITORY_MAX and _REPOSITORY.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    return _TAG.fullmatch(text) is not None


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _is_host(registry: str) -> bool:
    found = _HOST.fullmatch(registry)
    if found is None or (found[2] and not 0 < int(found[2]) < 65536):
        return False
    try:
        return found[1] is None or bool(ipaddress.IPv6Address(found[1]))
    except ValueError:
        return False


def _usual_scheme(registry: str) -> str:
    return "http" if is_loopback(registry) else "https"


def is_loopback(registry: str) -> bool:
    """Whether 'host:port' is this machine: localhost or an address of it. Names are not resolved."""
    host = urlsplit(f"//{registry}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _fault(url: str, why: str) -> UsageError:
    return UsageError(f"{mask_url(url)!r}: {why}")
