"""Manifests and indexes of a registry: which files an artifact is made of, and where their bytes stand. Pure.

Whoever reads one believes nothing. What is wrong with one layer of an artifact costs that layer; of an image, whose
layers build on each other, the image.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mfs.errors import IntegrityError, StoreError
from mfs.fetch.dates import epoch_ns
from mfs.oci import media
from mfs.oci.media import Packing
from mfs.oci.reference import is_digest
from mfs.sources import bounds
from mfs.types import Entry, EntryKind

MANIFEST_BYTES_MAX = 8 << 20
"""Registries take 4 MiB."""
BLOB_BYTES_MAX = 1 << 50
LAYERS_MAX = 50_000
"""Of one manifest, and manifests of an index: 8 MiB hold no more that state a digest."""
_PARTS_MAX = 4 * LAYERS_MAX + 1000
"""Objects and lists of one document; each takes memory before anything is known of it."""
_FAULTS_MAX = 3

_ATTESTATION = "vnd.docker.reference.type"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class BadLayerError(IntegrityError):
    """A layer whose own content is what is wrong: no tar, another digest, more than any may have. No other try and no
    other credentials mend it, so it may cost itself alone; any other error must not make a part pass for the whole.
    """


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob or a manifest. Source: image-spec 1.1 descriptor.md."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    platform: tuple[str, str] | None = None
    """(os, architecture), of an index's entries."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.platform:
            found["platform"] = {"os": self.platform[0], "architecture": self.platform[1]}
        return found


@dataclass(frozen=True)
class Manifest:
    """One artifact or image."""

    config_type: str
    artifact_type: str
    layers: tuple[Descriptor, ...]
    faults: tuple[str, ...] = ()
    """What is wrong with layers that are not among them, of the first few."""
    faults_count: int = 0
    """Of all such layers."""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_image(self) -> bool:
        """Whether its layers are those of a root file system: then its files are what lies under /models."""
        return self.config_type in media.IMAGE_CONFIGS and not self.artifact_type and not self._are_files

    @property
    def _are_files(self) -> bool:
        return any(name_of(layer) for layer in self.layers)


@dataclass(frozen=True)
class Index:
    """Several manifests under one name."""

    entries: tuple[Descriptor, ...]


class Place(NamedTuple):
    """Where a file's bytes stand."""

    packing: Packing
    layer: str
    """Digest of the blob."""
    layer_bytes: int
    """Of the blob."""
    offset: int
    """In the blob, or in what it holds once it is unpacked."""
    size: int
    """Of the file."""

    def locator(self) -> str:
        """For `ObjectId.locator`; `parse_locator` is the inverse."""
        return f"{self.packing} {self.layer} {self.layer_bytes} {self.offset} {self.size}"


def parse_locator(locator: str) -> Place:
    """Raises: StoreError for what `Place.locator` did not write."""
    try:
        packing, layer, layer_bytes, offset, size = locator.split(" ")
        place = Place(Packing(packing), layer, int(layer_bytes), int(offset), int(size))
    except ValueError:
        raise StoreError(f"expected where a file stands in a layer, got {locator[:200]!r}") from None
    if not is_digest(layer):
        raise StoreError(f"expected a layer's digest, got {layer[:100]!r}")
    return place


def entry_at(place: Place, mtime_ns: int = 0) -> Entry:
    """The entry of a file, yet without a name. A digest is stated where the layer is the file."""
    if place.packing is Packing.RAW:
        digest = place.layer if place.layer.startswith("sha256:") else None
        return Entry("", EntryKind.FILE, place.size, mtime_ns, place.layer, digest, place.locator())
    version = f"{place.layer}+{place.offset}"
    return Entry("", EntryKind.FILE, place.size, mtime_ns, version, None, place.locator())


