"""Where a mount's page is and which token lets in: a file in the runtime directory that only its owner can read."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mfs.errors import AccessError, NotFoundError, StoreError

_TOKEN_BYTES = 32
_TOKEN_LENGTHS = range(_TOKEN_BYTES, 129)
_FILE_BYTES_MAX = 4096


def page_file(control_socket: Path) -> Path:
    """Where address and token of a mount's page stand."""
    return control_socket.with_suffix(".page")


def page_url(control_socket: Path) -> str:
    """What to open in a browser, the token behind its '#'. Raises: NotFoundError if there is no page, AccessError."""
    file = page_file(control_socket)
    try:
        known = json.loads(_read_own(file))
        return f"{known['url']}#token={known['token']}"
    except FileNotFoundError:
        raise NotFoundError(f"{file} is not there: no page is served") from None
    except PermissionError as error:
        raise AccessError(f"the page is for root and the user who mounted ({error})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error


@contextmanager
def announced(url: str, control_socket: Path, stays: Callable[[], bool]) -> Iterator[str]:
    """Write down where the page is; yields the token that lets in. Leaving removes the file, if it is still ours.

    The token is that of an earlier daemon of the mount, where one has left it, else a new one. stays: asked on leaving,
    whether it is to stay for the next daemon. Raises: OSError.
    """
    file = page_file(control_socket)
    token = _known_token(file) or secrets.token_urlsafe(_TOKEN_BYTES)
    text = json.dumps({"url": url, "token": token})
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.page")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as written:
        written.write(text)
    temporary.replace(file)
    try:
        yield token
    finally:
        with suppress(OSError):
            if not stays() and file.read_text() == text:
                file.unlink()


def _known_token(file: Path) -> str | None:
    """The token that an earlier daemon of the mount has left, if nobody else can have read or written it."""
    try:
        token = json.loads(_read_own(file))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token if isinstance(token, str) and token.isascii() and len(token) in _TOKEN_LENGTHS else None


def _read_own(file: Path) -> bytes:
    """A small file that only its owner could read: ours, or the directory's owner's, for root. Raises: OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as opened:
        status = os.fstat(fd)
        is_private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not is_private or status.st_uid not in (os.geteuid(), os.stat(file.parent).st_uid):
            raise PermissionError(f"{file} is of uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}")
        return opened.read(_FILE_BYTES_MAX)
