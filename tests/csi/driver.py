"""A driver as a process, asked over its socket by a client made from the same specification; and workloads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from mfs import children
from mfs.control import mountinfo, runtime
from mfs.csi import csi_pb2 as csi
from mfs.csi import csi_pb2_grpc as services
from mfs.testing.outside import Outside
from tests.csi import containers

DEADLINE_S = 60.0
MODES = csi.VolumeCapability.AccessMode


class Driver:
    """`mfs csi` over a directory of its own, as a node has it: state, kubelet, caches, runtime; secrets in memory."""

    def __init__(self, place: Path, *, folders: tuple[Path, ...] = (), env: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.memory = Path(tempfile.mkdtemp(prefix="mfs-csi-", dir="/dev/shm"))
        self.pods = place / "pods"
        self.pods.mkdir()
        self.keeper: Path | None = None
        self._folders = folders
        self._env = {"MFS_RUNTIME_DIR": str(place / "run"), "TMPDIR": str(place), **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._has_own_pids = False
        self._keeper: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    # -- life

    def start(self, *, program: str | None = None, own_pids: bool = False) -> Driver:
        """Start it; wait until it is ready. program: Python run before it. own_pids: all die with it, as a pod's."""
        arguments = [
            "csi", "--endpoint", f"unix://{self.place}/csi.sock", "--node-id", "node-1",
            "--state-dir", str(self.place / "state"), "--secrets-dir", str(self.memory / "secrets"),
            "--cache-dir", str(self.place / "cache"), "--ram-size", "64M", "--cache-size", "1G",
            *[word for folder in self._folders for word in ("--folders", str(folder))],
            *(["--keeper", str(self.keeper)] if self.keeper else []),
        ]  # fmt: skip
        code = f"import sys; sys.argv[1:] = {arguments!r}\n{program or ''}\nfrom mfs.cli import main; sys.exit(main())"
        # A pod has its own /proc: what a daemon looks up there is of its own namespace.
        self._has_own_pids = own_pids
        prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if own_pids else []
        prefix += ["--propagation", "unchanged", "--"] if own_pids else []
        with (self.place / "driver.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, *children.python("-c", code)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=children.CWD, env=children.environment() | self._env,
            )  # fmt: skip
        self._channel = grpc.insecure_channel(f"unix:{self.place}/csi.sock")
        self.identity, self.node = services.IdentityStub(self._channel), services.NodeStub(self._channel)
        if program is None:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        assert wait_for(self._is_ready), self.log[-4000:]

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log[-4000:]
        try:
            return bool(self.identity.Probe(csi.ProbeRequest(), timeout=5, wait_for_ready=True).ready.value)
        except grpc.RpcError:
            return False

    def kill(self) -> None:
        """kill -9; of the driver alone, or of all in its pod."""
        assert self._process is not None
        os.kill(self._first or self._process.pid, signal.SIGKILL)
        self.wait_ended()

    @property
    def _first(self) -> int:
        """The first process of its PID namespace, with which all end; 0 without one."""
        assert self._process is not None
        found = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(found[0]) if found and self._has_own_pids else 0

    def wait_ended(self) -> None:
        assert self._process is not None
        self._process.wait(DEADLINE_S)
        self._process = None
        assert self._channel is not None
        self._channel.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def start_keeper(self) -> None:
        """`mfs keep`, outside the driver's pod."""
        self.keeper = self.place / "keeper.sock"
        self._keeper = subprocess.Popen(
            children.python("-m", "mfs", "keep", str(self.keeper)), cwd=children.CWD, env=children.environment()
        )
        assert wait_for(lambda: self.keeper is not None and self.keeper.exists())

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()
        for key in self.keys:
            record = self.record(key)
            for pid in (record.holder_pid, record.pid) if record else ():
                with_no_fault(os.kill, pid, signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait(DEADLINE_S)
        for mount in reversed(mountinfo.read()):
            if mount.mountpoint.startswith(f"{os.path.realpath(self.place)}/"):
                subprocess.run(["umount", "-l", mount.mountpoint], check=False, capture_output=True)
        shutil.rmtree(self.memory, ignore_errors=True)

    # -- asking

    def publish(
        self, volume: str, attributes: Mapping[str, str], secrets: Mapping[str, str] | None = None, **more: Any
    ) -> Path:
        """Have a volume published at the target of its name; where that is."""
        target = self.pods / volume
        request = publish_request(volume, str(target), attributes, secrets or {})
        for name, value in more.items():
            setattr(request, name, value)
        self.node.NodePublishVolume(request, timeout=DEADLINE_S)
        return target

    def unpublish(self, volume: str) -> None:
        request = csi.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(self.pods / volume))
        self.node.NodeUnpublishVolume(request, timeout=DEADLINE_S)

    def stats(self, volume: str) -> csi.NodeGetVolumeStatsResponse:
        request = csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=str(self.pods / volume))
        answer: csi.NodeGetVolumeStatsResponse = self.node.NodeGetVolumeStats(request, timeout=DEADLINE_S)
        return answer

    # -- looking

    @property
    def log(self) -> str:
        return (self.place / "driver.log").read_text(errors="replace")

    @property
    def keys(self) -> list[str]:
        """Of the daemons that are mounted."""
        folder = f"{os.path.realpath(self.place)}/state/mounts/"
        return sorted({m.mountpoint.removeprefix(folder) for m in mountinfo.read() if m.mountpoint.startswith(folder)})

    def record(self, key: str) -> runtime.Record | None:
        return runtime.read_record(f"{os.path.realpath(self.place)}/state/mounts/{key}", self.place / "run")

    @property
    def pids(self) -> list[int]:
        """Of the daemons."""
        return [record.pid for record in map(self.record, self.keys) if record is not None]

    @property
    def pod_mounts(self) -> list[str]:
        """Volumes at whose target something is mounted, once for each mount."""
        folder = f"{os.path.realpath(self.pods)}/"
        return sorted(m.mountpoint.removeprefix(folder) for m in mountinfo.read() if m.mountpoint.startswith(folder))

    def left(self) -> list[str]:
        """What the state and the secrets hold of volumes and daemons."""
        places = [self.place / "state" / name for name in ("volumes", "daemons", "mounts")]
        return [str(path) for place in [*places, self.memory / "secrets"] for path in place.iterdir()]


def publish_request(
    volume: str, target: str, attributes: Mapping[str, str], secrets: Mapping[str, str]
) -> csi.NodePublishVolumeRequest:
    """As the kubelet asks for an ephemeral volume of a pod in the namespace 'team'."""
    capability = csi.VolumeCapability(
        mount=csi.VolumeCapability.MountVolume(), access_mode=MODES(mode=MODES.SINGLE_NODE_WRITER)
    )
    context = {
        "csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.namespace": "team",
        "csi.storage.k8s.io/pod.name": "pod", "csi.storage.k8s.io/serviceAccount.name": "default", **attributes,
    }  # fmt: skip
    return csi.NodePublishVolumeRequest(
        volume_id=volume, target_path=target, volume_capability=capability, readonly=True, secrets=secrets,
        volume_context=context,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> bool:
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


def with_no_fault(function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except OSError:
        pass


@contextmanager
def workload(target: Path) -> Iterator[tuple[Outside, str]]:
    """A process of a pod, in a mount namespace of its own, and where it sees the volume (HostToContainer)."""
    outside = Outside(cwd=Path.cwd())
    inside = f"{target}.inside"
    try:
        outside.call(containers.enter, str(target), inside)
        yield outside, inside
    finally:
        outside.close()
