"""Whoever is killed, whenever: the driver between two steps, a daemon, its holder, or the driver's whole pod."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from tests.csi.conftest import FILES
from tests.csi.driver import Driver, wait_for, workload
from tests.mount import touching

WEIGHTS = FILES["llama/w.bin"]
PUBLISHING = (
    "mfs.csi.state:State.put", "mfs.csi.state:State.put_served", "mfs.csi.daemons:Daemons.ensure",
    "mfs.csi.binding:_mount", "mfs.csi.binding:bind",
)  # fmt: skip
UNPUBLISHING = (
    "mfs.csi.binding:unbind", "mfs.csi.binding:remove", "mfs.csi.state:State.drop", "mfs.csi.daemons:Daemons.end",
)  # fmt: skip


def dies_after(step: str) -> str:
    """A program that kills itself when it has done a step."""
    module, _, name = step.partition(":")
    return f"""
import functools, importlib, os, signal
where = importlib.import_module({module!r})
*path, last = {name!r}.split(".")
for part in path:
    where = getattr(where, part)
done = getattr(where, last)
@functools.wraps(done)
def then_die(*arguments, **more):
    done(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(where, last, then_die)
"""


@pytest.mark.parametrize("step", PUBLISHING)
def test_the_driver_is_killed_while_it_publishes(place: Path, models: Path, step: str) -> None:
    with Driver(place, folders=(models,)) as driver:
        driver.start(program=dies_after(step))
        driver.wait_ready()
        with pytest.raises(grpc.RpcError):
            driver.publish("a", {"source": str(models)})
        driver.wait_ended()
        driver.start()
        if step != PUBLISHING[-1]:  # what was not bound is no volume, and not half of one either
            assert driver.pod_mounts == ([] if step != "mfs.csi.binding:_mount" else ["a"])
        target = driver.publish("a", {"source": str(models)})
        assert driver.pod_mounts == ["a"]
        assert len(driver.pids) == 1
        with workload(target) as (pod, inside):
            assert pod.call(touching.read, f"{inside}/llama/w.bin") == WEIGHTS
        driver.unpublish("a")
        assert driver.keys == []
        assert driver.left() == []


@pytest.mark.parametrize("step", UNPUBLISHING)
def test_the_driver_is_killed_while_it_unpublishes(place: Path, models: Path, step: str) -> None:
    with Driver(place, folders=(models,)) as driver:
        driver.start(program=dies_after(step))
        driver.wait_ready()
        target = driver.publish("a", {"source": str(models)})
        with pytest.raises(grpc.RpcError):
            driver.unpublish("a")
        driver.wait_ended()
        driver.start()
        driver.unpublish("a")
        assert driver.pod_mounts == []
        assert not target.exists()
        assert driver.keys == []
        assert driver.left() == []


def test_a_volume_outlives_its_driver(driver: Driver, models: Path) -> None:
    """A reader notices nothing; the next driver finds the daemon, shares it and ends it."""
    target = driver.publish("a", {"source": str(models)})
    pids = driver.pids
    with workload(target) as (pod, inside):
        pod.call(touching.hold, "fd", f"{inside}/llama/w.bin")
        driver.kill()
        assert pod.call(touching.held_read, "fd", 0, 1000) == WEIGHTS[:1000]
        driver.start()
        assert pod.call(touching.held_read, "fd", 4 << 20, 1000) == WEIGHTS[4 << 20 :][:1000]
        driver.publish("b", {"source": str(models)})
        assert driver.pids == pids
        driver.unpublish("a")
        assert pod.call(touching.held_read, "fd", 5 << 20, 17) == WEIGHTS[5 << 20 :]
    driver.unpublish("b")
    assert driver.keys == []


def test_a_killed_daemon_is_a_pause(driver: Driver, models: Path) -> None:
    target = driver.publish("a", {"source": str(models)})
    with workload(target) as (pod, inside):
        pod.call(touching.hold, "fd", f"{inside}/llama/w.bin")
        pod.call(touching.hold_map, "map", f"{inside}/llama/w.bin")
        for _ in range(2):
            [pid] = driver.pids
            os.kill(pid, signal.SIGKILL)
            assert pod.call(touching.held_read, "fd", 0, len(WEIGHTS)) == WEIGHTS
            assert pod.call(touching.held_map, "map", 3 << 20, 1000) == WEIGHTS[3 << 20 :][:1000]
            assert wait_for(lambda pid=pid: driver.pids not in ([], [pid]))  # type: ignore[misc]
        assert wait_for(lambda: not driver.stats("a").volume_condition.abnormal)


def test_where_daemon_and_holder_are_lost_the_volume_is_shown_again(driver: Driver, models: Path) -> None:
    """What is open then fails, without a keeper; what is opened next does not, in the same pod."""
    target = driver.publish("a", {"source": str(models)})
    with workload(target) as (pod, inside):
        pod.call(touching.hold, "fd", f"{inside}/llama/w.bin")
        [key] = driver.keys
        record = driver.record(key)
        assert record is not None
        for pid in (record.holder_pid, record.pid):
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: driver.pids not in ([], [record.pid]))
        assert wait_for(lambda: not driver.stats("a").volume_condition.abnormal)
        assert wait_for(lambda: pod.call(touching.read_outcome, f"{inside}/llama/w.bin", 0, 1000) == WEIGHTS[:1000])
    driver.unpublish("a")
    assert driver.pod_mounts == []
    assert driver.left() == []


def test_a_pod_that_is_replaced_with_all_in_it_is_a_pause(place: Path, models: Path) -> None:
    """Driver, holders, daemons and workers are killed at once; the keeper has the mounts, readers wait."""
    with Driver(place, folders=(models,)) as driver:
        driver.start_keeper()
        driver.start(own_pids=True)
        target = driver.publish("a", {"source": str(models)})
        other = driver.publish("b", {"source": str(models), "timeout": "9s"})
        with workload(target) as (pod, inside), workload(other) as (second, inside_other):
            pod.call(touching.hold, "fd", f"{inside}/llama/w.bin")
            second.call(touching.hold_map, "map", f"{inside_other}/llama/w.bin")
            for turn in (1, 2):
                pod.call(touching.drop_pages, f"{inside}/llama/w.bin")
                driver.kill()
                pod.start(touching.held_read, "fd", 0, len(WEIGHTS))
                second.start(touching.held_map, "map", turn << 20, 1000)
                assert pod.is_busy(for_s=0.1)
                driver.start(own_pids=True)
                assert pod.finish() == WEIGHTS
                assert second.finish() == WEIGHTS[turn << 20 :][:1000]
                assert pod.call(touching.read, f"{inside}/llama/config.json") == b"{}"
                for name in ("a", "b"):
                    assert wait_for(lambda name=name: not driver.stats(name).volume_condition.abnormal)  # type: ignore[misc]
        assert driver.log.count("taken up from what the keeper holds") == 4
        driver.unpublish("a")
        driver.unpublish("b")
        assert driver.keys == []
        assert driver.left() == []


CANNOT_TAKE_UP = """
from mfs import launch
from mfs.csi import daemons, node
from mfs.errors import StoreError
daemons._TAKE_UPS_MAX, node._WATCH_S, start = 2, 0.1, launch.start_daemon
def start_anew(config, *, held, **more):
    if held:
        raise StoreError("no")
    return start(config, held=held, **more)
launch.start_daemon = start_anew
"""


def test_a_mount_that_nobody_can_take_up_is_made_anew(place: Path, models: Path) -> None:
    with Driver(place, folders=(models,)) as driver:
        driver.start_keeper()
        driver.start(own_pids=True)
        target = driver.publish("a", {"source": str(models)})
        with workload(target) as (pod, inside):
            pod.call(touching.hold, "fd", f"{inside}/llama/w.bin")
            driver.kill()
            driver.start(program=CANNOT_TAKE_UP, own_pids=True)
            driver.wait_ready()
            assert wait_for(lambda: not driver.stats("a").volume_condition.abnormal)
            assert pod.call(touching.read, f"{inside}/llama/w.bin") == WEIGHTS
        assert driver.log.count(": no") == 2
        driver.unpublish("a")
        assert driver.left() == []
