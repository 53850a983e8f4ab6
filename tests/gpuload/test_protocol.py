"""PROTOCOL.md, spoken by hand: sockets, lengths and JSON, nothing of ours but the server."""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpuload.testing import ServerThread
from tests.gpuload.conftest import GRANULE

one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])

SUMMARY = {
    "model", "device", "devices", "digest", "label", "bytes", "tensors_count", "ranks", "leases", "pinned", "retain",
    "generation",
}  # fmt: skip
SIZES = {"device"} | {
    f"arena{what}_bytes" for what in ("", "_most", "_floor", "_committed", "_used", "_free", "_evictable", "_room")
}


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(path)
    return sock


def exactly(sock: socket.socket, count: int) -> bytes:
    return sock.recv(count, socket.MSG_WAITALL)


def say(sock: socket.socket, question: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
    body = json.dumps({**question, "fds": len(fds)} if fds else question).encode()
    sock.sendall(struct.pack(">I", len(body)) + body)
    if fds:
        sock.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    answer = json.loads(exactly(sock, struct.unpack(">I", exactly(sock, 4))[0]))
    got: list[int] = []
    while len(got) < answer["fds"]:
        mark, more, _, _ = socket.recv_fds(sock, 1, 200)
        assert mark == b"F"
        got += more
    return answer, got


def ask(server: ServerThread, op: str, fds: Sequence[int] = (), **more: Any) -> dict[str, Any]:
    with connect(server.socket_path) as sock:
        answer, got = say(sock, {"op": op, **more}, fds)
        assert not got
        return answer


def safetensors(data: bytes, name: str = "w") -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def bytes_of(answer: dict[str, Any], fds: Sequence[int]) -> bytes:
    """Of the one tensor that was attached to."""
    [part], [[_, _, _, at_part, offset, nbytes]] = answer["parts"], answer["tensors"]
    assert (part["device"], part["fds"], at_part, part["granule_bytes"]) == ("cpu", 1, 0, GRANULE)
    assert set(part) == {"device", "arena", "granule_bytes", "runs", "fds"}
    with mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as arena:
        os.close(fds[0])
        memory = b"".join(arena[first * GRANULE : (first + count) * GRANULE] for first, count in part["runs"])
    return memory[offset : offset + nbytes]


@one_way
def test_every_question(server: ServerThread, tmp_path: Path) -> None:
    old, new = (bytes(range(seed, seed + 200)) * 50 for seed in (1, 2))
    assert set(ask(server, "ping")) == {"protocol", "version", "pid", "fds"}
    assert set(ask(server, "metrics")) == {"text", "content_type", "fds"}
    assert ask(server, "wait", model="m") == {"model": "m", "generation": 0, "digest": "", "changed": False, "fds": 0}

    file = tmp_path / "a.safetensors"
    answers = []
    for op, data in (("load", old), ("swap", new)):
        file.unlink(missing_ok=True)
        file.write_bytes(safetensors(data))
        with open(file, "rb") as opened:
            answers.append(ask(server, op, [opened.fileno()], model="m", files=[str(file)], wait_s=1, explain=True))
        assert set(answers[-1]) == SUMMARY | {"report", "explained", "fds"}
    loaded, swapped = answers
    assert swapped["generation"] > loaded["generation"]
    for what in ({"after": loaded["generation"]}, {"unlike": loaded["digest"], "after": swapped["generation"]}):
        told = ask(server, "wait", model="m", timeout_s=60, **what)
        assert (told["changed"], told["digest"], set(told)) == (True, swapped["digest"], SUMMARY | {"changed", "fds"})

    with connect(server.socket_path) as sock:
        attached = say(sock, {"op": "attach", "model": "m"})
        assert bytes_of(*attached) == new
        assert set(attached[0]) == SUMMARY | {"parts", "tensors", "metadata", "fds"}
        status = ask(server, "status")
        [device] = status["devices"]
        assert set(status) == {
            "protocol", "version", "pid", "uptime_s", "servers_before", "weights_since_s", "outlives_a_crash",
            "generation", "waiting", "mounts", "ram_tiers", "devices", "fds",
        }  # fmt: skip
        assert set(device) == SIZES | {"identity", "device_bytes", "device_free_bytes", "loads", "gauges", "models"}
        [model] = device["models"]
        assert set(model) == SUMMARY | {"bytes_here", "bytes_alone", "holders"}
        assert model["holders"] == [{"pid": os.getpid(), "uid": os.getuid()}]
        gone = ask(server, "unload", model="m")
        assert (gone["model"], gone["leases"], gone["released"]) == ("m", 1, False)
        [model] = ask(server, "status")["devices"][0]["models"]
        assert (model["model"], model["was"]) == (None, "m")

    with open(file, "rb") as opened, connect(server.socket_path) as sock:
        opened_ = say(sock, {"op": "open", "files": ["a"]}, [opened.fileno()])
        assert bytes_of(*opened_) == new
        assert set(opened_[0]) == SUMMARY | {"parts", "tensors", "metadata", "report", "fds"}
        assert ask(server, "unload", model=opened_[0]["model"])["leases"] == 1

    with connect(server.socket_path) as sock:
        assert bytes_of(*commit(sock, old)) == old
    assert ask(server, "pin", model="c") == {"model": "c", "pinned": True, "fds": 0}
    refused = ask(server, "resize", bytes=0)
    assert (refused["error"], set(refused)) == ("FitError", {"error", "message", "shortfall_bytes", "fds"})
    ask(server, "pin", model="c", pinned=False)
    most = device["arena_most_bytes"]
    resized = ask(server, "resize", bytes=0, evict=True, wait_s=1)
    assert (set(resized), resized["evicted"], resized["arena_bytes"]) == (SIZES | {"evicted", "fds"}, ["c"], 0)
    assert ask(server, "resize", bytes=most, floor_bytes=0)["arena_bytes"] == most
    assert ask(server, "no such")["error"] == "UsageError"


def commit(sock: socket.socket, data: bytes) -> tuple[dict[str, Any], list[int]]:
    whole = safetensors(data)
    begin, fd = len(whole) - len(data), os.memfd_create("bytes")
    os.ftruncate(fd, len(whole))
    os.pwrite(fd, whole[:begin], 0)
    ours, theirs = socket.socketpair()

    def give() -> None:
        while want := exactly(ours, 16):
            start, stop = struct.unpack("<QQ", want)
            os.pwrite(fd, whole[start:stop], start)
            ours.sendall(b"\0")

    giving = threading.Thread(target=give)
    giving.start()
    try:
        return say(sock, {"op": "commit", "model": "c", "files": ["c"]}, [fd, theirs.fileno()])
    finally:
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        giving.join()
        ours.close()
        os.close(fd)
