"""Hosts of several addresses: real sockets of this machine, some of which swallow what wants to connect."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from mfs.fetch.dial import _alternating, dial

NEVER_S = 3600.0
"""Nothing here is to wait for it: a test that does is ended by its own time."""


@contextmanager
def listener(host: str, port: int = 0) -> Iterator[socket.socket]:
    with socket.create_server((host, port)) as server:
        yield server


@contextmanager
def silent(host: str, port: int = 0) -> Iterator[socket.socket]:
    """A server whose queue is full: the kernel drops what else wants to connect, as a firewall would."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server


def resolve(monkeypatch: pytest.MonkeyPatch, port: int, hosts: Sequence[str]) -> None:
    """Make any name have these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_an_address_that_swallows_what_comes_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener("127.0.0.3") as server, silent("127.0.0.1", port_of(server)), silent("127.0.0.2", port_of(server)):
        resolve(monkeypatch, port_of(server), ["127.0.0.1", "127.0.0.2", "127.0.0.3"])
        with dial("host", port_of(server), NEVER_S) as sock:
            assert sock.getpeername() == server.getsockname()
            assert sock.gettimeout() is None


def test_one_that_is_slow_may_still_be_the_first_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener("127.0.0.1") as server, silent("127.0.0.2", port_of(server)):
        resolve(monkeypatch, port_of(server), ["127.0.0.1", "127.0.0.2"])
        with dial("host", port_of(server), NEVER_S) as sock:
            assert sock.getpeername() == server.getsockname()


def test_an_address_that_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener("127.0.0.2") as server:
        resolve(monkeypatch, port_of(server), ["127.0.0.1", "127.0.0.2"])
        with dial("host", port_of(server), NEVER_S) as sock:
            assert sock.getpeername() == server.getsockname()
        resolve(monkeypatch, port_of(server), ["127.0.0.1", "127.0.0.3"])
        with pytest.raises(ConnectionRefusedError):
            dial("host", port_of(server), NEVER_S)


def test_silence_of_all_ends_with_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent("127.0.0.1") as first, silent("127.0.0.2", port_of(first)):
        resolve(monkeypatch, port_of(first), ["127.0.0.1", "127.0.0.2", "127.0.0.3"])
        with pytest.raises(TimeoutError):
            dial("host", port_of(first), 0.6)


def test_families_take_turns() -> None:
    six, four = (socket.AF_INET6, "six"), (socket.AF_INET, "four")
    found = [(family, socket.SOCK_STREAM, 6, f"{name}{n}", ("", 0)) for family, name in (six, four) for n in range(3)]
    assert [name for *_, name, _ in _alternating(found[:5])] == ["six0", "four0", "six1", "four1", "six2"]
    assert _alternating([]) == []
