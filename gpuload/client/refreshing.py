"""Other content under the same addresses: what `Attached.prepare` and `refresh` do.

    prepare   a second lease, its table held against the first one's, its granules imported      nothing is shown yet
    apply     every part shows the new granules, or every part the old ones again; the new connection is kept, and the
              old one closed last: until then the server holds both
    close     the new lease is given up

A process that is killed anywhere in here closes both connections. An interrupt waits until a thread of its own has
applied: what is shown and what is leased must never differ.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from gpuload import wire
from gpuload.client import tensors
from gpuload.client.asking import check_granules, connect, exchange, split
from gpuload.descriptors import park, room_for
from gpuload.device.base import Change
from gpuload.errors import BusyError, DeviceError, first_error
from mfs.errors import ChangedError, UsageError

if TYPE_CHECKING:
    from gpuload.client.attached import Attached

log = logging.getLogger("gpuload.client")

_showing = threading.Lock()
"""Held while what is shown changes: a thread that forks waits for it, since its child would have a mix."""
os.register_at_fork(before=_showing.acquire, after_in_parent=_showing.release, after_in_child=_showing.release)


class Refresh:
    """Content that is held and ready. Leaving it as a context manager without `apply` gives it up."""

    digest: str
    """Of the content that `apply` shows."""
    generation: int
    """Its number at the server."""

    def __init__(self, attached: Attached, sock: socket.socket, reply: Mapping[str, Any]) -> None:
        """Not for programs, who get it from `Attached.prepare`."""
        self.digest, self.generation = reply["digest"], reply["generation"]
        self._attached, self._sock, self._reply = attached, sock, reply
        self._changes: list[Change] = []
        self._is_open = True

    def apply(self) -> bool:
        """Show it, in the tensors of the `Attached`, as `Attached.refresh` says. Says whether anything was new.

        Raises: UsageError while this thread captures a graph, or if it was applied or closed; DeviceError if the device
            refuses. Then the old content is shown, all of it; or, where not even that succeeded, nothing: the tensors
            must not be touched any more, and every later use of the `Attached` says so.
        """
        _refuse_capture()
        if not self._is_open:
            raise UsageError("this refresh was applied or closed before: prepare another one")
        was = self._attached.generation, self._attached.digest
        try:
            _uninterrupted(self._apply)
        finally:
            self.close()  # what it holds by now is what is not shown
        return was != (self.generation, self.digest)

    def _apply(self) -> None:
        held = self._attached._held
        sock = park(self._sock)
        self._sock = sock
        with _showing:
            self._exchange()
            held.sock, self._sock = sock, held.sock
            held.shown = {"parts": self._reply["parts"], "tensors": self._reply["tensors"]}
            self._attached.become(self._reply)

    def _exchange(self) -> None:
        done: list[Change] = []
        try:
            for change in self._changes:
                change.exchange()
                done.append(change)
        except Exception as error:
            self._go_back(done, error)
            raise

    def _go_back(self, done: list[Change], error: Exception) -> None:
        """Raises: DeviceError if that fails too; then nothing is shown."""
        held = self._attached._held
        try:
            for change in reversed(done):
                change.exchange()
            if not any(mapping.is_hidden for mapping in held.mappings):
                return
        except Exception as more:  # that part shows the new content, or nothing
            log.debug("going back: %s", more)
        held.fault = (
            f"the weights of {self._attached.model!r} are lost to this process: a refresh failed"
            f" ({first_error(error)}), and so did going back; let go of all tensors and attach anew"
        )
        self._attached.clear()
        for mapping in held.mappings:
            with suppress(Exception):
                mapping.hide()
        raise DeviceError(held.fault) from error

    def close(self) -> None:
        """Let go of what is not shown. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            with self._sock:
                for change in self._changes:
                    change.close()
        finally:
            self._attached._held.refreshing.release()

    def __enter__(self) -> Refresh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # as in Held
            if self._is_open:
                self._is_open = False
                self._attached._held.left.leave(self._changes, self._sock)
                self._attached._held.refreshing.release()


