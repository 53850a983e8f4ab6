"""The test vectors of FORMAT.md, in both directions; run as a program this writes them anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfs.registry import codecs, layout
from mfs.registry.chunk import chunk_id, digests_of, parse_table
from mfs.registry.chunk_io import decode_chunk
from mfs.registry.encode import Base, Effort, encode_chunk
from mfs.registry.manifest import manifest_id, parse_manifest

FOLDER = Path(__file__).parent / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "chunks.json").read_text()) if FOLDER.is_dir() else {}
CHUNKS: dict[str, dict[str, Any]] = VECTORS.get("chunks", {})


def ramp(nbytes: int, step: int) -> bytes:
    """Bytes that nobody needs a generator for: byte i is i * step mod 251."""
    return bytes(i * step % 251 for i in range(nbytes))


def words(count: int, start: int = 0) -> bytes:
    """bf16-like words: exponents around 0x3d, the rest a ramp."""
    return b"".join((0x3D00 + (i % 5 << 7) + ((i + start) * 37 % 128) | (i % 2 << 15)).to_bytes(2, "little")
                    for i in range(count))  # fmt: skip


PLAIN: dict[str, Callable[[], bytes]] = {
    "one byte": lambda: b"m",
    "raw": lambda: ramp(1000, 7),
    "text": lambda: b'{"architectures": ["BertModel"]}\n' * 40,
    "bf16": lambda: words(3000),
    "bf16, two frames and half a word": lambda: words(66_000) + b"\x7f",
    "f32": lambda: b"".join(w + b"\x3d" for w in (ramp(3, i) for i in range(1, 900))),
    "i64": lambda: b"".join(i.to_bytes(8, "little") for i in range(512)),
    "bf16, moved": lambda: moved(words(3000)),
}
WIDTHS = {"bf16": 2, "bf16, two frames and half a word": 2, "f32": 4, "i64": 8, "bf16, moved": 2}
BASES = {"bf16, moved": "bf16"}


def moved(plain: bytes) -> bytes:
    """Each word a few units further: 0, 1, -1, 2, 0 …"""
    return b"".join(
        ((int.from_bytes(plain[i : i + 2], "little") + (0, 1, -1, 2, 0)[i // 2 % 5]) % 65536).to_bytes(2, "little")
        for i in range(0, len(plain), 2)
    )


@pytest.mark.parametrize("name", PLAIN)
def test_a_stored_chunk_decodes_to_its_bytes(name: str) -> None:
    vector = CHUNKS[name]
    plain, body = PLAIN[name](), base64.b64decode(vector["object"])
    table = parse_table(body, vector["id"], len(plain))
    base = PLAIN[vector["base"]]() if vector["base"] else None
    assert (table.base, table.element_bytes) == (
        CHUNKS[vector["base"]]["id"] if base else None,
        vector["element_bytes"],
    )
    assert bytes(decode_chunk(table, memoryview(body), memoryview(base) if base else None)) == plain
    assert [frame.codec for frame in table.frames] == vector["codecs"]


@pytest.mark.parametrize("name", PLAIN)
def test_bytes_become_a_chunk_of_this_id(name: str) -> None:
    vector, made = CHUNKS[name], vector_of(name)
    assert made["id"] == vector["id"] == chunk_id(len(PLAIN[name]()), digests_of(memoryview(PLAIN[name]())))
    assert {key: made[key] for key in ("codecs", "element_bytes", "base", "key")} == {
        key: vector[key] for key in ("codecs", "element_bytes", "base", "key")
    }


def test_every_codec_has_a_vector() -> None:
    used = {codec for vector in CHUNKS.values() for codec in vector["codecs"]}
    assert used == {codec for codec in range(256) if codecs.is_known(codec)}


def test_the_manifest_is_read_and_written_to_the_byte() -> None:
    body = (FOLDER / "manifest.json").read_bytes()
    manifest = parse_manifest(body, VECTORS["manifest"])
    assert manifest.encode() == body
    assert {chunk.id for chunk in manifest.chunks} <= {vector["id"] for vector in CHUNKS.values()}
    assert manifest.requires == (CHUNKS["bf16"]["id"],)


def vector_of(name: str) -> dict[str, Any]:
    plain, width = memoryview(PLAIN[name]()), WIDTHS.get(name, 1)
    base = None
    if name in BASES:
        of_base = PLAIN[BASES[name]]()
        base = Base(chunk_id(len(of_base), digests_of(memoryview(of_base))), 0, memoryview(of_base))
    encoded = encode_chunk(plain, width, Effort.FAST, base)
    return {
        "plain_bytes": len(plain),
        "element_bytes": width,
        "base": BASES.get(name),
        "id": encoded.table.id,
        "key": layout.chunk_key(encoded.table.id),
        "codecs": [frame.codec for frame in encoded.table.frames],
        "plain": base64.b64encode(plain).decode() if len(plain) <= 20_000 else "see test_vectors.py",
        "object": base64.b64encode(encoded.body).decode(),
    }


def _write() -> None:
    import hashlib

    from blake3 import blake3

    from mfs.registry.manifest import Chunk, File, Manifest, Tensor

    chunks = {name: vector_of(name) for name in PLAIN}
    plain = PLAIN["text"]() + PLAIN["bf16, moved"]()
    start, named = len(PLAIN["text"]()), ("text", "bf16, moved")
    manifest = Manifest(
        "2026-11-29T19:05:00Z",
        tuple(Chunk(c["id"], c["plain_bytes"], len(base64.b64decode(c["object"]))) for c in (chunks[n] for n in named)),
        (File("sub/model.bin", len(plain), hashlib.sha256(plain).hexdigest(), (0, 1),
              (Tensor("w", "BF16", (30, 100), start, len(plain), blake3(plain[start:]).hexdigest()),)),),
        requires=(chunks["bf16"]["id"],), annotations={"licence": "Apache-2.0"},
    )  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "manifest.json").write_bytes(manifest.encode())
    said = {"manifest": manifest_id(manifest.encode()), "chunks": chunks}
    (FOLDER / "chunks.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    _write()
