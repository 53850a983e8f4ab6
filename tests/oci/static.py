"""A registry of plain files, for servers that lie about them on demand: what a GET asks for stands at its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.oci.artifacts import ARTIFACT, CONFIG, MANIFEST, RAW, digest_of


def publish(root: Path, repository: str, tags: Mapping[str, Mapping[str, bytes]]) -> dict[str, str]:
    """Lay out a repository below `root`: tag -> path -> content. The path of each file's blob, by 'tag/path'."""
    api = root / "v2" / repository
    for folder in ("manifests", "blobs", "tags"):
        (api / folder).mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for tag, files in tags.items():
        layers = []
        for path, content in files.items():
            digest = digest_of(content)
            (api / "blobs" / digest).write_bytes(content)
            places[f"{tag}/{path}"] = f"/v2/{repository}/blobs/{digest}"
            layers.append({"mediaType": RAW, "digest": digest, "size": len(content),
                           "annotations": {"org.cncf.model.filepath": path}})  # fmt: skip
        config = {"mediaType": CONFIG, "digest": digest_of(b"{}"), "size": 2}
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT, "config": config,
                    "layers": layers}  # fmt: skip
        (api / "manifests" / tag).write_text(json.dumps(manifest))
    (api / "tags/list").write_text(json.dumps({"name": repository, "tags": list(tags)}))
    return places
