"""The cache directory: whose it must be, how it is made, and how what stands in it is opened. `sidecar` has the format.

Its files carry checksums, not signatures: whoever can write here decides what readers get. So the directory belongs to
root or to who mounts, nobody else can write to it, and no link in it is followed. `shared` gives that up on purpose.

Two kinds of refusal. ConfigError: this is no directory for a cache, a person must name another. StoreError: it could be
one, but the disk does not let us now (read-only, full, failing); that may pass, and mounts serve without it until then.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from mfs.errors import ConfigError, StoreError

FORMAT = 2
MARKER = "mfs-cache.json"
PARTS = ("objects", "index", "pins")
"""Directories below `root_of`."""
LAYERS = "layers"
"""Another one, there only where a source had to unpack something: `mfs.oci.unpacked`."""
_ROOT = f"v{FORMAT}"
_FILES = ("names.lock", "tree.sqlite", "tree.sqlite-journal", "tree.sqlite-wal", "tree.sqlite-shm", "evict.lock",
          "chunks.index", "chunks.lock", "chunks.new")  # fmt: skip
_MAY_PASS = {
    errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
    errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG,
    errno.ESHUTDOWN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOMEDIUM,
}  # fmt: skip
"""What a disk says that is full, failing, away or read-only; anything else is about the name that was given."""
_OTHERS = 0o022
_OVERFLOW_UID = 65534  # who seems to own what belongs to no user of this namespace: user_namespaces(7)


def root_of(directory: Path) -> Path:
    """Where all of a cache stands but its marker."""
    return directory / _ROOT


def check_directory(directory: Path, *, shared: bool = False) -> None:
    """Make the directory, or see that it can be a cache of ours.

    Raises: ConfigError naming it, what is wrong and what to do; StoreError where its disk does not let us now.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(directory, shared)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _refusal(directory, error) from error


def look_at_directory(directory: Path, *, shared: bool = False) -> None:
    """What `check_directory` would find of a directory that stands, without changing or writing anything.

    Raises: as `check_directory`; whether its disk has room only writing tells.
    """
    try:
        _check_owner(directory, shared, mend=False)
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _refusal(directory, error) from error


def open_directory(directory: Path, *, shared: bool = False, create: bool = True) -> None:
    """Make the cache, or see that it is one of ours, with all its parts.

    create: also where nothing stands. Raises: as `check_directory`.
    """
    try:
        if create:
            check_directory(directory, shared=shared)
        _check_owner(directory, shared)
        # One look at the names: another worker may be making this very directory at the same instant.
        names = os.listdir(directory)
        if not _is_marked(directory, names, shared):
            _mark(directory)
        for name in ("", "objects"):
            (root_of(directory) / name).mkdir(mode=0o700, exist_ok=True)
        for name in ("", *PARTS, LAYERS):
            _check_part(root_of(directory) / name, shared)
        for name in _FILES:
            _refuse_foreign(root_of(directory) / name, shared)
        for name in (*PARTS[:-1], LAYERS):  # a pin is but a name
            _check_below(root_of(directory) / name, shared, depth=2 if name == "index" else 1)
    except OSError as error:
        raise _refusal(directory, error) from error


def open_own(path: str | Path, flags: int, *, shared: bool = False) -> int:
    """Open a file of the cache; new ones are ours alone. Raises: OSError, PermissionError for what others own."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    status = os.fstat(fd)
    if not shared and not is_ours(status):
        os.close(fd)
        raise PermissionError(errno.EPERM, f"it belongs to uid {status.st_uid}")
    return fd


def is_ours(status: os.stat_result) -> bool:
    """Whether root or this process' user owns it."""
    return status.st_uid in (0, os.geteuid())


def _refusal(directory: Path, error: OSError) -> ConfigError | StoreError:
    if error.errno in _MAY_PASS:
        return StoreError(f"cache directory {directory} cannot be used now ({error})")
    below = str(error.filename) if error.filename not in (None, str(directory)) else ""
    if isinstance(error, FileExistsError) and not below:
        return ConfigError(f"cache directory {directory} is not a directory: name one with --cache-dir")
    why = "Not a directory" if isinstance(error, FileExistsError) else error.strerror or str(error)
    why += f": {below}" if below else ""
    return ConfigError(f"cache directory {directory} cannot be written: {why}; name another one with --cache-dir")