def prepare(attached: Attached, digest: str | None, timeout_s: float) -> Refresh:
    """See `Attached.prepare`."""
    from gpuload.client.attached import let_go

    _refuse_capture()
    held = attached._held
    request = {**held.asked(), **({} if digest is None else {"digest": digest})}
    if digest is None:
        request.pop("digest", None)
    if not held.refreshing.acquire(blocking=False):
        raise BusyError(f"another refresh of {attached.model!r} is under way in this process")
    try:
        let_go()
        sock = connect(held.socket_path, timeout_s)
        try:
            return _prepared(attached, sock, request)
        except BaseException:
            sock.close()
            raise
    except BaseException:
        held.refreshing.release()
        raise


def _prepared(attached: Attached, sock: socket.socket, request: dict[str, Any]) -> Refresh:
    held = attached._held
    with ExitStack() as room:
        reply, got = exchange(sock, request, (), admit=lambda count: room.enter_context(room_for(count)))
        room.callback(wire.close_all, got)
        difference = _difference(held.shown, reply)
        if difference:
            raise ChangedError(
                f"{attached.model!r} cannot be refreshed in place, only attached anew: {difference} (generation"
                f" {attached.generation} here, {reply['generation']} there)"
            )
        is_held = _is_open(held.sock)
        changes: list[Change] = []
        try:
            for index, own in enumerate(split(reply, got)):
                mapping, part, shown = held.by_part.get(index), reply["parts"][index], held.shown["parts"][index]
                if mapping is not None:
                    check_granules(part, shown["granule_bytes"])
                    is_same = is_held and part.get("arena", "") == shown.get("arena")
                    runs = [(first, count) for first, count in part["runs"]]
                    changes.append(mapping.prepare(own, runs, is_same=is_same))
        except BaseException:
            for change in changes:
                change.close()
            raise
    made = Refresh(attached, sock, reply)
    made._changes = changes
    return made


def _difference(shown: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
    """What of the new table does not fit the places of the old one, in words; '' if all of it does."""
    places = [
        [(part["device"], sum(count for _, count in part["runs"])) for part in one["parts"]] for one in (shown, reply)
    ]
    before, after = ({row[0]: row[1:] for row in one["tensors"]} for one in (shown, reply))
    for name in before.keys() - after.keys():
        return f"it has no tensor {name!r} any more"
    for name in after.keys() - before.keys():
        return f"it has a tensor {name!r} that was not there"
    for name in before:
        (dtype, shape, part, offset, _), (dtype_now, shape_now, part_now, offset_now, _) = before[name], after[name]
        if (dtype, shape) != (dtype_now, shape_now):
            return f"tensor {name!r} was {dtype} of shape {shape}, is {dtype_now} of shape {shape_now}"
        if (part, offset) != (part_now, offset_now):
            return f"tensor {name!r} stands elsewhere: order or sizes of the files' tensors differ"
    return "" if places[0] == places[1] else f"it stood on {places[0]}, and stands on {places[1]} (device, granules)"


def _is_open(sock: socket.socket) -> bool:
    """Whether the server still has this lease: it says nothing on such a connection, and closes it when it ends."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _uninterrupted(work: Callable[[], None]) -> None:
    """Run it in a thread, to which no signal's handler comes; an interrupt rises once it has ended."""
    errors: list[BaseException] = []
    done, turn = threading.Event(), threading.Lock()

    def run() -> None:
        if not turn.acquire(blocking=False):
            return
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=run, name="gpuload-refresh").start()
    except BaseException as error:
        if turn.acquire(blocking=False):  # it did not begin, nor will it
            raise
        errors.append(error)
    while not done.is_set():
        try:
            done.wait()
        except BaseException as interrupt:
            errors.append(interrupt)
    if errors:
        first = errors[0]
        errors.clear()
        try:
            raise first
        finally:
            del first  # else it and this frame would keep each other, and the lease


def _refuse_capture() -> None:
    if tensors.is_capturing():
        raise UsageError("this thread captures a CUDA graph: refresh the weights before or after that")
