"""What runs here already: mounts that nobody serves, mounts that would end with their daemon, who starts services."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mfs.control import detach, runtime
from mfs.control.runtime import Served
from mfs.errors import MfsError
from mfs.findings import Finding, fault, note, ok, warning


def examine() -> Iterator[Finding]:
    """Look at the mounts of this machine. None of them is touched: one may hang."""
    yield _runtime_directory()
    try:
        served = runtime.list_mounts()
    except MfsError as error:
        yield fault("mounts", str(error), "remove that directory, or set XDG_RUNTIME_DIR")
        return
    stale = [one for one in served if _is_stale(one)]
    for one in stale:
        yield warning(f"mount {one.mountpoint}", "stale: its daemon has ended", f"mfs umount {one.mountpoint}")
    living = [one for one in served if one not in stale]
    for one in living:
        if one.record is not None and one.record.is_alive and not one.record.is_held:
            yield note(
                f"mount {one.mountpoint}", "has no holder: it ends if its daemon is killed",
                "'mfs status' says why; Linux 6.9 or newer keeps it",
            )  # fmt: skip
    if not stale:
        yield ok("mounts", f"{len(living)} served, none stale")
    yield _manager()


def _is_stale(served: Served) -> bool:
    try:
        return detach.is_stale(served.place.mount, served.record, is_listening=served.is_listening)
    except OSError:  # no process can be started to ask: a look more makes nothing worse
        return False


def _runtime_directory() -> Finding:
    folder = runtime.directory()
    above = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not os.access(above, os.W_OK | os.X_OK):
        return fault(
            "runtime directory", f"{folder} cannot be made or written", "set XDG_RUNTIME_DIR to one that is yours"
        )
    try:
        runtime.socket_path("/any")
    except MfsError as error:
        return fault("runtime directory", str(error), "set MFS_RUNTIME_DIR to a shorter path")
    return ok("runtime directory", str(folder))


def _manager() -> Finding:
    if os.path.isdir("/run/systemd/system"):
        return ok("service manager", "systemd; 'mfs mount --foreground' under Type=notify says when it is ready")
    return ok("service manager", "none that is known: mounts go on in the background")
