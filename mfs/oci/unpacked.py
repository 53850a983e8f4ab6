"""Compressed layers, unpacked whole, since nobody can read the middle of one: in a bounded place, with a warning.

With a cache directory they stand in its `layers/`, one file called by the layer's digest, for all workers of all
mounts that share it: together at most LAYERS_BYTES_MAX, the longest unused removed first, and never the last tenth of
the disk; what is being unpacked counts, and one lock of the folder is held by who counts. Without one, in memory, one
after the other, at most MEMORY_BYTES_MAX together and as much for the one under way. A layer is taken only when all of
its bytes have been seen to have its digest; one whose bytes have it and are no packed tar is never fetched again. What
was removed is unpacked again by who reads it.

One thread unpacks a layer; it goes on when a listing or read has given up waiting, and ends with the process.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import zstandard

from mfs.cache.directory import LAYERS, open_own, root_of
from mfs.errors import IntegrityError, MfsError, StoreError, TransientStoreError
from mfs.oci.artifact import BadLayerError
from mfs.oci.media import Packing

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12

LAYERS_BYTES_MAX = 64 << 30
"""Of one cache directory, unpacked. So no layer may have more."""
MEMORY_BYTES_MAX = 256 << 20
"""Of one layer without a cache directory, and of those that are kept together."""
KEPT_MAX = 16
"""Unpacked layers in memory."""
BAD_MAX = 1000
"""Layers that are known to be bad."""
PIECE_BYTES = 8 << 20
_ROOM_BYTES = 64 << 20
"""Written between two looks at the room there is."""
PIECE_S = 120.0
"""Until a piece of the layer must be here."""
_WINDOW_BYTES_MAX = 128 << 20
"""Of zstd: what `zstd` itself accepts unless told otherwise."""

Fetch = Callable[[int, memoryview, float], None]
"""(start, out, deadline_s): fill `out` from the layer as it stands in the registry, tried again as needed."""

log = logging.getLogger(__name__)


class _Work:
    """One layer being unpacked."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.read_bytes = 0
        self.error: MfsError | None = None


