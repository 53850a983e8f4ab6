"""Network, mounts and processes of our own: when the run ends, however it ends, the kernel takes away all it started.

The loopback that gets capped is then nobody else's, mounts made here are not seen outside, and the first process of the
namespace takes all others with it.
"""

from __future__ import annotations

import ctypes
import os
import signal

from tools.bench.processes import BenchError

_CLONE_NEWNS, _CLONE_NEWNET, _CLONE_NEWPID = 0x00020000, 0x40000000, 0x20000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> None:
    """Return in a child process inside new namespaces. The caller's process waits, passes signals on, and ends with it.

    Raises: BenchError where the machine does not allow that.
    """
    # os.unshare is there from Python 3.12 on.
    _call("unshare", _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWPID))
    child = os.fork()
    if child:
        _stand_by(child)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _call("mount --make-rprivate /", _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _call("mount /proc", _libc.mount(b"proc", b"/proc", b"proc", 0, None))


def _stand_by(child: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the child by itself
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: os.kill(child, got))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _call(what: str, result: int) -> None:
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        raise BenchError(f"{what} failed ({reason}): needs root, and in a container --privileged")
