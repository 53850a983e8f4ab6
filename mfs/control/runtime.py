"""Where running daemons are found: one socket, one record and one lock per mount, in the runtime directory.

    <directory>/<hash>.sock   the control socket
    <directory>/<hash>.loans  where the RAM tier is lent
    <directory>/<hash>.next   where the mount is handed to the next daemon
    <directory>/<hash>.page   address of the page in a browser, and the token that lets in (`mfs.page.where`)
    <directory>/<hash>.json   who serves there (Record)
    <directory>/<hash>.lock   held by the daemon as long as it lives
    <directory>/<hash>.log    what a background daemon says, where it was given no log file

<hash> is made of the mount point's real path. A record whose process is gone is stale: the next mount replaces it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mfs.control import mountinfo
from mfs.control.mountinfo import Mount, Place
from mfs.errors import AccessError, ConfigError, NotFoundError

_SOCKET_PATH_BYTES_MAX = 107  # sun_path, less its final zero: unix(7)
_LONGEST_ENDING = ".loans"
_ROOM_BYTES = 16 << 10
_LOCK_ATTEMPTS, _LOCK_PAUSE_S = 5, 0.02  # whoever only looks whether a lock is free holds it for an instant
_RECORD_BYTES_MAX = 4 << 20
_PROBE_S = 5.0


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
    holder_pid: int = 0
    """Of the process that starts the next daemon if this one is killed; 0 without one."""
    holder_started_ticks: int = 0

    @property
    def is_held(self) -> bool:
        """Whether the holder lives: if the daemon does not, its successor is on the way."""
        return self.holder_pid > 0 and process_started_ticks(self.holder_pid) == self.holder_started_ticks

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs (in this PID namespace)."""
        return process_started_ticks(self.pid) == self.pid_started_ticks


def directory() -> Path:
    """The runtime directory of this process's user; it may not exist yet."""
    override = os.environ.get("MFS_RUNTIME_DIR")
    if override:
        return Path(os.path.abspath(override))  # the daemon stands elsewhere
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


def _is_trusted(path: Path, uid: int) -> bool:
    """Whether only `uid`, or we, can put things into a directory."""
    for owner in {uid, os.geteuid()}:
        try:
            _check_owner(path, owner)
            return True
        except (OSError, AccessError):
            continue
    return False


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
    lock = _lock(file)
    if lock is None:
        holder = read_record(mountpoint, folder)
        pid = f" by pid {holder.pid}" if holder else ""
        raise ConfigError(f"{mountpoint} is being served already{pid}: 'mfs umount {mountpoint}' ends that")
    try:
        yield lock
    finally:
        os.close(lock)


