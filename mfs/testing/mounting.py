"""A real mount for tests: the daemon as a process, started through its own protocol, surely detached afterwards.

Nothing here touches the mount point: a `stat` of a mount that hangs would hang the test run. Files are read by
`mfs.testing.outside.Outside` processes, with deadlines.
"""

from __future__ import annotations

import json
import os
import re
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mfs import children
from mfs.config import MountConfig, SourceConfig
from mfs.control import mountinfo, runtime
from mfs.control.client import Client
from mfs.control.ready import daemon_arguments
from mfs.errors import MfsError
from mfs.testing.outside import Outside
from mfs.types import CHUNK_BYTES

T = TypeVar("T")

READY_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 20.0
_ALARMS = re.compile(
    r"^.*(?: ERROR | CRITICAL |\"level\": \"(?:ERROR|CRITICAL)\"|Traceback \(most recent call last\)|unforeseen error)"
    r".*$",
    re.MULTILINE,
)


class MountFailedError(Exception):
    """The daemon said that the mount did not come about: `kind` and `message` are its answer, `status` how it ended."""

    def __init__(self, kind: str, message: str, status: int | None) -> None:
        super().__init__(f"{kind}: {message} (exit status {status})")
        self.kind = kind
        self.message = message
        self.status = status


class TestMount:
    """One mount below `folder`: mnt/, cache/, run/ and mfs.log. Not started by the constructor.

    Used as a context it starts, stops, and checks on the way out that every gauge is back to zero and that no error was
    logged, other than lines that match one of `alarms_expected`.
    """

    __test__ = False  # pytest takes every Test… for a test

    def __init__(
        self,
        folder: Path,
        url: str = "",
        *,
        sources: Sequence[SourceConfig] = (),
        source: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """url: of the one source at the root, with `source` as its further settings; or several `sources`.

        env: added to the daemon's environment. settings: further fields of MountConfig; a cache directory, a small
        RAM tier and one worker, which starts quickest, are there unless said otherwise.
        """
        self.folder = folder
        self.path = folder / "mnt"
        self.path.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "mfs.log"
        self._sources = tuple(sources) or (SourceConfig(url=url, **(source or {})),)
        self._settings: dict[str, Any] = {
            "cache_dir": folder / "cache", "ram_bytes": 64 << 20, "timeout_s": 20.0,
            "workers_count": 1, "log_format": "text",
        } | settings  # fmt: skip
        self._env = {"MFS_RUNTIME_DIR": str(folder / "run"), **(env or {})}
        self.ready_timeout_s = READY_TIMEOUT_S
        """How long a daemon may take to begin, and the one before it to end."""
        self.alarms_expected: list[str] = []
        self.ready: dict[str, Any] = {}
        """The daemon's answer once it serves."""
        self.status: int | None = None
        """How the daemon ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._outside: Outside | None = None
        self._outsiders: list[Outside] = []
        self._device = ""

    # -- life

    def start(self, *, program: str | None = None) -> TestMount:
        """Start the daemon and return when it serves. program: see `spawn`. Raises: MountFailedError."""
        assert self._process is None, "already started"
        self._process, ready = self.spawn(program=program)
        try:
            answer = self._read_answer(ready)
        except BaseException:
            self.clean_up()
            raise
        if "error" in answer:
            process, self._process = self._process, None
            self._raise_failed(process, answer)
        self.ready = answer
        found = mountinfo.mount_at(os.path.realpath(self.folder) + "/mnt")
        assert found is not None, "the daemon says it serves, and nothing is mounted"
        self._device = found.device
        return self

    def hand_over(self, *, program: str | None = None, old_status: int = 0, **settings: Any) -> None:
        """Have a new daemon, with these settings changed, take the mount over; the old one must end as it should.

        program: Python that becomes the new daemon, instead of `mfs.daemon`; nobody holds it.
        Raises: MountFailedError if the new one does not come about; the old one goes on then.
        """
        before = self._settings
        assert self._process is not None, "not running"
        self._settings = before | settings
        heir, ready = self.spawn(handover=True, program=program)
        try:
            answer = self._read_answer(ready)
        except BaseException:
            heir.kill()
            heir.wait(SETTLE_TIMEOUT_S)
            raise
        if "error" in answer:
            self._settings = before
            self._raise_failed(heir, answer)
        self.ready = answer
        self.adopt(heir, old_status=old_status)

    def adopt(self, heir: subprocess.Popen[bytes], *, old_status: int = 0) -> None:
        """Go on with a daemon from `spawn` that has taken the mount over; the old one must end as it should."""
        old, self._process = self._process, heir
        assert old is not None, "not running"
        status = old.wait(self.ready_timeout_s)
        assert status == old_status, f"the old daemon ended with {status}:\n{self.log[-4000:]}"

    def spawn(self, *, handover: bool = False, program: str | None = None) -> tuple[subprocess.Popen[bytes], int]:
        """A daemon with this mount's settings, as the process that holds it, and the descriptor on which it will
        answer, once.

        program: Python that becomes that process, instead of `mfs.holder`.
        """
        config = MountConfig(mountpoint=self.path, sources=self._sources, **self._settings)
        config_read, config_write = os.pipe()
        ready_read, ready_write = os.pipe()
        what = ["-c", program] if program else ["-m", "mfs.holder"]
        arguments = daemon_arguments(config_fd=config_read, ready_fd=ready_write, handover=handover)
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                children.python(*what, *arguments), pass_fds=(config_read, ready_write), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, cwd=children.CWD, env=children.environment() | self._env,
            )  # fmt: skip
        os.close(config_read)
        os.close(ready_write)
        with open(config_write, "wb") as file:
            file.write(config.to_json().encode())
        return process, ready_read

    def _raise_failed(self, process: subprocess.Popen[bytes], answer: dict[str, Any]) -> NoReturn:
        self.status = process.wait(SETTLE_TIMEOUT_S)
        raise MountFailedError(answer["error"]["type"], answer["error"]["message"], self.status)

    def _read_answer(self, fd: int) -> dict[str, Any]:
        """The daemon's answer; closes `fd`."""
        text, deadline_s = b"", time.monotonic() + self.ready_timeout_s
        with selectors.DefaultSelector() as ready, open(fd, "rb", buffering=0):
            ready.register(fd, selectors.EVENT_READ)
            while not text.endswith(b"\n") or text.rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(b'{"waiting"'):
                if not ready.select(max(0.0, deadline_s - time.monotonic())):
                    within = f"within {self.ready_timeout_s:g} s"
                    raise AssertionError(f"the daemon was not ready {within}:\n{self.log[-4000:]}")
                data = os.read(fd, 1 << 16)
                if not data:
                    raise AssertionError(f"the daemon ended without an answer:\n{self.log[-4000:]}")
                text += data
        answer: dict[str, Any] = json.loads(text.splitlines()[-1])  # before it: what was waited for
        return answer

    def stop(self, *, check: bool = True) -> None:
        """Unmount with SIGTERM and wait. check: gauges and log too (see `TestMount`). Raises: AssertionError."""
        assert self._process is not None, "not running"
        self.close_outsiders()
        if check:
            self.wait_quiet(prefetch=False)
        self._process.send_signal(signal.SIGTERM)
        self.wait_ended()
        if check:
            assert self.status == 0, f"the daemon ended with status {self.status}:\n{self.log[-4000:]}"
            self.check_log()

    def wait_ended(self, *, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Until the daemon ended by itself, as after an unmount; sets `status`. Raises: AssertionError."""
        assert self._process is not None
        try:
            self.status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end within {timeout_s:g} s:\n{self.log[-4000:]}") from None
        self._forget_process()
        assert not self.is_mounted, "the daemon ended and left its mount"

    def kill(self, *, detach: bool = True) -> None:
        """SIGKILL for holder and daemon, after which nobody goes on; then `detach` what is left of the mount."""
        assert self._process is not None, "not running"
        daemon = self.pid
        self._process.kill()
        self.status = self._process.wait(SETTLE_TIMEOUT_S)
        _kill(daemon)
        self._forget_process()
        if detach:
            self.detach()

    def crash(self) -> int:
        """SIGKILL for the daemon alone: its holder starts the next one. Returns the pid of the killed."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def settle_between(self, heir: subprocess.Popen[bytes]) -> None:
        """A daemon was killed while `heir`, from `spawn`, took over: one holder ends, the other has the mount."""
        holders = (self._process, heir)
        assert self.wait_for(lambda: any(one is not None and one.poll() is not None for one in holders))
        if heir.poll() is None:
            self._process = heir

    def wait_successor(self, killed: int, *, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Until another daemon than this one answers."""
        answered = self.wait_for(lambda: self._answering_pid() not in (0, killed), timeout_s=timeout_s)
        assert answered, self.log[-4000:]

    def _answering_pid(self) -> int:
        try:
            return int(self.client.status()["pid"])
        except MfsError:
            return 0

    def detach(self) -> None:
        """Take a dead mount away, as the next `mfs mount` does."""
        for _ in range(8):
            if not self.is_mounted:
                return
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False, capture_output=True, timeout=30)
        raise AssertionError(f"{self.path} cannot be unmounted")

    def clean_up(self) -> None:
        """End everything, however it stands; for the end of a test that failed."""
        self.abort()
        self.close_outsiders()
        if self._process is not None:
            self.kill(detach=False)
        self.detach()

    def _forget_process(self) -> None:
        self._process = None
        self._device = ""  # the kernel may give the number to somebody else's mount

    def __enter__(self) -> TestMount:
        return self.start()

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None and self._process is not None:
                self.stop()
        finally:
            self.clean_up()

    # -- looking

    @property
    def client(self) -> Client:
        """The control client, as the shell commands use it."""
        return Client(runtime.socket_path(str(self.path), Path(self._env["MFS_RUNTIME_DIR"])), timeout_s=20)

    @property
    def pid(self) -> int:
        """Of the daemon; `holder_pid` is its parent's."""
        assert self._process is not None, "not running"
        record = runtime.read_record(os.path.realpath(self.folder) + "/mnt", Path(self._env["MFS_RUNTIME_DIR"]))
        return record.pid if record is not None else self._process.pid

    @property
    def holder_pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not been ended from here."""
        return self._process is not None

    @property
    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.client.status()["workers"]]

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def is_mounted(self) -> bool:
        return mountinfo.mount_at(os.path.realpath(self.folder) + "/mnt") is not None

    @property
    def origin_bytes(self) -> int:
        """What was fetched from the origins so far, as the daemon counts it once it has heard of all that readers got:
        a worker answers them before."""
        self.wait_for(lambda: not self.client.status()["reads"]["waiting"], timeout_s=1.0)
        count: int = self.client.status()["origin"]["fetched_bytes"]
        return count

    def wait_quiet(self, *, prefetch: bool = True) -> None:
        """Until nothing is read, fetched or leased, and every slot is free or holds a chunk. Raises: AssertionError.

        prefetch: and until nothing is left to be fetched ahead; this may take as long as a model is remembered.
        """
        quiet = self.wait_for(lambda: not self._busy(prefetch))
        assert quiet, f"gauges do not come back to rest: {self._busy(prefetch)}"

    def _busy(self, prefetch: bool) -> dict[str, Any]:
        status = self.client.status()
        ram = status["ram"]
        gauges = {
            "reads waiting": status["reads"]["waiting"],
            "fetches in flight": status["origin"]["inflight"],
            "leases": ram["slots_leased"],
            "slots missing": ram["slots_count"] - ram["slots_free"] - ram["used_bytes"] // CHUNK_BYTES,
            "bytes to prefetch": status["prefetch"]["queued_bytes"] if prefetch else 0,
        }
        return {name: value for name, value in gauges.items() if value}

    def wait_saved(self, *paths: str) -> None:
        """Until the SSD tier holds the whole of these files."""
        assert self.wait_for(lambda: all(self._is_saved(path) for path in paths)), f"{paths} did not reach the SSD"

    def _is_saved(self, path: str) -> bool:
        found = self.client.stat(path)
        return bool(found["ssd_bytes"] == found["size"])

    @staticmethod
    def wait_for(condition: Callable[[], bool], *, timeout_s: float = SETTLE_TIMEOUT_S) -> bool:
        """Whether the condition came true in time."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True

    def check_log(self) -> None:
        """Raises: AssertionError naming the first line that says something went wrong, unless it was expected."""
        for alarm in _ALARMS.findall(self.log):
            if not any(re.search(pattern, alarm) for pattern in self.alarms_expected):
                raise AssertionError(f"the daemon logged: {alarm}\n{self.log[-4000:]}")

    # -- touching

    def outside(self) -> Outside:
        """A further process that may touch the mount."""
        outsider = Outside(on_hang=self.abort, cwd=Path.cwd())
        self._outsiders.append(outsider)
        return outsider

    def call(self, function: Callable[..., T], *args: Any, timeout_s: float = 30.0) -> T:
        """`function(*args)` in a process of its own, the same one each time; see `Outside.call`."""
        if self._outside is None:
            self._outside = self.outside()
        return self._outside.call(function, *args, timeout_s=timeout_s)

    def run(self, *argv: object, timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> str:
        """Run a program that touches the mount and return what it printed. Raises: AssertionError if it fails."""
        process = subprocess.Popen(
            [str(argument) for argument in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **(env or {})}, text=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.abort()
            process.kill()
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"{argv[0]} hung:\n{out}\n{err}\n{self.log[-4000:]}") from None
        assert process.returncode == 0, f"{argv} ended with {process.returncode}:\n{out}\n{err}\n{self.log[-4000:]}"
        return out

    def abort(self) -> None:
        """End the kernel's side of the connection: whoever waits for an answer gets an error."""
        if not self._device:
            return
        try:
            Path(f"/sys/fs/fuse/connections/{self._device.partition(':')[2]}/abort").write_text("1")
        except OSError:  # gone already
            pass

    def close_outsiders(self) -> None:
        """End all processes that `outside` and `call` started."""
        for outsider in self._outsiders:
            outsider.close()
        self._outsiders.clear()
        self._outside = None


def _kill(pid: int) -> None:
    """End a process that is no child of ours, and wait until it has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], SETTLE_TIMEOUT_S)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
