"""Who we are to a registry: what `docker login` left in ~/.docker/config.json, or a credential helper tells.

Looked at again by whoever is refused: passwords and tokens are rotated in these very places. Secrets stay out of reprs.

Source: docker/cli cli/config (auths, credHelpers, credsStore, identitytoken, registrytoken), docker-credential-helpers'
protocol; containerd and ORAS read the same.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfs import children
from mfs.oci.reference import HUB

log = logging.getLogger(__name__)

HELPER_S = 10.0
"""Longest wait for a credential helper."""
_CONFIG_BYTES_MAX = 4 << 20
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_TOKEN_USER = "<token>"
"""What helpers say as the user's name where the secret is an identity token."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What opens a registry; all empty for nobody."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """To be exchanged for tokens, in place of a password."""
    registry_token: str = field(default="", repr=False)
    """A token as it is sent."""

    def __bool__(self) -> bool:
        return bool(self.username or self.identity_token or self.registry_token)

    def basic(self) -> str:
        """The Authorization value of user and password. Source: RFC 7617."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


def find_credentials(registry: str, *, deadline_s: float) -> Credentials:
    """What is known of a registry ('host:port') now; empty for anonymous. Trouble with it is logged: then nobody asks.

    deadline_s: time.monotonic() value for a helper to answer by.
    """
    config = _read_config()
    keys = _HUB_KEYS if registry == HUB else (registry, f"https://{registry}", f"http://{registry}")
    helpers = config.get("credHelpers")
    named = _named(helpers, keys) if isinstance(helpers, dict) else None
    helper = named or config.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, keys[0], deadline_s)
        if found or named:  # a store that knows nothing of it: the file may
            return found
    auths = config.get("auths")
    if not isinstance(auths, dict):
        return Credentials()
    items = [(key, item) for key, item in auths.items() if isinstance(item, dict)]
    hosts = {_host_of(key) for key in keys}
    # As docker: first what is called exactly so, then whatever means the same host.
    items.sort(key=lambda pair: keys.index(pair[0]) if pair[0] in keys else len(keys))
    stated = (_of_item(key, item) for key, item in items if _host_of(key) in hosts)
    return next((credentials for credentials in stated if credentials), Credentials())


def _host_of(key: str) -> str:
    """'host:port' of a key, which may be a URL with a version behind it, in small letters."""
    return (key.partition("://")[2].partition("/")[0] if "://" in key else key.removesuffix("/")).lower()


def _named(helpers: dict[str, Any], keys: tuple[str, ...]) -> object:
    """The helper of these keys, else of one that means the same host."""
    hosts = {_host_of(key) for key in keys}
    return next((helpers[key] for key in keys if key in helpers), None) or next(
        (name for key, name in helpers.items() if _host_of(key) in hosts), None
    )


def _config_path() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")) / "config.json"


def _read_config() -> dict[str, Any]:
    path = _config_path()
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_CONFIG_BYTES_MAX))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is not used: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _of_item(key: str, item: dict[str, Any]) -> Credentials:
    texts = {name: value for name, value in item.items() if isinstance(value, str)}
    username, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            pair = base64.b64decode(texts["auth"], validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            log.warning("%s: what it has for %s is not used: its 'auth' is no base64", _config_path(), key)
            pair = ""
        username, _, password = pair.partition(":") if ":" in pair else (username, "", password)
    tokens = texts.get("identitytoken", ""), texts.get("registrytoken", "")
    if not all(token.isascii() and token.isprintable() for token in tokens):
        log.warning("%s: what it has for %s is not used: its token has characters that none has", _config_path(), key)
        tokens = "", ""
    return Credentials(username, password.strip("\0"), *tokens)


def _ask_helper(helper: str, server: str, deadline_s: float) -> Credentials:
    if not _HELPER.fullmatch(helper):
        log.warning("%s: %r is no name of a credential helper", _config_path(), helper[:80])
        return Credentials()
    program = f"docker-credential-{helper}"
    patience_s = max(0.1, min(HELPER_S, deadline_s - time.monotonic()))
    try:
        process = subprocess.Popen(
            [program, "get"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=children.CWD, env=children.environment(), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.warning("%s cannot be run: %s", program, error)
        return Credentials()
    try:
        answer, _ = process.communicate(server.encode(), timeout=patience_s)
    except subprocess.TimeoutExpired:
        log.warning("%s did not answer within %.0f s", program, patience_s)
        answer = b""
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started itself
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()
    if process.returncode != 0:
        return Credentials()  # which is how it says that it knows nothing
    try:
        found = json.loads(answer)
        username, secret = found["Username"], found["Secret"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s: expected Username and Secret as JSON, got something else", program)
        return Credentials()
    if not isinstance(username, str) or not isinstance(secret, str):
        return Credentials()
    if username == _TOKEN_USER and not (secret.isascii() and secret.isprintable()):
        log.warning("%s: tells a token with characters that none has", program)
        return Credentials()
    return Credentials(identity_token=secret) if username == _TOKEN_USER else Credentials(username, secret)
