"""The page in a real browser, on a real mount: shows what the daemon says, obeys the keyboard, asks nobody else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mfs.page import where
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.units import format_size
from tests.mount import origins
from tests.page.demo import BusyDaemon
from tests.page.test_site import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MIB = 1 << 20
EVIL = "<img src=x onerror=alert(1)>"
FILES = {
    "alpha/model.safetensors": ramp(9 * MIB + 5),
    "alpha/config.json": b"{}",
    "beta/model.safetensors": ramp(5 * MIB, 31),
    f"{EVIL}/weights.bin": ramp(MIB, 7),
    "gamma-with-a-name-that-is-much-too-long-for-any-table-" + "x" * 90 + "/w.bin": ramp(MIB, 9),
}


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestMount]:
    folder = tmp_path_factory.mktemp("p")
    origin = origins.FolderOrigin(folder / "registry")
    origin.put_all(FILES)
    with origins.mount(origin, folder / "m", page_addr="127.0.0.1:0") as started:
        yield started


@pytest.fixture
def url(mount: TestMount) -> str:
    [file] = (mount.folder / "run").glob("*.page")
    return where.page_url(file.with_suffix(".sock"))


class Seen:
    """What a page asked for and complained of."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., tuple[Page, Seen]]]:
    """`opened(url)` is a page in a context of its own; what it complains of fails the test, unless it is `forgiven`."""
    made: list[tuple[Page, Seen]] = []

    def open_page(url: str, **options: object) -> tuple[Page, Seen]:
        page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(20_000)
        made.append((page, Seen(page)))
        page.goto(url)
        return made[-1]

    yield open_page
    complaints = [text for _, seen in made for text in seen.complaints]
    for page, _ in made:
        page.context.close()
    assert complaints == []


