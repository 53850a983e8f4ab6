"""A real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Playwright

PROGRAM = shutil.which("chromium")


@contextmanager
def launched(playwright: Playwright) -> Iterator[Browser]:
    """Chromium without a window. As root it has no sandbox; it talks to nobody but who is named to it."""
    arguments = ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with playwright.chromium.launch(
        executable_path=PROGRAM, args=arguments, chromium_sandbox=os.geteuid() != 0
    ) as browser:
        yield browser
