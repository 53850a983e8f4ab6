"""What a volume is to be, read from what a pod's or a PersistentVolume's author wrote. Pure.

Authors of pods are strangers to the node: they choose a source and some sizes within the node's limits, and nothing
that names a file of the node or another's credentials.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mfs.config import MountConfig, SourceConfig, chosen
from mfs.errors import ConfigError, UsageError
from mfs.registry.signing import parse_public_key
from mfs.shown import mask_url
from mfs.sources.folder import folder_path
from mfs.units import exact_size, parse_duration, parse_size

POD_INFO = "csi.storage.k8s.io/"
"""Keys of a volume's context that the kubelet adds."""
TOKENS = f"{POD_INFO}serviceAccount.tokens"
"""Tokens of the pod's service account, by audience: a secret, wherever the kubelet puts it."""
STS_AUDIENCE = "sts.amazonaws.com"
_FOLDER_SCHEMES = ("file", "mfs+file")
_TEXT_BYTES_MAX = 4096
_ID_BYTES_MAX = 128  # as the specification has it
_PATH_BYTES_MAX = 4096


@dataclass(frozen=True)
class Limits:
    """What the node allows its volumes."""

    cache_bytes: int = 100 << 30
    """Budget of each SSD cache directory, and the most a volume may ask for."""
    ram_bytes: int = 1 << 30
    """RAM tier of a daemon, and the most a volume may ask for."""
    folders: tuple[Path, ...] = ()
    """Directories of the node below which a volume may be. None: folders are no sources here."""
    via: str | None = None
    dragonfly: str | None = None
    """A cache that the nodes share, for volumes that name none."""


@dataclass(frozen=True)
class Volume:
    """One volume, as asked for."""

    source: SourceConfig
    settings: dict[str, Any]
    """Fields of MountConfig."""
    secrets: dict[str, str] = field(repr=False)
    namespace: str
    """Of the pod, '' if the kubelet does not say."""
    role: str = ""
    """AWS role that the pod's service account takes on."""
    account: str = ""
    """The service account, where its token counts."""
    token: str = field(default="", repr=False)
    """Of the service account."""
    public_key: str = ""
    """PEM: what the source shows must be signed with it. '' for whatever is there."""
    has_own_cache: bool = False
    """Whether its author names a cache that nodes share."""

    @property
    def is_isolated(self) -> bool:
        """Whether nothing of the node's own credentials may reach its source.

        So with secrets of its own, and with an address of its author's, to which ours would be sent: an endpoint, or
        a cache, which is asked by signed addresses.
        """
        return bool(self.secrets or self.role or self.source.endpoint_url or self.has_own_cache)

    def key(self, salt: bytes) -> str:
        """What volumes have in common that share a daemon, 32 hexadecimal digits; tells nothing without the salt.

        A token is not part of it, it changes by the hour; the account it is for is.
        """
        told = [chosen(self.source), self.settings, sorted(self.secrets.items()), self.role, self.account]
        told += [self.public_key] if self.public_key else []
        if self.secrets or self.role:
            told.append(self.namespace)
        return _digest(salt, told)

    def keys(self, salt: bytes) -> Iterator[str]:
        """`key`, and others for as long as what has the last one was moved on to other secrets."""
        key = self.key(salt)
        while True:
            yield key
            key = _digest(salt, ["not", key])

    def secrets_digest(self, salt: bytes) -> str:
        """Equal for equal secrets, '' for none; tells nothing without the salt."""
        return _digest(salt, ["secrets", sorted(self.secrets.items())]) if self.secrets else ""

    def domain(self, salt: bytes) -> str:
        """Whose cache it may share, as the name of a directory: who has the same right to look at what is in it.

        With the origin away a mount shows what its cache has, so nobody's cache is shared by others than those who
        could have mounted with the same secret: a namespace, as everywhere in Kubernetes.
        """
        if not (self.secrets or self.role):
            return "public"
        return _digest(salt, ["namespace", self.namespace] if self.namespace else ["alone", self.key(salt)])

    def config(self, mountpoint: Path, cache_dir: Path | None, log_file: Path, key_file: Path) -> MountConfig:
        """For its daemon; free of secrets. key_file: where its public key stands, if it has one. Raises: UsageError."""
        source = replace(self.source, require_signature=key_file) if self.public_key else self.source
        try:
            return MountConfig(
                mountpoint, (source,), cache_dir=cache_dir, log_file=log_file, allow_other=True, **self.settings
            )
        except ConfigError as error:
            raise UsageError(f"volume attributes: {error}") from error


def _digest(salt: bytes, value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=os.fspath)
    return hmac.new(salt, text.encode(), hashlib.sha256).hexdigest()[:32]


