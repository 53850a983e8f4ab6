"""Nodes with addresses of their own: network namespaces on one bridge of this machine, where origins and caches are.

Only the network is another there: files, processes and mounts are everybody's. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """`count` nodes; the bridge has `address`, node i has `address_of(i)`."""

    def __init__(self, count: int) -> None:
        self._id = f"{random.randrange(1 << 20):05x}"
        self.bridge = f"mfs{self._id}"
        self._net = f"198.18.{random.randrange(1, 255)}"  # for tests of networks (RFC 2544); one of many for each run
        self.count = count
        self.address = f"{self._net}.1"

    def address_of(self, node: int) -> str:
        return f"{self._net}.{10 + node}"

    @contextlib.contextmanager
    def inside(self, node: int) -> Iterator[None]:
        """What this thread starts meanwhile is on that node."""
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{self._name(node)}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def __enter__(self) -> Network:
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            for node in range(self.count):
                self._add(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in range(self.count):
            _ip("netns", "del", self._name(node), check=False)
        _ip("link", "del", self.bridge, check=False)

    def _add(self, node: int) -> None:
        name, ours = self._name(node), f"v{self._id}{node}"
        _ip("netns", "add", name)
        _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", ours, "master", self.bridge, "up")
        _ip("-n", name, "addr", "add", f"{self.address_of(node)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")

    def _name(self, node: int) -> str:
        return f"mfs{self._id}-{node}"


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if check and done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def reason_why_not() -> str:
    """Why no network can be made here, '' where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network(1):
            return ""
    except OSError as error:
        return f"no network namespaces here: {error}"