def tab_to(page: Page, label: str) -> None:
    """Press Tab until what is called so has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
        )
        if name == label:
            return
    raise AssertionError(f"{label!r} cannot be reached by the keyboard")


class TestWhatItShows:
    def test_the_tiers_and_models_as_the_daemon_says(
        self, mount: TestMount, url: str, opened: Callable[..., tuple[Page, Seen]]
    ) -> None:
        list(mount.client.prefetch(["beta"], "ssd", wait=True))
        mount.client.pin(["beta"])
        page, seen = opened(url)
        rows = mount.client.overview()["models"]["rows"]
        for row in rows:
            page.get_by_role("button", name=row["path"], exact=True).wait_for()
        status = mount.client.status()
        tiers = page.get_by_label("Tiers")
        tiers.get_by_text(f"of {format_size(status['ssd']['budget_bytes'])}").wait_for()
        tiers.get_by_text(f"of {format_size(status['ram']['budget_bytes'])}").wait_for()
        assert status["ssd"]["pinned_count"] > 0
        pinned = f"{status['ssd']['pinned_count']} pinned ({format_size(status['ssd']['pinned_bytes'])})"
        tiers.get_by_text(pinned).wait_for()
        mount.client.unpin(["beta"])
        assert page.get_by_role("heading", level=1).text_content() == f"mfs {mount.path}"
        beta = page.get_by_role("row").filter(has=page.get_by_role("button", name="beta", exact=True))
        beta.get_by_role("img", name=re.compile("100 % on SSD")).wait_for()
        assert page.locator("img").count() == 0  # what a model is called is text
        base = url.partition("#")[0]
        assert seen.requests
        assert [asked for asked in seen.requests if not asked.startswith(base)] == []
        assert [asked for asked in seen.requests if "token" in asked] == []
        assert page.url == base

    def test_finding_and_ordering(self, url: str, opened: Callable[..., tuple[Page, Seen]]) -> None:
        from playwright.sync_api import expect

        page, _ = opened(url)
        page.get_by_label("Find").fill("ALPH")
        page.get_by_role("button", name="beta", exact=True).wait_for(state="detached")
        assert page.locator("tbody button.name").all_text_contents() == ["alpha"]
        page.get_by_label("Find").fill("no such")
        page.get_by_text("No model has that in its name.").wait_for()
        page.get_by_label("Find").fill("")
        page.get_by_label("Order").select_option("name")
        expect(page.locator("tbody button.name")).to_have_text(sorted({path.partition("/")[0] for path in FILES}))

    def test_nothing_is_asked_while_nobody_can_see_it(self, url: str, opened: Callable[..., tuple[Page, Seen]]) -> None:
        page, seen = opened("about:blank")
        page.clock.install()
        page.goto(url)
        page.get_by_role("button", name="alpha", exact=True).wait_for()
        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});" \
               "document.dispatchEvent(new Event('visibilitychange'))"  # fmt: skip
        page.evaluate(hide % "true")
        page.wait_for_load_state("networkidle")
        before = len(seen.requests)
        page.clock.run_for(60_000)
        page.wait_for_load_state("networkidle")
        assert len(seen.requests) == before
        with page.expect_request("**/v1/overview*"):
            page.evaluate(hide % "false")


class TestByKeyboard:
    def test_a_model_is_prefetched_and_looked_into(
        self, mount: TestMount, url: str, opened: Callable[..., tuple[Page, Seen]]
    ) -> None:
        mount.client.evict(["alpha"], "all")
        page, _ = opened(url)
        page.get_by_role("button", name="alpha", exact=True).wait_for()
        tab_to(page, "Prefetch alpha")
        page.keyboard.press("Enter")
        page.get_by_role("status").get_by_text("Prefetching alpha").wait_for()
        mount.wait_saved("alpha/model.safetensors", "alpha/config.json")
        page.get_by_label("Find").focus()
        tab_to(page, "alpha")
        page.keyboard.press("Enter")
        page.get_by_role("img", name="alpha/model.safetensors: 100 % on SSD").wait_for()
        assert page.get_by_role("button", name="alpha", exact=True).get_attribute("aria-expanded") == "true"

    def test_evicting_asks_back(self, mount: TestMount, url: str, opened: Callable[..., tuple[Page, Seen]]) -> None:
        list(mount.client.prefetch(["beta"], "ssd", wait=True))
        page, _ = opened(url)
        page.get_by_role("button", name="beta", exact=True).wait_for()
        tab_to(page, "Evict beta")
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name="Evict beta?").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="detached")
        assert mount.client.stat("beta/model.safetensors")["ssd_bytes"] == 5 * MIB
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Evict beta"
        page.keyboard.press("Enter")
        page.get_by_role("dialog").wait_for()
        page.get_by_role("dialog").get_by_role("button", name="Evict").focus()
        page.keyboard.press("Enter")
        page.get_by_role("status").get_by_text("Evicted beta").wait_for()
        assert mount.client.stat("beta/model.safetensors")["ssd_bytes"] == 0

    def test_pin_and_refresh(self, mount: TestMount, url: str, opened: Callable[..., tuple[Page, Seen]]) -> None:
        list(mount.client.prefetch(["beta"], "ssd", wait=True))
        page, _ = opened(url)
        page.get_by_role("button", name="Pin beta").click()
        page.get_by_role("status").get_by_text("Pinned beta. 1 files.").wait_for()
        assert mount.client.stat("beta/model.safetensors")["pinned"] is True
        page.get_by_role("button", name="Unpin beta").click()
        page.get_by_role("button", name="Pin beta").wait_for()
        assert mount.client.stat("beta/model.safetensors")["pinned"] is False
        page.get_by_role("button", name="Look for changes").click()
        page.get_by_role("status").get_by_text("0 changed, 0 new, 0 gone").wait_for()


class TestWithoutTheToken:
    def test_it_shows_nothing_and_says_how_to_get_it(self, url: str, browser: Browser) -> None:
        page = browser.new_context().new_page()
        page.goto(url.partition("#")[0])
        page.get_by_role("heading", name="This page needs its token").wait_for()
        page.get_by_text("mfs page /path/of/the/mount").wait_for()
        assert page.get_by_role("button").count() == 0
        page.goto(url)  # the same tab, now with it
        page.get_by_role("button", name="alpha", exact=True).wait_for()
        page.context.close()

    def test_buttons_are_refused_once_it_is_lost(self, mount: TestMount, url: str, browser: Browser) -> None:
        mount.client.unpin(["alpha"])
        page = browser.new_context().new_page()
        page.goto(url)
        page.get_by_role("button", name="Pin alpha").wait_for()
        page.evaluate("sessionStorage.setItem('mfs-token', 'wrong')")
        page.get_by_role("button", name="Pin alpha").click()
        page.get_by_role("status").get_by_text("no token, or not this mount's").wait_for()
        assert mount.client.stat("alpha/model.safetensors")["pinned"] is False
        page.context.close()

    def test_a_page_of_another_site_gets_nothing(
        self, mount: TestMount, url: str, browser: Browser, nginx: object
    ) -> None:
        base, token = url.split("#token=")
        page = browser.new_context().new_page()
        page.goto(nginx.url)  # type: ignore[attr-defined]
        ask = """async ([url, token]) => {
            const headers = token ? {Authorization: `Bearer ${token}`} : {};
            try { return (await fetch(url, {method: "POST", body: '{"paths": ["alpha"]}', headers})).status }
            catch (error) { return "refused" }
        }"""
        for given in (token, ""):
            assert page.evaluate(ask, [f"{base}v1/pin", given]) == "refused"
        assert mount.client.stat("alpha/model.safetensors")["pinned"] is False
        page.context.close()


class TestForEverybody:
    @pytest.fixture
    def busy(self, tmp_path: Path) -> Iterator[str]:
        with served(BusyDaemon(), tmp_path) as socket_path:
            yield where.page_url(socket_path)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing(
        self, busy: str, opened: Callable[..., tuple[Page, Seen]], tmp_path: Path, scheme: str
    ) -> None:
        from axe_playwright_python.sync_playwright import Axe

        page, _ = opened(busy, color_scheme=scheme, reduced_motion="reduce")
        page.get_by_label("Find").fill("customer")  # one row is like another, and each costs axe a while
        page.get_by_role("button", name=re.compile("^llama.*-v12$")).click()
        page.get_by_role("img", name=re.compile("model-00001-of-00012")).wait_for()
        page.get_by_role("heading", name="Last load").wait_for()
        page.get_by_label("Tiers").get_by_text(re.compile(r"95\s% through the cache http://cache.svc:8080")).wait_for()
        found = Axe().run(page, options={} if scheme == "light" else {"runOnly": ["color-contrast"]})
        assert found.response["violations"] == [], found.generate_report()
        picture = tmp_path / "page.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 20_000

    def test_nothing_sticks_out_of_a_narrow_window(self, busy: str, opened: Callable[..., tuple[Page, Seen]]) -> None:
        page, _ = opened(busy, viewport={"width": 390, "height": 800})
        page.get_by_role("button", name="llama-3.3-70b-instruct", exact=True).click()
        page.get_by_role("img", name=re.compile("model-00001-of-00012")).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
