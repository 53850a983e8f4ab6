"""Artifacts made by hand, as modctl, Docker's model runner and builders of modelcars do, with `requests` alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import requests
import zstandard

from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from tests.servers.docker_registry import PASSWORD, USER, DockerRegistry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
MODEL = "application/vnd.cncf.model"
ARTIFACT = f"{MODEL}.manifest.v1+json"
CONFIG = f"{MODEL}.config.v1+json"
RAW = f"{MODEL}.weight.v1.raw"
MTIME = "2026-05-04T03:02:01Z"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tar_of(files: Mapping[str, bytes] | Iterable[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]], *,
           kind: int = tarfile.PAX_FORMAT) -> bytes:  # fmt: skip
    """A tar of files by path, or of members as they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        if isinstance(files, Mapping):
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size, info.mtime = len(content), 1_700_000_000
                archive.addfile(info, io.BytesIO(content))
        else:
            for item in files:
                info, content = item if isinstance(item, tuple) else (item, b"")
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def packed(content: bytes, how: str) -> bytes:
    return gzip.compress(content, 1, mtime=0) if how == "gzip" else zstandard.compress(content)


class Repository:
    """One repository of a registry, written around whatever is under test."""

    def __init__(self, registry: DockerRegistry, name: str = "", *, secret: str = "") -> None:
        """name: of the repository, its own where none is said. secret: USER's password where the registry wants one."""
        self.registry = registry
        self.name = name or f"team/m-{uuid.uuid4().hex[:10]}"
        self.api = f"{registry.url}/v2/{self.name}"
        self._secret = secret
        self._http = requests.Session()
        self._http.trust_env = False
        self._token = ""

    @property
    def url(self) -> str:
        return f"oci://{self.registry.host}/{self.name}"

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, url: str, **kw: Any) -> requests.Response:
        """One request that must succeed, with USER's credentials if there is a password."""
        headers = kw.pop("headers", {})
        if self._token:
            headers = {**headers, "Authorization": f"Bearer {self._token}"}
        auth = (USER, self._secret) if self._secret and not self._token else None
        reply = self._http.request(method, url, headers=headers, auth=auth, timeout=30, **kw)
        challenge = reply.headers.get("WWW-Authenticate", "")
        if reply.status_code == 401 and challenge.startswith("Bearer ") and self._secret:
            fields = dict(part.split("=", 1) for part in challenge[7:].replace('"', "").split(",") if "=" in part)
            found = self._http.get(fields["realm"], auth=(USER, self._secret), timeout=30, params={
                "service": fields["service"], "scope": f"repository:{self.name}:pull,push"})  # fmt: skip
            self._token = found.json()["token"]
            return self.request(method, url, headers=headers, **kw)
        reply.raise_for_status()
        return reply

    def blob(self, content: bytes) -> dict[str, Any]:
        """Upload a blob; its descriptor without a media type."""
        digest = digest_of(content)
        begun = self.request("POST", f"{self.api}/blobs/uploads/")
        place = begun.headers["Location"]
        mark = "&" if "?" in place else "?"
        self.request("PUT", f"{place}{mark}digest={digest}", data=content,
                     headers={"Content-Type": "application/octet-stream"})  # fmt: skip
        return {"digest": digest, "size": len(content)}

    def layer(self, content: bytes, media_type: str = RAW, **annotations: str) -> dict[str, Any]:
        found = {"mediaType": media_type, **self.blob(content)}
        if annotations:
            found["annotations"] = annotations
        return found

    def file(self, path: str, content: bytes, media_type: str = RAW, *, legacy: bool = False) -> dict[str, Any]:
        """A raw layer as modctl makes it."""
        space = "org.cnai.model" if legacy else "org.cncf.model"
        metadata = {"name": path, "mode": 420, "uid": 0, "gid": 0, "size": len(content), "mtime": MTIME, "typeflag": 48}
        return self.layer(content, media_type, **{
            f"{space}.filepath": path, f"{space}.file.metadata+json": json.dumps(metadata)})  # fmt: skip

    def manifest(
        self,
        layers: list[dict[str, Any]],
        tag: str = "v1",
        *,
        config_type: str = CONFIG,
        artifact_type: str = ARTIFACT,
        config: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> str:
        """Put a manifest of these layers under a tag; its digest."""
        facts = config or {"descriptor": {}, "config": {}, "modelfs": {
            "type": "layers", "diffIds": [layer["digest"] for layer in layers]}}  # fmt: skip
        found = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": artifact_type,
                 "config": {"mediaType": config_type, **self.blob(json.dumps(facts).encode())},
                 "layers": layers, **more}  # fmt: skip
        if not artifact_type:
            del found["artifactType"]
        return self.put_manifest(json.dumps(found).encode(), tag)

    def put_manifest(self, body: bytes, tag: str, media_type: str = MANIFEST) -> str:
        digest = digest_of(body)
        self.request("PUT", f"{self.api}/manifests/{tag or digest}", data=body, headers={"Content-Type": media_type})
        return digest

    def image(self, layers: list[bytes], tag: str = "v1", media_type: str = "application/vnd.oci.image.layer.v1.tar",
              architecture: str = "amd64") -> str:  # fmt: skip
        """A modelcar: layers are tars."""
        config = {"architecture": architecture, "os": "linux", "rootfs": {
            "type": "layers", "diff_ids": [digest_of(layer) for layer in layers]}}  # fmt: skip
        found = [self.layer(layer, media_type) for layer in layers]
        return self.manifest(found, tag, config_type="application/vnd.oci.image.config.v1+json", artifact_type="",
                             config=config)  # fmt: skip


class RegistryOrigin:
    """A repository whose tag `v1` is moved with each change, as modctl's users do."""

    def __init__(self, registry: DockerRegistry, *, packing: str = "raw", secret: str = "") -> None:
        """packing: 'raw', one layer a file; 'tar', 'gzip', 'zstd': one layer of all."""
        self.repository = Repository(registry, secret=secret)
        self.packing = packing
        self.files: dict[str, bytes] = {}
        self._layers: dict[str, tuple[bytes, dict[str, Any]]] = {}

    @property
    def url(self) -> str:
        return f"{self.repository.url}:v1"

    def source(self, **options: Any) -> Source:
        return open_source(self.url, SourceOptions(**options))

    def put(self, path: str, content: bytes) -> None:
        self.put_all({**self.files, path: content})

    def delete(self, path: str) -> None:
        self.put_all({name: content for name, content in self.files.items() if name != path})

    def put_all(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        if self.packing == "raw":
            for path, content in files.items():
                if self._layers.get(path, (None,))[0] != content:
                    self._layers[path] = (content, self.repository.file(path, content))
            self.repository.manifest([self._layers[path][1] for path in files])
            return
        body = tar_of(files)
        if self.packing != "tar":
            body = packed(body, self.packing)
        suffix = "tar" if self.packing == "tar" else f"tar+{self.packing}"
        self.repository.manifest([self.repository.layer(body, f"{MODEL}.weight.v1.{suffix}")])

    def close(self) -> None:
        self.repository.close()


__all__ = ["PASSWORD", "USER", "RegistryOrigin", "Repository", "digest_of", "packed", "tar_of"]
