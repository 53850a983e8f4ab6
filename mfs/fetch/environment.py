"""What the machine's environment says about reaching the network: proxies and trusted certificates.

The only file of this room that reads environment variables. Nothing here connects to anything.
"""

from __future__ import annotations

import base64
import os
import ssl
import urllib.request
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from mfs.errors import ConfigError

CA_BUNDLE_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""Read in addition to SSL_CERT_FILE and SSL_CERT_DIR, which OpenSSL honours by itself."""


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

    Honours http_proxy, https_proxy, all_proxy and no_proxy in the usual spellings.
    Raises: ConfigError for a proxy that is not an http:// URL.
    """
    proxies = urllib.request.getproxies_environment()
    value = proxies.get(scheme) or proxies.get("all")
    if not value or urllib.request.proxy_bypass_environment(f"{host}:{port}", proxies):  # type: ignore[attr-defined]
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


def basic_authorization(username: str | None, password: str | None) -> str:
    """The Authorization value for user and password as they stand, percent-encoded, in a URL."""
    pair = f"{unquote(username or '')}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")


def trust_store() -> ssl.SSLContext:
    """Certificates to trust: the system's, plus the bundles that AWS_CA_BUNDLE and REQUESTS_CA_BUNDLE name.

    Raises: ConfigError for a bundle that cannot be read.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    loaded = {os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")}
    for variable in CA_BUNDLE_VARIABLES:
        bundle = os.environ.get(variable)
        if not bundle or bundle in loaded:
            continue
        loaded.add(bundle)
        try:
            if os.path.isdir(bundle):
                context.load_verify_locations(capath=bundle)
            else:
                context.load_verify_locations(cafile=bundle)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(f"{variable}={bundle}: cannot be read as PEM certificates: {e}") from e
    return context
