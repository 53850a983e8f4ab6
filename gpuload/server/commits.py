"""Commits that may come back: no file has them, but where one is evicted and the RAM tier has its bytes, its name
suffices. Tables and digests are remembered; the bytes are a cache's, and may be gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpuload.moving.source import Loan
from gpuload.server.digest_files import Digest
from gpuload.server.work import Job, PieceKey, Work
from mfs.errors import NotFoundError

REMEMBERED_MAX = 32
"""Names; those that were used longest ago are forgotten first. A table of 30,000 tensors takes some 20 MB."""


class Commits:
    """What this server was given by engines, by name."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def note(self, job: Job, digests: Mapping[PieceKey, Digest]) -> None:
        """A model is served under its name: whatever else had it does not come back."""
        assert job.name is not None
        self.forget(job.name)
        if (job.asked_fd is None and job.known is None) or job.retain == "lease":  # which goes with its last lease
            return
        shards = [replace(shard, fd=-1) for shard in job.shards]
        self._jobs[job.name] = replace(
            job, shards=shards, known=dict(digests), is_swap=False, asked_fd=None, timing=None, span=None
        )
        if len(self._jobs) > REMEMBERED_MAX:
            self._jobs.popitem(last=False)

    def forget(self, name: str) -> None:
        """Nobody wants it back."""
        self._jobs.pop(name, None)

    def find(self, name: str) -> Job | None:
        """A job that reads nothing, for `Loader.load`."""
        return self._jobs.get(name)


def check_there(work: Work) -> None:
    """That all blocks are on the device or in its RAM tier. Raises: NotFoundError; no checkpoint."""
    for part in work.parts:
        tier = part.site.tier
        for i, digest in enumerate(part.digests):
            if part.resident(i) is None and (tier is None or digest is None or tier.find(digest) is None):
                raise _gone(work.job)


class NoSource:
    """Of bytes that nobody has any more; see `Source`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """See `Source.borrow`."""
        raise _gone(self._job)

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`."""
        raise _gone(self._job)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""

    def close(self) -> None:
        """See `Source.close`."""


def _gone(job: Job) -> NotFoundError:
    return NotFoundError(
        f"{job.name!r} ({job.label}) was evicted, and not all of it is in RAM any more: commit it again"
    )
