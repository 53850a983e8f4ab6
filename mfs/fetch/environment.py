"""What the machine's environment says about reaching the network: proxies and trusted certificates.

The only file of this room that reads environment variables. Nothing here connects to anything.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import ssl
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from mfs.errors import ConfigError

CA_BUNDLE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
"""The first one set is read in addition to SSL_CERT_FILE and SSL_CERT_DIR, which OpenSSL honours by itself: requests'
order, and AWS's last. A source with an order of its own (S3) says so to `trust_store`."""


class CaBundle(NamedTuple):
    """Certificates that somebody wants trusted."""

    path: str
    """A file of PEM certificates, or a directory as `c_rehash` makes them."""
    named_by: str
    """Where that was said, for messages."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """One HTTP proxy; the credentials stay out of its repr."""

    host: str
    port: int
    authorization: str | None

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port}{', with credentials' if self.authorization else ''})"


def proxy_for(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy that the environment names for this origin, or None.

    Honours http_proxy, https_proxy, all_proxy and no_proxy, the lower-case name before the upper-case one.
    Raises: ConfigError for a proxy that is not an http:// URL.
    """
    proxies = urllib.request.getproxies_environment()
    value = proxies.get(scheme) or proxies.get("all")
    if not value or is_direct(host, port, proxies.get("no", "")):
        return None
    parts = urlsplit(value if "://" in value else f"http://{value}")
    try:
        proxy_port = parts.port or 80
    except ValueError:
        raise ConfigError(
            f"{scheme}_proxy: the port is not a number; expected http://[user:password@]host:port"
        ) from None
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"{scheme}_proxy: expected http://[user:password@]host:port, got a {parts.scheme!r} URL")
    authorization = basic_authorization(parts.username, parts.password) if parts.username else None
    return Proxy(parts.hostname, proxy_port, authorization)


def is_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether a NO_PROXY list wants this host, a name or an address without brackets, asked without a proxy.

    Entries stand between commas or blanks: a name (it and all below it, with or without a leading '.' or '*.'), an
    address, a range like 10.0.0.0/8 or fd00::/8, each with or without brackets and, unless a range, with ':port'; or
    '*' for everything. Names are not resolved, so ranges hold for addresses only. What is none of these matches none.
    Source: curl's CURLOPT_NOPROXY, requests' should_bypass_proxies and Go's httpproxy, together: what one of them asks
    directly, so do we. urllib's own knows no ranges.
    """
    address = _address(host)
    name = host.lower().rstrip(".")
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        if entry == "*":
            return True
        if "/" in entry:
            if address is not None and address in (_network(entry) or ()):
                return True
            continue
        wanted, wanted_port = _split_port(entry)
        if not wanted or wanted_port not in (None, str(port)):
            continue
        if address is not None:
            if _address(wanted) == address:
                return True
        elif name == (suffix := wanted.removeprefix("*").strip(".")) or name.endswith(f".{suffix}"):
            return True
    return False


def _split_port(entry: str) -> tuple[str, str | None]:
    """(host without brackets, port or None) of 'host', 'host:port', '[v6]', '[v6]:port' or a bare v6 address."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":") or None
    host, colon, port = entry.partition(":")
    return (host, port) if colon and ":" not in port else (entry, None)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, the v4 one where a v6 one only wraps it, or None if it is a name."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])  # the zone is which of our links, not which host
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    address, _, bits = text.replace("[", "").replace("]", "").partition("/")
    try:
        return ipaddress.ip_network((address, int(bits)), strict=False)
    except ValueError:
        return None


def basic_authorization(username: str | None, password: str | None) -> str:
    """The Authorization value for user and password as they stand, percent-encoded, in a URL."""
    pair = f"{unquote(username or '')}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")


def ca_bundle(variables: Iterable[str] = CA_BUNDLE_VARIABLES) -> CaBundle | None:
    """The bundle that the first of these variables names which is set and not empty, or None."""
    return next((CaBundle(path, name) for name in variables if (path := os.environ.get(name, "").strip())), None)


def trust_store(bundle: CaBundle | None = None) -> ssl.SSLContext:
    """Certificates to trust: the system's, or SSL_CERT_FILE's and SSL_CERT_DIR's in their place, and the bundle's.

    bundle: None for what `ca_bundle` finds.
    Raises: ConfigError for a bundle that cannot be read.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    bundle = bundle or ca_bundle()
    if bundle is None or bundle.path in (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")):
        return context
    try:
        if os.path.isdir(bundle.path):
            context.load_verify_locations(capath=bundle.path)
        else:
            context.load_verify_locations(cafile=bundle.path)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"{bundle.named_by}={bundle.path}: cannot be read as PEM certificates: {e}") from e
    return context
