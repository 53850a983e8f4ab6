"""What others make of a family's files: bytes that each member adds, one after the other. Pure of us; no network.

    zstd -3, zstd -19   each file by itself
    ZipNN               weights as its README has it (bf16, automatic); other files by zstd -3, its default level
    whole files         S3 with names by content, Git LFS: what is equal as a whole is there once
    Xet                 `hf-xet` itself, uploading into a folder: its chunks, its compression, its index

Files that are equal as a whole count once everywhere: nobody compresses the same tokenizer twice.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zstandard

from tools.bench.processes import BenchError

WHOLE_FILES, ZSTD, ZSTD_SLOW, ZIPNN, XET = "whole files", "zstd -3", "zstd -19", "ZipNN", "Xet"
PEERS = (WHOLE_FILES, ZSTD, ZSTD_SLOW, ZIPNN, XET)
_SLOW_THREADS = 2


def added_bytes(peer: str, members: dict[str, Path], folder: Path) -> dict[str, int]:
    """What each member adds, in their order. folder: not there yet, and removed again.

    Raises: BenchError where the peer cannot be used here.
    """
    if peer == XET:
        return _xet(members, folder)
    pack = _PACKERS[peer]()
    seen: set[bytes] = set()
    jobs: list[tuple[str, Path]] = []
    for member, path in members.items():
        for file in files_of(path):
            digest = hashlib.sha256(file.read_bytes()).digest()
            if digest not in seen:
                seen.add(digest)
                jobs.append((member, file))
    added = dict.fromkeys(members, 0)
    with ThreadPoolExecutor(_SLOW_THREADS if peer == ZSTD_SLOW else 1) as pool:
        for (member, _), count in zip(jobs, pool.map(lambda job: pack(job[1]), jobs), strict=True):
            added[member] += count
    return added


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sum_of_files(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def _whole() -> Callable[[Path], int]:
    return lambda file: file.stat().st_size


def _zstd(level: int) -> Callable[[Path], int]:
    return lambda file: len(zstandard.ZstdCompressor(level).compress(file.read_bytes()))


def _zipnn() -> Callable[[Path], int]:
    try:
        from zipnn import ZipNN
    except ImportError as error:
        raise BenchError(f"{error}: pip install zipnn (it needs a compiler)") from None
    plain = _zstd(3)

    def pack(file: Path) -> int:
        if file.suffix != ".safetensors":
            return plain(file)
        # It may write into what it is given.
        data = bytearray(file.read_bytes())
        return len(ZipNN(input_format="byte", bytearray_dtype="bfloat16").compress(data))

    return pack


_PACKERS: dict[str, Callable[[], Callable[[Path], int]]] = {
    WHOLE_FILES: _whole,
    ZSTD: lambda: _zstd(3),
    ZSTD_SLOW: lambda: _zstd(19),
    ZIPNN: _zipnn,
}


def _xet(members: dict[str, Path], folder: Path) -> dict[str, int]:
    """What its store grows by: xorbs (chunks, compressed as it sees fit) and shards (which chunks a file is)."""
    try:
        import hf_xet
    except ImportError as error:
        raise BenchError(f"{error}: pip install hf-xet") from None
    store: Any = f"local://{folder / 'cas'}"
    added, before = {}, 0
    (folder / "cas").mkdir(parents=True)
    try:
        for member, path in members.items():
            files = [str(file) for file in files_of(path)]
            hf_xet.upload_files(files, store, None, None, None, "model")
            kept = folder / "cas" / "xet" / "xorbs"
            now = sum(file.stat().st_size for part in ("xorbs", "shards") for file in files_of(kept / part))
            if now == 0:
                raise BenchError(f"hf-xet {hf_xet.__name__}: nothing below {kept}: it keeps its store elsewhere now")
            added[member], before = now - before, now
    except (RuntimeError, OSError) as error:
        raise BenchError(f"hf-xet: {' '.join(str(error).split())[:300]}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return added
