"""What reads from mounts in processes outside (`TestMount.call`)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from mfs.types import CHUNK_BYTES


def read_chunks(path: str, indexes: list[int]) -> int:
    """Read a byte of each of these chunks, all at once. Returns how many could not be had."""

    def fails(index: int) -> bool:
        try:
            return not os.pread(fd, 1, index * CHUNK_BYTES + 1)
        except OSError:
            return True

    fd = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(max(1, len(indexes))) as threads:
            return sum(threads.map(fails, indexes))
    finally:
        os.close(fd)


def read_run(path: str, nbytes: int) -> int:
    """Read a file from its start on. Returns how many bytes there were."""
    with open(path, "rb", buffering=0) as file:
        return sum(len(file.read(1 << 18)) for _ in range(nbytes >> 18))


def read_first(paths: list[str]) -> None:
    """Read the first byte of each file."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.read(1)


def error_of(path: str) -> str:
    """What reading the whole file ends with, '' if well."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        return str(error)
    return ""
