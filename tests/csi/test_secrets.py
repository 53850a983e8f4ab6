"""Secrets of volumes: they open their sources, they rotate, and nobody else ever sees them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mfs.testing import ramp
from tests.csi.driver import Driver, publish_request, wait_for, workload
from tests.mount import touching
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error

FILES = {f"m/w{n}.bin": ramp(300_000, n) for n in range(4)}
CANARY = "canaryBird7"
_READ_BYTES_MAX = 64 << 20


class Bucket:
    """An S3 server that lets one key in, and notes who came."""

    def __init__(self) -> None:
        self.good = ""
        self.seen: list[str] = []
        self.server = ScriptedServer(self.answer)

    def answer(self, request: Request) -> Answer:
        self.seen.append(request.authorization)
        if f"Credential={self.good}/" not in request.authorization:
            return s3_error(403, "AccessDenied")
        return s3_bucket(request, FILES)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    with bucket.server:
        yield bucket


@pytest.fixture
def driver(place: Path) -> Iterator[Driver]:
    """A driver that has credentials of its own."""
    env = {"AWS_ACCESS_KEY_ID": "AKNODE", "AWS_SECRET_ACCESS_KEY": "node", "HF_TOKEN": "hf_node"}
    with Driver(place, env=env) as driver:
        yield driver.start()


def secrets(number: int) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": f"AK{number}{CANARY}", "AWS_SECRET_ACCESS_KEY": f"s{number}{CANARY}",
        "AWS_SESSION_TOKEN": f"t{number}{CANARY}", "HF_TOKEN": f"hf_{CANARY}", "username": "me",
        "password": f'p "{CANARY}\\', ".dockerconfigjson": f'{{"auths": {{"r": {{"auth": "{CANARY}"}}}}}}',
    }  # fmt: skip


def sightings(driver: Driver) -> list[str]:
    """Where the canary is to be seen: arguments and environments of all processes, files of the node, logs."""
    found = []
    for process in Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            try:
                if process.name.isdigit() and CANARY.encode() in (process / name).read_bytes():
                    found.append(f"{process / name}")
            except OSError:
                continue
    for root, folders, files in os.walk(driver.place):
        folders[:] = [each for each in folders if not os.path.ismount(f"{root}/{each}")]
        for file in files:
            path = Path(root, file)
            if path.is_file() and CANARY.encode() in path.read_bytes()[:_READ_BYTES_MAX]:
                found.append(str(path))
    return found


def test_a_secret_opens_its_source_and_is_seen_nowhere_else(driver: Driver, bucket: Bucket) -> None:
    bucket.good = f"AK1{CANARY}"
    attributes = {"source": "s3://b", "endpointUrl": bucket.server.url, "region": "us-east-1"}
    target = driver.publish("a", attributes, secrets(1))
    with workload(target) as (pod, inside):
        assert pod.call(touching.read, f"{inside}/m/w0.bin") == FILES["m/w0.bin"]
        assert sightings(driver) == []
        folders = [driver.memory / "secrets", *(driver.memory / "secrets").iterdir()]
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
        files = [file for folder in folders[1:] for file in folder.iterdir()]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        bucket.good = f"AK2{CANARY}"  # refused from here on, and said in the log
        assert pod.call(touching.read_failure, f"{inside}/m/w1.bin") == "EACCES"
        code = driver.node.NodePublishVolume.future(
            publish_request("b", str(driver.pods / "b"), attributes, secrets(9)), timeout=60
        ).code()
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert sightings(driver) == []
    driver.unpublish("a")
    assert driver.left() == []
    assert driver.keys == []
    assert "/AKNODE/" not in "".join(bucket.seen)


def test_a_secret_that_was_rotated_is_used_from_the_next_publish_on(driver: Driver, bucket: Bucket) -> None:
    """As the kubelet repeats it: the same volume, the same daemon, nothing mounted anew."""
    attributes = {"source": "s3://b", "endpointUrl": bucket.server.url, "region": "us-east-1"}
    bucket.good = f"AK1{CANARY}"
    target = driver.publish("a", attributes, secrets(1))
    pids = driver.pids
    with workload(target) as (pod, inside):
        for number in (1, 2, 3):
            bucket.good = f"AK{number}{CANARY}"
            driver.publish("a", attributes, secrets(number))
            name = f"m/w{number}.bin"
            assert pod.call(touching.read, f"{inside}/{name}") == FILES[name]
    assert driver.pids == pids
    assert driver.pod_mounts == ["a"]
    assert sightings(driver) == []
    driver.restart()  # which has the secrets of memory only: they are still where the daemon looks
    driver.publish("a", attributes, secrets(3))
    driver.unpublish("a")
    assert driver.left() == []


def test_a_secret_that_was_rotated_out_opens_nothing_and_spoils_nothing(driver: Driver, bucket: Bucket) -> None:
    attributes = {"source": "s3://b", "endpointUrl": bucket.server.url, "region": "us-east-1"}
    bucket.good = f"AK1{CANARY}"
    for name in ("a", "b"):
        target = driver.publish(name, attributes, secrets(1))
    bucket.good = f"AK2{CANARY}"
    driver.publish("a", attributes, secrets(2))
    driver.publish("b", attributes, secrets(1))  # whose Secret is as it was
    late = publish_request("c", str(driver.pods / "c"), attributes, secrets(1))
    assert driver.node.NodePublishVolume.future(late, timeout=60).code() is grpc.StatusCode.PERMISSION_DENIED
    with workload(target) as (pod, inside):
        assert pod.call(touching.read, f"{inside}/m/w1.bin") == FILES["m/w1.bin"]
    assert len(driver.pids) == 1
    driver.publish("c", attributes, secrets(2))
    for name in ("a", "b", "c"):
        driver.unpublish(name)
    assert driver.left() == []


def test_who_shares_a_daemon_has_the_same_secret_in_the_same_namespace(driver: Driver, bucket: Bucket) -> None:
    attributes = {"source": "s3://b", "endpointUrl": bucket.server.url, "region": "us-east-1"}
    bucket.good = f"AK1{CANARY}"
    for name in ("a", "b"):
        driver.publish(name, attributes, secrets(1))
    assert len(driver.pids) == 1
    other = {**attributes, "csi.storage.k8s.io/pod.namespace": "others"}
    driver.publish("c", other, secrets(1))
    assert len(driver.pids) == 2
    caches = list((driver.place / "cache").iterdir())
    assert len(caches) == 2
    driver.unpublish("c")
    for cache in caches:
        os.utime(cache, (0, 0))
    assert wait_for(lambda: len(list((driver.place / "cache").iterdir())) == 1)  # nobody used it for long
    [kept] = (driver.place / "cache").iterdir()
    assert wait_for(lambda: kept.stat().st_mtime > 0)  # by whom it is used is known
    for name in ("a", "b"):
        driver.unpublish(name)
    assert kept.exists()


def test_the_nodes_own_credentials_go_to_no_address_that_an_author_chose(driver: Driver, bucket: Bucket) -> None:
    bucket.good = "AKNODE"
    attributes = {"source": "s3://b", "endpointUrl": bucket.server.url, "region": "us-east-1"}
    request = publish_request("a", str(driver.pods / "a"), attributes, {})
    assert driver.node.NodePublishVolume.future(request, timeout=60).code() is grpc.StatusCode.PERMISSION_DENIED
    hub = {"source": "hf://org/name", "endpointUrl": bucket.server.url}
    driver.node.NodePublishVolume.future(publish_request("h", str(driver.pods / "h"), hub, {}), timeout=60).code()
    assert not any("AKNODE" in seen or "hf_node" in seen for seen in bucket.seen)
    assert driver.left() == []


def test_secrets_must_stand_in_memory(place: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mfs", "csi", "--endpoint", f"unix://{place}/s.sock", "--node-id", "n",
         "--state-dir", str(place / "state"), "--secrets-dir", "/var/lib/mfs-test-secrets"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.rmdir("/var/lib/mfs-test-secrets")
    assert (done.returncode, "is not in memory" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
