"""All families of a mount, read out of its parts in one go on the trio thread: some hundred microseconds."""

from __future__ import annotations

import errno
import os
import platform
import time

from mfs import __version__
from mfs.cache.chunk_state import CacheCounters
from mfs.control.api import Json
from mfs.fuse.protocol import Opcode
from mfs.metrics.families import Families
from mfs.metrics.tally import Tally
from mfs.mount import Mount

SSD_STATES = ("ok", "not writing", "away", "off")


def gathered(mount: Mount, ssd: Json) -> Families:
    """What a scrape of a mount says now. ssd: as of its status. No checkpoint."""
    families = Families()
    _add_mount(families, mount)
    _add_tiers(families, mount, ssd)
    _add_origin(families, mount)
    _add_readers(families, mount)
    _add_models(families, mount.tally)
    return families


def processes(mount: Mount) -> dict[str, int]:
    """The pids of a mount's processes."""
    found = {"daemon": os.getpid(), **{f"worker-{number}": pid for number, pid in mount.pool.pids.items()}}
    return found | ({"traces": mount.exporting.pid} if mount.exporting.pid is not None else {})


def _add_mount(families: Families, mount: Mount) -> None:
    operations, now_s = mount.operations, time.time()
    families.info(
        "mfs_build", "What serves.",
        {"version": __version__, "python": platform.python_version(), "kernel": platform.release()},
    )  # fmt: skip
    families.info("mfs_mount", "Where it is mounted.", {"mountpoint": str(mount.config.mountpoint)})
    families.gauge("mfs_start_time_seconds", "When this daemon began, since the epoch.", mount.started_at)
    families.gauge("mfs_uptime_seconds", "Since this daemon began.", now_s - mount.started_at)
    families.gauge("mfs_mount_generation", "Which daemon of this mount it is; the first is 1.", operations.generation)
    crashes = operations.crashes_count
    families.counter("mfs_mount_crashes", "Daemons of this mount that were killed or failed.", crashes)
    families.counter(
        "mfs_mount_handovers", "Times that one daemon of this mount gave it to the next.",
        operations.generation - 1 - crashes,
    )  # fmt: skip
    families.gauge("mfs_mount_warnings", "Warnings that 'mfs status' shows.", len(mount.all_warnings))
    families.gauge("mfs_mount_held", "Whether the mount would outlive a killed daemon.", float(not mount.unheld))
    families.gauge("mfs_workers", "Worker processes that run.", len(mount.pool.pids))
    families.counter("mfs_worker_restarts", "Workers started anew.", mount.pool.restarts_count)


def _add_tiers(families: Families, mount: Mount, ssd: Json) -> None:
    memory, counters, cache = mount.memory, mount.cache.counters, mount.cache
    tiers: dict[str, tuple[float, float, float, float, float, float, float]] = {
        "ram": (
            memory.used_bytes, memory.size_bytes, counters.ram_hits, counters.ram_misses, counters.ram_hit_bytes,
            counters.ram_evictions, counters.ram_evicted_bytes,
        ),
    }  # fmt: skip
    if mount.config.cache_dir is not None:
        tiers["ssd"] = (
            ssd["used_bytes"], ssd["budget_bytes"], counters.ssd_hits, counters.ssd_misses, counters.ssd_hit_bytes,
            counters.ssd_evictions, counters.ssd_evicted_bytes,
        )  # fmt: skip
    by = [{(tier,): row[column] for tier, row in tiers.items()} for column in range(7)]
    families.gauge("mfs_tier_bytes", "Bytes that stand in a tier.", by[0], ["tier"])
    families.gauge("mfs_tier_budget_bytes", "What may stand there.", by[1], ["tier"])
    families.counter(
        "mfs_tier_hits", "RAM: reads it answered at once. SSD: chunks it had something of.", by[2], ["tier"]
    )
    families.counter(
        "mfs_tier_misses", "RAM: reads that had to wait. SSD: chunks it lacked something of.", by[3], ["tier"]
    )
    families.counter("mfs_tier_hit_bytes", "Bytes that a tier gave.", by[4], ["tier"])
    families.counter("mfs_tier_evictions", "Chunks that lost their place.", by[5], ["tier"])
    families.counter("mfs_tier_evicted_bytes", "Bytes that lost their place.", by[6], ["tier"])
    families.gauge("mfs_ram_free_slots", "Slots of 4 MiB that are free.", memory.slots_free)
    families.gauge("mfs_ram_warm_bytes", "Memory kept ready for what comes, that holds nothing.", memory.warm_bytes)
    families.gauge("mfs_ram_leases", "Holds on chunks in RAM now.", cache.leases_count)
    families.counter("mfs_ram_lost_bytes", "Given up before the SSD had taken them.", counters.lost_bytes)
    families.counter("mfs_ssd_written_bytes", "Written to the SSD tier.", counters.saved_bytes)
    families.gauge("mfs_ssd_objects", "Files of which the SSD tier has something.", ssd["objects_count"])
    for name, kind, what in (
        ("pinned", "pinned", "that no eviction takes"),
        ("whole", "sealed", "all of which is there"),
    ):
        families.gauge(f"mfs_ssd_{name}_objects", f"Files {what}.", ssd[f"{kind}_count"])
        families.gauge(f"mfs_ssd_{name}_bytes", f"Of files {what}.", ssd[f"{kind}_bytes"])
    families.gauge("mfs_ssd_disk_free_bytes", "Room left on its disk.", ssd["free_disk_bytes"])
    states = {(state.replace(" ", "_"),): float(state == ssd["state"]) for state in SSD_STATES}
    families.gauge(
        "mfs_ssd_state", "1 at what the SSD tier is: ok, not_writing (full or failed), away, off.", states, ["state"]
    )
    families.counter("mfs_ssd_sealed_objects", "Files that became whole on SSD.", mount.whole_files.sealed_count)
    _add_prefetch(families, mount, counters)


