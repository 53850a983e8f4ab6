"""What a load's time went to, from the command's start to the server's answer: gpuload's phases, and the mount's below.

While gpuload opens or reads, a mount may say why that takes time: then the instant is the mount's (origin, ssd, …);
where the mount had the bytes, it stays gpuload's. The sum is the command's own time. Pure, but for asking the mount.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from mfs.errors import MfsError
from mfs.phases import STEPS_COUNT

Json = dict[str, Any]

_DIVIDED = ("open", "read")
_MOUNT_HAD_IT = "page_cache"


def explain(where: str, began_s: float, ended_s: float, server: Json) -> Json:
    """{seconds, phases, strip}: of the time from `began_s` to `ended_s`, on the machine's monotonic clock.

    where: the model as it was named. server: what its `Timing` said.
    """
    return combine(began_s, ended_s, server, _load_of(where, began_s, ended_s))


def combine(began_s: float, ended_s: float, server: Json, mount: Json | None) -> Json:
    """The same, given what the mount says of its load, if there is a mount."""
    step_s = (ended_s - began_s) / STEPS_COUNT
    at = [began_s + (number + 0.5) * step_s for number in range(STEPS_COUNT)]
    ours = [_ours(moment, server) for moment in at]
    both = [_with_mount(cause, moment, mount) for cause, moment in zip(ours, at, strict=True)]
    phases: dict[str, float] = dict(server["phases"])
    phases["open"] += server["began_s"] - began_s
    phases["other"] += ended_s - server["began_s"] - server["seconds"]
    found: defaultdict[str, float] = defaultdict(float)
    for cause, seconds in phases.items():
        mine = [then for own, then in zip(ours, both, strict=True) if own == cause]
        if cause not in _DIVIDED or not mine:
            found[cause] += seconds
            continue
        for then, steps in Counter(mine).items():
            found[then] += seconds * steps / len(mine)
    return {
        "seconds": ended_s - began_s, "phases": {name: took for name, took in found.items() if took > 0},
        "strip": {"step_s": step_s, "phases": both}, "mount": mount,
    }  # fmt: skip


def _ours(moment: float, server: Json) -> str:
    if moment < server["began_s"]:
        return "open"
    return _at(server, moment) or "other"


def _with_mount(cause: str, moment: float, mount: Json | None) -> str:
    if cause not in _DIVIDED or mount is None:
        return cause
    then = _at(mount, moment)
    return cause if then in (None, _MOUNT_HAD_IT) else str(then)


def _at(load: Json, moment: float) -> str | None:
    """What a strip says of a moment, None outside of it."""
    steps: list[str] = load["strip"]["phases"]
    number = int((moment - load["began_s"]) // load["strip"]["step_s"])
    return steps[number] if 0 <= number < len(steps) else None


def _load_of(where: str, began_s: float, ended_s: float) -> Json | None:
    """What the mount says that a model stands on; None where it stands on none, or that does not say."""
    from mfs.control.client import Client
    from mfs.control.runtime import find_mount

    try:
        served = find_mount(where)
        loads = Client(served.socket).loads(served.place.path)["loads"]
    except MfsError:
        return None

    def overlap(load: Json) -> float:
        return float(min(ended_s, load["began_s"] + load["seconds"]) - max(began_s, load["began_s"]))

    return max((load for load in loads if overlap(load) > 0), key=overlap, default=None)
