"""safetensors' own `safe_open`, and so `load_file` and all that stands on them, served by the resident server.

Names imported earlier must see the change, and the Rust types can be neither subclassed nor given attributes, so their
methods are replaced in place and instances known by id(). An id may be used again after its object is gone: every new
object passes through a replaced `__init__` or `get_slice`, which sets or clears what its id means, so a stale entry is
never read. The real object is always made too (it maps the file and reads the header), which keeps every refusal, every
method and every fallback the library's own.

Served: framework 'pt', on a device where the server has an arena, files of SMALL_BYTES and more. Everything else, and
everything that fails, goes the library's way; the first failure is logged, once per process.

A lease lasts while tensors given out live, and for the open file itself until it is closed or unused for IDLE_S: an
object that is dropped unclosed cannot be seen to go. A forked child holds nothing of its parent's open files and
attaches anew; tensors that it inherited stay good.
Source: behaviour run on the versions that HOOKS.md names.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from gpuload.hooks.counts import counts
from gpuload.hooks.resident import attach_file, is_away, is_copied, tell_once
from mfs.errors import UsageError

KNOWN_MAX = 1 << 17
"""Open files, and slices not yet dropped with their file, that are remembered; an older one falls back to the library.
The largest model known has 90,000 tensors, and transformers takes a slice of each."""

IDLE_S = 60.0
"""How long an open file that nobody reads holds its lease; the next read attaches again, in milliseconds."""

SMALL_BYTES = 1 << 20
"""Of a file that is left to the library: to map it takes 0.06 ms, to have it from the server 3 to 12, and sharing it
saves no more than this."""

SMALL_VARIABLE = "GPULOAD_SMALL_BYTES"
"""Another number; 0: every file is served."""

_NAMES = {"pt", "torch", "pytorch"}


class _File:
    """One open file; attached when its first tensor is asked for."""

    def __init__(self, path: str, device: str) -> None:
        self.path, self.device = path, device
        self.slice_keys: list[int] = []
        self._seen = os.stat(path)
        self.nbytes = self._seen.st_size
        self._used_at = 0.0
        self.forget()

    def forget(self) -> None:
        """As if just opened, with a lock of its own: what a forked child does with its parent's."""
        self._lock = threading.Lock()
        self._tensors: Any = None
        self._is_refused = False

    def tensor(self, name: str, key: Any = ...) -> Any:
        """The tensor, or what `key` cuts from it, of the caller's own and in his mode; None: ask the library."""
        from gpuload.client import tensors  # torch is there by now

        if not tensors.has_memory():  # a tracer's: the library has its own words for it
            return None
        with self._lock:
            self._used_at = time.monotonic()
            if self._tensors is None and not self._is_refused:
                self._tensors = attach_file(self.path, self.device, seen=self._seen)
                self._is_refused = self._tensors is None
                if self._tensors is not None:
                    _idle.add(self)
            found = None if self._tensors is None else self._tensors.get(name)
        if found is None:
            return None
        if is_copied(self.device):
            return found[key].clone()
        whole = tensors.fresh(found)
        return whole if key is ... else tensors.fresh(whole[key])  # a view remembers the mode that it was taken in

    def close(self) -> None:
        """Give up the lease; slices that outlive their file are the library's."""
        with self._lock:
            had, self._tensors, self._is_refused = self._tensors is not None, None, True
        _idle.remove(self)
        if had:
            from gpuload.client.attached import close_left

            close_left()

    def release_if_idle(self) -> bool:
        """True if the lease was given up."""
        if not self._lock.acquire(blocking=False):  # somebody reads it right now
            return False
        try:
            if time.monotonic() - self._used_at < IDLE_S:
                return False
            self._tensors = None
            return True
        finally:
            self._lock.release()


class _Known:
    """What ids stand for, oldest forgotten first."""

    def __init__(self) -> None:
        self.renew_lock()
        self._entries: OrderedDict[int, Any] = OrderedDict()

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def put(self, key: Any, value: Any) -> Any:
        """Set what `key` stands for, None for nothing; returns what it stood for."""
        with self._lock:
            old = self._entries.pop(id(key), None)
            if value is not None:
                self._entries[id(key)] = value
            while len(self._entries) > KNOWN_MAX:
                self._entries.popitem(last=False)
            return old

    def get(self, key: Any) -> Any:
        with self._lock:
            return self._entries.get(id(key))

    def drop_slices_of(self, file: _File) -> None:
        with self._lock:
            for key in file.slice_keys:
                if key in self._entries and self._entries[key][0] is file:  # the id may be another slice's by now
                    del self._entries[key]
        file.slice_keys = []

    def values(self) -> list[Any]:
        with self._lock:
            return list(self._entries.values())


class _Idle:
    """Takes leases from open files that nobody reads. Its thread exists only while an open file holds one."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._holders: set[_File] = set()

    def add(self, file: _File) -> None:
        with self._lock:
            self._holders.add(file)
            self._set_timer()

    def remove(self, file: _File) -> None:
        with self._lock:
            self._holders.discard(file)
            if not self._holders and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _set_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(IDLE_S, self._sweep)
            self._timer.daemon = True
            self._timer.start()

    def _sweep(self) -> None:
        with self._lock:
            holders = list(self._holders)
        released = [file for file in holders if file.release_if_idle()]
        with self._lock:
            self._timer = None
            self._holders.difference_update(released)
            if self._holders:
                self._set_timer()


_files = _Known()
_slices = _Known()
_idle = _Idle()
_is_installed = False


def _start_afresh() -> None:
    """In a forked child: locks may be held by threads that it does not have, and its parent's timer does not run."""
    counts.renew_lock()
    for known in (_files, _slices):
        known.renew_lock()
    _idle.renew()
    for file in _files.values():
        file.forget()


