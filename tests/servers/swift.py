"""A real S3 server: OpenStack Swift with its s3api, all on loopback, from its own virtual environment.

Signatures, ETags, conditions, multipart and listings are Swift's own. Made by `tools/setup test` in `.servers/swift`.
Quirks (Swift 2.38): the region must be REGION; PUT with If-Match answers 501; an unsigned GET answers 400; PUT with
If-None-Match: * is refused over what is there, but of several at once more than one is told 200, and the last stays.
"""

from __future__ import annotations

import argparse
import os
import pwd
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.servers.process import PROJECT_ROOT, ServerError, ServerProcess, free_port, wait_for_signal
from tests.servers.s3_client import S3Account

VENV = PROJECT_ROOT / ".servers" / "swift"

_SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = mfs
swift_hash_path_suffix = test
[storage-policy:0]
name = gold
default = yes
[swift-constraints]
max_file_size = 5368709122
"""

# workers = 0 serves from the process itself: nothing is forked that could outlive it. The user may be root.
_COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {etc}
devices = {devices}
mount_check = false
workers = 0
fallocate_reserve = 0
disable_fallocate = true
log_address = /dev/null
log_level = WARNING
"""

_STORAGE = """\
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {cache}
network_chunk_size = 1048576
disk_chunk_size = 1048576
"""

_PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
client_chunk_size = 1048576
object_chunk_size = 1048576
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
check_bucket_owner = false
auth_pipeline_check = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
user_test_other = otherpw
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

# One replica on one device; run by Swift's own interpreter, once, instead of nine swift-ring-builder commands.
_MAKE_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for spec in sys.argv[2:]:
    kind, port = spec.split(":")
    builder = RingBuilder(6, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1.0})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


class SwiftServer(S3Account):
    """One S3 endpoint with one account. `stop` and `start` keep the data and the port, to play a dead origin."""

    access_key = "test:tester"
    secret_key = "testing"
    region = "us-east-1"

    def __init__(self, root: Path, *, port: int | None = None) -> None:
        """Lay out configuration under `root`, which must be on a file system with user xattrs; start nothing."""
        self.root = root
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._ports = {"account": free_port(), "container": free_port(), "object": free_port(), "proxy": self.port}
        self._processes: list[ServerProcess] = []

    def start(self) -> None:
        """Start the four daemons and return when the endpoint answers. Raises: ServerError."""
        if self._processes:
            raise ServerError("Swift is already running")
        if not (self.root / "etc" / "object.ring.gz").exists():
            self._lay_out()
        try:
            for kind in self._ports:
                self._processes.append(self._spawn(kind))
            for process, kind in zip(self._processes, self._ports, strict=True):
                process.wait_until(lambda kind=kind: self._healthy(kind))  # type: ignore[misc]
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the daemons; connections under way are cut. Data, port and credentials stay for the next `start`."""
        for process in self._processes:
            process.popen.kill()  # SIGTERM would let Swift finish what it serves: a dead origin finishes nothing
        for process in self._processes:
            process.reap()
        self._processes.clear()

    def ensure_started(self) -> None:
        """Start unless running."""
        if not self._processes:
            self.start()

    def __enter__(self) -> SwiftServer:
        self.start()
        return self

    def _spawn(self, kind: str) -> ServerProcess:
        return ServerProcess(
            f"swift-{kind}-server",
            [str(VENV / "bin" / f"swift-{kind}-server"), str(self.root / "etc" / f"{kind}.conf"), "--verbose"],
            log=self.root / "log" / f"{kind}.log",
            env={"SWIFT_DIR": str(self.root / "etc"), "PYTHONWARNINGS": "ignore"},
        )

    def _healthy(self, kind: str) -> bool:
        # Storage daemons answer 4xx to this: any HTTP answer means they serve.
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self._ports[kind]}/healthcheck", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return kind != "proxy"
        except OSError:
            return False
        return True

    def _lay_out(self) -> None:
        python = VENV / "bin" / "python"
        if not python.exists():
            raise ServerError(f"no Swift in {VENV}: run tools/setup test")
        etc, devices, cache = self.root / "etc", self.root / "devices", self.root / "cache"
        for folder in (etc, devices / "d1", cache, self.root / "log"):
            folder.mkdir(parents=True, exist_ok=True)
        self._require_xattrs(devices)
        user = _user_name()
        for kind, port in self._ports.items():
            head = _COMMON.format(port=port, user=user, etc=etc, devices=devices)
            body = _PROXY if kind == "proxy" else _STORAGE.format(kind=kind, cache=cache)
            (etc / f"{kind}.conf").write_text(head + body)
        (etc / "swift.conf").write_text(_SWIFT_CONF)
        specs = [f"{kind}:{port}" for kind, port in self._ports.items() if kind != "proxy"]
        log = self.root / "log" / "rings.log"
        argv = [str(python), "-c", _MAKE_RINGS, str(etc), *specs]
        ServerProcess("Swift's ring builder", argv, log=log, env={"SWIFT_DIR": str(etc)}).complete()

    @staticmethod
    def _require_xattrs(folder: Path) -> None:
        try:
            os.setxattr(folder, "user.swift.probe", b"1")
        except OSError as error:
            raise ServerError(
                f"Swift keeps metadata in user xattrs and {folder} has none ({error.strerror})"
            ) from error


def _user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--root", type=Path, help="keep data here (default: a new temporary directory)")
    args = parser.parse_args()
    root = args.root or Path(tempfile.mkdtemp(prefix="swift-"))
    with SwiftServer(root.resolve(), port=args.port) as server:
        for name, value in server.environ().items():
            print(f"export {name}={value}", flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()
