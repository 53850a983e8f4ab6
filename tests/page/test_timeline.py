"""A load drawn: what is in the drawing is what the load says, whatever the load says."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.page import timeline
from mfs.page.timeline import CAUSES, PHASES, READS_MAX, STYLE, timeline_svg

SVG = "{http://www.w3.org/2000/svg}"
LOAD = {
    "model": "llama-3.1-70b",
    "began_at": 1_790_000_000.0,
    "seconds": 8.0,
    "phases": {"open": 0.5, "header": 0.5, "origin": 4.0, "slot": 1.0, "other": 2.0},
    "reads": [
        {"at": 1.0, "waited_s": 2.0, "on": "origin", "path": "llama/a.safetensors", "start": 0, "stop": 4 << 20},
        {"at": 1.5, "waited_s": 2.0, "on": "origin", "path": "llama/b.safetensors", "start": 0, "stop": 4 << 20},
        {"at": 5.0, "waited_s": 1.0, "on": "slot", "path": "llama/b.safetensors", "start": 4 << 20, "stop": 8 << 20},
    ],
    "left_out": 12,
    "bytes": {"origin": 3 << 30, "ssd": 0, "ram": 1 << 20},
}


def drawn(load: dict[str, Any], **options: bool) -> ElementTree.Element:
    return ElementTree.fromstring(timeline_svg(load, **options))


def rects(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """The bars of a class that say something: not what explains them."""
    return [
        r for r in root.iter(f"{SVG}rect") if name in r.attrib["class"].split() and r.find(f"{SVG}title") is not None
    ]


def width(rect: ElementTree.Element) -> float:
    return float(rect.attrib["width"])


class TestWhatIsDrawn:
    def test_phases_are_as_wide_as_they_are_long(self) -> None:
        root = drawn(LOAD | {"reads": []})
        widths = {phase: sum(map(width, rects(root, f"tl-{phase}"))) for phase in PHASES}
        whole = sum(widths.values())
        for phase, seconds in LOAD["phases"].items():
            assert widths[phase] / whole == pytest.approx(seconds / 8.0, abs=0.001)

    def test_a_strip_says_when_each_phase_was(self) -> None:
        steps = ["open", "origin", "origin", "page_cache", "origin", "nobody knows"]
        root = drawn(LOAD | {"seconds": 6.0, "reads": [], "strip": {"step_s": 1.0, "phases": steps}})
        step = width(rects(root, "tl-open")[0])
        first, second = rects(root, "tl-origin")
        assert width(first) == pytest.approx(2 * step, abs=0.2)
        assert float(second.attrib["x"]) - float(first.attrib["x"]) == pytest.approx(3 * step, abs=0.2)
        assert len(rects(root, "tl-other")) == 1

    def test_each_wait_stands_in_the_lane_of_its_cause_at_its_time(self) -> None:
        root = drawn(LOAD)
        waits = {cause: [r for r in rects(root, f"tl-{cause}") if "tl-wait" in r.attrib["class"]] for cause in CAUSES}
        assert {cause: len(found) for cause, found in waits.items() if found} == {"origin": 2, "slot": 1}
        first, second = waits["origin"]
        assert float(first.attrib["y"]) != float(second.attrib["y"])  # at the same time: side by side
        [slot] = waits["slot"]
        assert width(first) / width(slot) == pytest.approx(2.0, abs=0.01)
        assert float(slot.attrib["x"]) - float(first.attrib["x"]) == pytest.approx(2 * width(first), abs=0.2)
        said = slot.findtext(f"{SVG}title") or ""
        assert "llama/b.safetensors" in said
        assert "4.0 M at 4.0 M" in said

    def test_it_says_in_words_what_it_shows(self) -> None:
        root = drawn(LOAD)
        ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        assert set(root.attrib["aria-labelledby"].split()) == ids
        assert root.attrib["role"] == "img"
        described = root.findtext(f"{SVG}desc") or ""
        assert "waiting for the origin 4.00 s" in described
        assert "15 reads waited" in described
        assert "3.0 G from the origin" in described
        texts = [text.text or "" for text in root.iter(f"{SVG}text")]
        assert any("12 shorter waits are not drawn" in text for text in texts)

    def test_two_loads_on_a_page_have_different_ids(self) -> None:
        assert drawn(LOAD).attrib["aria-labelledby"] != drawn(LOAD | {"seconds": 9.0}).attrib["aria-labelledby"]

    def test_every_class_has_a_colour(self) -> None:
        for name in (*PHASES, *CAUSES):
            assert f".tl-{name}{{" in STYLE

    def test_bare_has_no_style_of_its_own(self) -> None:
        assert drawn(LOAD).find(f"{SVG}style") is not None
        assert drawn(LOAD, bare=True).find(f"{SVG}style") is None
        assert "style=" not in timeline_svg(LOAD, bare=True)

    def test_the_longest_of_too_many_waits_are_kept(self) -> None:
        reads = [
            {"at": n / 1000, "waited_s": n / 1e6, "on": "ssd", "path": "m/f", "start": 0, "stop": 1}
            for n in range(READS_MAX + 500)
        ]
        text = timeline_svg(LOAD | {"reads": reads})
        assert len(rects(ElementTree.fromstring(text), "tl-wait")) == READS_MAX
        assert "512 shorter waits are not drawn" in text
        assert len(text) < 1 << 20


class TestWhateverALoadSays:
    @pytest.mark.parametrize("load", [{}, {"phases": None, "reads": None, "bytes": None}, {"reads": [{}, None, 3]}])
    def test_what_is_missing_is_nothing(self, load: dict[str, Any]) -> None:
        assert drawn(load).find(f"{SVG}title") is not None

    @given(name=st.text(), number=st.floats() | st.integers() | st.none() | st.text(max_size=2))
    def test_names_and_numbers_of_strangers(self, name: str, number: object) -> None:
        read = {"at": number, "waited_s": number, "on": "origin", "path": name, "start": number, "stop": 1}
        load = {"model": name, "began_at": 1.0, "seconds": number, "phases": {"open": number}, "reads": [read]}
        text = timeline_svg(load)
        ElementTree.fromstring(text)
        for x, w in re.findall(r'x="([^"]*)" y="[^"]*" width="([^"]*)"', text):
            assert float(x) + float(w) <= timeline._WIDTH

    def test_markup_stays_text(self) -> None:
        evil = '</title><script>alert(1)</script><a href="javascript:x"/>'
        root = drawn(LOAD | {"model": evil, "reads": [{"waited_s": 1, "on": "ssd", "path": evil}]})
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
            "svg", "title", "desc", "style", "text", "rect", "line",
        }  # fmt: skip
        assert "http" not in timeline_svg(LOAD).replace("http://www.w3.org/2000/svg", "")
