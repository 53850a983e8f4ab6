"""What names the layers of a push: a ModelPack's manifest and config, or an index of images with theirs. Pure.

Source: image-spec 1.1 manifest.md and image-index.md; modelpack/model-spec 0.0.7.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfs.errors import UsageError
from mfs.oci import image, media
from mfs.oci.artifact import Descriptor, digest_of
from mfs.oci.blob import Blob
from mfs.oci.reference import Reference
from mfs.oci.referrers import encoded
from mfs.types import ObjectId

REGISTRIES_TAKE_BYTES = 4 << 20
"""Of a manifest: what distribution-spec 1.1 asks of each, and the most that many take."""
_FORMATS = {".safetensors": "safetensors", ".gguf": "gguf", ".onnx": "onnx", ".bin": "pt", ".pt": "pt", ".pth": "pt"}


@dataclass(frozen=True)
class Layer:
    """One layer to be."""

    blob: Blob
    media_type: str
    annotations: Mapping[str, str]

    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.blob.digest, self.blob.nbytes, self.annotations)


@dataclass(frozen=True)
class Documents:
    """What names the layers of one push."""

    body: bytes
    """Of what the tag will name."""
    media_type: str
    configs: tuple[Blob, ...]
    inner: tuple[tuple[bytes, str], ...] = ()
    """Manifests that an index names, with their types."""


def make_documents(
    layers: Sequence[Layer],
    files: Sequence[ObjectId],
    reference: Reference,
    annotations: Mapping[str, str],
    *,
    is_image: bool,
) -> Documents:
    """The documents of layers, which hold `files`. How long they are depends on no digest.

    Raises: UsageError where one is longer than registries take.
    """
    described = [layer.descriptor().to_json() for layer in layers]
    digests = [layer.blob.digest for layer in layers]  # nothing is compressed, so these are the diffIds as well
    if is_image:
        configs, inner, entries = [], [], []
        for architecture in image.ARCHITECTURES:
            config = _blob(encoded(image.config(architecture, digests)), "the image's config")
            body = _manifest(config, media.OCI_CONFIG, described, annotations)
            configs.append(config)
            inner.append((body, media.OCI_MANIFEST))
            platform = ("linux", architecture)
            entries.append(Descriptor(media.OCI_MANIFEST, digest_of(body), len(body), {}, "", platform).to_json())
        index: dict[str, object] = {"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": entries}
        if annotations:
            index["annotations"] = dict(annotations)
        return Documents(_fitting(encoded(index)), media.OCI_INDEX, tuple(configs), tuple(inner))
    suffixes = [os.path.splitext(file.path)[1].lower() for file in files]
    form = next((form for suffix, form in _FORMATS.items() if suffix in suffixes), None)
    facts = {
        "descriptor": {"name": reference.repository.rpartition("/")[2]},
        "config": {"format": form} if form else {},
        "modelfs": {"type": "layers", "diffIds": digests},
    }
    config = _blob(encoded(facts), "the model's config")
    body = _manifest(config, media.MODEL_CONFIG, described, annotations, media.MODEL_MANIFEST)
    return Documents(body, media.OCI_MANIFEST, (config,))


def _blob(content: bytes, path: str) -> Blob:
    return Blob((content,), len(content), digest_of(content), path)


def _manifest(
    config: Blob, config_type: str, layers: list[dict[str, object]], annotations: Mapping[str, str], kind: str = ""
) -> bytes:
    found: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": media.OCI_MANIFEST,
        "config": Descriptor(config_type, config.digest, config.nbytes).to_json(),
        "layers": layers,
    }
    if kind:
        found["artifactType"] = kind
    if annotations:
        found["annotations"] = dict(annotations)
    return _fitting(encoded(found))


def _fitting(body: bytes) -> bytes:
    if len(body) > REGISTRIES_TAKE_BYTES:
        raise UsageError(
            f"the manifest of these files and annotations has {len(body)} bytes, and registries take "
            f"{REGISTRIES_TAKE_BYTES}: push as an image (--modelcar), which puts small files together, or to an "
            "mfs+…:// registry, which takes any number"
        )
    return body
