"""One browser for all tests here, and mounts as next door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.mount.conftest import folder as folder
from tests.mount.conftest import mounted as mounted

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    from tests.page.browser import PROGRAM, launched

    if PROGRAM is None:
        pytest.skip("no chromium: run tools/setup test")
    with sync_playwright() as playwright, launched(playwright) as started:
        yield started
