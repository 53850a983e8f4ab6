"""What `mfs status` says of a mount, of made-up numbers."""

from __future__ import annotations

import io

import trio
from rich.console import Console

from mfs.cli.panel import render
from tests.page.demo import BusyDaemon


def text_of(daemon: BusyDaemon) -> str:
    out = Console(file=io.StringIO(), width=200)
    out.print(render(trio.run(daemon.status), None, None))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_it_says_which_way_bytes_came_and_what_is_whole_and_pinned() -> None:
    text = text_of(BusyDaemon())
    assert "95 % through the cache http://cache.svc:8080" in text
    assert "5 % past it" in text
    assert "2 cache failures" in text
    assert "in whole ones, 272 G pinned" in text
    assert "171 read by the kernel itself" in text
    assert "cache failures" not in text_of(BusyDaemon(is_troubled=False))
