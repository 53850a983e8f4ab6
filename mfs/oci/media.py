"""Media types of manifests, configs and layers, and what a layer's type says of how its bytes stand. Pure.

Source: image-spec 1.1 media-types.md; modelpack/model-spec 0.0.7 specs-go/v1/mediatype.go; docker/model-runner
pkg/distribution/types/config.go.
"""

from __future__ import annotations

import re
from enum import StrEnum

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

ACCEPTED = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST))
"""What is asked for; a registry that is not told answers with formats of 2015."""
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
IMAGE_CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})

MODEL_MANIFEST = "application/vnd.cncf.model.manifest.v1+json"
MODEL_MANIFESTS = frozenset({MODEL_MANIFEST, "application/vnd.cnai.model.manifest.v1+json"})
"""With the older name of it."""
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
_MODEL_LAYER = "application/vnd.cncf.model.{}.v1.raw"

FILEPATH = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
"""Annotations that name a layer's file, the first that is there: ModelPack's, its older ones, ORAS's."""
METADATA = ("org.cncf.model.file.metadata+json", "org.cnai.model.file.metadata+json")
UNTESTED = "org.cncf.model.file.mediatype.untested"
TITLE = FILEPATH[-1]
UNPACK = "io.deis.oras.content.unpack"
"""ORAS's, on a folder that it has packed. Its files it calls tars, though they are none."""

DOCKER_AI = "application/vnd.docker.ai."
DOCKER_NAMES = {
    "gguf.v3": "model.gguf",
    "gguf.v3.lora": "adapter.gguf",
    "gguf.v3.mmproj": "model.mmproj",
    "safetensors": "model.safetensors",
    "mmproj": "model.mmproj",
    "dduf": "model.dduf",
    "license": "LICENSE",
    "chat.template.jinja": "template.jinja",
}
"""What Docker calls the file of a layer that has no name, by the rest of its media type. Several of one kind are
numbered as shards are."""


class Packing(StrEnum):
    """How a layer's bytes stand."""

    RAW = "raw"
    """They are the file's."""
    TAR = "tar"
    GZIP = "gzip"
    """Of a tar."""
    ZSTD = "zstd"
    """Of a tar."""


_PACKED = re.compile(
    r"(?:\.tar[+.][^/]+|\+(?:encrypted|gzip|gz|zstd|zst|xz|lzma|bzip2|bz2|lz4|br|brotli)(?:[+.][^/]*)?)\Z", re.ASCII
)


def packing_by_type(media_type: str) -> Packing | None:
    """By the end of its media type. What is unknown is raw: whoever makes up a type for a format means the file; but
    None for what says that it is packed, in a way that is not known.
    """
    kind = media_type.partition(";")[0].strip().lower()
    if kind.endswith((".tar+gzip", ".tar.gzip", ".tar+gz", ".tar.gz")):
        return Packing.GZIP
    if kind.endswith((".tar+zstd", ".tar.zstd")):
        return Packing.ZSTD
    if kind.endswith(".tar"):
        return Packing.TAR
    return None if _PACKED.search(kind) else Packing.RAW


_WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".h5", ".hdf5", ".keras",
    ".tflite", ".pb", ".msgpack", ".npz", ".npy", ".mlmodel", ".engine", ".plan", ".pdparams", ".ot", ".llamafile",
)  # fmt: skip
_CONFIGS = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".config", ".model", ".vocab", ".jinja", ".txt",
            ".tiktoken", ".modelcard", ".spm", ".merges", ".pbtxt", ".xml", ".index")  # fmt: skip
_DOCS = (".md", ".rst", ".pdf", ".html", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".adoc")
_CODE = (".py", ".sh", ".ipynb", ".js", ".ts", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java")
_LARGE_BYTES = 10 << 20


def layer_type(path: str, nbytes: int) -> tuple[str, bool]:
    """The media type that ModelPack has for a file, and whether that is more than a guess by its size."""
    name = path.rpartition("/")[2].lower()
    if name.startswith(("readme", "license", "licence", "notice", "copying", "use_policy")) or name.endswith(_DOCS):
        return _MODEL_LAYER.format("doc"), True
    for kind, suffixes in (("weight", _WEIGHTS), ("code", _CODE), ("weight.config", _CONFIGS)):
        if name.endswith(suffixes):
            return _MODEL_LAYER.format(kind), True
    return _MODEL_LAYER.format("weight" if nbytes > _LARGE_BYTES else "weight.config"), False
