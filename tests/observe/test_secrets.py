"""Secrets are said nowhere: canaries in keys, tokens, URLs and signed queries, through real failures against real
servers, at the most talkative level; looked for in logs, metrics, status, settings, errors and what the commands print.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import MfsError
from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from mfs.types import CHUNK_BYTES
from tests.mount.conftest import Mounted
from tests.observe.readers import error_of
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

CANARY = "C4naryC4nary"
_SIGNATURE = re.compile(r"(?:Signature|Credential|Security-Token)=(?!\*\*\*)[^&\s\"']", re.IGNORECASE)
"""A signed query whose secret part is not masked: what it is made of, no test can know."""


class CanaryHub(HubServer):
    token = f"hf_{CANARY}"


@pytest.fixture
def canary_hub(tmp_path: Path) -> Iterator[HubServer]:
    with CanaryHub(tmp_path / "hub") as server:
        yield server


def all_said(mount: TestMount) -> str:
    """Everything a living mount says to anybody."""
    client = mount.client
    said = [mount.log, json.dumps(client.status()), json.dumps(client.config())]
    said += [client.metrics(accept) for accept in ("text/plain", "application/openmetrics-text")]
    for command in ("status", "config", "ls"):
        for options in ((), ("--json",)):
            argv = [sys.executable, "-m", "mfs", command, *options, mount.path]
            said.append(mount.run(*argv, env=dict(mount._env)))
    return "\n".join(said)


def check(said: str) -> None:
    """Raises: AssertionError with the first line that says too much."""
    for line in said.splitlines():
        assert CANARY not in line, line
        assert base64.b64encode(CANARY.encode()).decode()[:12] not in line, line
        assert not _SIGNATURE.search(line), line


def test_an_origin_that_dies_gives_nothing_away(canary_hub: HubServer, mounted: Mounted) -> None:
    canary_hub.commit("org/model", {"model.bin": ramp(2 * CHUNK_BYTES), "config.json": b"{}"}, private=True)
    env = canary_hub.environ(canary_hub.token)
    mount = mounted("hf://org/model", env=env, log_level="debug", log_format="json", timeout_s=2.0)
    mount.alarms_expected = [".*"]
    path = str(mount.path / "model.bin")
    assert mount.call(error_of, path) == ""
    for tier in ("ram", "ssd"):
        mount.client.evict([""], tier)  # type: ignore[arg-type]
    mount.call(drop_cached, path)
    canary_hub.reject(1000, 403, host="cdn")
    refused = mount.call(error_of, path)
    canary_hub.stop()
    dead = mount.call(error_of, path)
    assert refused
    assert dead
    with pytest.raises(MfsError) as said:
        list(mount.client.verify(["no-such-name"]))
    check(f"{all_said(mount)}\n{refused}\n{dead}\n{said.value}")
    lines = [json.loads(line) for line in mount.log.splitlines() if line.startswith("{")]
    assert any(line["level"] == "WARNING" and "model.bin" in line["message"] for line in lines)


def drop_cached(path: str) -> None:
    """Have the next read of a file ask the mount."""
    import os

    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("kind", ["userinfo", "signed query", "token", "s3 keys", "docker login", "hub token"])
def test_a_mount_that_is_refused_gives_nothing_away(
    kind: str, tmp_path: Path, nginx: NginxServer, swift: SwiftServer, hub: HubServer, registry: DockerRegistry
) -> None:
    url, source, env = refused(kind, tmp_path, nginx, swift, hub)
    mount = TestMount(tmp_path / "m", url, source=source, env=env, log_level="debug", timeout_s=3.0)
    said = ""
    try:
        mount.start()
        said = all_said(mount)
        mount.stop(check=False)
    except MountFailedError as error:
        said = f"{error}\n{error.message}"
    finally:
        mount.clean_up()
    assert mount.log
    check(f"{said}\n{mount.log}")
    argv = [sys.executable, "-m", "mfs", "mount", url, str(mount.path), "--timeout", "3s"]
    import os
    import subprocess

    for name, value in source.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        argv, env={**os.environ, **mount._env}, capture_output=True, text=True, check=False, timeout=60
    )
    subprocess.run(["fusermount3", "-u", "-z", str(mount.path)], check=False, capture_output=True)
    check(done.stdout + done.stderr)


def refused(
    kind: str, tmp_path: Path, nginx: NginxServer, swift: SwiftServer, hub: HubServer
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
            return "s3://no-such-bucket/models", {"endpoint_url": swift.endpoint.replace("://", f"://u:{CANARY}@")}, env
        case "hub token":
            return "hf://org/none", {}, hub.environ(f"hf_{CANARY}")
    folder = tmp_path / "docker"
    folder.mkdir()
    login = base64.b64encode(f"user:{CANARY}".encode()).decode()
    host = nginx.url.removeprefix("http://").rstrip("/")
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
    return f"oci://{host}/~private/model:latest", {}, {"DOCKER_CONFIG": str(folder)}
