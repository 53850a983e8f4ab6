"""Secrets are said nowhere: canaries in keys, tokens, URLs and signed queries, through real failures against real
servers, at the most talkative level; looked for in logs, metrics, status, settings, errors and what the commands print.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from mfs.types import CHUNK_BYTES
from tests.mount.conftest import Mounted
from tests.observe.readers import error_of, read_chunks
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.rclone import RcloneServer

CANARY = "C4naryC4nary"
TALKATIVE: dict[str, Any] = {"log_level": "debug", "log_format": "json", "timeout_s": 2.0}
_SIGNATURE = re.compile(r"(?:Signature|Credential|Security-Token)=(?!\*\*\*)[^&\s\"']", re.IGNORECASE)
"""A signed query whose secret part is not masked: what it is made of, no test can know."""


class CanaryHub(HubServer):
    token = f"hf_{CANARY}"


class CanaryNginx(NginxServer):
    password = CANARY


@pytest.fixture
def canary_hub(tmp_path: Path) -> Iterator[CanaryHub]:
    with CanaryHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def canary_nginx(tmp_path: Path) -> Iterator[CanaryNginx]:
    with CanaryNginx(tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def guarded_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path / "guarded", auth="htpasswd") as server:
        yield server


def all_said(mount: TestMount) -> str:
    """Everything a living mount says to anybody."""
    client = mount.client
    said = [mount.log, json.dumps(client.status()), json.dumps(client.config())]
    said += [client.metrics(accept) for accept in ("text/plain", "application/openmetrics-text")]
    for command in (("status", "--json"), ("status",), ("config",)):
        said.append(mount.run(sys.executable, "-m", "mfs", *command, mount.path, env=dict(mount._env)))
    return "\n".join(said)


def check(said: str) -> None:
    """Raises: AssertionError with the first line that says too much."""
    for line in said.splitlines():
        assert CANARY not in line, line
        assert base64.b64encode(CANARY.encode()).decode()[:12] not in line, line
        assert not _SIGNATURE.search(line), line


def test_a_hub_that_refuses_and_dies_gives_nothing_away(canary_hub: CanaryHub, mounted: Mounted) -> None:
    canary_hub.commit("org/model", {"model.bin": ramp(2 * CHUNK_BYTES)}, private=True)
    mount = mounted("hf://org/model", env=canary_hub.environ(canary_hub.token), **TALKATIVE)
    path = str(mount.path / "model.bin")
    assert mount.call(read_chunks, path, [0]) == 0
    canary_hub.reject(1000, 403, host="cdn")
    refused = mount.call(error_of, path)
    canary_hub.stop()
    check_failing(mount, [refused, mount.call(error_of, path)])


def test_a_server_with_a_password_that_dies_gives_nothing_away(canary_nginx: CanaryNginx, mounted: Mounted) -> None:
    (canary_nginx.files / "model.bin").write_bytes(ramp(2 * CHUNK_BYTES))
    url = f"{canary_nginx.url}~private/".replace("://", f"://{canary_nginx.user}:{CANARY}@")
    mount = mounted(url, **TALKATIVE)
    path = str(mount.path / "model.bin")
    assert mount.call(read_chunks, path, [0]) == 0
    canary_nginx.stop()
    check_failing(mount, [mount.call(error_of, path)])


def check_failing(mount: TestMount, errors: list[str]) -> None:
    """A mount whose reads have failed has said so, and no more than it should."""
    mount.alarms_expected = [".*"]
    assert all(errors)
    check("\n".join([all_said(mount), *errors]))
    lines = [json.loads(line) for line in mount.log.splitlines() if line.startswith("{")]
    assert any(line["level"] == "WARNING" and "model.bin" in line["message"] for line in lines)


@pytest.mark.parametrize("kind", ["userinfo", "signed query", "token", "s3 keys", "docker login", "hub token"])
def test_a_mount_that_is_refused_gives_nothing_away(
    kind: str,
    tmp_path: Path,
    nginx: NginxServer,
    rclone_s3: RcloneServer,
    hub: HubServer,
    guarded_registry: DockerRegistry,
) -> None:
    url, source, env = refused(kind, tmp_path, nginx, rclone_s3, hub, guarded_registry.host)
    mount = TestMount(tmp_path / "m", url, source=source, env=env, log_level="debug", timeout_s=3.0)
    with pytest.raises(MountFailedError) as said:
        mount.start()
    assert said.value.message.rpartition(": ")[2] in mount.log
    check(f"{said.value}\n{mount.log}")
    if kind not in ("userinfo", "token"):  # the command line and what the shell says show what it holds itself
        return
    argv = [sys.executable, "-m", "mfs", "mount", url, str(mount.path), "--timeout", "3s"]
    for name, value in source.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        argv, env={**os.environ, **mount._env}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode
    check(done.stdout + done.stderr)


def refused(
    kind: str, tmp_path: Path, nginx: NginxServer, rclone_s3: RcloneServer, hub: HubServer, registry_host: str
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(URL, further settings, environment) of a mount that a server does not like."""
    private = f"{nginx.url}~private/"
    match kind:
        case "userinfo":
            return private.replace("://", f"://user:{CANARY}@"), {}, {}
        case "signed query":
            return f"{private}?X-Amz-Signature={CANARY}&X-Amz-Credential={CANARY}", {}, {}
        case "token":
            return private, {"token": CANARY}, {}
        case "s3 keys":
            env = {"AWS_ACCESS_KEY_ID": f"AK{CANARY}", "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_SESSION_TOKEN": CANARY}
            endpoint = rclone_s3.endpoint.replace("://", f"://u:{CANARY}@")
            return "s3://no-such-bucket/models", {"endpoint_url": endpoint}, env
        case "hub token":
            return "hf://org/none", {}, hub.environ(f"hf_{CANARY}")
    folder = tmp_path / "docker"
    folder.mkdir()
    login = base64.b64encode(f"user:{CANARY}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {registry_host: {"auth": login}}}))
    return f"oci://{registry_host}/private/model:latest", {}, {"DOCKER_CONFIG": str(folder)}
