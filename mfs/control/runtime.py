"""Where running daemons are found: one socket, one record and one lock per mount, in the runtime directory.

    <directory>/<hash>.sock   the control socket
    <directory>/<hash>.slots  where RAM slots are lent
    <directory>/<hash>.next   where the mount is handed to the next daemon
    <directory>/<hash>.json   who serves there (Record)
    <directory>/<hash>.lock   held by the daemon as long as it lives

<hash> is made of the mount point's real path. A record whose process is gone is stale: the next mount replaces it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mfs.control import mountinfo
from mfs.control.mountinfo import Mount, Place
from mfs.errors import AccessError, ConfigError, NotFoundError

_SOCKET_PATH_BYTES_MAX = 107  # sun_path, less its final zero: unix(7)
_LONGEST_ENDING = ".slots"
_ROOM_BYTES = 16 << 10


@dataclass(frozen=True)
class Record:
    """What the daemon of a mount says about itself, for those who find its mount dead."""

    pid: int
    pid_started_ticks: int
    """Field 22 of /proc/PID/stat: tells this process from a later one with the same number."""
    mountpoint: str
    cache_dir: str | None
    log_file: str | None
    started_at: float
    """Seconds since the epoch."""
    sources: tuple[str, ...] = ()
    """Their urls, passwords masked, for lists of mounts."""

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs (in this PID namespace)."""
        return process_started_ticks(self.pid) == self.pid_started_ticks


def directory() -> Path:
    """The runtime directory of this process's user; it may not exist yet."""
    override = os.environ.get("MFS_RUNTIME_DIR")
    if override:
        return Path(override)
    uid = os.geteuid()
    if uid == 0 and os.access("/run", os.W_OK):
        return Path("/run/mfs")
    session = os.environ.get("XDG_RUNTIME_DIR")
    if uid != 0 and session:
        return Path(session) / "mfs"
    return Path(f"/tmp/mfs-{uid}")


def create_directory() -> Path:
    """Make the runtime directory, or check that it is ours: in /tmp anyone could have made it first.

    Raises: ConfigError.
    """
    path = directory()
    # Root's is open to passers-by, so that a readable socket (ServerConfig.socket_mode) can be reached.
    mode = 0o755 if path == Path("/run/mfs") else 0o700
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        _check_owner(path, os.geteuid())
    except OSError as error:
        raise ConfigError(f"runtime directory {path} cannot be made: {error.strerror}") from error
    except AccessError as error:
        raise ConfigError(f"{error}; remove it, or set XDG_RUNTIME_DIR") from error
    return path


def _check_owner(path: Path, uid: int) -> None:
    """Raises: AccessError unless only `uid` can put things into the directory; OSError."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise AccessError(f"runtime directory {path} is not a directory")
    if status.st_uid != uid or status.st_mode & 0o022:
        raise AccessError(
            f"runtime directory {path} is owned by uid {status.st_uid} with mode {status.st_mode & 0o777:04o}: "
            f"expected uid {uid}, writable by nobody else"
        )


def mount_hash(mountpoint: str) -> str:
    """The file name, without its ending, of everything about the mount at this real path."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def socket_path(mountpoint: str, folder: Path | None = None) -> Path:
    """Where the daemon of the mount at this real path listens. Raises: ConfigError if the path is too long to bind."""
    path = (folder or directory()) / f"{mount_hash(mountpoint)}.sock"
    longest = path.with_suffix(_LONGEST_ENDING)
    length_bytes = len(os.fsencode(longest))
    if length_bytes > _SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"socket path {longest} is {length_bytes} bytes long: the kernel allows {_SOCKET_PATH_BYTES_MAX}; "
            f"set XDG_RUNTIME_DIR (or MFS_RUNTIME_DIR) to a shorter directory"
        )
    return path


def log_path(mountpoint: str) -> Path:
    """Where a background daemon logs when it was given no log file."""
    return directory() / f"{mount_hash(mountpoint)}.log"


@contextmanager
def locked(mountpoint: str) -> Iterator[int]:
    """Hold the mount's place; yields the lock's descriptor, which another process may inherit, lock and all.

    Raises: ConfigError if another daemon holds it. The kernel drops the lock of a daemon that was killed.
    """
    folder = create_directory()
    file = socket_path(mountpoint, folder).with_suffix(".lock")
    # The file stays: removing it would let two daemons hold two files of one name.
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_record(mountpoint, folder)
            pid = f" by pid {holder.pid}" if holder else ""
            raise ConfigError(
                f"{mountpoint} is being served already{pid}: 'mfs umount {mountpoint}' ends that"
            ) from None
        yield lock
    finally:
        os.close(lock)


