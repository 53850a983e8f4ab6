"""Pictures of the page and of `mfs top` for the README, of made-up data: python -m tests.page.shots [FOLDER]"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
from playwright.sync_api import Page, sync_playwright

from mfs.page import where
from tests.page.browser import launched
from tests.page.demo import BusyDaemon
from tests.page.test_site import served

_FOLDER = Path(__file__).parents[2] / "mfs/page/shots"
_LOOKS = 125


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with sync_playwright() as playwright, launched(playwright) as browser, tempfile.TemporaryDirectory() as place:
        for scheme in ("light", "dark"):
            with served(BusyDaemon(step_s=1.0), Path(place)) as socket_path:
                context = browser.new_context(color_scheme=scheme, viewport={"width": 1240, "height": 900})
                page = context.new_page()
                look_long(page, where.page_url(socket_path))
                page.screenshot(path=folder / f"page-{scheme}.png", full_page=True)
                context.close()
        page = browser.new_page(viewport={"width": 1180, "height": 700})
        page.set_content(top_svg())
        page.locator("svg").first.screenshot(path=folder / "top.png")


def look_long(page: Page, url: str) -> None:
    """Open the page, let two minutes pass for it, and open a model."""
    page.clock.install()
    page.goto(url)
    page.get_by_role("button", name="llama-3.3-70b-instruct", exact=True).click()
    for _ in range(_LOOKS):
        with page.expect_response("**/v1/overview*"):
            page.clock.run_for(1000)
    page.evaluate("window.scrollTo(0, 0)")


def top_svg() -> str:
    """`mfs top` of a busy daemon and of one that is gone, as rich draws a terminal."""
    from rich.console import Console

    from mfs.cli.top_view import Watched, render

    async def looks(daemon: BusyDaemon) -> list[Any]:
        return [await daemon.overview(sort="recent", match="", count=200) for _ in range(22)]

    busy, dead = (Watched(SimpleNamespace(mountpoint=place)) for place in ("/mnt/models", "/mnt/hub"))  # type: ignore[arg-type]
    for seen in trio.run(looks, BusyDaemon(step_s=1.0)):
        busy._before, busy.seen = busy.seen, seen
        if busy._before is not None:
            busy.history.append(busy.rates()["origin"])
    dead.state = "not answering"
    console = Console(record=True, width=150, file=open(os.devnull, "w"), markup=False, highlight=False)
    console.print(render([busy, dead], "recent", rows_max=200, size=SimpleNamespace(width=150, height=44)))  # type: ignore[arg-type]
    return console.export_svg(title="mfs top")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER)
