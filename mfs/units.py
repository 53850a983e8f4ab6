"""Sizes, durations and addresses as people write them, to bytes and seconds and back. Pure."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([KMGTP]?)(I|IB|B)?", re.IGNORECASE | re.ASCII)
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", re.ASCII)
_SIZE_BYTES_MAX = 1 << 63  # what the kernel can say about a file or a disk


def parse_size(text: str) -> int:
    """Bytes meant by '64M', '500G', '1.5T', '32GiB' or '4096'. Units are binary: 1G is 2**30 bytes.

    Raises: ValueError saying what was expected; also for decimal spellings such as '500GB', which could mean either.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}; expected a number of bytes or a form like 64M, 500G or 1.5T")
    whole, fraction, unit, suffix = match.groups()
    if unit and (suffix or "").upper() == "B":
        raise ValueError(f"ambiguous size: {text!r}; write {whole}{unit.upper()} for binary units (1G = 2**30 bytes)")
    if not unit and (fraction or (suffix or "").upper().startswith("I")):
        raise ValueError(f"not a size: {text!r}; expected a whole number of bytes or a form like 64M, 500G or 1.5T")
    factor = _FACTORS[unit.upper()]
    size = int(whole) * factor
    if fraction:  # integers throughout: a float would lose bytes above 2**53
        size += int(fraction) * factor // 10 ** len(fraction)
    if size >= _SIZE_BYTES_MAX:
        raise ValueError(f"size too large: {text!r}; expected less than 8192P")
    return size


def format_size(size: int) -> str:
    """At most six characters a person reads at a glance: '0 B', '1.5 G', '1023 M' (binary units, rounded)."""
    value = float(size)
    for unit in ("B", "K", "M", "G", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1024
    if unit == "B" or value >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}"


def exact_size(size: int) -> str:
    """The shortest text that `parse_size` turns back into exactly `size` bytes: '500G', '1536M', '4097'."""
    for unit in ("P", "T", "G", "M", "K"):
        if size and size % _FACTORS[unit] == 0:
            return f"{size // _FACTORS[unit]}{unit}"
    return str(size)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port meant by '127.0.0.1:9400', '[::1]:9400', 'node7:9400' or ':9400' (every address of the machine).

    Raises: ValueError saying what was expected.
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"not an address: {text!r}; write an IPv6 address in brackets, as in [::1]:9400")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"not an address: {text!r}; expected HOST:PORT, such as 127.0.0.1:9400")
    return host, int(port)


LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def parse_local_address(text: str) -> tuple[str, int]:
    """As `parse_address`, of an address that only this machine can reach. Raises: ValueError."""
    host, port = parse_address(text)
    if host not in LOCAL_HOSTS:
        raise ValueError(
            f"{text!r} can be reached from elsewhere: expected 127.0.0.1:PORT, [::1]:PORT or localhost:PORT; "
            f"to come from elsewhere, use 'ssh -L' or 'kubectl port-forward'"
        )
    return ("127.0.0.1" if host == "localhost" else host), port


def parse_duration(text: str) -> float:
    """Seconds meant by '30s', '5m', '1.5h', '250ms', '1d' or a plain number. Raises: ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a duration: {text!r}; expected a number of seconds or a form like 30s, 5m or 1h")
    seconds = float(match[1]) * _SECONDS[match[2] or "s"]
    if seconds > 366 * _SECONDS["d"]:
        raise ValueError(f"duration too long: {text!r}; expected at most 366d")
    return seconds


def format_duration(seconds: float) -> str:
    """Two units at most, as a person says it: '0s', '45s', '3m 20s', '2h 5m', '4d 3h'."""
    left = max(0, round(seconds))
    for unit, lower, size, lower_size in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if left >= size:
            rest = left % size // lower_size
            return f"{left // size}{unit} {rest}{lower}" if rest else f"{left // size}{unit}"
    return f"{left}s"
