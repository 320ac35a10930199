"""What a person does on the page, in light, in dark and on a phone."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from images import encoded, folder_of, smooth
from PIL import Image
from playwright.sync_api import Browser, expect
from web.driving import DESKTOP, PHONE, Site, answer, text_of, visit

pytestmark = pytest.mark.slow

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": DESKTOP},
    "dark": {"color_scheme": "dark", "viewport": DESKTOP},
    "phone": {"color_scheme": "light", "viewport": PHONE, "has_touch": True},
    "phone, dark": {"color_scheme": "dark", "viewport": PHONE, "has_touch": True},
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my holiday.png"
    path.write_bytes(encoded(smooth(96, 128), "PNG"))
    return path


@pytest.mark.parametrize("look", LOOKS)
def test_every_view_is_accessible_and_fits(browser: Browser, served: Site, look: str, photo: Path) -> None:
    with visit(browser, served, **LOOKS[look]) as seen:
        views = {
            "": None,
            "#sample=cat&model=classify": "classify",
            "#sample=temple&model=segment": "segment",
            "#view=two&sample=cat&model=classify&with=caption": "caption",
            "#view=many": None,
        }
        for fragment, model in views.items():
            seen.open("?" + fragment)  # another address, so that the page is loaded
            if model:
                seen.answered(model)
                seen.painted()
            else:
                expect(seen.page.get_by_role("main")).to_be_visible()
                expect(seen.page.get_by_role("button", name=re.compile("Choose")).first).to_be_attached()
            for details in seen.page.locator("details").all():
                details.evaluate("element => { element.open = true; }")
            assert not seen.violations(), fragment
            assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), fragment


def test_a_sample_is_classified_and_the_link_names_it(browser: Browser, served: Site) -> None:
    with visit(browser, served) as seen:
        seen.open()
        seen.page.get_by_role("button", name="sample photo: cat").click()
        said = seen.answered("classify").inner_text()
        assert said.startswith("classify: cat ")
        first = seen.page.locator(".bars li").first
        expect(first).to_contain_text("cat")
        width = first.locator(".bars-track span").evaluate("bar => bar.style.width")
        assert f"{float(width.rstrip('%')):.1f} %" in first.inner_text()
        expect(seen.page.get_by_role("img", name="cat, cut into 8 by 8 patches")).to_be_visible()
        assert seen.page.evaluate("location.hash") == "#sample=cat"
        seen.model("caption")
        seen.answered("caption")
        assert seen.page.evaluate("location.hash") == "#model=caption&sample=cat"
        expect(seen.page.get_by_role("img", name="cat, cut into 7 by 7 patches")).to_be_visible()
        link = seen.page.url
    with visit(browser, served) as seen:
        seen.page.goto(link)
        seen.answered("caption")


def test_a_caption_comes_word_by_word(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served) as seen:
        seen.open("#model=caption")
        seen.page.evaluate(
            """() => {
                window.drafts = [];
                new MutationObserver(() => {
                    const text = document.querySelector('[data-draft]')?.textContent;
                    if (text && text !== window.drafts.at(-1)) window.drafts.push(text);
                }).observe(document.body, {subtree: true, childList: true, characterData: true});
            }"""
        )
        # The words of a fast server may arrive all at once.
        slow = {"offline": False, "latency": 0, "downloadThroughput": 4_000, "uploadThroughput": -1}
        seen.page.context.new_cdp_session(seen.page).send("Network.emulateNetworkConditions", slow)
        seen.give(photo)
        said = seen.answered("caption").inner_text().removeprefix("caption: ").removeprefix("not sure: ")
        drafts = seen.page.evaluate("window.drafts")
        assert drafts and said
        caption = seen.page.locator(".caption")
        assert caption.inner_text().split() == said.split()
        strengths = caption.locator(".word").evaluate_all(
            "words => words.map(word => +word.style.getPropertyValue('--p'))"
        )
        assert len(strengths) == len(said.split()) and all(0 < p <= 1 for p in strengths)
        # A person's photo is never named in the address.
        assert seen.page.evaluate("location.href").endswith("#model=caption")


def test_whether_a_caption_is_sure(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served) as seen:
        row = {"task": "caption", "caption": "a dog", "captions": [], "match": 0.21, "sure": False}
        events = f"event: done\ndata: {json.dumps({'model': 'caption', 'predictions': [row]})}\n\n"
        seen.page.route(
            "**/v1/predict?stream=true",
            lambda route: route.fulfill(status=200, body=events, headers={"Content-Type": "text/event-stream"}),
        )
        seen.open("#model=caption")
        seen.give(photo)
        seen.answered("caption")
        expect(seen.page.locator(".answer")).to_contain_text("The model is not sure")
        expect(seen.page.locator(".answer")).to_contain_text("0.21")


def test_masks_have_a_legend_that_hides_them(browser: Browser, served: Site) -> None:
    with visit(browser, served) as seen:
        seen.open("#model=segment&sample=temple")
        seen.answered("segment")
        count = """() => {
            const canvas = document.querySelector('.masks');
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
            copy.drawImage(canvas, 0, 0);
            const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
            let covered = 0;
            for (let i = 3; i < data.length; i += 4) covered += data[i] > 0;
            return covered / (data.length / 4);
        }"""
        assert seen.page.evaluate(count) > 0.98  # every pixel has a class
        largest = seen.page.locator(".legend li").first
        share = float(largest.locator(".numbers").inner_text().split()[0]) / 100
        largest.get_by_role("checkbox").uncheck()
        assert abs(1 - seen.page.evaluate(count) - share) < 0.03
        seen.page.get_by_role("slider", name="Colour").fill("0")
        seen.page.locator(".masks").hover(position={"x": 20, "y": 200})
        expect(seen.page.locator(".legend li[data-hover]")).to_have_count(1)


def test_boxes_are_drawn_where_they_are(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served) as seen:
        box = {"label": "cell", "score": 0.9, "box": [32, 24, 96, 72]}
        seen.page.route("**/v1/predict", lambda route: route.fulfill(**answer(task="detect", boxes=[box])))
        seen.open("#model=segment")
        seen.give(photo)
        seen.answered("segment")
        whole = seen.page.locator(".window-frame").bounding_box()
        found = seen.page.locator(".window-frame .box").bounding_box()
        assert whole and found
        shares = [(found["x"] - whole["x"]) / whole["width"], found["width"] / whole["width"]]
        assert shares == pytest.approx([32 / 128, 64 / 128], abs=0.02)
        expect(seen.page.get_by_role("list", name="Objects in the image")).to_contain_text("cell")


def test_a_photo_comes_by_paste_drop_and_camera(browser: Browser, served: Site, photo: Path) -> None:
    put = """([kind, bytes]) => {
        const data = new DataTransfer();
        const binary = Uint8Array.from(atob(bytes), sign => sign.charCodeAt(0));
        data.items.add(new File([binary], kind + '.png', {type: 'image/png'}));
        const init = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(kind === 'paste' ? new ClipboardEvent(kind, {...init, clipboardData: data})
            : new DragEvent(kind, {...init, dataTransfer: data}));
    }"""
    data = base64.b64encode(photo.read_bytes()).decode()
    with visit(browser, served, permissions=["camera"]) as seen:
        seen.open("#model=classify")
        for kind in ("paste", "drop"):
            seen.page.get_by_role("button", name="Choose a photo").wait_for()
            seen.page.evaluate(put, [kind, data])
            expect(seen.page.get_by_role("article", name=f"classify: {kind}.png")).to_be_visible()
            seen.answered("classify")
        seen.page.get_by_role("button", name="Camera").click()
        seen.page.get_by_role("button", name="Take the photo").click()
        expect(seen.page.get_by_role("article", name="classify: photo from the camera")).to_be_visible()
        seen.answered("classify")
        expect(seen.page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("size", [(3000, 2), (1, 400)])
def test_an_image_of_any_shape_has_a_window(browser: Browser, served: Site, tmp_path: Path, size: Any) -> None:
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "long.png")
    with visit(browser, served) as seen:
        seen.open("#model=classify")
        seen.give(tmp_path / "long.png")
        seen.answered("classify")
        box = seen.page.locator(".window").bounding_box()
        assert box is not None and 20 < box["height"] < 2_000
        canvas = seen.page.locator(".window-frame > canvas").first
        assert canvas.evaluate("canvas => canvas.height / canvas.width") == pytest.approx(
            box["height"] / box["width"], rel=0.1
        )


def test_two_models_answer_side_by_side(browser: Browser, served: Site) -> None:
    with visit(browser, served) as seen:
        seen.open("#sample=cat")
        seen.answered("classify")
        seen.page.get_by_role("radio", name="Two models").check(force=True)
        seen.answered("caption")
        expect(seen.page.get_by_role("article")).to_have_count(2)
        seen.page.get_by_role("radiogroup", name="Second model").get_by_role("radio", name="segment").check(force=True)
        seen.answered("segment")
        expect(seen.page.locator(".masks")).to_have_count(1)
        assert seen.page.evaluate("location.hash") == "#view=two&with=segment&sample=cat"
        seen.page.go_back()
        expect(seen.page.get_by_role("article")).to_have_count(1)


def test_a_folder_becomes_a_gallery_and_a_table(browser: Browser, served: Site, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder_of(folder, {"cats": 6, "dogs": 5})
    (folder / "notes.txt").write_text("no image")
    (folder / "=damaged.png").write_bytes(encoded(smooth(), "PNG")[:60])
    with visit(browser, served) as seen:
        seen.open("#view=many")
        seen.page.set_input_files("input[webkitdirectory]", str(folder))
        expect(seen.page.get_by_text("12 of 12 answered")).to_be_visible()
        expect(seen.page.get_by_text("1 file that is no image was left out")).to_be_visible()
        expect(seen.page.locator(".card[data-failed]")).to_have_count(1)
        assert not seen.violations()
        table = text_of(seen.saved("Save as CSV"), tmp_path)
        rows = list(csv.DictReader(io.StringIO(table)))
        assert len(rows) == 12
        good = [row for row in rows if not row["error"]]
        assert len(good) == 11 and all(row["label"] and 0 < float(row["score"]) <= 1 for row in good)
        assert {row["image"].split("/")[1] for row in good} == {"cats", "dogs"}
        seen.page.locator(".card:not([data-failed]) button").first.click()
        seen.answered("classify")
        seen.page.go_back()
        expect(seen.page.locator(".card")).to_have_count(12)


def test_a_result_is_saved_as_one_page(browser: Browser, served: Site, tmp_path: Path) -> None:
    with visit(browser, served) as seen:
        seen.open("#sample=temple&model=segment")
        seen.answered("segment")
        seen.page.wait_for_load_state("networkidle")
        html = text_of(seen.saved("Save as a page"), tmp_path)
    assert "<script" not in html and not re.search(r"(?:src|href)=\"(?!data:)", html)
    (tmp_path / "saved.html").write_text(html, encoding="utf-8")
    with visit(browser, served) as seen:
        seen.page.goto((tmp_path / "saved.html").as_uri())
        images = seen.page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
        assert images and all(images)
        expect(seen.page.locator(".legend")).to_contain_text("sky")
        expect(seen.page.get_by_role("heading", name="segment: temple")).to_be_visible()
        assert not seen.violations()


def test_a_saved_page_says_what_its_map_shows(browser: Browser, served: Site, tmp_path: Path) -> None:
    with visit(browser, served) as seen:
        seen.open("#sample=cat&model=classify&inside=relevance")
        seen.page.get_by_role("group", name="Choose what is explained").get_by_role("button", name="dog").click()
        html = text_of(seen.saved("Save as a page"), tmp_path)
    (tmp_path / "saved.html").write_text(html, encoding="utf-8")
    with visit(browser, served) as seen:
        seen.page.goto((tmp_path / "saved.html").as_uri())
        expect(seen.page.locator(".segmented")).to_have_text(["classify", "Relevance"])
        expect(seen.page.locator(".outputs")).to_contain_text("Choose what is explaineddog")


def test_keys_alone_are_enough(browser: Browser, served: Site) -> None:
    with visit(browser, served) as seen:
        seen.open()
        seen.page.get_by_role("button", name="sample photo: cat").wait_for()
        seen.page.keyboard.press("Tab")
        expect(seen.page.get_by_role("button", name="Skip to the content")).to_be_focused()
        seen.page.keyboard.press("Enter")
        expect(seen.page.get_by_role("main")).to_be_focused()
        for _ in range(3):
            seen.page.keyboard.press("Tab")
        expect(seen.page.get_by_role("button", name="sample photo: cat")).to_be_focused()
        seen.page.keyboard.press("Enter")
        seen.answered("classify")
        group = seen.page.get_by_role("radiogroup", name="Model")
        group.get_by_role("radio", name="classify").focus()
        seen.page.keyboard.press("ArrowRight")
        seen.answered("caption")


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_the_window_assembles_unless_motion_is_reduced(browser: Browser, served: Site, motion: str) -> None:
    with visit(browser, served, reduced_motion=motion) as seen:
        seen.page.add_init_script(
            """window.frames_drawn = 0;
            const before = window.requestAnimationFrame.bind(window);
            window.requestAnimationFrame = call => before(time => { window.frames_drawn++; call(time); });"""
        )
        seen.open("#sample=cat")
        seen.answered("classify")
        if motion == "reduce":
            assert seen.page.evaluate("window.frames_drawn") == 0
            assert not seen.page.evaluate("document.getAnimations().length")
        else:
            seen.until("window.frames_drawn > 0")
        seen.painted()


def test_themes_change_and_stay(browser: Browser, served: Site) -> None:
    with visit(browser, served, color_scheme="light") as seen:
        seen.open()
        ground = "getComputedStyle(document.body).backgroundColor"
        light = seen.page.evaluate(ground)
        button = seen.page.get_by_role("button", name="Theme: ")
        for name in ("light", "dark"):
            button.click()
            expect(button).to_have_accessible_name(f"Theme: {name}")
        dark = seen.page.evaluate(ground)
        assert dark != light
        seen.page.reload()
        expect(button).to_have_accessible_name("Theme: dark")
        assert seen.page.evaluate(ground) == dark


def test_the_page_works_apart_from_the_server(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served) as seen:
        seen.page.goto(f"{served.apart}/?api={served.url}#model=caption")
        seen.give(photo)
        seen.answered("caption")
        expect(seen.page.locator(".server")).to_have_text(served.url.removeprefix("http://"))
