"""Whether this machine can mount, and what its kernel gives a mount."""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mfs.findings import Finding, fault, note, ok, warning
from mfs.planning.wanted import Wanted

_SINCE = (6, 9)
"""`fuse.kernel.PASSTHROUGH_SINCE`, which cannot be imported where pyfuse3 is missing: a test keeps the two equal."""
_CAP_SYS_ADMIN = 21
_FUSECTL = Path("/sys/fs/fuse/connections")


def examine(wanted: Wanted, root: Path = Path("/")) -> Iterator[Finding]:
    """root: of the tree that /proc, /sys, /dev and /etc are read from."""
    yield _release(os.uname().release)
    yield from _parts()
    yield _module(root)
    yield _device(root / "dev/fuse")
    yield _may_mount(root)
    if os.geteuid():
        yield _allow_other(root / "etc/fuse.conf", wanted)
    yield _queue(root)


def _release(release: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        return note("kernel", release, "its version cannot be read: 'mfs status' says what a mount has")
    if (int(found[1]), int(found[2])) >= _SINCE:
        value = f"Linux {release}: whole files are read by the kernel itself, a killed daemon is a pause"
        if os.geteuid():
            return note(
                "kernel", value + "; the former for mounts of root's only", "mount as root for local-file speed"
            )
        return ok("kernel", value)
    return warning(
        "kernel",
        f"Linux {release}: every read goes through the daemon, and a mount ends with it",
        f"Linux {_SINCE[0]}.{_SINCE[1]} or newer has passthrough and resend",
    )


def _parts() -> Iterator[Finding]:
    yield ok("python", platform.python_version())
    try:
        yield ok("pyfuse3", metadata.version("pyfuse3"))
    except metadata.PackageNotFoundError:
        yield fault("pyfuse3", "not installed", "install mfs's dependencies: pip install mfs")
    try:
        library = ctypes.CDLL("libfuse3.so.3")
        library.fuse_pkgversion.restype = ctypes.c_char_p
        yield ok("libfuse", library.fuse_pkgversion().decode())
    except (OSError, AttributeError):
        yield fault("libfuse", "libfuse3.so.3 cannot be loaded", "install libfuse 3 (Debian: libfuse3-3)")


def _module(root: Path) -> Finding:
    try:
        known = (root / "proc/filesystems").read_text().split()
    except OSError as error:
        return note("fuse module", f"/proc/filesystems cannot be read: {error.strerror}")
    if "fuse" in known:
        return ok("fuse module", "loaded")
    return fault("fuse module", "not loaded", "as root of the machine itself, not of a container: modprobe fuse")


def _device(path: Path) -> Finding:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return fault("/dev/fuse", "missing", "in a container: --device /dev/fuse; elsewhere: modprobe fuse")
    except PermissionError as error:
        return fault(
            "/dev/fuse",
            f"cannot be opened: {error.strerror}",
            "its mode should be 0666; in a container its device group must allow it: --device /dev/fuse",
        )
    except OSError as error:
        return fault("/dev/fuse", f"cannot be opened: {error.strerror}", "modprobe fuse")
    return ok("/dev/fuse", "can be opened")


def _may_mount(root: Path) -> Finding:
    """Root mounts by itself and needs the capability; others by fusermount3, which is setuid."""
    if os.geteuid() == 0:
        if _capabilities(root / "proc/self/status") >> _CAP_SYS_ADMIN & 1:
            return ok("mounting", "root, with CAP_SYS_ADMIN; fusermount3 is not needed")
        return fault("mounting", "root without CAP_SYS_ADMIN", "in a container: --cap-add SYS_ADMIN")
    if not _has_name(os.geteuid()):
        return fault(
            "mounting", f"uid {os.geteuid()} has no name", "fusermount3 mounts for users in /etc/passwd: add one there"
        )
    program = shutil.which("fusermount3")
    if program is None:
        return fault("mounting", "fusermount3 is not installed", "install it (Debian: fuse3), or mount as root")
    status = os.stat(program)
    if not (status.st_mode & 0o4000 and status.st_uid == 0):
        return fault("mounting", f"{program} is not setuid root", f"as root: chown root {program}; chmod u+s {program}")
    return ok("mounting", f"by {program}")


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _capabilities(status: Path) -> int:
    """The effective ones of this process, all if nobody says."""
    try:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    except OSError:
        return -1
    return int(found[1], 16) if found else -1


def _allow_other(conf: Path, wanted: Wanted) -> Finding:
    try:
        is_allowed = any(line.strip() == "user_allow_other" for line in conf.read_text().splitlines())
    except OSError:
        is_allowed = False
    advice = f"add the line 'user_allow_other' to {conf}"
    if is_allowed:
        return ok("other users", f"{conf} has user_allow_other")
    if wanted.allow_other:
        return fault("other users", f"allow_other is wanted, and {conf} has no user_allow_other", advice)
    return note("other users", f"{conf} has no user_allow_other: only you can read what you mount", advice)


def _queue(root: Path) -> Finding:
    """See `mfs.fuse.kernel`: who cannot raise max_background cannot keep a hung model from the others."""
    place = root / _FUSECTL.relative_to("/")
    if os.geteuid():
        return note(
            "fuse queue", "max_background stays at the kernel's 12: only root raises it",
            "mount as root, so that a model that hangs holds up no other",
        )  # fmt: skip
    if root == Path("/") and not os.path.ismount(place):
        return warning(
            "fuse queue", "fusectl is not mounted: max_background stays at the kernel's 12",
            f"as root: mount -t fusectl none {_FUSECTL}",
        )  # fmt: skip
    return ok("fuse queue", "max_background can be raised")
