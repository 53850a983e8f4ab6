"""safetensors' own `safe_open`, and so `load_file` and all that stands on them, served by the resident server.

Names imported earlier must see the change, and the Rust types can be neither subclassed nor given attributes, so their
methods are replaced in place and instances known by id(). An id may be used again after its object is gone: every new
object passes through a replaced `__init__` or `get_slice`, which sets or clears what its id means, so a stale entry is
never read. The real object is always made too (it maps the file and reads the header), which keeps every refusal, every
method and every fallback the library's own.

Served: framework 'pt', on a device where the server has an arena. Everything else, and everything that fails, goes the
library's way; the first failure is logged, once per process.
Source: behaviour run on safetensors 0.6.2 to 0.8.0.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from typing import Any

log = logging.getLogger("gpuload.hooks")

KNOWN_MAX = 4096
"""Open files and slices remembered; an older one falls back to the library."""

RETRY_S = 30.0
"""After a server did not answer, how long it is not asked again."""

_NAMES = {"pt", "torch", "pytorch"}


class _File:
    """One open file; attached when its first tensor is asked for."""

    def __init__(self, path: str, device: str) -> None:
        self.path, self.device = path, device
        self._seen = os.stat(path)
        self._lock = threading.Lock()
        self._tensors: Any = None
        self._is_tried = False

    def tensor(self, name: str) -> Any:
        """The tensor, or None if the library must serve it."""
        with self._lock:
            if not self._is_tried:
                self._is_tried = True
                self._tensors = attach_file(self.path, self.device, self._seen)
        found = None if self._tensors is None else self._tensors.get(name)
        return None if found is None else found.detach()


class _Known:
    """What ids stand for, oldest forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, Any] = OrderedDict()

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._entries.pop(id(key), None)
            if value is not None:
                self._entries[id(key)] = value
            while len(self._entries) > KNOWN_MAX:
                self._entries.popitem(last=False)

    def get(self, key: Any) -> Any:
        with self._lock:
            return self._entries.get(id(key))


_files = _Known()
_slices = _Known()
_away_until = 0.0
_has_logged = False
_is_installed = False


def install() -> None:
    """Replace the methods. Idempotent. Raises: AttributeError if this safetensors is built otherwise."""
    global _is_installed
    if _is_installed:
        return
    import safetensors

    opened: Any = safetensors.safe_open
    real = {n: getattr(opened, n) for n in ("__init__", "__exit__", "get_tensor", "get_slice")}
    real_get_tensors = getattr(opened, "get_tensors", None)  # since 0.8
    slice_type = _slice_type(opened)
    real_getitem = slice_type.__getitem__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _files.put(self, _served(*args, **kwargs))

    def __exit__(self: Any, *args: Any) -> Any:
        _files.put(self, None)
        return real["__exit__"](self, *args)

    def get_tensor(self: Any, name: str) -> Any:
        file = _files.get(self)
        tensor = file.tensor(name) if file is not None else None
        return real["get_tensor"](self, name) if tensor is None else tensor

    def get_slice(self: Any, name: str) -> Any:
        made = real["get_slice"](self, name)
        file = _files.get(self)
        _slices.put(made, None if file is None else (file, name))
        return made

    def get_tensors(self: Any) -> Any:
        if _files.get(self) is None:
            return real_get_tensors(self)  # type: ignore[misc]
        return {name: get_tensor(self, name) for name in self.offset_keys()}

    def __getitem__(self: Any, key: Any) -> Any:
        known = _slices.get(self)
        tensor = known[0].tensor(known[1]) if known is not None else None
        return real_getitem(self, key) if tensor is None else tensor[key]

    opened.__init__, opened.__exit__ = __init__, __exit__
    opened.get_tensor, opened.get_slice = get_tensor, get_slice
    if real_get_tensors is not None:
        opened.get_tensors = get_tensors
    slice_type.__getitem__ = __getitem__
    _is_installed = True


def _slice_type(opened: Any) -> Any:
    """The type of slices has no public name: take it from a slice."""
    import struct
    import tempfile

    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(struct.pack("<Q", len(header)) + header + b"\0")
        file.flush()
        with opened(file.name, "np") as one:
            return type(one.get_slice("a"))


def _served(filename: Any = None, framework: Any = None, device: Any = "cpu", **_: Any) -> _File | None:
    """What to serve for these arguments of safe_open; None leaves it to the library."""
    from gpuload.device import canonical_name

    if framework not in _NAMES or time.monotonic() < _away_until:
        return None
    try:
        return _File(os.fspath(filename), canonical_name(device if isinstance(device, int) else str(device)))
    except Exception:  # another kind of device, or a name the library has already refused
        return None


def attach_file(path: str, device: str, seen: os.stat_result | None = None) -> Any:
    """The file's tensors from the server, or None, with the reason logged the first time.

    seen: what `path` was when the library opened it; another file of that name is not mixed with it.
    """
    global _away_until, _has_logged
    if time.monotonic() < _away_until:
        return None
    from gpuload.errors import AwayError, first_error

    try:
        from gpuload.client import open_resident
        from mfs.errors import ChangedError

        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            now = os.fstat(fd)
            if seen is not None and (not os.path.samestat(seen, now) or seen.st_ctime_ns != now.st_ctime_ns):
                raise ChangedError("the file was replaced since it was opened")
            return open_resident([fd], [os.path.abspath(path)], device)
        finally:
            os.close(fd)
    except Exception as error:  # whatever it is, the library can still load the file
        if isinstance(error, AwayError):
            _away_until = time.monotonic() + RETRY_S
        if not _has_logged:
            _has_logged = True
            log.warning("gpuload: loading %s without the server: %s", path, first_error(error))
        return None
