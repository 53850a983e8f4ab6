"""Tables of clients' files, as a server that serves others meanwhile can read them.

Python parses JSON holding its one lock: a legal header of 99 MB stops every thread for half a minute and takes up to
3 GB. A small one is parsed here; a larger one in a process of its own (`table_child`), bounded in memory and time,
whose answer comes some rows at a time. What the server keeps of a model is bounded too.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

import msgpack

from gpuload.errors import BusyError, from_wire
from gpuload.moving.shards import from_os_error, read_header
from gpuload.server.client_files import Shares
from mfs import children
from mfs.errors import IntegrityError, UsageError
from mfs.safetensors import LENGTH_BYTES, Header, TensorInfo, header_bytes_needed

PARSED_HERE_BYTES_MAX = 256 << 10
"""Some milliseconds; the headers of most files."""

TENSORS_MAX = 250_000
"""Of one model. The largest known has 90,000; each takes the server about a kilobyte."""

ROW_BYTES_MAX = 256 << 20
"""Of the child's answer; above all that it says in one piece."""

CHILDREN_MAX = 8
"""Tables that are parsed at once, by the rule of shares; each may take `table_child.MEMORY_BYTES`."""

PARSE_S = 90.0
"""Longest life of such a process, and longest wait for a place."""

END_S = 5.0
"""How long a killed one is waited for: one that reads from a hung file system does not end before that does."""

_children = Shares(CHILDREN_MAX)


def read_table(fd: int, path: str, who: int, *, tensors_max: int = TENSORS_MAX) -> Header:
    """As `shards.read_header`, in bounded memory. Blocks; never long while it holds the interpreter.

    who: the client's process.
    Raises: as that; UsageError for more than a server keeps; BusyError.
    """
    try:
        is_small = header_bytes_needed(os.pread(fd, LENGTH_BYTES, 0)) <= PARSED_HERE_BYTES_MAX
    except OSError as error:
        raise from_os_error(error, path) from None
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from None
    header = read_header(fd, path) if is_small else _read_in_child(fd, path, who)
    if len(header.tensors) > tensors_max:
        raise UsageError(
            f"{path}: with its {len(header.tensors)} tensors the model has more than the {TENSORS_MAX} that a server"
            " keeps: load it with gpuload.load_file"
        )
    return header


def _read_in_child(fd: int, path: str, who: int) -> Header:
    if not _children.take(who, timeout_s=PARSE_S):
        raise BusyError(f"{path}: other large tables are being read; try later")
    try:
        process = subprocess.Popen(
            children.python("-m", "gpuload.server.table_child", str(fd), path, str(TENSORS_MAX)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(fd,),
            cwd=children.CWD, env=children.environment(),
        )  # fmt: skip
        deadline = threading.Timer(PARSE_S, process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            assert process.stdout is not None
            with process.stdout as answer:
                return _header(answer, path)
        finally:
            deadline.cancel()
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
    finally:
        _children.put(who)


def _header(answer: IO[bytes], path: str) -> Header:
    """Raises: what the child says; IntegrityError if it was ended before it said all."""
    rows: Iterator[Any] = iter(
        msgpack.Unpacker(answer, max_buffer_size=ROW_BYTES_MAX, use_list=False, strict_map_key=False)
    )
    head = next(rows, None)
    if isinstance(head, dict) and "error" in head:
        raise from_wire(head)
    tensors = tuple(TensorInfo._make(row) for some in rows for row in some)
    if not isinstance(head, dict) or len(tensors) != head["tensors_count"]:
        raise IntegrityError(f"{path}: its header takes too much memory or time to read")
    return Header(tensors, head["metadata"], head["data_start"], head["file_bytes"], tuple(head["oddities"]))