@contextmanager
def room_held() -> Iterator[None]:
    """Hold as much of the runtime directory's file system as `announced` and the sockets need for a moment.

    A full one is found out before anything depends on it. Raises: ConfigError.
    """
    folder = create_directory()
    with ExitStack() as stack:
        try:
            room = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # has no name: a kill leaves nothing
            os.posix_fallocate(room.fileno(), 0, _ROOM_BYTES)
        except OSError as error:
            raise ConfigError(f"nothing can be written in {folder}: {error.strerror}") from error
        yield


@contextmanager
def registered(record: Record) -> Iterator[Path]:
    """Hold the mount's place and say who serves there; yields the path for the daemon's socket. See `locked`."""
    with locked(record.mountpoint), announced(record) as socket_file:
        yield socket_file


@contextmanager
def announced(record: Record) -> Iterator[Path]:
    """Say who serves the mount whose lock is held; yields the path for the daemon's socket.

    Leaving removes record and socket, unless they are another daemon's by then.
    """
    folder = create_directory()
    socket_file = socket_path(record.mountpoint, folder)
    record_file = socket_file.with_suffix(".json")
    temporary = record_file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(record)))
    temporary.replace(record_file)
    try:
        yield socket_file
    finally:
        if read_record(record.mountpoint, folder) == record:
            record_file.unlink(missing_ok=True)
            socket_file.unlink(missing_ok=True)


def record_of_self(
    mountpoint: str, *, cache_dir: str | None, log_file: str | None, started_at: float, sources: tuple[str, ...]
) -> Record:
    """The record of the calling process."""
    pid = os.getpid()
    ticks = process_started_ticks(pid) or 0
    return Record(pid, ticks, mountpoint, cache_dir, log_file, started_at, sources)


def read_record(mountpoint: str, folder: Path | None = None) -> Record | None:
    """What is written about the mount at this real path, or None if nothing readable is."""
    file = (folder or directory()) / f"{mount_hash(mountpoint)}.json"
    try:
        values = json.loads(file.read_bytes())
        return Record(**(values | {"sources": tuple(values["sources"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def process_started_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before ')' may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class Served:
    """A path under a mount, and how to reach the daemon that serves it."""

    place: Place
    mountpoint: str
    """Where the daemon mounted it: differs from the place's for a bind mount."""
    socket: Path
    record: Record | None
    """None where the runtime directory is not readable, or the daemon ended without a trace."""


def find_mount(path: str) -> Served:
    """The mfs mount that `path` lies in, found without touching the mount. Raises: NotFoundError."""
    mounts = mountinfo.read()
    place = mountinfo.locate(path, mounts)
    if place is None:
        raise NotFoundError(f"{path} is not under an mfs mount; 'mfs status' lists the mounts of this machine")
    return _served(place, mounts)


def list_mounts() -> list[Served]:
    """All mfs mounts this process sees, bind mounts of one file system only once."""
    mounts = mountinfo.read()
    seen: set[str] = set()
    served = []
    for mount in mounts:
        if mount.is_mfs and mount.device not in seen:
            seen.add(mount.device)
            served.append(_served(Place(mount, ""), mounts))
    return served


def _served(place: Place, mounts: list[Mount]) -> Served:
    """Look for the daemon: under every name its file system has, in its owner's runtime directory."""
    names = [place.mount.mountpoint]
    names += [mount.mountpoint for mount in mounts if mount.device == place.mount.device and mount != place.mount]
    folders = _folders(place.mount.user_id)
    for folder in folders:
        for name in names:
            record = read_record(name, folder)
            if record is not None:
                return Served(place, name, socket_path(name, folder), record)
    return Served(place, names[0], socket_path(names[0], folders[0]), None)


def _folders(uid: int | None) -> list[Path]:
    """Runtime directories in which a daemon of user `uid` may have registered; only such as nobody else can fill."""
    own = directory()
    if uid is None or uid == os.geteuid() or "MFS_RUNTIME_DIR" in os.environ:
        return [own]
    others = [Path("/run/mfs")] if uid == 0 else [Path(f"/run/user/{uid}/mfs")]
    trusted = []
    for folder in [*others, Path(f"/tmp/mfs-{uid}")]:
        try:
            _check_owner(folder, uid)
            trusted.append(folder)
        except (OSError, AccessError):
            continue
    return trusted or [own]
