"""The views of what a model computed: they answer the pointer, the keyboard and a screen reader."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from images import encoded, smooth
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from web.driving import DESKTOP, PATIENCE, PHONE, Site, Visit, error, visit

import vitrail
from vitrail.explain.command import explain
from vitrail.explain.explanation import explanation

pytestmark = pytest.mark.slow

VIEWS = [
    "Relevance",
    "Attention",
    "Rollout",
    "Similarity",
    "Colours",
    "Layer by layer",
    "Distance",
    "Norms",
    "Positions",
]
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": DESKTOP},
    "phone, dark": {"color_scheme": "dark", "viewport": PHONE, "has_touch": True},
}


@contextmanager
def inside(browser: Browser, served: Site, view: str, model: str = "classify", **how: Any) -> Iterator[Visit]:
    """A view of a sample photo."""
    with visit(browser, served, **how) as seen:
        seen.open(f"#sample=cat&model={model}&inside={view}")
        expect(glass(seen.page)).to_be_visible()
        drawn(glass(seen.page))
        yield seen


def glass(page: Page, number: int = 0) -> Locator:
    """The photo under a map."""
    return page.locator(".glass-map").nth(number)


def told(page: Page) -> str:
    """The map in words."""
    return page.locator(".told").first.inner_text()


def colours(canvas: Locator) -> int:
    """How many colours a canvas shows."""
    found = canvas.evaluate(
        """canvas => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
            copy.drawImage(canvas, 0, 0);
            const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
            const seen = new Set();
            for (let i = 0; i < data.length; i += 4 * 97) seen.add(data.slice(i, i + 3).join());
            return seen.size;
        }"""
    )
    return int(found)


def drawn(canvas: Locator) -> None:
    """Wait until a canvas shows a photo."""
    eventually(canvas.page, lambda: colours(canvas) > 40)


def eventually(page: Page, true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE / 1000
    while not true():
        assert time.monotonic() < end
        page.wait_for_timeout(50)


def pixels(canvas: Locator) -> str:
    return str(canvas.evaluate("canvas => canvas.toDataURL()"))


def changes(canvas: Locator, before: str) -> str:
    """Wait until a canvas shows something else; what it shows then."""
    eventually(canvas.page, lambda: pixels(canvas) != before)
    return pixels(canvas)


def point(canvas: Locator, x: float, y: float) -> None:
    """Point at a place, as shares of the canvas."""
    box = canvas.bounding_box()
    assert box is not None
    canvas.hover(position={"x": x * box["width"], "y": y * box["height"]}, force=True)


def open_view(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check(force=True)
    drawn(glass(page))


@pytest.mark.parametrize("look", LOOKS)
def test_every_view_shows_something_explains_it_and_is_accessible(browser: Browser, served: Site, look: str) -> None:
    with inside(browser, served, "relevance", **LOOKS[look]) as seen:
        page, shown = seen.page, set()
        for name in VIEWS:
            open_view(page, name)
            expect(page.locator(".says")).to_contain_text(re.compile(r"\. .*arXiv \d{4}\.\d{5}"))
            assert not seen.violations(), name
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            shown.add(pixels(glass(page)))
            if name not in ("Layer by layer", "Colours"):
                assert re.search(r"(Strongest|Most similar to it): row \d+, column \d+ \(.+\)", told(page)), name
        assert len(shown) >= len(VIEWS) - 1  # attention and distance begin with the same map
        assert page.evaluate("location.hash").endswith("inside=positions")


def test_pointing_at_a_patch_shows_where_it_looks(browser: Browser, served: Site) -> None:
    with inside(browser, served, "attention") as seen:
        page, canvas = seen.page, glass(seen.page)
        read = pixels(canvas)
        assert told(page).startswith("Strongest")
        point(canvas, 0.45, 0.4)
        first = changes(canvas, read)
        assert told(page).startswith("Patch at row 4, column 4.")
        point(canvas, 0.6, 0.7)
        changes(canvas, first)
        assert told(page).startswith("Patch at row 6, column 6.")
        page.mouse.move(2, 2)
        assert changes(canvas, first) == read, "the pointer has left"


def test_patches_are_chosen_by_keyboard_and_by_tap(browser: Browser, served: Site) -> None:
    with inside(browser, served, "attention") as seen:
        page, canvas = seen.page, glass(seen.page)
        read = pixels(canvas)
        canvas.focus()
        page.keyboard.press("ArrowRight")
        changes(canvas, read)
        place = re.compile(r"Patch at row (\d), column (\d)")
        before = place.search(told(page))
        assert before
        page.keyboard.press("ArrowUp" if before[1] > "1" else "ArrowDown")
        expect(page.locator(".told").first).not_to_contain_text(before[0])
        after = place.search(told(page))
        assert after and after[2] == before[2] and abs(int(after[1]) - int(before[1])) == 1
        page.keyboard.press("Escape")
        expect(page.locator(".told").first).to_contain_text(re.compile("^Strongest"))
    with inside(browser, served, "attention", viewport=PHONE, has_touch=True) as seen:
        canvas = glass(seen.page)
        before_tap, box = pixels(canvas), canvas.bounding_box()
        assert box is not None
        canvas.tap(position={"x": box["width"] / 2 + 4, "y": box["height"] / 2 + 4})
        changes(canvas, before_tap)
        assert told(seen.page).startswith("Patch at row 5, column 5.")


def test_layers_and_heads_are_chosen_by_sliders_and_tiles(browser: Browser, served: Site) -> None:
    with inside(browser, served, "attention") as seen:
        page, canvas = seen.page, glass(seen.page)
        layer, head = page.get_by_role("slider", name="Layer"), page.get_by_role("slider", name="Head")
        expect(layer).to_have_attribute("aria-valuetext", "6 of 6")
        shown = pixels(canvas)
        layer.press("ArrowLeft")
        expect(layer).to_have_attribute("aria-valuetext", "5 of 6")
        shown = changes(canvas, shown)
        head.press("ArrowRight")
        expect(head).to_have_attribute("aria-valuetext", "1 of 3")
        shown = changes(canvas, shown)
        tiles = page.locator(".mosaic button")
        expect(tiles).to_have_count(3)
        expect(tiles.nth(0)).to_have_attribute("aria-pressed", "true")
        tiles.nth(2).click()
        expect(head).to_have_attribute("aria-valuetext", "3 of 3")
        changes(canvas, shown)
        tile = pixels(tiles.nth(1).locator("canvas"))
        canvas.focus()
        page.keyboard.press("ArrowLeft")
        changes(tiles.nth(1).locator("canvas"), tile)


def test_the_words_of_a_caption_show_their_patches(browser: Browser, served: Site) -> None:
    with inside(browser, served, "words", "caption") as seen:
        page, canvas = seen.page, glass(seen.page)
        words = page.locator(".chips button")
        assert words.count() > 5 and words.last.inner_text() == "<end>"
        shown = pixels(canvas)
        for number in (1, 3):
            words.nth(number).click()
            expect(words.nth(number)).to_have_attribute("aria-pressed", "true")
            shown = changes(canvas, shown)
        assert not seen.violations()
        open_view(page, "Relevance")
        relevance = pixels(canvas)
        words.nth(2).click()
        changes(canvas, relevance)


def test_any_class_can_be_explained(browser: Browser, served: Site) -> None:
    with inside(browser, served, "relevance") as seen:
        page, canvas = seen.page, glass(seen.page)
        chips = page.locator(".chips button")
        expect(chips).to_have_count(6)
        shown = pixels(canvas)
        chips.nth(2).click()
        shown = changes(canvas, shown)
        others = page.get_by_label("Another class")
        name = others.locator("option").nth(1).inner_text()
        others.select_option(name)
        expect(chips).to_have_count(7)
        expect(chips.last).to_have_text(name)
        expect(chips.last).to_have_attribute("aria-pressed", "true")
        changes(canvas, shown)


def test_a_second_photo_is_compared(browser: Browser, served: Site) -> None:
    with inside(browser, served, "similarity") as seen:
        page = seen.page
        expect(page.locator(".glass-map")).to_have_count(1)
        page.get_by_role("button", name="compare with the sample photo: temple").click()
        expect(page.locator(".glass-map")).to_have_count(2)
        drawn(glass(page, 1))
        expect(page.locator(".beside .told")).to_contain_text(re.compile(r"row \d, column \d"))
        shown = pixels(glass(page, 1))
        point(glass(page), 0.8, 0.7)  # the patch that is chosen at first is near the middle
        changes(glass(page, 1), shown)
        assert not seen.violations()
        source = base64.b64encode(encoded(smooth(40, 60), "PNG")).decode()
        before = page.locator(".beside .told").inner_text()
        page.locator(".drop").evaluate(
            """(drop, source) => {
                const bytes = Uint8Array.from(atob(source), letter => letter.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], 'mine.png', {type: 'image/png'}));
                const how = {bubbles: true, cancelable: true, dataTransfer};
                for (const type of ['dragenter', 'dragover', 'drop']) drop.dispatchEvent(new DragEvent(type, how));
            }""",
            source,
        )
        expect(page.locator(".beside .told")).not_to_have_text(before)
        expect(page.locator(".drop-hint")).to_have_count(0)
        assert "inside=similarity" in page.evaluate("location.hash"), "the dropped file is the second photo alone"
        open_view(page, "Colours")
        assert colours(glass(page, 1)) > 20


def test_an_error_of_a_second_photo_is_told_and_the_views_stay(browser: Browser, served: Site) -> None:
    with inside(browser, served, "similarity", allowed="503") as seen:
        page = seen.page
        busy = error(503, "busy", "too many explanations are in progress", "try again after 9 seconds")
        page.route("**/v1/explain", lambda route: route.fulfill(**busy))
        page.get_by_role("button", name="compare with the sample photo: rocket").click()
        expect(page.get_by_role("alert")).to_contain_text(
            "too many explanations are in progress: try again after 9 seconds"
        )
        expect(glass(page)).to_be_visible()


def test_the_answer_after_each_layer(browser: Browser, served: Site) -> None:
    with inside(browser, served, "layers") as seen:
        rows = seen.page.locator(".layers tbody tr")
        expect(rows).to_have_count(6)
        assert re.search(r"6\s+cat\s+\d+ %", rows.last.inner_text())
        bar = rows.last.locator(".track i").evaluate("bar => bar.style.width")
        assert f"{float(bar.rstrip('%')):.0f} %" in rows.last.inner_text()


def test_a_dot_of_the_chart_of_distances_is_a_head(browser: Browser, served: Site) -> None:
    with inside(browser, served, "distance") as seen:
        page, canvas = seen.page, glass(seen.page)
        dots = page.locator(".chart .dot")
        expect(dots).to_have_count(6 * 3)
        expect(page.get_by_role("img", name="How far each head looks, by layer.")).to_be_visible()
        shown = pixels(canvas)
        dots.nth(4).dispatch_event("click")
        expect(page.get_by_role("slider", name="Layer")).to_have_attribute("aria-valuetext", "2 of 6")
        expect(page.get_by_role("slider", name="Head")).to_have_attribute("aria-valuetext", "2 of 3")
        changes(canvas, shown)


def test_norms_by_layer_and_positions_by_patch(browser: Browser, served: Site) -> None:
    with inside(browser, served, "norms") as seen:
        page, canvas = seen.page, glass(seen.page)
        shown = pixels(canvas)
        page.get_by_role("slider", name="Layer").press("Home")
        changes(canvas, shown)
        expect(page.get_by_role("img", name="Lengths of tokens by layer. Layer 1:")).to_be_visible()
        expect(page.locator(".controls")).to_contain_text(re.compile("outlier"))
        open_view(page, "Positions")
        grid = page.locator(".positions canvas")
        assert colours(grid) > 20
        before, box = pixels(canvas), grid.bounding_box()
        assert box is not None
        grid.click(position={"x": box["width"] * 0.95, "y": box["height"] * 0.05})
        changes(canvas, before)
        assert told(page).startswith("Patch at row 1, column 8.")
        expect(grid).to_have_attribute("aria-label", re.compile("The chosen one is at row 1, column 8"))


def test_blocks_stand_for_the_patches_of_a_large_image(browser: Browser, served: Site) -> None:
    task = vitrail.create("nano/2", classes=["a", "b"])
    found = explanation(task, Image.fromarray(smooth(64, 64)), values=16 * 16)
    assert found.facts["block"] == 2 and found.arrays["similarity"].shape == (4, 4)
    body = json.dumps({"model": "classify", "explanation": found.packed()})
    with visit(browser, served) as seen:
        page = seen.page
        page.route("**/v1/explain", lambda route: route.fulfill(body=body, content_type="application/json"))
        seen.open("#sample=cat&model=classify&inside=similarity")
        expect(glass(page)).to_be_visible()
        drawn(glass(page))
        shown = pixels(glass(page))
        point(glass(page), 0.9, 0.9)
        changes(glass(page), shown)
        place = re.search(r"Patch at row 4, column 4. Most similar to it: row (\d), column (\d)", told(page))
        assert place and {place[1], place[2]} <= {"1", "3"}, "a block is called by its first patch"
        open_view(page, "Attention")
        shown = pixels(glass(page))
        point(glass(page), 0.1, 0.9)
        changes(glass(page), shown)
        assert told(page).startswith("Patch at row 4, column 1.")
        expect(page.locator(".mosaic canvas").first).to_have_attribute("width", "2")


def test_the_page_of_the_command_shows_a_tall_image_as_a_whole(browser: Browser, tmp_path: Path) -> None:
    explain(vitrail.load("classify"), Image.new("RGB", (1, 400), (200, 30, 30)), tmp_path / "seen")
    page = browser.new_page(viewport=DESKTOP)
    page.goto((tmp_path / "seen" / "index.html").as_uri())
    canvas = page.locator("#window")
    expect(canvas).to_have_attribute("height", "1200")
    box = canvas.bounding_box()
    assert box is not None and box["height"] <= 860 and box["height"] / box["width"] == pytest.approx(400, rel=0.2)
    page.close()