def digest_of(body: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def check_digest(body: bytes, digest: str, where: str) -> None:
    """Raises: IntegrityError if these are not the bytes that the digest names."""
    if (got := digest_of(body, digest.partition(":")[0])) != digest:
        raise IntegrityError(f"{where}: expected bytes of the digest {digest}, got some of {got}")


def parse_document(body: bytes, where: str) -> Manifest | Index:
    """Read and check a manifest or an index. Raises: StoreError, one line, naming what is wrong.

    What is both is refused, since two readers may take it for two things (CVE-2021-41190).
    """
    try:
        parts_count = body.count(b"{") + body.count(b"[")
        if parts_count > _PARTS_MAX:
            raise ValueError(f"{parts_count} objects and lists, more than {_PARTS_MAX}")
        top = bounds.parse_json(body)
        if not isinstance(top, dict):
            raise ValueError("no object")
        if top.get("schemaVersion") != 2:
            raise ValueError(f"schemaVersion is {top.get('schemaVersion')!r:.40}, expected 2")
        if "manifests" in top and ("layers" in top or "config" in top):
            raise ValueError("it is both a manifest and an index")
        if top.get("mediaType") in media.INDEXES or "manifests" in top:
            return Index(tuple(_descriptors(_list(top, "manifests"), [])))
        config = top.get("config")
        faults: list[str] = []
        items = _list(top, "layers")
        layers = tuple(_descriptors(items, faults))
        return Manifest(
            _text(config.get("mediaType")) if isinstance(config, dict) else "",
            _text(top.get("artifactType")),
            layers,
            tuple(faults),
            len(items) - len(layers),
            _texts(top.get("annotations")),
        )
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: expected a manifest of an OCI registry, got {body[:60]!r}: {error}") from None


def _descriptors(items: list[Any], faults: list[str]) -> Iterator[Descriptor]:
    for number, item in enumerate(items):
        found = item if isinstance(item, dict) else {}
        digest, size = found.get("digest"), bounds.size_of(found.get("size"))
        if not is_digest(digest) or not 0 <= size <= BLOB_BYTES_MAX:
            if len(faults) < _FAULTS_MAX:
                faults.append(f"number {number} has the digest {digest!r:.90} and the size {found.get('size')!r:.40}")
            continue
        system = found.get("platform")
        of = (_text(system.get("os")), _text(system.get("architecture"))) if isinstance(system, dict) else None
        yield Descriptor(_text(found.get("mediaType")), str(digest), size, _texts(found.get("annotations")),
                         _text(found.get("artifactType")), of)  # fmt: skip


def _list(top: dict[str, Any], name: str) -> list[Any]:
    found = top.get(name)
    if not isinstance(found, list):
        raise ValueError(f"no list of {name}")
    if len(found) > LAYERS_MAX:
        raise ValueError(f"{len(found)} {name}, more than {LAYERS_MAX}")
    return found


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: object) -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else ()
    return {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}


def choose(index: Index, where: str) -> Descriptor:
    """The entry of an index to read: a model, else what fits this machine, since weights are the same for all.

    Raises: StoreError if there is none.
    """
    entries = [entry for entry in index.entries if _ATTESTATION not in entry.annotations]
    here = _ARCHITECTURES.get(platform.machine(), platform.machine())
    wishes = (
        lambda entry: entry.artifact_type in media.MODEL_MANIFESTS,
        lambda entry: entry.platform == ("linux", here),
        lambda entry: entry.platform is None,
        lambda entry: entry.platform == ("linux", "amd64"),
        lambda entry: True,
    )
    for is_wished in wishes:
        if found := next((entry for entry in entries if is_wished(entry)), None):
            return found
    raise StoreError(f"{where}: an index that names no manifest")


def packing_of(layer: Descriptor) -> Packing:
    """How a layer's bytes stand: by its media type, unless ORAS wrote it. Raises: BadLayerError for what is packed in a
    way that is not known: its bytes are not the file's.
    """
    is_orass = media.TITLE in layer.annotations and not any(key in layer.annotations for key in media.FILEPATH[:-1])
    if is_orass and layer.annotations.get(media.UNPACK) != "true":
        return Packing.RAW
    packing = media.packing_by_type(layer.media_type)
    if packing is None:
        raise BadLayerError(f"of type {layer.media_type!r:.80}: packed or encrypted in a way that is not known here")
    return packing


def name_of(layer: Descriptor) -> str:
    """The file's path that a layer states, '' if none."""
    stated = next((path for key in media.FILEPATH if (path := layer.annotations.get(key))), "")
    return stated.removeprefix("./")


def named_layers(layers: Iterable[Descriptor]) -> list[tuple[str, Descriptor]]:
    """Each raw layer with its file's path; those that state none are called as Docker calls them, or ''."""
    found = [(name_of(layer), layer) for layer in layers]
    unnamed: dict[str, list[int]] = {}
    for number, (name, layer) in enumerate(found):
        kind = layer.media_type.removeprefix(media.DOCKER_AI)
        if not name and kind != layer.media_type and (usual := media.DOCKER_NAMES.get(kind)):
            unnamed.setdefault(usual, []).append(number)
    for usual, numbers in unnamed.items():
        stem, dot, suffix = usual.partition(".")
        for place, number in enumerate(numbers, 1):
            shard = f"{stem}-{place:05d}-of-{len(numbers):05d}{dot}{suffix}"
            found[number] = (usual if len(numbers) == 1 else shard, found[number][1])
    return found


def mtime_ns_of(layer: Descriptor) -> int:
    """The modification time that a layer states of its file, 0 if none."""
    stated = next((text for key in media.METADATA if (text := layer.annotations.get(key))), "")
    try:
        found = json.loads(stated) if 0 < len(stated) <= 4096 else None
    except (ValueError, RecursionError):
        return 0
    return (epoch_ns(found.get("mtime")) or 0) if isinstance(found, dict) else 0