def _add_prefetch(families: Families, mount: Mount, counters: CacheCounters) -> None:
    families.counter("mfs_prefetch_bytes", "Brought to RAM ahead of need.", counters.ahead_bytes)
    families.counter("mfs_prefetch_wasted_bytes", "Of these, dropped before anybody read them.", counters.wasted_bytes)
    families.gauge(
        "mfs_prefetch_queued_bytes", "Meant to be fetched ahead, and not yet.", mount.prefetcher.queued_bytes
    )
    families.gauge("mfs_prefetch_objects", "Files that are being fetched ahead.", mount.prefetcher.active_count)


def _add_origin(families: Families, mount: Mount) -> None:
    counters, pool, tally = mount.cache.counters, mount.pool, mount.tally
    families.counter("mfs_origin_received_bytes", "That came from origins, as they sent it.", counters.origin_bytes)
    families.counter("mfs_origin_requests", "Requests for bytes that origins answered.", counters.origin_requests)
    families.counter(
        "mfs_origin_way_bytes",
        "Of sources with a cache that nodes share: that came through it, or past it from the origin.",
        {(way,): pool.ways[f"{way}_bytes"] for way in ("cache", "direct")},
        ["way"],
    )
    families.counter("mfs_cache_faults", "Times that this cache failed.", pool.ways["cache_faults"])
    families.counter("mfs_shared_bytes", "Taken from other files on SSD instead.", counters.shared_bytes)
    families.counter(
        "mfs_brought_bytes",
        "That readers got for both; divided by mfs_origin_received_bytes: what compression and sharing save.",
        counters.brought_bytes,
    )
    families.gauge("mfs_origin_fetches", "Fetches under way.", pool.inflight("origin"))
    families.gauge("mfs_origin_fetches_queued", "Fetches that wait for their turn.", pool.queued("origin"))
    families.counter(
        "mfs_origin_retries",
        "Requests made once more; throttled: the server had asked for a pause.",
        {(reason,): count for reason, count in pool.retries.items()},
        ["reason"],
    )
    kinds = {"mfs_fetch_errors": tally.fetch_errors, "mfs_list_errors": tally.list_errors}
    for name, what in (("mfs_fetch_errors", "Fetches"), ("mfs_list_errors", "Listings")):
        errors = {(kind,): count for kind, count in kinds[name].items()}
        families.counter(name, f"{what} that failed for good, after all attempts.", errors, ["kind"])
    names = [source.name for source in mount.config.sources]
    looks = list(zip(names, mount.looking.last, strict=True))
    families.gauge(
        "mfs_source_refreshed_timestamp_seconds", "Last look at a source for changes, since the epoch; 0: none yet.",
        {(name,): state.at for name, state in looks}, ["source"],
    )  # fmt: skip
    families.gauge(
        "mfs_source_errors", "Directories that the last look could not list.",
        {(name,): len(state.errors) for name, state in looks}, ["source"],
    )  # fmt: skip
    families.gauge("mfs_listed_files", "Names in all listings.", mount.namespace.files_count)
    families.gauge("mfs_listed_bytes", "Sizes of all files listed.", mount.namespace.listed_bytes)
    families.gauge("mfs_listed_directories", "Directories listed.", mount.namespace.listed_count)


def _add_readers(families: Families, mount: Mount) -> None:
    files, tally = mount.operations.files, mount.tally
    families.histogram(
        "mfs_demand_wait_seconds", "How long readers waited, by what they waited for.",
        {(cause.value,): durations for cause, durations in tally.waits.items()}, ["cause"],
    )  # fmt: skip
    times = mount.operations.times
    families.histogram(
        "mfs_fuse_operation_seconds", "From the kernel's request to its answer.",
        {(name,): durations for name, durations in times.named().items()}, ["operation"],
    )  # fmt: skip
    refused = {
        (Opcode(opcode).name.lower(), errno.errorcode.get(number, str(number))): count
        for (opcode, number), count in times.errors.items()
    }
    families.counter("mfs_fuse_errors", "Answers that were an error.", refused, ["operation", "errno"])
    families.counter(
        "mfs_read_bytes", "Handed to the kernel; what it reads by itself is not seen.", files.counters.bytes
    )
    families.counter("mfs_read_errors", "Reads that failed.", files.counters.errors)
    families.gauge("mfs_reads_waiting", "Reads that wait now.", files.counters.waiting)
    by_way = {("daemon",): files.open_count - files.passed_through_count, ("kernel",): files.passed_through_count}
    families.gauge("mfs_open_files", "Open files, by who reads them for their readers.", by_way, ["way"])


def _add_models(families: Families, tally: Tally) -> None:
    models, labels = tally.models, ["source", "model"]
    for name, help, field in (
        ("mfs_model_received_bytes", "From the origin.", "origin_bytes"),
        ("mfs_model_ssd_hit_bytes", "From SSD.", "ssd_bytes"),
        ("mfs_model_shared_bytes", "From other files on SSD.", "shared_bytes"),
        ("mfs_model_waits", "Waits of readers.", "waits"),
        ("mfs_model_wait_seconds", "How long they took together.", "waited_s"),
        ("mfs_model_fetch_errors", "Fetches that failed for good.", "errors"),
    ):
        families.counter(name, help, {label: getattr(model, field) for label, model in models.items()}, labels)