def parse(context: Mapping[str, str], secrets: Mapping[str, str], limits: Limits) -> Volume:
    """What a volume's context and its secrets ask for. Raises: UsageError naming the attribute, never a secret."""
    given = {name: text for name, text in context.items() if not name.startswith(POD_INFO)}
    unknown = sorted(set(given) - set(_ATTRIBUTES))
    if unknown:
        known = ", ".join(_ATTRIBUTES)
        raise UsageError(f"volume attribute {unknown[0]!r:.80} is not known: expected some of {known}")
    fields: dict[str, Any] = {}
    for name, text in given.items():
        if len(text.encode()) > _TEXT_BYTES_MAX or not text.isprintable():
            raise UsageError(f"volume attribute {name} is too long or holds control characters")
        setting, read = _ATTRIBUTES[name]
        try:
            fields[setting] = read(text)
        except ValueError as error:
            raise UsageError(f"volume attribute {name}: {error}") from None
    role, public_key = fields.pop("role", ""), fields.pop("public_key", "")
    namespace = context.get(f"{POD_INFO}pod.namespace", "")
    own = {name: fields.pop(name) for name in _OF_SOURCE if name in fields}
    has_own_cache = bool(own.get("via") or own.get("dragonfly"))
    if not has_own_cache:
        own |= {"via": limits.via, "dragonfly": limits.dragonfly}
    if public_key:
        own["require_signature"] = Path(os.devnull)  # until it stands somewhere
    own["beneath"] = _check_url(own.get("url", ""), limits)
    fields["cache_bytes"] = _within("cacheSize", fields.get("cache_bytes"), limits.cache_bytes)
    fields["ram_bytes"] = _within("ramSize", fields.get("ram_bytes"), limits.ram_bytes)
    try:
        source = SourceConfig(**own)
    except ConfigError as error:
        raise UsageError(f"volume attributes: {error}") from error
    account = token = ""
    if role:
        account = context.get(f"{POD_INFO}serviceAccount.name", "")
        token = _token(secrets.get(TOKENS) or context.get(TOKENS, ""))
    mine = {name: value for name, value in secrets.items() if name != TOKENS}
    return Volume(source, fields, mine, namespace, role, account, token, public_key, has_own_cache)


def _check_url(url: str, limits: Limits) -> Path | None:
    """Of a folder, the directory that it may not lead out of: now, and with what its owner changes later.

    Raises: UsageError.
    """
    beneath = None
    if not url:
        raise UsageError(
            "volume attribute source is missing: expected a URL such as s3://bucket/prefix or hf://org/name"
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"volume attribute source: {error}") from None
    if parts.scheme == "" or parts.scheme in _FOLDER_SCHEMES:
        folder = Path(os.path.realpath(folder_path(url.removeprefix("mfs+"))))
        roots = (Path(os.path.realpath(root)) for root in limits.folders)
        beneath = next((root for root in roots if folder.is_relative_to(root)), None)
        if beneath is None:
            raise UsageError(
                f"volume attribute source is {mask_url(url)}: folders of this node are no sources, "
                f"other than those that 'mfs csi --folders' names"
            )
    if "@" in parts.netloc and parts.scheme in ("http", "https", "mfs+http", "mfs+https"):
        raise UsageError("volume attribute source holds a user or a password: put them into the volume's Secret")
    return beneath


def _token(text: str) -> str:
    """The token for STS. Raises: UsageError."""
    try:
        token = json.loads(text)[STS_AUDIENCE]["token"]
    except (ValueError, KeyError, TypeError):
        token = None
    if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
        raise UsageError(
            f"volume attribute roleArn needs a token of the service account: the CSIDriver object must ask for one "
            f"(tokenRequests with audience {STS_AUDIENCE})"
        )
    return token


def _within(name: str, wanted: int | None, most: int) -> int:
    if wanted is not None and wanted > most:
        raise UsageError(f"volume attribute {name} is {exact_size(wanted)}: this node allows {exact_size(most)}")
    return most if wanted is None else wanted


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r:.40}")
    return text == "true"


def _umask(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError:
        raise ValueError(f"expected an octal number, got {text!r:.40}") from None


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"expected a whole number, got {text!r:.40}")
    return int(text)


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _public_key(text: str) -> str:
    """PEM, of what stands between its lines 'BEGIN' and 'END', with these or without."""
    body = "".join(_PEM_LINES.sub("", text).split())
    pem = "\n".join(("-----BEGIN PUBLIC KEY-----", *textwrap.wrap(body, 64), "-----END PUBLIC KEY-----", ""))
    try:
        parse_public_key(pem.encode(), "the key")
    except ConfigError as error:
        raise ValueError(f"{error}; give a public key as PEM has it, without its line breaks") from None
    return pem


_PEM_LINES = re.compile("-----(BEGIN|END) PUBLIC KEY-----")
_OF_SOURCE = ("url", "endpoint_url", "region", "unsigned", "requester_pays", "layout", "via", "dragonfly")
_ATTRIBUTES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "source": ("url", str),
    "endpointUrl": ("endpoint_url", str),
    "region": ("region", str),
    "unsigned": ("unsigned", _flag),
    "requesterPays": ("requester_pays", _flag),
    "layout": ("layout", str),
    "via": ("via", str),
    "dragonfly": ("dragonfly", str),
    "requireSignature": ("public_key", _public_key),
    "roleArn": ("role", str),
    "cacheSize": ("cache_bytes", parse_size),
    "ramSize": ("ram_bytes", parse_size),
    "timeout": ("timeout_s", parse_duration),
    "refresh": ("refresh_s", parse_duration),
    "connections": ("connections_count", _whole),
    "materialize": ("materialize", _patterns),
    "uid": ("uid", _whole),
    "gid": ("gid", _whole),
    "umask": ("umask", _umask),
}
"""Attribute -> field of SourceConfig or MountConfig, and how it is read."""


def check_target(volume_id: str, target: str) -> None:
    """Raises: UsageError unless these can name a volume and the place where it is to be seen."""
    if not volume_id:
        raise UsageError("volume_id is missing")
    if len(volume_id.encode()) > _ID_BYTES_MAX:
        raise UsageError(f"volume_id is longer than {_ID_BYTES_MAX} bytes")
    if not target:
        raise UsageError("target_path is missing")
    if not target.startswith("/") or len(os.fsencode(target)) > _PATH_BYTES_MAX or "\0" in target:
        raise UsageError(f"target_path is {target!r:.80}: expected an absolute path")
    if os.path.normpath(target) != target or target == "/":
        raise UsageError(f"target_path is {target!r:.200}: expected a path without '.', '..' and double slashes")
