"""ETags by what they mean, not by how they are spelled. Pure; no I/O. Dates: `mfs.fetch.dates`.

Servers, and proxies before them, spell one validator in several ways: comparing the text calls an unchanged object
another one for ever.
"""

from __future__ import annotations


def opaque_of(etag: str) -> str:
    """What identifies the version in an ETag, '' if nothing: without W/ and quotes, which not all senders write.

    Two ETags of equal opaque parts are equal by weak comparison. Source: RFC 9110 §8.8.3.2.
    """
    text = etag.strip()
    return (text[2:] if is_weak(text) else text).strip().strip('"')


def is_weak(etag: str) -> bool:
    """Whether an ETag claims only equivalence: If-Match never matches such a one. Source: RFC 9110 §13.1.1."""
    return etag.strip()[:2] in ("W/", "w/")
