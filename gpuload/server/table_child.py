"""A process that reads one large table: `python -P -m gpuload.server.table_child FD PATH TENSORS_MAX`.

Writes to stdout, in msgpack: {error, message} as on the wire; or {tensors_count, metadata, data_start, file_bytes,
oddities} and then lists of rows, one for each tensor. If it is ended in the middle, rows are missing.
"""

from __future__ import annotations

import gc
import resource
import sys

import msgpack

from gpuload.errors import to_wire
from gpuload.moving.shards import read_header
from mfs.errors import IntegrityError, MfsError, UsageError

MEMORY_BYTES = 1 << 30
"""Of address space. A header of a quarter million tensors needs half of it."""

METADATA_CHARS_MAX = 16 << 20
"""Of the file's own strings, which are handed out to whoever attaches."""

TABLE_CHARS_MAX = 64 << 20
"""Of all names, with what their shapes take: an answer to whoever attaches has 128 MiB at most."""

ROWS_COUNT = 1000
"""Of one list: some 100 KB, a millisecond of the server's Python."""

CPU_S = 60
ODDITIES_MAX = 100
"""That are told: a file may have one for every tensor."""


def main() -> None:
    fd, path, tensors_max = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()  # there are no circles, and looking for them took as long as the parsing
    out = sys.stdout.buffer
    try:
        header = read_header(fd, path)
        metadata = sum(len(key) + len(value) for key, value in (header.metadata or {}).items())
        table = sum(len(t.name) + 20 * len(t.shape) for t in header.tensors)
        for count, most, what in (
            (len(header.tensors), tensors_max, "tensors"),
            (metadata, METADATA_CHARS_MAX, "characters of metadata"),
            (table, TABLE_CHARS_MAX, "characters of names and shapes"),
        ):
            if count > most:
                raise UsageError(
                    f"{path}: {count} {what}, more than the {most} that a server keeps: load it with gpuload.load_file"
                )
    except MfsError as error:
        out.write(msgpack.packb(to_wire(error)))
        return
    except MemoryError:
        told = IntegrityError(f"{path}: its header takes more than {MEMORY_BYTES >> 20} MiB to read")
        out.write(msgpack.packb(to_wire(told)))
        return
    head = {
        "tensors_count": len(header.tensors),
        "metadata": header.metadata,
        "data_start": header.data_start,
        "file_bytes": header.file_bytes,
        "oddities": header.oddities[:ODDITIES_MAX],
    }
    out.write(msgpack.packb(head))
    for at in range(0, len(header.tensors), ROWS_COUNT):
        out.write(msgpack.packb(header.tensors[at : at + ROWS_COUNT]))
    out.flush()


if __name__ == "__main__":
    main()