def _check_owner(directory: Path, shared: bool, *, mend: bool = True) -> None:
    """Raises: ConfigError if others could put things here, or another directory in its place.

    mend: take others' right to write from one that is ours and empty; else it is only known that this would be done.
    """
    status = os.stat(directory)
    if shared:
        return
    if not is_ours(status):
        raise ConfigError(
            f"cache directory {directory} belongs to uid {status.st_uid}: expected uid {os.geteuid()}, or root's: "
            f"its owner decides what readers get; name another --cache-dir, or trust them with --cache-shared"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & _OTHERS and status.st_uid == os.geteuid() and not os.listdir(directory):  # a new one, of a lax umask
        if mend:
            os.chmod(directory, mode & ~_OTHERS)
            mode = stat.S_IMODE(os.stat(directory).st_mode)
        else:
            mode &= ~_OTHERS
    if mode & _OTHERS:
        raise ConfigError(
            f"cache directory {directory} has mode {mode:04o}: others can write to it, and "
            f"decide what readers get; empty it and 'chmod go-w' it, or trust them with --cache-shared"
        )
    for parent in Path(os.path.realpath(directory)).parents:
        above = os.stat(parent)
        if above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX:
            raise ConfigError(
                f"cache directory {directory} can be replaced by anyone, since {parent} has mode "
                f"{stat.S_IMODE(above.st_mode):04o}; 'chmod o-w' that, or trust them with --cache-shared"
            )
        if not is_ours(above) and above.st_uid != _OVERFLOW_UID:
            raise ConfigError(
                f"cache directory {directory} can be replaced by uid {above.st_uid}, who owns {parent}; "
                f"name another --cache-dir, or trust them with --cache-shared"
            )


def _check_part(part: Path, shared: bool) -> None:
    """Raises: ConfigError unless this is a directory of ours; takes others' right to write from one that is."""
    _refuse_foreign(part, shared)
    if not os.path.lexists(part):
        return
    mode = stat.S_IMODE(os.lstat(part).st_mode)
    if mode & _OTHERS and not shared:
        os.chmod(part, mode & ~_OTHERS)


def _check_below(folder: Path, shared: bool, depth: int) -> None:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            _refuse_foreign(Path(entry.path), shared)
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                _check_below(Path(entry.path), shared, depth - 1)


def _refuse_foreign(path: Path, shared: bool) -> None:
    """Raises: ConfigError for a link, what is no file or directory, or what others own."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(
            f"{path} is a symbolic link: a cache of ours has none; remove it, or name another --cache-dir"
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a FIFO would keep its reader for ever
        raise ConfigError(f"{path} is neither file nor directory; remove it, or name another --cache-dir")
    if not shared and not is_ours(status):
        raise ConfigError(
            f"{path} belongs to uid {status.st_uid}, who would decide what readers get; remove it, name another "
            f"--cache-dir, or trust them with --cache-shared"
        )


def _is_marked(directory: Path, names: list[str], shared: bool) -> bool:
    """Whether the marker stands there; False where it is yet to be made, or was lost. Raises: ConfigError."""
    if MARKER not in names:
        strange = next((n for n in names if n not in ("lost+found", _ROOT) and not n.endswith(".tmp")), None)
        if strange is not None or (_ROOT in names and not _looks_ours(directory)):
            raise ConfigError(
                f"cache directory {directory} is neither empty nor an mfs cache (it holds {strange or _ROOT!r}); "
                f"name an empty one with --cache-dir"
            )
        return False
    _refuse_foreign(directory / MARKER, shared)
    found: object = None
    with suppress(ValueError, AttributeError):  # cut off by a crash: no format at all
        found = json.loads((directory / MARKER).read_text()).get("format")
    if found is None and _looks_ours(directory):
        return False
    if found == 1 and not isinstance(found, bool):
        raise ConfigError(
            f"cache directory {directory} has format 1, expected {FORMAT}: an earlier mfs kept one file per chunk "
            f"there; remove its v1/ and {MARKER}, or name another one with --cache-dir"
        )
    if found != FORMAT or isinstance(found, bool):
        raise ConfigError(
            f"cache directory {directory} has format {found!r}, expected {FORMAT}: it was written by another "
            f"version of mfs; name another --cache-dir or delete this one"
        )
    return True


def _looks_ours(directory: Path) -> bool:
    """Whether the root is what only a cache has, so that a marker that is lost can be made again."""
    try:
        names = set(os.listdir(root_of(directory)))
    except OSError:
        return False
    return bool(names) and names <= {*PARTS, LAYERS, *_FILES}


def _mark(directory: Path) -> None:
    temporary = directory / f"{MARKER.removesuffix('.json')}.{secrets.token_hex(6)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "w") as file:
        file.write(json.dumps({"format": FORMAT}))
        file.flush()
        os.fsync(file.fileno())  # the one file of a cache that is not made again from others
    temporary.rename(directory / MARKER)
