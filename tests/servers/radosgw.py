"""A second real S3 server, Ceph's radosgw: faster than Swift, so the benchmarks use it; the test suite does not.

One monitor, one OSD whose objects live in memory, one gateway, on loopback. From Debian packages (see APT).
Quirks (16.2): CompleteMultipartUpload returns an empty ETag; anonymous GET is 403.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import urllib.request
import uuid
from pathlib import Path

from tests.servers.process import ServerError, ServerProcess, free_port, wait_for_signal
from tests.servers.s3_client import S3Account

APT = "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"

_COMMANDS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_COMMAND_TIMEOUT_S = 60

_ATTEMPTS = 5
"""ceph 16's programs can send their first command before they have learnt the cluster's id. The monitor then refuses it
("wrong fsid", EPERM), and they give up: about one start in three here."""

_CONF = """\
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
run dir = {root}/run
admin socket = {root}/run/$name.$pid.asok
pid file = {root}/run/$name.pid
log file = {root}/run/$name.log
ms bind ipv6 = false
ms bind msgr2 = false
[mon]
mon data = {root}/mon
mon cluster log file = {root}/run/cluster.log
[osd]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd max object name len = 256
osd max object namespace len = 64
[client.rgw]
rgw data = {root}/rgw
# Without tcp_nodelay small ranged GETs take 44 ms instead of 3.
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
rgw enable ops log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
rgw thread pool size = 64
rgw max concurrent requests = 256
"""


class RadosGateway(S3Account):
    """One S3 endpoint with one account. `stop` forgets the objects: they are in memory."""

    access_key = "mfskey"
    secret_key = "mfssecret"
    region = "us-east-1"

    def __init__(self, root: Path, *, port: int | None = None, memory_gib: int = 8) -> None:
        """Keep state under `root`. memory_gib: what the object store pretends to have; it uses what is stored."""
        self.root = root
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._memory_bytes = memory_gib << 30
        self._processes: list[ServerProcess] = []

    def start(self) -> None:
        """Make a new cluster, start it and return when the endpoint answers, in some 12 s. Raises: ServerError."""
        if self._processes:
            raise ServerError("radosgw is already running")
        if missing := [command for command in _COMMANDS if shutil.which(command) is None]:
            raise ServerError(f"{', '.join(missing)} not installed: {APT}")
        try:
            self._start_cluster()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the daemons and drop the objects."""
        for process in reversed(self._processes):
            process.popen.kill()
            process.reap()
        self._processes.clear()

    def _start_cluster(self) -> None:
        for folder in ("mon", "osd", "rgw", "run"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
            (self.root / folder).mkdir(parents=True)
        fsid, osd_id, mon_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        conf = _CONF.format(
            root=self.root, fsid=fsid, mon_port=mon_port, port=self.port, memory_bytes=self._memory_bytes
        )
        (self.root / "ceph.conf").write_text(conf)
        monitors = str(self.root / "monmap")
        address = f"[v1:127.0.0.1:{mon_port}]"
        self._run("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, monitors)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitors)
        self._spawn("ceph-mon", "-i", "a")
        number = self._run("ceph", "--connect-timeout", "30", "osd", "new", osd_id).strip()
        self._run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", osd_id)
        self._start_osd(number)
        self._spawn("radosgw", "-n", "client.rgw").wait_until(self._answers)
        account = ("--access-key", self.access_key, "--secret-key", self.secret_key)
        user = ("user", "create", "--uid", "mfs", "--display-name", "mfs")
        self._run("radosgw-admin", "-n", "client.rgw", *user, *account)

    def _start_osd(self, number: str) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            osd = self._spawn("ceph-osd", "-i", number)
            try:
                osd.wait_until(lambda: "1 up" in self._run("ceph", "osd", "stat"))
                break
            except ServerError as error:
                if attempt == _ATTEMPTS or "wrong fsid" not in str(error):
                    raise
                self._processes.remove(osd)

    def _run(self, command: str, *arguments: str) -> str:
        place = () if command == "monmaptool" else ("-c", str(self.root / "ceph.conf"))
        argv = [command, *place, *arguments]
        for attempt in range(1, _ATTEMPTS + 1):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
            if done.returncode == 0:
                break
            if attempt == _ATTEMPTS or "EPERM" not in done.stderr:
                raise ServerError(f"{' '.join(argv)} failed: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def _spawn(self, command: str, *arguments: str) -> ServerProcess:
        argv = [command, "-c", str(self.root / "ceph.conf"), *arguments, "-f"]
        process = ServerProcess(command, argv, log=self.root / "run" / f"{command}.out")
        self._processes.append(process)
        return process

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except OSError:
            return False
        return True

    def __enter__(self) -> RadosGateway:
        self.start()
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--memory-gib", type=int, default=8)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="radosgw-"))
    with RadosGateway(root, port=args.port, memory_gib=args.memory_gib) as server:
        for name, value in server.environ().items():
            print(f"export {name}={value}", flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()
