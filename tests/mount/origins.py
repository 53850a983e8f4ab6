"""The origins that mounts are tested on, behind one door: written around the mount, read through it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mfs.registry.folder_store import FolderStore
from mfs.testing.mounting import TestMount
from tests.oci import artifacts
from tests.registry import made
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.rclone import RcloneServer
from tests.servers.s3_client import S3Account


class Origin(Protocol):
    """A place that can be mounted."""

    url: str
    source: dict[str, Any]
    """Further fields of SourceConfig."""
    env: dict[str, str]
    """What the daemon must find in its environment."""
    has_empty_folders: bool
    has_links: bool
    has_digests: bool

    def put_all(self, files: Mapping[str, bytes]) -> None:
        """Make exactly these files of the tree, each changed one in a new version."""
        ...


def mount(origin: Origin, folder: Path, **settings: Any) -> TestMount:
    """A mount of the origin, not yet started."""
    return TestMount(folder, origin.url, source=origin.source, env=origin.env, **settings)


class FolderOrigin:
    has_empty_folders = has_links = True
    has_digests = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.source: dict[str, Any] = {}
        self.env: dict[str, str] = {}
        root.mkdir(parents=True)

    def put(self, path: str, content: bytes) -> None:
        """Replaced by rename, as careful publishers do."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root.with_name(f"{uuid.uuid4().hex}.put")
        temporary.write_bytes(content)
        temporary.rename(target)

    def put_all(self, files: Mapping[str, bytes]) -> None:
        _sync_folder(self.root, files)

    def remove_empty_folders(self) -> None:
        _remove_empty_folders(self.root)


def _remove_empty_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder) != root and not os.listdir(folder):
            os.rmdir(folder)


def _sync_folder(root: Path, files: Mapping[str, bytes]) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if str(path.relative_to(root)) not in files:
                path.unlink()
    for name, content in files.items():
        target = root / name
        if target.exists() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = root.with_name(f"{uuid.uuid4().hex}.put")
        temporary.write_bytes(content)
        if target.exists():  # nginx's ETag is made of whole seconds and size: a change must show there
            later_s = target.stat().st_mtime + 2
            os.utime(temporary, (later_s, later_s))
        temporary.rename(target)


class S3Origin:
    has_empty_folders = has_links = has_digests = False

    def __init__(self, swift: S3Account, bucket: str, prefix: str = "models/prod") -> None:
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}"
        self.source: dict[str, Any] = {"endpoint_url": swift.endpoint}
        self.env = {name: value for name, value in swift.environ().items() if name != "AWS_ENDPOINT_URL"}
        self.client = swift.client()
        self._known: dict[str, bytes] = {}

    def put_all(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            if self._known.get(path) != content:
                self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=content)
        for path in set(self._known) - set(files):
            self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")
        self._known = dict(files)


class WebOrigin:
    """A folder of its own of `nginx`, or of another server of a folder."""

    has_empty_folders = True
    has_links = has_digests = False

    def __init__(self, nginx: NginxServer | RcloneServer) -> None:
        name = uuid.uuid4().hex[:12]
        self.root = nginx.files / name
        self.root.mkdir()
        self.url = f"{nginx.url}{name}/"
        self.source: dict[str, Any] = {}
        self.env: dict[str, str] = {}

    def put_all(self, files: Mapping[str, bytes]) -> None:
        _sync_folder(self.root, files)

    def remove_empty_folders(self) -> None:
        _remove_empty_folders(self.root)


class HubOrigin:
    """A repository of `hub` of its own."""

    has_empty_folders = has_links = False
    has_digests = True

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.repo = f"org/{uuid.uuid4().hex[:12]}"
        self.url = f"hf://{self.repo}"
        self.source: dict[str, Any] = {}
        self.env = hub.environ(hub.token)

    def put_all(self, files: Mapping[str, bytes]) -> None:
        self.hub.commit(self.repo, dict(files))


class RegistryOrigin:
    """A tag of a model of a registry in a folder."""

    has_empty_folders = has_links = False
    has_digests = True

    def __init__(self, root: Path, model: str = "llama", tag: str = "prod") -> None:
        self.registry = made.Registry(FolderStore(str(root)))
        self.model, self.tag = model, tag
        self.url = f"mfs+file://{root}/{model}:{tag}"
        self.source: dict[str, Any] = {}
        self.env: dict[str, str] = {}

    def put_all(self, files: Mapping[str, bytes]) -> None:
        self.registry.push(self.model, self.tag, files)


class OciOrigin:
    """A repository of `registry` of its own, mounted by a tag that is moved."""

    has_empty_folders = has_links = False
    has_digests = True

    def __init__(self, registry: DockerRegistry) -> None:
        self.pushed = artifacts.RegistryOrigin(registry)
        self.url = self.pushed.url
        self.source: dict[str, Any] = {}
        self.env: dict[str, str] = {}

    def put_all(self, files: Mapping[str, bytes]) -> None:
        self.pushed.put_all(files)