class UnpackedLayers:
    """The layers of one source. Thread-safe."""

    def __init__(self, cache_directory: str, stopped: threading.Event, *, elsewhere: str = "") -> None:
        """elsewhere: a directory to unpack into, so that what the cache has is read and nothing in it changed."""
        cache = root_of(Path(cache_directory)) / LAYERS if cache_directory else None
        self._folder = root_of(Path(elsewhere)) / LAYERS if elsewhere else cache
        self._looked_into = cache if elsewhere else None
        self._most = MEMORY_BYTES_MAX if self._folder is None else LAYERS_BYTES_MAX
        self._stopped = stopped
        self._guard = threading.Lock()
        self._in_memory: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """Without a folder. Digest -> (descriptor, bytes)."""
        self._turn = threading.Lock()
        """Without a folder, of who unpacks: one at a time, so that memory is bounded."""
        self._works: dict[str, _Work] = {}
        self._bad: OrderedDict[str, str] = OrderedDict()
        """Digest -> what is wrong with what has it: for ever, so nobody fetches it again."""

    def read(self, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch, start: int, out: memoryview,
             where: str, *, deadline_s: float) -> None:  # fmt: skip
        """Fill `out` from the unpacked layer, which is unpacked first where that is needed.

        Raises: TransientStoreError while that takes longer than the deadline; IntegrityError, StoreError.
        """
        fd, _ = self._opened(digest, packing, layer_bytes, fetch, where, deadline_s)
        try:
            filled = 0
            while filled < len(out):
                count = os.preadv(fd, [out[filled:]], start + filled)
                if not count:
                    raise IntegrityError(f"{where}: its unpacked layer is shorter than its table says")
                filled += count
        finally:
            os.close(fd)

    def nbytes(self, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch, where: str, *,
               deadline_s: float) -> int:  # fmt: skip
        """Bytes of the unpacked layer. Raises: as `read`."""
        fd, nbytes = self._opened(digest, packing, layer_bytes, fetch, where, deadline_s)
        os.close(fd)
        return nbytes

    def close(self) -> None:
        """Give memory back; what is being read keeps its own."""
        with self._guard:
            while self._in_memory:
                os.close(self._in_memory.popitem()[1][0])

    def _opened(self, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch, where: str,
                deadline_s: float) -> tuple[int, int]:  # fmt: skip
        """A descriptor of the caller's own, and the layer's bytes."""
        while True:
            if time.monotonic() >= deadline_s:
                raise TransientStoreError(f"{where}: not read before the deadline")
            if found := self._known(digest):
                return found
            if layer_bytes > self._most:
                raise self._too_large(where)
            with self._guard:
                if known_bad := self._bad.get(digest):
                    raise BadLayerError(known_bad)
                work = self._works.get(digest)
                if work is None:
                    log.warning("%s: a layer of %d bytes is compressed (%s): it is unpacked whole before anything of "
                                "it can be read; push it as raw layers, or as an uncompressed tar",
                                where, layer_bytes, packing)  # fmt: skip
                    work = self._works[digest] = _Work()
                    threading.Thread(target=self._run, args=(work, digest, packing, layer_bytes, fetch, where),
                                     name="unpack", daemon=True).start()  # fmt: skip
            if not work.done.wait(max(0.0, deadline_s - time.monotonic())):
                percent = 100 * work.read_bytes // max(1, layer_bytes)
                raise TransientStoreError(
                    f"{where}: its compressed layer of {layer_bytes} bytes is still being unpacked ({percent} %); try "
                    f"again, or mount with a longer --timeout"
                )
            if work.error:
                raise work.error

    def _known(self, digest: str) -> tuple[int, int] | None:
        if self._looked_into is not None:
            with suppress(OSError):  # not there, or not ours to read
                fd = open_own(self._path(self._looked_into, digest), os.O_RDONLY)
                return fd, os.fstat(fd).st_size
        if self._folder is not None:  # not kept open: a file that somebody removes for its room must give it back
            path = self._path(self._folder, digest)
            try:
                fd = open_own(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StoreError(f"{path} cannot be used: {error}") from error
            with suppress(OSError):
                os.utime(fd)
            return fd, os.fstat(fd).st_size
        with self._guard:
            known = self._in_memory.get(digest)
            if known is None:
                return None
            self._in_memory.move_to_end(digest)
            return os.dup(known[0]), known[1]

    def _keep(self, digest: str, fd: int) -> None:
        """In memory, in the place of the longest unused."""
        with self._guard:
            self._in_memory[digest] = (fd, os.fstat(fd).st_size)
            total = sum(nbytes for _, nbytes in self._in_memory.values())
            while len(self._in_memory) > 1 and (len(self._in_memory) > KEPT_MAX or total > MEMORY_BYTES_MAX):
                old, nbytes = self._in_memory.popitem(last=False)[1]
                os.close(old)
                total -= nbytes

    def _know_bad(self, digest: str, error: BadLayerError) -> None:
        with self._guard:
            self._bad[digest] = str(error)
            while len(self._bad) > BAD_MAX:
                self._bad.popitem(last=False)

    @staticmethod
    def _path(folder: Path, digest: str) -> Path:
        return folder / f"{digest.replace(':', '-')}.tar"

    def _run(self, work: _Work, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch, where: str) -> None:
        try:
            if self._folder is None:
                with self._turn:
                    fd = os.memfd_create("mfs-layer", os.MFD_CLOEXEC)
                    try:
                        self._unpack(work, fd, digest, packing, layer_bytes, fetch, where)
                    except BaseException:
                        os.close(fd)
                        raise
                    self._keep(digest, fd)
            else:
                self._unpack_into(self._folder, work, digest, packing, layer_bytes, fetch, where)
        except MfsError as error:
            work.error = error
        except Exception as error:  # told to those who wait, as any failure of a source
            work.error = StoreError(f"{where}: cannot be unpacked: {type(error).__name__}: {error}")
        finally:
            with self._guard:
                self._works.pop(digest, None)
            work.done.set()

    def _unpack_into(self, folder: Path, work: _Work, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch,
                     where: str) -> None:  # fmt: skip
        for directory in (folder.parent, folder):  # not the cache's own: its disk may be away
            directory.mkdir(mode=0o700, exist_ok=True)
        path = self._path(folder, digest)
        temporary = path.with_suffix(".tmp")
        while True:  # another worker's turn may be long; it ends with that process at the latest
            with _accounts(folder):
                if path.exists():
                    return
                fd = open_own(temporary, os.O_RDWR | os.O_CREAT)
                if _lock(fd):
                    break
                os.close(fd)
            if self._stopped.wait(0.1):
                raise StoreError(f"{where}: the source was closed")
        try:
            os.ftruncate(fd, 0)  # what one left who was killed
            self._unpack(work, fd, digest, packing, layer_bytes, fetch, where)
            os.fsync(fd)  # before its name says that it is whole
            with _accounts(folder):
                temporary.rename(path)
        except BaseException:
            with _accounts(folder):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _unpack(self, work: _Work, fd: int, digest: str, packing: Packing, layer_bytes: int, fetch: Fetch,
                where: str) -> None:  # fmt: skip
        layer = _LayerStream(work, digest, layer_bytes, fetch, self._stopped)
        try:
            self._write(fd, layer, packing, where)
        except BadLayerError as error:
            layer.check(where)  # with other bytes than its digest's it may be right the next time
            self._know_bad(digest, error)
            raise
        layer.check(where)

    def _write(self, fd: int, layer: _LayerStream, packing: Packing, where: str) -> None:
        source: IO[bytes]
        if packing is Packing.GZIP:
            source = gzip.GzipFile(fileobj=layer)  # type: ignore[assignment]
        else:
            unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
            raw = cast("IO[bytes]", layer)
            source = unpacker.stream_reader(raw, read_size=1 << 20, read_across_frames=True, closefd=False)
        done = reserved = 0
        try:
            while piece := source.read(1 << 20):
                done += len(piece)
                if done > self._most:
                    raise self._too_large(where)
                if self._folder is not None and done > reserved:
                    reserved = min(done + _ROOM_BYTES, self._most)
                    self._reserve(self._folder, fd, reserved, where)
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise BadLayerError(f"{where}: cannot be unpacked: {error}") from None
        os.ftruncate(fd, done)

    def _too_large(self, where: str) -> BadLayerError:
        cure = "" if self._folder else "; with --cache-dir larger ones can be"
        return BadLayerError(f"{where}: its compressed layer has more than {self._most} bytes when unpacked{cure}")

    def _reserve(self, folder: Path, fd: int, nbytes: int, where: str) -> None:
        """Let a file that grows have so many bytes, for which the longest unused are removed.

        Its size says to all others that share the folder what it is going to take.
        Raises: StoreError if the disk has no room; TransientStoreError while others that unpack have it all.
        """
        with _accounts(folder):
            os.ftruncate(fd, nbytes)
            total, standing = 0, []
            for entry in os.scandir(folder):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".tar"):
                    standing.append((status.st_mtime, status.st_size, entry.name))
                elif not entry.name.endswith(".tmp") or (
                    status.st_ino != os.fstat(fd).st_ino and _is_left(Path(entry.path))
                ):
                    continue
                total += status.st_size
            standing.sort(reverse=True)
            while True:
                disk = os.statvfs(folder)
                is_tight = disk.f_bavail < disk.f_blocks // 10
                if total <= LAYERS_BYTES_MAX and not is_tight:
                    return
                if not standing:
                    break
                _, freed, name = standing.pop()
                (folder / name).unlink(missing_ok=True)
                total -= freed
        if is_tight:
            raise StoreError(f"{where}: no room to unpack its compressed layer: less than a tenth of the disk below "
                             f"{folder} is free")  # fmt: skip
        raise TransientStoreError(
            f"{where}: no room to unpack its compressed layer: {total} bytes are being unpacked into {folder} at once"
        )