def _lock(file: Path) -> int | None:
    """A locked file, its descriptor; None if somebody else holds it."""
    for _ in range(_LOCK_ATTEMPTS):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who ends removes it (`leftovers`): two daemons must not hold two files of one name.
            if os.path.samestat(os.fstat(lock), file.lstat()):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)
        time.sleep(_LOCK_PAUSE_S)
    return None


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
def announced(record: Record, stays: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Say who serves the mount whose lock is held; yields the path for the daemon's socket.

    Leaving removes record and socket, unless they are another daemon's by then.
    stays: asked on leaving, whether they are to stay until another daemon replaces them, as after a kill.
    """
    folder = create_directory()
    socket_file = socket_path(record.mountpoint, folder)
    record_file = socket_file.with_suffix(".json")
    temporary = record_file.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)  # nobody else's business
    with open(fd, "w") as file:
        json.dump(asdict(record), file)
    temporary.replace(record_file)
    try:
        yield socket_file
    finally:
        if not stays() and read_record(record.mountpoint, folder) == record:
            record_file.unlink(missing_ok=True)
            socket_file.unlink(missing_ok=True)


def record_of_self(
    mountpoint: str, *, cache_dir: str | None, log_file: str | None, started_at: float, sources: tuple[str, ...],
    holder_pid: int = 0,
) -> Record:  # fmt: skip
    """The record of the calling process."""
    pid = os.getpid()
    ticks, holder_ticks = (process_started_ticks(process) or 0 for process in (pid, holder_pid))
    return Record(pid, ticks, mountpoint, cache_dir, log_file, started_at, sources, holder_pid, holder_ticks)


def read_record(mountpoint: str, folder: Path | None = None, *, owner: int | None = None) -> Record | None:
    """What is written about the mount at this real path, or None if nothing readable is.

    owner: uid of the mount; None is ours. A directory that others could fill is not read: they would say whom to end.
    """
    folder = folder or directory()
    if not _is_trusted(folder, os.geteuid() if owner is None else owner):
        return None
    try:
        # A file of another user's directory, for root: no link, nothing that waits for a writer, nothing endless.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(folder / f"{mount_hash(mountpoint)}.json", flags)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            values = json.loads(file.read(_RECORD_BYTES_MAX))
        record = Record(**(values | {"sources": tuple(values["sources"])}))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if _is_sound(record) else None


def _is_sound(record: Record) -> bool:
    """Whether the fields are what they are said to be: the file is some text that somebody wrote."""
    texts = (record.mountpoint, *record.sources, *filter(None, (record.cache_dir, record.log_file)))
    numbers = (record.pid, record.pid_started_ticks, record.holder_pid, record.holder_started_ticks)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        and 0 < record.pid < 1 << 31
        and isinstance(record.started_at, int | float)
    )


def serves(record: Record, folder: Path, owner: int) -> bool:
    """Whether the process of a record is a daemon of uid `owner` that holds the lock of its mount.

    Asked before anybody is ended: a record may be old, or written by whoever wants another process ended. False also
    where the process cannot be looked into. Source: proc_pid_fdinfo(5), 'lock:'.
    """
    process = Path(f"/proc/{record.pid}")
    try:
        lock = os.path.realpath(socket_path(record.mountpoint, folder).with_suffix(".lock"))
        uids = {line.split()[1] for line in (process / "status").read_text().splitlines() if line.startswith("Uid:")}
        if not record.is_alive or uids != {str(owner)}:
            return False
        for number in os.listdir(process / "fd"):
            try:
                if os.readlink(process / "fd" / number).removesuffix(" (deleted)") == lock:
                    said = (process / "fdinfo" / number).read_text()
                    if any(line.startswith("lock:") and "FLOCK" in line for line in said.splitlines()):
                        return True
            except OSError:  # closed meanwhile
                continue
    except (OSError, ConfigError):
        pass
    return False


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

    @property
    def is_listening(self) -> bool:
        """Whether something accepts connections on the mount's socket, or is there but not for us to ask."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_PROBE_S)
            try:
                sock.connect(str(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except OSError:  # permission denied, or so busy that its queue is full: the call itself will say
                return True
        return True


def find_mount(path: str) -> Served:
    """The mfs mount that `path` lies in, found without touching the mount.

    Raises: NotFoundError; AccessError where others could have put a daemon of theirs into the runtime directory.
    """
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
            record = read_record(name, folder, owner=place.mount.user_id)
            if record is not None:
                return Served(place, name, socket_path(name, folder), record)
    return Served(place, names[0], socket_path(names[0], folders[0]), None)


def _folders(uid: int | None) -> list[Path]:
    """Runtime directories in which a daemon of user `uid` may have registered; only such as nobody else can fill.

    Raises: AccessError if it is ours that others can fill.
    """
    own = directory()
    if uid is None or uid == os.geteuid() or "MFS_RUNTIME_DIR" in os.environ:
        if os.path.lexists(own):
            try:
                _check_owner(own, os.geteuid())
            except AccessError as error:
                if uid is None or not _is_trusted(own, uid):
                    raise AccessError(f"{error}; nothing in it is believed: 'fusermount3 -u' unmounts") from None
        return [own]
    others = [Path("/run/mfs")] if uid == 0 else [Path(f"/run/user/{uid}/mfs")]
    return [folder for folder in [*others, Path(f"/tmp/mfs-{uid}")] if _is_trusted(folder, uid)] or [own]
