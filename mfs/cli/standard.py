"""What every command stands on: descriptors 0 to 2, how names are read and written, and output that cannot be written.

Both commands, `mfs` and `gpuload`, call `prepare` before they import anything else of ours.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO, TypeGuard

_OUTPUT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)
_ENCODING_OPTION = "mfs_encoding"


def prepare(*, may_restart: bool) -> None:
    """Make standard descriptors, their encodings and the names of files what the rest takes for granted.

    A descriptor that is closed becomes /dev/null: else the next file we open would be 'standard output'. What a
    terminal's encoding cannot say is written as an escape. File names are UTF-8 here whatever the locale says, as on
    the mount and in every source: under another locale this process starts again in Python's UTF-8 mode (PEP 540), if
    `may_restart`, and still writes in the terminal's encoding.
    """
    for fd in (0, 1, 2):
        _open_if_closed(fd)
    if may_restart and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
        flags = ["-X", "utf8", "-X", f"{_ENCODING_OPTION}={encoding}"]
        os.execv(sys.executable, (sys.executable, *flags, *_arguments()))
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:  # it was closed when Python began
            setattr(sys, name, os.fdopen(fd, mode, encoding="utf-8", closefd=False))
    encoding_wanted = sys._xoptions.get(_ENCODING_OPTION)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a test's own stream has none
        if reconfigure is not None:
            reconfigure(encoding=encoding_wanted or stream.encoding, errors="backslashreplace")


def _arguments() -> list[bytes]:
    """What this process was started with, behind its name, to the byte.

    `sys.orig_argv` holds what the locale made of it, which in those of several bytes a character (EUC-JP, GBK) does not
    always go back. Source: proc_pid_cmdline(5).
    """
    with open("/proc/self/cmdline", "rb") as file:
        return file.read().split(b"\0")[1:-1]


def _open_if_closed(fd: int) -> None:
    """As /dev/null, for our children too."""
    try:
        os.fstat(fd)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)
        os.set_inheritable(fd, True)


def tell(line: str) -> None:
    """A line on standard error. If that is full, or nobody's, the exit status has to say it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def flushed_fault() -> OSError | None:
    """Write out what standard output still holds. Why it cannot be written, if so; it is given up then."""
    try:
        sys.stdout.flush()
        return None
    except OSError as error:
        give_up(sys.stdout)
        return error


def give_up(stream: TextIO) -> None:
    """Let what the stream holds go nowhere: Python would try again at its end, and complain."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
    except (OSError, ValueError):  # no descriptor behind it, or none left
        pass


def is_of_output(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error came from writing what a command prints: any file it opens by itself has a name."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_ERRNOS


def is_nobody_reading(error: OSError) -> bool:
    """Whether the reader of our output has seen enough, which is no news to anybody."""
    return error.errno == errno.EPIPE
