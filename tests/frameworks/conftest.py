"""One registry of models for all tests here: made once, on a real S3 server and behind nginx, mounted anew by each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mfs.testing.mounting import TestMount
from tests.frameworks.programs import ENVIRONMENT
from tests.mount import origins
from tests.mount.conftest import folder, mounted
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer
from tests.servers.warm import WarmPython

__all__ = ["folder", "mounted"]

_MAKING_S = 120.0
_FRAMEWORKS = ("torch", "transformers", "sentence_transformers", "diffusers", "accelerate")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SNAPSHOT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
"""A commit, as the Hub's cache names its snapshots."""
HUB_CACHE = "hub/models--sentence-transformers--all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """For programs that find what they read by a folder, not in their environment."""
    python = WarmPython(_FRAMEWORKS, log=tmp_path_factory.mktemp("warm") / "log", env=OFFLINE | ENVIRONMENT)
    yield python
    python.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path, warm: WarmPython) -> Path:
    """The checkpoints of `tests.frameworks.models` on local disk: what the mount is compared with."""
    folder = tmp_path_factory.mktemp("models")
    code = "import runpy; runpy.run_module('tests.frameworks.models', run_name='__main__')"
    made = warm.run(code, folder, minilm_dir, env=os.environ | OFFLINE, timeout_s=_MAKING_S)
    assert made.returncode == 0, made.stderr[-4000:]
    return folder


class Registry:
    """Where the models stand, by kind of server; what can be mounted."""

    def __init__(self, models: Path, swift: SwiftServer, bucket: str, nginx: NginxServer) -> None:
        self.models = models
        self._swift, self._bucket, self._nginx = swift, bucket, nginx
        self._uploaded: set[str] = set()

    def s3(self, model: str) -> origins.S3Origin:
        """The model in the bucket."""
        origin = origins.S3Origin(self._swift, self._bucket, model)
        if model not in self._uploaded:
            self._uploaded.add(model)
            for file in files_below(self.models / model):
                origin.client.upload_file(str(file), self._bucket, str(file.relative_to(self.models)))
        return origin

    def web(self, model: str) -> origins.WebOrigin:
        """The model in a folder of the web server."""
        origin = origins.WebOrigin(self._nginx)
        for file in files_below(self.models / model):
            target = origin.root / file.relative_to(self.models / model)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
            target.chmod(0o644)
        return origin

    def s3_hub_cache(self) -> origins.S3Origin:
        """The model as a Hub cache was uploaded: no links there, so the files stand under `snapshots` themselves."""
        minilm, origin = self.s3("minilm"), origins.S3Origin(self._swift, self._bucket, "hf-home")
        if origin.prefix not in self._uploaded:
            self._uploaded.add(origin.prefix)
            client, key = minilm.client, f"{origin.prefix}/{HUB_CACHE}"
            client.put_object(Bucket=self._bucket, Key=f"{key}/refs/main", Body=SNAPSHOT.encode())
            for file in files_below(self.models / "minilm"):
                name = file.relative_to(self.models / "minilm")
                source = {"Bucket": self._bucket, "Key": f"minilm/{name}"}
                # Not copy_object: of a file uploaded in parts Swift 2.38 makes a copy whose listed etag no GET gives.
                client.copy(source, self._bucket, f"{key}/snapshots/{SNAPSHOT}/{name}")
        return origin


def files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="session")
def registry(models: Path, swift: SwiftServer, nginx: NginxServer) -> Iterator[Registry]:
    bucket = "frameworks"
    swift.client().create_bucket(Bucket=bucket)
    yield Registry(models, swift, bucket, nginx)
    swift.ensure_started()
    swift.remove_bucket(bucket)


@contextmanager
def watching(mount: TestMount) -> Iterator[list[dict[str, Any]]]:
    """What readers do meanwhile, as `mfs watch` tells it; complete when the block is left."""
    records: list[dict[str, Any]] = []
    begun, enough = threading.Event(), threading.Event()
    caught_up = threading.Event()

    def listen() -> None:
        items = mount.client.watch()
        for item in items:
            begun.set()
            records.extend(item["records"])
            if enough.is_set():
                if caught_up.is_set() and not item["records"]:
                    break
                caught_up.set()  # this item may have been made before `enough` was; the next was not
        items.close()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert begun.wait(20), "the daemon does not tell what it does"
    try:
        yield records
    finally:
        enough.set()
        listener.join(20)
    assert not listener.is_alive()


Watching = Callable[[TestMount], Any]
