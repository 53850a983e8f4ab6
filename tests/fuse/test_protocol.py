"""Messages against the kernel's own header: a C program that includes <linux/fuse.h> says where each field stands."""

from __future__ import annotations

import json
import re
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mfs.fuse import protocol
from mfs.fuse.protocol import Opcode

HEADER = Path("/usr/include/linux/fuse.h")
TIME_NS = 1_700_000_000_123_456_789
PRINTER = r"""
#include <linux/fuse.h>
#include <stddef.h>
#include <stdio.h>
#define SIZE(s) printf("\"%s\": %zu,\n", #s, sizeof(struct s))
#define AT(s, f) printf("\"%s.%s\": [%zu, %zu],\n", #s, #f, offsetof(struct s, f), sizeof(((struct s *)0)->f))
int main(void) {
    puts("{");
    SIZE(fuse_in_header); SIZE(fuse_out_header); SIZE(fuse_forget_in); SIZE(fuse_batch_forget_in);
    SIZE(fuse_forget_one); SIZE(fuse_open_in); SIZE(fuse_read_in); SIZE(fuse_release_in); SIZE(fuse_getxattr_in);
    SIZE(fuse_attr); SIZE(fuse_entry_out); SIZE(fuse_attr_out); SIZE(fuse_open_out); SIZE(fuse_kstatfs);
    SIZE(fuse_getxattr_out);
    AT(fuse_in_header, opcode); AT(fuse_in_header, unique); AT(fuse_in_header, nodeid);
    AT(fuse_read_in, fh); AT(fuse_read_in, offset); AT(fuse_read_in, size);
    AT(fuse_attr, ino); AT(fuse_attr, size); AT(fuse_attr, blocks); AT(fuse_attr, mtime); AT(fuse_attr, mtimensec);
    AT(fuse_attr, mode); AT(fuse_attr, nlink); AT(fuse_attr, uid); AT(fuse_attr, gid); AT(fuse_attr, blksize);
    AT(fuse_entry_out, nodeid); AT(fuse_entry_out, entry_valid); AT(fuse_entry_out, attr_valid);
    AT(fuse_entry_out, attr);
    AT(fuse_attr_out, attr_valid); AT(fuse_attr_out, attr);
    AT(fuse_open_out, fh); AT(fuse_open_out, open_flags);
    AT(fuse_kstatfs, blocks); AT(fuse_kstatfs, files); AT(fuse_kstatfs, bsize); AT(fuse_kstatfs, namelen);
    AT(fuse_kstatfs, frsize);
    AT(fuse_dirent, ino); AT(fuse_dirent, off); AT(fuse_dirent, namelen); AT(fuse_dirent, type);
    printf("\"name\": %zu, \"keep\": %d, \"noflush\": %d}\n", FUSE_NAME_OFFSET, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH);
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sizes, and [offset, size] of fields."""
    compiler = shutil.which("cc")
    if compiler is None or not HEADER.exists():
        pytest.skip("needs a C compiler and linux/fuse.h (linux-libc-dev)")
    folder = tmp_path_factory.mktemp("header")
    (folder / "p.c").write_text(PRINTER)
    subprocess.run([compiler, "-o", folder / "p", folder / "p.c"], check=True)
    return json.loads(subprocess.run([folder / "p"], check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


def field(header: dict[str, Any], name: str, message: bytes, *, at: int = 0) -> int:
    """A field of a message of ours, where the kernel's header says it is."""
    offset, size = header[name]
    return int.from_bytes(message[at + offset : at + offset + size], "little")


def test_opcodes_are_the_kernels() -> None:
    if not HEADER.exists():
        pytest.skip("needs linux/fuse.h")
    numbers = dict(re.findall(r"^\s*FUSE_([A-Z_]+)\s*=\s*(\d+)", HEADER.read_text(), re.MULTILINE))
    assert {opcode.name: int(numbers[opcode.name]) for opcode in Opcode} == {o.name: o.value for o in Opcode}


@pytest.mark.parametrize(
    ("kernels", "ours"),
    [
        ("fuse_in_header", protocol.IN_HEADER), ("fuse_out_header", protocol.OUT_HEADER),
        ("fuse_forget_in", protocol.FORGET_IN), ("fuse_batch_forget_in", protocol.BATCH_FORGET_IN),
        ("fuse_forget_one", protocol.FORGET_ONE), ("fuse_open_in", protocol.OPEN_IN),
        ("fuse_read_in", protocol.READ_IN), ("fuse_release_in", protocol.RELEASE_IN),
        ("fuse_getxattr_in", protocol.GETXATTR_IN),
    ],
)  # fmt: skip
def test_requests_are_as_long_as_the_kernels(header: dict[str, Any], kernels: str, ours: struct.Struct) -> None:
    assert ours.size == header[kernels]


def test_requests_are_read_where_the_kernel_writes(header: dict[str, Any]) -> None:
    for struct_name, parse, names in (
        ("fuse_in_header", protocol.IN_HEADER, ("opcode", "unique", "nodeid")),
        ("fuse_read_in", protocol.READ_IN, ("fh", "offset", "size")),
    ):
        message = bytearray(header[struct_name])
        for number, name in enumerate(names, 1):
            offset, size = header[f"{struct_name}.{name}"]
            message[offset : offset + size] = number.to_bytes(size, "little")
        assert parse.unpack(message) == (1, 2, 3)


def attributes(**changed: int) -> bytes:
    said = {
        "inode": 11,
        "mode": stat.S_IFREG | 0o444,
        "links": 1,
        "size": 12345,
        "time_ns": TIME_NS,
        "uid": 7,
        "gid": 8,
    }
    return protocol.attributes(**(said | changed))


def test_answers_stand_where_the_kernel_reads(header: dict[str, Any]) -> None:
    attr = attributes()
    entry = protocol.entry_answer(11, 60, 3600, attr)
    told = protocol.attributes_answer(3600, attr)
    opened = protocol.open_answer(5, protocol.KEEP_CACHE | protocol.NO_FLUSH)
    full = protocol.statfs_answer(100, 3, 255)
    assert [len(message) for message in (attr, entry, told, opened, full, protocol.xattr_size_answer(3))] == [
        header[name]
        for name in (
            "fuse_attr",
            "fuse_entry_out",
            "fuse_attr_out",
            "fuse_open_out",
            "fuse_kstatfs",
            "fuse_getxattr_out",
        )
    ]
    for name, value in {
        "ino": 11, "size": 12345, "blocks": 25, "mtime": TIME_NS // 10**9, "mtimensec": TIME_NS % 10**9,
        "mode": stat.S_IFREG | 0o444, "nlink": 1, "uid": 7, "gid": 8, "blksize": 4096,
    }.items():  # fmt: skip
        for message, at in (
            (attr, 0), (entry, header["fuse_entry_out.attr"][0]), (told, header["fuse_attr_out.attr"][0]),
        ):  # fmt: skip
            assert field(header, f"fuse_attr.{name}", message, at=at) == value, name
    said = {name: field(header, f"fuse_entry_out.{name}", entry) for name in ("nodeid", "entry_valid", "attr_valid")}
    assert said == {"nodeid": 11, "entry_valid": 60, "attr_valid": 3600}
    assert field(header, "fuse_attr_out.attr_valid", told) == 3600
    assert field(header, "fuse_open_out.fh", opened) == 5
    assert field(header, "fuse_open_out.open_flags", opened) == header["keep"] | header["noflush"]
    said = {
        name: field(header, f"fuse_kstatfs.{name}", full) for name in ("blocks", "files", "bsize", "namelen", "frsize")
    }
    assert said == {"blocks": 100, "files": 3, "bsize": 4096, "namelen": 255, "frsize": 4096}


def test_a_time_before_the_epoch_is_negative_seconds_and_positive_rest(header: dict[str, Any]) -> None:
    attr = attributes(time_ns=-1)
    offset, size = header["fuse_attr.mtime"]
    assert int.from_bytes(attr[offset : offset + size], "little", signed=True) == -1
    assert field(header, "fuse_attr.mtimensec", attr) == 999_999_999


@pytest.mark.parametrize("name", [b"a", b"exactly8", b"\xffnot utf-8", b"n" * 255])
def test_a_directory_entry_ends_at_eight_bytes(header: dict[str, Any], name: bytes) -> None:
    entry = protocol.directory_entry(3, 9, stat.S_IFDIR | 0o555, name)
    start = header["name"]
    said = {
        field_name: field(header, f"fuse_dirent.{field_name}", entry)
        for field_name in ("ino", "off", "namelen", "type")
    }
    assert said == {"ino": 3, "off": 9, "namelen": len(name), "type": stat.S_IFDIR >> 12}
    assert entry[start : start + len(name)] == name
    assert len(entry) % 8 == 0
    assert len(entry) - start - len(name) < 8


def test_a_batch_of_forgets_is_read_to_its_count() -> None:
    body = struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 10, 1, 11, 4) + b"what stood in the buffer"
    assert list(protocol.forgotten(memoryview(body))) == [(10, 1), (11, 4)]
