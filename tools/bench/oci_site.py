"""An artifact served by nginx as an OCI registry would: files at the places that the distribution API names.

So that `oci://` and `http://` are compared on one server, on the same bytes. What is served was pushed to a real
registry before; that one, written in Go, is slower or faster than nginx, which says nothing of us.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

from tests.servers.docker_registry import DockerRegistry
from tools.bench.processes import run

REPOSITORY, TAG = "team/model", "v1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def push(directory: Path, registry: DockerRegistry) -> None:
    """`mfs push` of a directory to a running registry."""
    run([sys.executable, "-P", "-m", "mfs", "push", directory, address(registry.port)], timeout_s=300)


def address(port: int) -> str:
    """Of the artifact, on a registry of this machine."""
    return f"oci://127.0.0.1:{port}/{REPOSITORY}:{TAG}"


def lay_out(registry: DockerRegistry, files: Path) -> list[str]:
    """Put the artifact below `files`, on the same file system as the registry's data.

    Returns: its blobs' digests, the largest last.
    """
    request = urllib.request.Request(f"{registry.url}/v2/{REPOSITORY}/manifests/{TAG}", headers={"Accept": _MANIFEST})
    with urllib.request.urlopen(request, timeout=30) as answer:
        body = answer.read()
    manifest = json.loads(body)
    place = files / "v2" / REPOSITORY
    (place / "manifests").mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "manifests" / TAG).write_bytes(body)
    blobs = sorted([manifest["config"], *manifest["layers"]], key=lambda blob: blob["size"])
    for digest in {blob["digest"] for blob in blobs}:
        os.link(registry.blob_file(digest), place / "blobs" / digest)
    return [blob["digest"] for blob in blobs]
