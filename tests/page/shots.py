"""Pictures of the page and of `mfs top` for the README, of made-up data: python -m tests.page.shots [FOLDER]"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from mfs.page import where
from tests.page.browser import launched
from tests.page.demo import BusyDaemon
from tests.page.test_site import served

_FOLDER = Path(__file__).parents[2] / "mfs/page/shots"
_LOOKS = 125
_WIDTH, _TOP_HEIGHT = 1240, 1560


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, launched(playwright) as browser, tempfile.TemporaryDirectory() as place:
        for scheme in ("light", "dark"):
            with served(BusyDaemon(step_s=1.0), Path(place)) as socket_path:
                page = browser.new_context(color_scheme=scheme, viewport={"width": _WIDTH, "height": 900}).new_page()
                look_long(page, where.page_url(socket_path))
                height = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": _WIDTH, "height": height})
                if scheme == "light":
                    page.screenshot(path=folder / "page-light.png", clip=_part(0, _TOP_HEIGHT))
                else:
                    fetches = page.locator("section[aria-labelledby=fetches]").bounding_box()
                    assert fetches is not None
                    page.screenshot(path=folder / "page-dark.png", clip=_part(fetches["y"] - 20, height))
                page.context.close()
        page = browser.new_page(viewport={"width": 1240, "height": 700})
        page.set_content(top_svg())
        page.locator("svg").first.screenshot(path=folder / "top.png")
    for file in folder.glob("*.png"):  # a third of the size, and no eye sees it
        Image.open(file).convert("RGB").quantize(160).save(file, optimize=True)


def _part(top: float, bottom: float) -> dict[str, float]:
    return {"x": 0, "y": top, "width": _WIDTH, "height": bottom - top}


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
    console = Console(record=True, width=150, file=io.StringIO(), markup=False, highlight=False)
    console.print(render([busy, dead], "recent", rows_max=200, size=SimpleNamespace(width=150, height=44)))  # type: ignore[arg-type]
    return console.export_svg(title="mfs top")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER)
