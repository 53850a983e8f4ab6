"""Where things stand in a registry, and what they may be called. Pure.

    mfs-registry.json                        the marker: this prefix is the root of a registry
    chunks/<aa>/<chunk id>                   content, see `chunk`; <aa> are the id's first two digits
    manifests/<model>/<manifest id>          see `manifest`
    signatures/<model>/<manifest id>/<name>  what vouches for a manifest
    tags/<model>/<tag>/<number>              one move of a tag, see `tags`; the highest number holds
    work/<kind>-<token>                      who is pushing or collecting, see `work`

Models and tags are called as OCI calls tags, so that every name is one component of a path, a key and a URL alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mfs.errors import UsageError
from mfs.shown import mask_url

MARKER_KEY = "mfs-registry.json"
MARKER_BODY = b'{"format": "mfs-registry", "version": 1}\n'

SCHEMES = ("mfs+s3", "mfs+file", "mfs+http", "mfs+https")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """What an mfs+…:// URL names, as far as the text alone can say."""

    scheme: str
    """What the registry stands on: 's3', 'file', 'http', 'https'."""
    place: str
    """The URL without 'mfs+' and without what follows the last component's ':' or '@'. Where `tag` and `manifest` are
    None it is a registry's root or a model of it: the marker tells (`registry.opening`)."""
    tag: str | None = None
    manifest: str | None = None
    """64 hex digits."""


def parse_address(url: str) -> Address:
    """Take 'mfs+s3://bucket/registry/llama:v3', '…/llama@sha256:…' or '…/registry' apart. Raises: UsageError."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise UsageError(f"{mask_url(url)!r}: not a registry; expected one of {', '.join(f'{s}://' for s in SCHEMES)}")
    above, slash, last = rest.rstrip("/").rpartition("/")
    tag = manifest = None
    if "@" in last and slash:
        last, _, digest = last.partition("@")
        manifest = digest.removeprefix("sha256:")
        if not digest.startswith("sha256:") or not _ID.fullmatch(manifest):
            raise UsageError(f"{mask_url(url)!r}: expected …/model@sha256: and 64 hexadecimal digits")
    elif ":" in last and slash:
        last, _, tag = last.partition(":")
        if not _NAME.fullmatch(tag):
            raise UsageError(f"{mask_url(url)!r}: {tag!r} is no tag; expected letters, digits, '.', '_' and '-'")
    if (tag or manifest) and not _NAME.fullmatch(last):
        raise UsageError(f"{mask_url(url)!r}: {last!r} is no model's name; expected letters, digits, '.', '_' and '-'")
    kind = scheme.removeprefix("mfs+")
    return Address(kind, f"{kind}://{above}{slash}{last}", tag, manifest)


def names_revision(url: str) -> bool:
    """Whether a source's URL names one revision of a registry's model, by tag or manifest; it is shown as a whole."""
    if url.partition("://")[0] not in SCHEMES:
        return False
    address = parse_address(url)
    return address.tag is not None or address.manifest is not None


def is_name(text: str) -> bool:
    """Whether a model or a tag may be called so."""
    return _NAME.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether this is the id of a chunk or a manifest: 64 hexadecimal digits in lower case."""
    return _ID.fullmatch(text) is not None


def is_key(key: str) -> bool:
    """Whether an object of a registry may stand here: the one rule for keys given and listed, on every store.

    Names that begin with '.' are none: what others leave in a folder (.nfs…, .DS_Store, .snapshot) is not ours.
    """
    return all(_NAME.fullmatch(part) for part in key.split("/"))


def chunk_key(chunk_id: str) -> str:
    return f"chunks/{chunk_id[:2]}/{chunk_id}"


def manifest_key(model: str, manifest_id: str) -> str:
    return f"manifests/{model}/{manifest_id}"


def signature_key(model: str, manifest_id: str, name: str) -> str:
    return f"signatures/{model}/{manifest_id}/{name}"


def tag_prefix(model: str, tag: str) -> str:
    return f"tags/{model}/{tag}/"


def tag_key(model: str, tag: str, number: int) -> str:
    return f"{tag_prefix(model, tag)}{number:010d}"