def install() -> None:
    """Replace the methods. Idempotent. Raises: AttributeError if this safetensors is built otherwise."""
    global _is_installed
    if _is_installed:
        return
    import safetensors

    opened: Any = safetensors.safe_open
    real = {n: getattr(opened, n) for n in ("__init__", "__exit__", "get_tensor", "get_slice")}
    real_get_tensors = getattr(opened, "get_tensors", None)  # since 0.8
    real_prefetch = getattr(opened, "prefetch", None)  # since 0.9
    slice_type = _slice_type(opened)
    real_getitem = slice_type.__getitem__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _files.put(self, _served(*args, **kwargs))

    def __exit__(self: Any, *args: Any) -> Any:
        file = _files.put(self, None)
        if file is not None:
            file.close()
            _slices.drop_slices_of(file)
        return real["__exit__"](self, *args)

    def get_tensor(self: Any, name: str) -> Any:
        file = _files.get(self)
        return _or_library(file, name, lambda: real["get_tensor"](self, name))

    def get_slice(self: Any, name: str) -> Any:
        made = real["get_slice"](self, name)
        file = _files.get(self)
        _slices.put(made, None if file is None else (file, name))
        if file is not None:
            file.slice_keys.append(id(made))
        return made

    def get_tensors(self: Any) -> Any:
        if _files.get(self) is None:
            made = real_get_tensors(self)  # type: ignore[misc]
            counts.add(left=len(made))
            return made
        return {name: get_tensor(self, name) for name in self.offset_keys()}

    def __getitem__(self: Any, key: Any) -> Any:
        file, name = _slices.get(self) or (None, "")
        tensor = _or_library(file, name, lambda: None, key)
        return real_getitem(self, key) if tensor is None else tensor

    def prefetch(self: Any, plan: Any = None, *, device: Any = None, threads: int = 8) -> Any:
        made = _prefetched(self, plan, device)
        return real_prefetch(self, plan, device=device, threads=threads) if made is None else made  # type: ignore[misc]

    opened.__init__, opened.__exit__ = __init__, __exit__
    opened.get_tensor, opened.get_slice = get_tensor, get_slice
    if real_get_tensors is not None:
        opened.get_tensors = get_tensors
    if real_prefetch is not None:
        opened.prefetch = prefetch
    slice_type.__getitem__ = __getitem__
    os.register_at_fork(after_in_child=_start_afresh)
    _is_installed = True


def _or_library(file: _File | None, name: str, library: Callable[[], Any], key: Any = ...) -> Any:
    tensor = file.tensor(name, key) if file is not None else None
    if tensor is None:
        counts.add(left=1)
        return library()
    counts.add(served=1)
    return tensor


def _prefetched(opened: Any, plan: Any, device: Any) -> Any:
    """A loader of the server's tensors; None leaves it to the library."""
    from safetensors import SafetensorError

    from gpuload.hooks import prefetched

    file = _files.get(opened)
    place = None if file is None else file.device if device is None else _canonical(device)
    if file is None or place is None or not place.startswith("cuda"):  # it loads to no other
        return None
    names = prefetched.plan_of(plan, {name: opened.get_tensor_meta(name).shape for name in opened.offset_keys()})
    held = attach_file(file.path, place, seen=file._seen) if names is not None else None
    if names is None or held is None:
        return None
    return prefetched.Prefetched(held, names, place, SafetensorError)


def _slice_type(opened: Any) -> Any:
    """The type of slices has no public name: take it from a slice."""
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    fd = os.memfd_create("gpuload-slice")
    try:
        os.write(fd, struct.pack("<Q", len(header)) + header + b"\0")
        with opened(f"/proc/self/fd/{fd}", "np") as one:
            return type(one.get_slice("a"))
    finally:
        os.close(fd)


def _served(filename: Any = None, framework: Any = None, device: Any = "cpu", **_: Any) -> _File | None:
    """What to serve for these arguments of safe_open; None leaves it to the library."""
    place = _canonical(device)
    if framework not in _NAMES or place is None or is_away():
        return None
    try:
        file = _File(os.fspath(filename), place)
        return file if file.nbytes >= _small_bytes() else None
    except Exception:  # a name the library has already refused
        return None


def _canonical(device: Any) -> str | None:
    """As `canonical_name`; None for another kind of device."""
    from gpuload.device import canonical_name

    try:
        return canonical_name(device if isinstance(device, int) else str(device))
    except UsageError:
        return None


def _small_bytes() -> int:
    given = os.environ.get(SMALL_VARIABLE)
    if not given:
        return SMALL_BYTES
    if given.isascii() and given.isdigit():
        return int(given)
    tell_once(f"{SMALL_VARIABLE}={given[:50]!r}", ValueError(f"expected a number of bytes; {SMALL_BYTES} it is"))
    return SMALL_BYTES
