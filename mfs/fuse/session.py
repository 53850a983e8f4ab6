"""One FUSE session: mounting, serving, telling the kernel what changed, and handing the mount to another process.

pyfuse3 has one session per process. A session serves from `serve` on, until the kernel ends it (somebody unmounted)
or the context is left. In between it may be paused: then requests wait in the kernel, those that were being answered
are dropped, and whoever serves next, this process or another one, has the kernel send them again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pyfuse3
import trio

from mfs.errors import ConfigError, StoreError
from mfs.fuse import device
from mfs.fuse.device import Agreement, Channel
from mfs.fuse.kernel import TASKS_MAX
from mfs.fuse.loop import Loop
from mfs.fuse.operations import Operations

logger = logging.getLogger(__name__)

_AGREE_TIMEOUT_S = 10.0
_NAMES_AT_ONCE = 256
Name = tuple[int, str]
"""(directory inode, name)"""


class Session:
    """A mount's connection to the kernel."""

    def __init__(
        self, operations: Operations, channel: Channel, unmount: Callable[[], None], nursery: trio.Nursery
    ) -> None:
        self.ended = trio.CancelScope()
        """Cancelled when the kernel ends the session, and by who wants it to end."""
        self.agreement = Agreement(b"", b"")
        self.unsaid_names: deque[Name] = deque()
        """Names the kernel must still be told to ask for again."""
        self.is_ours = False
        """Whether leaving unmounts: not before the device is ours, not after it was given away."""
        self.on_closing: Callable[[], None] = lambda: None
        """Told when a session that is ours ends: nobody else need serve it."""
        self.on_letting_go: Callable[[], None] = lambda: None
        """Told before the device is let go of, however: its number means something else then, and as long as anybody
        here has it open, readers of a mount that nobody serves wait."""
        self.is_held: Callable[[], bool] = lambda: False
        """Whether somebody else goes on with it, should we fail."""
        self.channel = channel
        self._operations = operations
        self._unmount = unmount
        self._nursery = nursery
        self._serving = trio.CancelScope()
        self._paused = trio.Event()
        self._resumed = trio.Event()
        self._unsaid = trio.Event()
        self._told = trio.Event()

    @property
    def device(self) -> int:
        """The descriptor of /dev/fuse, once connected."""
        return self.channel.fd

    # -- the beginning

    async def agree(self, request: bytes) -> bytes:
        """Have libfuse answer an INIT; its reply is returned. Raises: StoreError if it gives none."""
        ours = self.channel.our_end
        ours.send(request)
        with trio.move_on_after(_AGREE_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                await trio.lowlevel.wait_readable(ours)
                nursery.cancel_scope.cancel()
            return ours.recv(1 << 16)
        raise StoreError(f"libfuse did not answer INIT within {_AGREE_TIMEOUT_S:g} s")

    def connect(self, fd: int, agreement: Agreement) -> None:
        """Put the kernel, which is at descriptor `fd`, behind libfuse's; from here on leaving unmounts."""
        self.channel.connect(fd)
        self.agreement = agreement
        self.is_ours = True

    # -- serving

    def start(self) -> None:
        """Answer the kernel from now on, until it ends the session; also what another process has left unanswered."""
        self._operations.files.passthrough.connect(self.device, self.agreement)
        if self.agreement.can_resend:
            device.resend(self.device)
        self._nursery.start_soon(self._serve)

    async def _serve(self) -> None:
        self._nursery.start_soon(self._tell_names)
        handlers = self._operations.handlers
        loop = Loop(
            self.device, handlers, write_bytes_max=self.agreement.write_bytes_max, tasks_max=TASKS_MAX,
            times=self._operations.times,
        )  # fmt: skip
        while True:
            os.set_blocking(self.device, False)
            with trio.CancelScope() as self._serving:
                await loop.run()
            if not self._serving.cancelled_caught:
                break
            os.set_blocking(self.device, True)  # as another version of us, or libfuse, would want it
            self._paused.set()
            await self._resumed.wait()
            self._paused, self._resumed = trio.Event(), trio.Event()
            device.resend(self.device)
        self.ended.cancel()
        self._paused.set()

    async def pause(self) -> None:
        """Stop answering: returns when no handler runs. What the kernel asks from now on waits, and what the next
        daemon is told of stays as it is.

        Raises: StoreError if the kernel has ended the session.
        """
        self._serving.cancel()
        await self._paused.wait()
        if self.ended.cancel_called:
            raise StoreError("the mount is being taken away")
        self._operations.hold()

    def resume(self) -> None:
        """Answer again, also what was dropped."""
        self._operations.go_on()
        self._resumed.set()

    def release(self) -> None:
        """The mount belongs to somebody else now: this session, which answers nothing, never touches it again."""
        self.is_ours = False
        self.on_letting_go()
        self._operations.files.passthrough.let_go()
        self.channel.disconnect()

    # -- names

    def invalidate_names(self, names: Iterable[Name]) -> None:
        """Have the kernel ask again for these names, soon. Never blocks."""
        if not self.is_ours:  # whoever has the mount now tells it
            return
        self.unsaid_names.extend(names)
        self._unsaid.set()

    async def wait_told(self) -> None:
        """Until the kernel knows of all names so far: whoever looks from now on sees what was published."""
        while self.is_ours and self.unsaid_names:
            await self._told.wait()

    async def _tell_names(self) -> None:
        """In a thread: the kernel holds us up while a request about the same directory waits for its answer."""
        while True:
            await self._unsaid.wait()
            while self.unsaid_names:
                batch = [self.unsaid_names[i] for i in range(min(_NAMES_AT_ONCE, len(self.unsaid_names)))]
                await trio.to_thread.run_sync(_invalidate, batch, abandon_on_cancel=True)
                for _ in batch:  # only now: told twice is no harm, should we stop in between
                    self.unsaid_names.popleft()
                self._told.set()
                self._told = trio.Event()
            self._unsaid = trio.Event()

    # -- the end

    def close(self) -> None:
        """End the session; unmount if it is ours to do, and the mount still there.

        One that nobody asked to end has failed: where the mount is held it stays, for the next daemon to serve.
        """
        if self.is_ours and not self.ended.cancel_called and self.is_held():
            self.release()
        still_mounted = self.is_ours and device.is_connected(self.device)
        if self.is_ours:
            self.on_closing()
        self.on_letting_go()
        pyfuse3.close(unmount=False)  # first: unmounting may ask the file system, and nobody answers any more
        if still_mounted:
            self._unmount()


def _invalidate(names: list[Name]) -> None:
    for inode, name in names:
        try:
            pyfuse3.invalidate_entry(inode, name.encode())
        except FileNotFoundError:  # the kernel did not know it
            pass
        except OSError as error:
            logger.warning("the kernel was not told that %r changed: %s", name, error)
    # The directory's own time: for a name that the kernel does not know, the above leaves it as it was (fs/fuse/dir.c).
    for inode in dict.fromkeys(inode for inode, _ in names):
        try:
            pyfuse3.invalidate_inode(inode, attr_only=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("the kernel was not told that a directory changed: %s", error)


@contextlib.asynccontextmanager
async def mounted(
    operations: Operations, mountpoint: Path, *, label: str, allow_other: bool, unmount: Callable[[], None]
) -> AsyncIterator[Session]:
    """Mount; unmounts when the context is left. Nothing is answered before `Session.start`.

    unmount: takes the mount away; blocks. Raises: ConfigError if it cannot be mounted. On exit requests still waiting
    are dropped: their readers get ENOTCONN.
    """
    try:
        pyfuse3.init(pyfuse3.Operations(), str(mountpoint), _options(label, allow_other))
    except RuntimeError as error:
        raise ConfigError(
            f"{mountpoint} cannot be mounted ({error}): {_mount_help(allow_other)}; libfuse's own words are in the log"
        ) from error
    async with _open(operations, Channel(), unmount) as session:
        session.is_ours = True
        fd = session.channel.take_place_of(device.find())
        request = device.read_init(fd)
        reply = device.honoured(request, await session.agree(request))
        os.write(fd, reply)
        session.connect(fd, Agreement(request, reply))
        os.close(fd)
        yield session


@contextlib.asynccontextmanager
async def adopting(
    operations: Operations, agreement: Agreement, *, label: str, allow_other: bool, unmount: Callable[[], None]
) -> AsyncIterator[Session]:
    """A session like that of the process that mounted, without the device: `Session.connect` brings it.

    Raises: ConfigError if our libfuse does not agree to what was agreed on.
    """
    channel = Channel()
    try:
        pyfuse3.init(pyfuse3.Operations(), f"/dev/fd/{channel.fd}", _options(label, allow_other))
    except RuntimeError as error:
        channel.close()
        raise ConfigError(f"libfuse does not take a connection that exists already ({error})") from error
    async with _open(operations, channel, unmount) as session:
        request = agreement.repeated()
        agreement.check_same(device.honoured(request, await session.agree(request)))
        yield session


@contextlib.asynccontextmanager
async def _open(operations: Operations, channel: Channel, unmount: Callable[[], None]) -> AsyncIterator[Session]:
    """pyfuse3's one session; when the context is left, whatever it was doing is dropped."""
    session: Session | None = None
    try:
        async with trio.open_nursery() as nursery:
            session = Session(operations, channel, unmount, nursery)
            try:
                yield session
            finally:
                nursery.cancel_scope.cancel()
    finally:
        assert session is not None
        session.close()
        operations.close_all()


def _options(label: str, allow_other: bool) -> set[str]:
    options = {"default_permissions", "ro", "nosuid", "nodev", "subtype=mfs", f"fsname=mfs:{_ascii(label)}"}
    return options | {"allow_other"} if allow_other else options


def _mount_help(allow_other: bool) -> str:
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing; in a container start it with --device /dev/fuse --cap-add SYS_ADMIN"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse cannot be opened ({errno.errorcode.get(error.errno or 0)})"
    if os.geteuid() and not _has_name(os.geteuid()):
        return f"fusermount3 mounts for users that have a name, and uid {os.geteuid()} is not in /etc/passwd"
    if allow_other and os.geteuid():
        return "--allow-other needs 'user_allow_other' in /etc/fuse.conf for users other than root"
    return "is fusermount3 installed (Debian package fuse3) and the mount point yours?"


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _ascii(label: str) -> str:
    """A label that libfuse takes as an option value: ASCII, without what separates options."""
    return "".join(c if c.isascii() and c.isprintable() and c not in ",\\ " else "_" for c in label)
