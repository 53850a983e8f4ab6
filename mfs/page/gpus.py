"""What gpuload has on this node's GPUs, asked at its socket as any client would; mfs does not know gpuload otherwise.

The protocol is `gpuload.wire`'s: four bytes of length, then JSON. Blocks: for a thread.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import Any

from mfs.control.api import Json

_TIMEOUT_S = 1.0  # for all of it
_ANSWER_BYTES_MAX = 4 << 20
_LENGTH = struct.Struct(">I")


def socket_path() -> str:
    """Where gpuload's server listens, by the same rule as `gpuload.paths.default_socket`."""
    given = os.environ.get("GPULOAD_SOCKET")
    if given:
        return given
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return os.path.join(runtime, "gpuload.sock")
    return f"/tmp/gpuload-{os.getuid()}/gpuload.sock"


def look() -> Json:
    """{state: 'none' | 'ok' | 'not answering', note, devices: as its status has them, without what is not shown}."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        until_s = time.monotonic() + _TIMEOUT_S
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(socket_path())
        except (FileNotFoundError, ConnectionRefusedError):
            return {"state": "none", "note": "", "devices": []}
        except OSError as error:
            return {"state": "not answering", "note": f"gpuload: {error.strerror or error}", "devices": []}
        try:
            body = json.dumps({"op": "status", "fds": 0}).encode()
            sock.sendall(_LENGTH.pack(len(body)) + body)
            (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size, until_s))
            if length > _ANSWER_BYTES_MAX:
                raise ValueError(f"an answer of {length} bytes")
            return {"state": "ok", "note": "", "devices": _devices(json.loads(_exactly(sock, length, until_s)))}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return {"state": "not answering", "note": f"gpuload: {error or type(error).__name__}", "devices": []}


def _devices(answer: dict[str, Any]) -> list[Json]:
    return [
        {
            "device": str(device["device"]), "arena_bytes": int(device["arena_bytes"]),
            "free_bytes": int(device["arena_free_bytes"]), "swaps": int(device["loads"]),
            "models": [
                {"name": str(model["model"]), "bytes": int(model["bytes_here"]), "leases": int(model["leases"]),
                 "pinned": bool(model["pinned"])}
                for model in device["models"]
            ],
        }
        for device in answer["devices"]
    ]  # fmt: skip


def _exactly(sock: socket.socket, nbytes: int, until_s: float) -> bytes:
    data = b""
    while len(data) < nbytes:
        sock.settimeout(max(0.001, until_s - time.monotonic()))
        more = sock.recv(min(nbytes - len(data), 1 << 16))
        if not more:
            raise ValueError("the answer broke off")
        data += more
    return data
