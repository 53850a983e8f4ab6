"""The pool with real worker processes: order, deadlines, deaths, and gauges that return to zero."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import trio

from mfs.cache.chunks import full_mask
from mfs.cache.pieces import Piece
from mfs.errors import ConfigError, MfsError, NotFoundError, StoreError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from mfs.workers import pool as pool_module
from mfs.workers import worker as worker_module
from mfs.workers.frames import FRAME_BYTES_MAX, Decoder, encode, object_to_wire
from mfs.workers.job import Job, Priority, WorkerEndedError
from mfs.workers.pool import PoolConfig, WorkerPool
from tests.workers.rig import Rig, process_state, raises_inside, running_rig, until

FULL = full_mask(CHUNK_BYTES)


def fill_arguments(rig: Rig, obj: ObjectId, index: int = 0, mask: int = 1) -> dict[str, Any]:
    piece = rig.piece(obj, index)
    return {"source": 0, "obj": object_to_wire(obj), "index": index, "mask": mask, "piece": piece, "replies": {}}


def worker_pids(rig: Rig) -> list[int]:
    return [worker["pid"] for worker in rig.pool.describe()]


async def test_bytes_go_origin_ram_disk_ram(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj = rig.put_ramp("model.bin", CHUNK_BYTES + 300_000)
        call, data = rig.pool.call, rig.contents[obj]
        length = 300_000
        result = await call("fill", **fill_arguments(rig, obj, 1, full_mask(length)))
        assert rig.in_ram(obj, 1) == data[CHUNK_BYTES:]
        assert (result["ssd_bytes"], result["origin_bytes"], result["requests"]) == (0, length, 1)
        saved = await call("persist", obj=object_to_wire(obj), index=1, sums=result["sums"], piece=rig.piece(obj, 1))
        assert saved == {"bytes": length, "full": False, "away": False}
        rig.in_ram(obj, 1)[:] = bytes(length)
        (rig.origin / "model.bin").unlink()  # from here on the disk must do
        result = await call("fill", **fill_arguments(rig, obj, 1, full_mask(length)))
        assert rig.in_ram(obj, 1) == data[CHUNK_BYTES:]
        assert (result["ssd_bytes"], result["requests"]) == (length, 0)
        with pytest.raises(NotFoundError):
            await call("fill", **fill_arguments(rig, obj, 0, 1))
        assert (await call("masks", obj=object_to_wire(obj)))["masks"] == [0, full_mask(length)]
        assert (await call("residency", objects=[object_to_wire(obj)]))["rows"] == [[length, False]]
        assert (await call("usage"))["used_bytes"] == length + 2 * 4096
        rig.assert_idle()


async def test_verify_evict_and_pin(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj, call = rig.put_ramp("model.bin", 2 * CHUNK_BYTES), rig.pool.call
        wire, parts = object_to_wire(obj), list[Any]()
        for index in range(2):
            filled = await call("fill", **fill_arguments(rig, obj, index, FULL))
            await call("persist", obj=wire, index=index, sums=filled["sums"], piece=rig.piece(obj, index))
        assert await call("verify", obj=wire, on_part=parts.append) == {"checked_bytes": obj.size, "bad": []}
        assert [part["checked_bytes"] for part in parts] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
        with open(rig.object_file(obj), "r+b") as file:
            file.seek(CHUNK_BYTES + 5 * BLOCK_BYTES)
            file.write(b"\xff")
        result = await call("verify", obj=wire)
        assert [chunk for chunk, _ in result["bad"]] == [1]
        assert (await call("masks", obj=wire))["masks"] == [FULL, FULL & ~(1 << 5)]
        await call("pin", objects=[wire], pinned=True)
        assert await call("evict", objects=[wire]) == {"ssd_bytes": 0, "kept_pinned_count": 1}
        await call("pin", objects=[wire], pinned=False)
        assert await call("evict", objects=[wire]) == {
            "ssd_bytes": 2 * CHUNK_BYTES - BLOCK_BYTES,
            "kept_pinned_count": 0,
        }
        assert not rig.object_file(obj).exists()
        assert (await call("usage"))["used_bytes"] == 0


async def test_bytes_whose_digest_is_wrong_are_dropped_whole(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj, call = rig.put_ramp("model.bin", 1000), rig.pool.call
        wrong = [*object_to_wire(obj)[:4], f"sha256:{'0' * 64}", ""]
        filled = await call("fill", **fill_arguments(rig, obj) | {"obj": wrong})
        await call("persist", obj=wrong, index=0, sums=filled["sums"], piece=rig.piece(obj, 0))
        result = await call("verify", obj=wrong)
        assert [chunk for chunk, _ in result["bad"]] == [-1]
        assert (await call("usage"))["used_bytes"] == 0


async def test_a_listing_comes_in_pages(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        for number in range(2500):
            (rig.origin / f"{number:04d}.bin").touch()
        pages: list[Any] = []
        await rig.pool.call("list_directory", source=0, path="", on_part=pages.append)
        assert [len(page["page"][1]) for page in pages] == [1000, 1000, 500]
        assert len({entry[0] for page in pages for entry in page["page"][1]}) == 2500
        with pytest.raises(NotFoundError):
            await rig.pool.call("list_directory", source=0, path="nowhere")


async def test_orders_larger_than_the_socket_are_no_reason_to_kill(tmp_path: Path) -> None:
    """500 objects with long names, as the service asks for them, several times at once."""
    async with running_rig(tmp_path) as rig:
        wire = [["file:///x", f"{number}/" + "x" * 4000, 1, "v", None, ""] for number in range(500)]
        before, rows = worker_pids(rig), list[int]()

        async def ask() -> None:
            rows.append(len((await rig.pool.call("residency", objects=wire))["rows"]))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)
        assert rows == [500] * 8
        assert worker_pids(rig) == before
        rig.assert_idle()


async def test_what_a_reader_waits_for_overtakes_what_was_fetched_ahead(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1, origin_limit=1, background_limit=1) as rig:
        obj = rig.put_ramp("model.bin", 40 * CHUNK_BYTES)
        order: list[str] = []

        def ask(name: str, priority: Priority, index: int) -> Job:
            job = Job("fill", fill_arguments(rig, obj, index, FULL), lambda r, e: order.append(name), priority, 20)
            rig.pool.submit(job)
            return job

        # no checkpoint: the first is under way, all others queue
        ask("first", Priority.BACKGROUND, 0)
        ahead = [ask(f"ahead {n}", Priority.BACKGROUND, n) for n in range(1, 5)]
        ask("reader", Priority.DEMAND, 5)
        rig.pool.hurry(ahead[2])
        rig.pool.hurry(ahead[2])
        assert rig.pool.queued("origin") == 5 + 1  # the hurried one stands twice until its old place is skipped
        await until(lambda: len(order) == 6, "all done")
        assert order == ["first", "ahead 3", "reader", "ahead 1", "ahead 2", "ahead 4"] or order == [
            "first", "reader", "ahead 3", "ahead 1", "ahead 2", "ahead 4"]  # fmt: skip
        rig.assert_idle()


async def test_fetching_ahead_leaves_a_connection_for_readers(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1, origin_limit=3, background_limit=2) as rig:
        obj = rig.put_ramp("model.bin", 10 * CHUNK_BYTES)
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        done: list[int] = []
        for index in range(6):
            rig.pool.submit(Job("fill", fill_arguments(rig, obj, index, FULL), lambda r, e: done.append(1),
                                Priority.BACKGROUND))  # fmt: skip
        assert rig.pool.inflight("origin") == 2
        rig.pool.submit(Job("fill", fill_arguments(rig, obj, 7, FULL), lambda r, e: done.append(1)))
        assert rig.pool.inflight("origin") == 3
        os.kill(pid, signal.SIGCONT)
        await until(lambda: len(done) == 7, "all done")
        rig.assert_idle()


async def test_each_order_has_its_own_descriptor_also_behind_a_full_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SEND_BUFFER_BYTES", 1)  # the kernel makes some KiB of it
    async with running_rig(tmp_path, workers_count=1, origin_limit=32) as rig:
        objects = [rig.put_ramp(f"{number}.bin", 1000 + number, start=number) for number in range(30)]
        fds_before = len(os.listdir("/proc/self/fd"))
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        done: list[MfsError | None] = []
        for obj in objects:
            rig.pool.submit(Job("fill", fill_arguments(rig, obj), lambda r, e: done.append(e)))
        assert rig.pool._workers[0]._unsent, "all of it fits the socket: nothing was tried"
        os.kill(pid, signal.SIGCONT)
        await until(lambda: len(done) == len(objects), "all done")
        assert not any(done)
        assert all(rig.in_ram(obj, 0) == rig.contents[obj] for obj in objects)
        assert len(os.listdir("/proc/self/fd")) == fds_before + len(objects), "a descriptor was kept beside the files'"
        rig.assert_idle()


async def test_the_common_file_is_sent_once_to_each_worker_and_kept_mapped(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1) as rig:
        obj = rig.put_ramp("model.bin", 3 * CHUNK_BYTES)
        places = [rig.memory.take_common() for _ in range(3)]
        common = places[0].file
        [pid] = worker_pids(rig)

        async def fill(index: int, mask: int) -> None:
            piece = Piece(common.fd, places[index].start, CHUNK_BYTES, common.stays)
            await rig.pool.call("fill", **fill_arguments(rig, obj, index, mask) | {"piece": piece})

        await fill(0, FULL)  # the first brings the file
        before = len(os.listdir(f"/proc/{pid}/fd"))
        assert mappings(pid, common.fd) == 2
        await fill(1, FULL)
        await fill(2, 1 << 5)  # by the other mapping, of small pages
        assert (len(os.listdir(f"/proc/{pid}/fd")), mappings(pid, common.fd)) == (before, 2)
        for index, (start, stop) in enumerate([(0, CHUNK_BYTES), (0, CHUNK_BYTES), (5 * BLOCK_BYTES, 6 * BLOCK_BYTES)]):
            at = index * CHUNK_BYTES
            place = places[index].start
            assert common.view(place + start, place + stop) == rig.contents[obj][at + start : at + stop]
        os.kill(pid, signal.SIGKILL)
        await fill(0, 1)  # another worker, which was sent nothing yet
        for place in places:
            rig.memory.give(place)
        rig.assert_idle()


def mappings(pid: int, fd: int) -> int:
    """How often a process has a file mapped that we have open."""
    inode = str(os.fstat(fd).st_ino)
    return sum(line.split()[4] == inode for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


async def test_an_order_whose_caller_was_cancelled_before_its_turn_is_not_sent(tmp_path: Path) -> None:
    """What it was to work on may be gone by then."""
    async with running_rig(tmp_path, workers_count=1, origin_limit=1, background_limit=1) as rig:
        obj = rig.put_ramp("model.bin", CHUNK_BYTES)
        gate = rig.gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.pool.call, "fill", **fill_arguments(rig, obj, 0, FULL)))
            await until(lambda: len(rig.origin_reads()) == 1, "as many as may run do")
            with trio.move_on_after(0.1) as scope:
                await rig.pool.call("fill", **fill_arguments(rig, obj, 0, FULL))
            assert scope.cancelled_caught
            gate.unlink()
        await rig.pool.call("usage")
        assert len(rig.origin_reads()) == 1
        rig.assert_idle()


# -- deaths


async def test_a_killed_worker_is_one_clear_error_and_another_worker(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj = rig.put_ramp("model.bin", CHUNK_BYTES)
        before = worker_pids(rig)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        errors: list[MfsError | None] = []
        for _ in range(4):
            rig.pool.submit(Job("fill", fill_arguments(rig, obj, 0, FULL), lambda r, e: errors.append(e)))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(errors) == 4, "errors")
        assert all(isinstance(error, WorkerEndedError) and "ended during fill" in str(error) for error in errors)
        assert all(not process_state(pid) for pid in before)  # only then may what they fill be used again
        await rig.pool.call("fill", **fill_arguments(rig, obj, 0, FULL))
        assert not set(before) & set(worker_pids(rig))
        assert rig.pool.restarts_count >= 1
        rig.assert_idle()


async def test_a_hung_worker_is_killed_before_what_it_fills_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_GRACE_S", 0.2)
    async with running_rig(tmp_path, workers_count=1) as rig:
        obj = rig.put_ramp("model.bin", CHUNK_BYTES)
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        states_at_answer: list[str] = []
        rig.pool.submit(Job("fill", fill_arguments(rig, obj, 0, FULL), lambda r, e: states_at_answer.append(
            process_state(pid)), timeout_s=0.1))  # fmt: skip
        await until(lambda: bool(states_at_answer), "an answer")
        assert states_at_answer == [""]
        await rig.pool.call("fill", **fill_arguments(rig, obj, 0, FULL))
        rig.assert_idle()


async def test_what_is_queued_fails_in_time_though_no_worker_can_take_it(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1, control_limit=1) as rig:
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.pool.call, "list_directory", source=0, path=""))
            await until(lambda: rig.pool.inflight("control") == 1, "the first is given to the worker")
            with pytest.raises(StoreError, match=r"no answer within 0\.1 s"):
                await rig.pool.call("list_directory", source=0, path="", timeout_s=0.1)
            os.kill(pid, signal.SIGCONT)
        rig.assert_idle()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_to_the_group_are_the_daemons_business(tmp_path: Path, number: signal.Signals) -> None:
    async with running_rig(tmp_path) as rig:
        before = worker_pids(rig)
        for pid in before:
            os.kill(pid, number)
        for _ in range(4):
            await rig.pool.call("stat_path", path="/")
        assert worker_pids(rig) == before


async def test_shutdown_answers_what_is_queued_and_what_runs(tmp_path: Path) -> None:
    answers: list[MfsError | None] = []
    async with running_rig(tmp_path, workers_count=1, origin_limit=2, background_limit=1) as rig:
        obj = rig.put_ramp("model.bin", 10 * CHUNK_BYTES)
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        for index in range(8):
            rig.pool.submit(Job("fill", fill_arguments(rig, obj, index, FULL), lambda r, e: answers.append(e),
                                Priority(index % 2)))  # fmt: skip
    assert len(answers) == 8
    assert all(isinstance(error, StoreError) for error in answers)
    rig.pool.submit(Job("usage", {}, lambda r, e: answers.append(e)))
    assert len(answers) == 9
    rig.assert_idle()
    assert not process_state(pid)


# -- starts that fail


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"sources": [{"url": "gopher://x", "options": {}}]}, "not a source"),
        ({"cache_dir": "/proc/nowhere"}, "cannot be written"),
        ({"cache_dir": "/etc"}, "neither empty nor an mfs cache"),
    ],
)
async def test_a_worker_that_cannot_start_says_why(tmp_path: Path, setup: dict[str, Any], message: str) -> None:
    async with running_rig(tmp_path):
        whole = {"sources": [], "cache_dir": None, "cache_fsync": False, "log_level": "WARNING"} | setup
        with raises_inside(MfsError, message):
            async with WorkerPool(PoolConfig(whole)).running():
                raise AssertionError("it runs")


async def test_a_worker_that_dies_at_once_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with raises_inside(ConfigError, "did not start"):
        async with running_rig(tmp_path):
            raise AssertionError("it runs")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with raises_inside(ConfigError, "cannot be started"):
        async with running_rig(tmp_path):
            raise AssertionError("it runs")


# -- two processes, one budget


async def test_two_daemons_keep_one_budget(tmp_path: Path) -> None:
    async with (
        running_rig(tmp_path) as one,
        running_rig(tmp_path, cache_dir=tmp_path / "cache") as two,
    ):
        for number, rig in enumerate([one, two]):
            obj = rig.put_ramp(f"{number}.bin", 6 * CHUNK_BYTES, start=number)
            for index in range(6):
                filled = await rig.pool.call("fill", **fill_arguments(rig, obj, index, FULL))
                await rig.pool.call(
                    "persist", obj=object_to_wire(obj), index=index, sums=filled["sums"], piece=rig.piece(obj, index)
                )
        sidecars = 2 * 8192
        budget, target = 8 * CHUNK_BYTES + sidecars, 5 * CHUNK_BYTES + sidecars
        results: list[Any] = []

        async def enforce(rig: Rig) -> None:
            results.append(await rig.pool.call("enforce_budget", budget_bytes=budget, target_bytes=target))

        async with trio.open_nursery() as nursery:
            for rig in [one, two, one, two]:
                nursery.start_soon(enforce, rig)
        assert sum(result["evicted_bytes"] for result in results) == 7 * CHUNK_BYTES
        standing = [found for found in one.ssd.walk_all() for mask in found.masks if mask]
        assert len(standing) == 5
        assert (await two.pool.call("usage"))["used_bytes"] == 5 * CHUNK_BYTES + len(set(map(id, standing))) * 8192


# -- frames


def test_frames_survive_any_cut() -> None:
    frames = [{"id": n, "text": "é" * n} for n in range(40)]
    stream = b"".join(map(encode, frames))
    for size in (1, 3, 4, 5, 17, len(stream)):
        decoder = Decoder()
        cut = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [frame for piece in cut for frame in decoder.feed(piece)] == frames


def test_a_frame_too_long_is_refused_and_not_buffered_for_ever() -> None:
    decoder, piece = Decoder(), bytes(1 << 20)
    head = b"\xc6" + (FRAME_BYTES_MAX + 1).to_bytes(4, "big")  # a binary string of that length
    assert list(decoder.feed(head)) == []
    pieces = [piece] * (FRAME_BYTES_MAX // len(piece) + 1)
    with pytest.raises(ValueError, match="more than"):
        list(chain.from_iterable(map(decoder.feed, pieces)))


def test_what_is_no_frame_is_refused() -> None:
    for garbage in (b"\xc1", b"\x93\x01\x02\x03", b"GET / HTTP/1.1\r\n"):
        with pytest.raises(ValueError):
            list(Decoder().feed(garbage))


async def test_a_question_is_asked_again_when_its_worker_dies(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        rig.put_ramp("model.bin", 10)
        parts: list[dict[str, object]] = []
        before = worker_pids(rig)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.pool.call, "list_directory", source=0, path="", on_part=parts.append))
            await until(lambda: rig.pool.inflight("control") == 1, "the question is with a worker")
            for pid in before:
                os.kill(pid, signal.SIGKILL)
        assert parts[0] == {"again": True}
        assert [list(part) for part in parts if "again" not in part] == [["page"]]
        rig.assert_idle()


async def test_a_model_that_hangs_leaves_connections_to_another_and_a_source_to_a_source(tmp_path: Path) -> None:
    async with running_rig(tmp_path, origin_limit=4, background_limit=3) as rig:
        obj, other = rig.put_ramp("m/model.bin", 16 * CHUNK_BYTES), rig.put_ramp("h/model.bin", CHUNK_BYTES)
        gate, done = rig.gate(), list[str]()

        def ask(name: str, source: int, obj: ObjectId, index: int, priority: Priority) -> None:
            arguments = fill_arguments(rig, obj, min(index, obj.chunks_count - 1), 1) | {"source": source}
            rig.pool.submit(Job("fill", arguments, lambda r, e: done.append(name), priority))

        for index in range(10):
            ask("m", 0, obj, index, Priority.DEMAND)
        await until(lambda: len(rig.origin_reads()) == 4, "the share of one model")
        ask("ahead", 0, other, 10, Priority.BACKGROUND)
        ask("other", 0, other, 11, Priority.DEMAND)
        await until(lambda: len(rig.origin_reads()) == 6, "the other model's, in the same source")
        assert rig.pool.inflight("origin") == 6
        assert rig.pool.queued("origin") == 6
        ask("elsewhere", 1, other, 12, Priority.DEMAND)  # the rig has no source 1: it fails at once, in a worker
        await until(lambda: done == ["elsewhere"], "another source's")
        gate.unlink()
        await until(lambda: len(done) == 13, "all done")
        rig.assert_idle()


async def test_a_worker_that_says_nothing_is_killed_before_its_deadline_and_its_work_is_done(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1, silence_s=1) as rig:
        obj = rig.put_ramp("model.bin", 1000)
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        assert (await rig.pool.call("residency", objects=[object_to_wire(obj)], timeout_s=60))["rows"] == [[0, False]]
        assert worker_pids(rig) != [pid]


async def test_all_attempts_together_take_as_long_as_one_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die one after another; the question was not given a new time each time."""
    async with running_rig(tmp_path, workers_count=1) as rig:
        asked = list[float]()

        async def die(job: Job) -> Any:
            asked.append(job.timeout_s)
            await trio.sleep(0.05)
            raise WorkerEndedError("dead")

        monkeypatch.setattr(rig.pool, "_call_once", die)
        with pytest.raises(WorkerEndedError):
            await rig.pool.call("usage", timeout_s=0.12)
        assert asked == sorted(asked, reverse=True)
        assert 1 < len(asked) <= 3


async def test_a_source_that_no_longer_opens_costs_itself_when_a_worker_starts_anew(tmp_path: Path) -> None:
    """Its certificate file is gone, say: the other sources and the cache are served on."""
    async with running_rig(tmp_path, workers_count=1) as rig:
        rig.put_ramp("model.bin", 1000)
        sources, pages = rig.pool._config.setup["sources"], list[Any]()
        good = dict(sources[0])
        sources[0]["url"] = "gopher://gone"
        [pid] = worker_pids(rig)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: worker_pids(rig) not in ([], [pid]), "another worker")
        with pytest.raises(MfsError, match="gopher"):
            await rig.pool.call("list_directory", source=0, path="")
        assert "used_bytes" in await rig.pool.call("usage")
        sources[0] = good
        os.kill(worker_pids(rig)[0], signal.SIGKILL)
        await rig.pool.call("list_directory", source=0, path="", on_part=pages.append)
        assert [entry[0] for page in pages if "page" in page for entry in page["page"][1]] == ["model.bin"]