@contextmanager
def _accounts(folder: Path) -> Iterator[None]:
    """Held, for an instant, by whoever looks at or changes what stands in the folder."""
    lock = open_own(folder / "room.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _lock(fd: int) -> bool:
    """Take the file of a layer that is being unpacked; False if another has it, who lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_left(path: Path) -> bool:
    """Whether nobody unpacks into this file any more; then it is removed. Within `_accounts`."""
    fd = open_own(path, os.O_RDWR)
    try:
        if not _lock(fd):
            return False
        path.unlink()
        return True
    finally:
        os.close(fd)


class _LayerStream(io.RawIOBase):
    """The compressed layer from its beginning, hashed on the way."""

    def __init__(self, work: _Work, digest: str, nbytes: int, fetch: Fetch, stopped: threading.Event) -> None:
        self._work, self._digest, self._nbytes, self._fetch, self._stopped = work, digest, nbytes, fetch, stopped
        self._hash = hashlib.new(digest.partition(":")[0])
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        if not self._piece and not self._next():
            return 0
        count = min(len(view), len(self._piece))
        view[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def _next(self) -> bool:
        if self._stopped.is_set():
            raise StoreError("the source was closed")
        count = min(PIECE_BYTES, self._nbytes - self._work.read_bytes)
        if not count:
            return False
        piece = bytearray(count)
        self._fetch(self._work.read_bytes, memoryview(piece), time.monotonic() + PIECE_S)
        self._hash.update(piece)
        self._work.read_bytes += count
        self._piece = memoryview(piece)
        return True

    def check(self, where: str) -> None:
        """Raises: IntegrityError unless the whole layer has its digest; what follows the packed part counts too."""
        while self._next():
            pass
        got = f"{self._digest.partition(':')[0]}:{self._hash.hexdigest()}"
        if got != self._digest:
            raise BadLayerError(f"{where}: expected a layer of the digest {self._digest}, got bytes of {got}")
