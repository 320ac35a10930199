"""What the page says when something is wrong, and what a person can do then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from images import encoded, smooth
from playwright.sync_api import Browser, Route, expect
from web.driving import Site, error, visit

pytestmark = pytest.mark.slow

FAILED = "Failed to load resource"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(smooth(), "PNG"))
    return path


def test_a_file_that_is_no_image(browser: Browser, served: Site, tmp_path: Path, photo: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    with visit(browser, served, allowed=FAILED) as seen:
        seen.open("#model=classify")
        seen.give(tmp_path / "letter.txt")
        alert = seen.page.get_by_role("alert")
        expect(alert).to_contain_text("The file is not an image.")
        expect(alert).to_contain_text("Send the content of an image file")
        assert not seen.violations()
        seen.give(photo)
        seen.answered("classify")


def test_a_busy_server_is_tried_again(browser: Browser, served: Site, photo: Path) -> None:
    calls: list[int] = []

    def busy(route: Route) -> None:
        calls.append(1)
        if len(calls) == 1:
            found = error(503, "busy", "the queue is full", "try again after 1 seconds", **{"Retry-After": "1"})
            route.fulfill(**found)
        else:
            route.continue_()

    with visit(browser, served, allowed=FAILED) as seen:
        seen.page.route("**/v1/predict", busy)
        seen.open("#model=classify")
        seen.give(photo)
        expect(seen.page.get_by_text("The queue is full.")).to_be_visible()
        seen.answered("classify")
        assert len(calls) == 2


def test_a_key_is_requested_and_kept_in_the_tab(browser: Browser, served: Site, photo: Path) -> None:
    key = "a-key-of-16-signs"

    def locked(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {key}":
            route.continue_()
        else:
            route.fulfill(**error(401, "unauthorized", "the request carries no valid API key", "send the header"))

    with visit(browser, served, allowed=FAILED) as seen:
        seen.page.route("**/v1/**", locked)
        seen.open("#model=classify")
        expect(seen.page.get_by_role("alert")).to_contain_text("A key is needed")
        assert not seen.violations()
        for given in ("wrong", key):
            seen.page.get_by_label("API key", exact=True).and_(seen.page.locator("input")).fill(given)
            seen.page.get_by_role("button", name="Use this key").click()
        seen.give(photo)
        seen.answered("classify")
        assert key not in seen.page.evaluate("JSON.stringify(localStorage) + location.href")
        seen.page.reload()
        expect(seen.page.get_by_role("button", name="Choose a photo")).to_be_visible()


def test_a_server_that_is_away(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served, allowed=FAILED) as seen:
        seen.page.route("**/v1/models", lambda route: route.abort())
        seen.open()
        expect(seen.page.get_by_role("alert")).to_contain_text(f"The server at {served.url} does not answer.")
        seen.page.unroute("**/v1/models")
        seen.page.get_by_role("button", name="Try again").click()
        seen.give(photo)
        seen.answered("classify")
        seen.page.route("**/v1/predict?stream=true", lambda route: route.abort())
        seen.model("caption")
        expect(seen.page.get_by_role("alert")).to_contain_text("does not answer")


def test_a_stream_that_is_cut_off(browser: Browser, served: Site, photo: Path) -> None:
    with visit(browser, served) as seen:
        seen.page.route(
            "**/v1/predict?stream=true",
            lambda route: route.fulfill(
                status=200,
                body='event: word\ndata: {"text": "a cat"}\n\n',
                headers={"Content-Type": "text/event-stream"},
            ),
        )
        seen.open("#model=caption")
        seen.give(photo)
        expect(seen.page.get_by_role("alert")).to_contain_text("The answer was cut off.")


@pytest.mark.parametrize("code, title", [("bad_image", "This cannot be answered"), ("busy", "The server is busy")])
def test_a_stream_that_ends_with_an_error(browser: Browser, served: Site, photo: Path, code: str, title: str) -> None:
    """Its status was 200: the code tells whether to wait."""
    found = json.dumps({"error": {"code": code, "message": "no caption", "hint": "try another"}})
    with visit(browser, served) as seen:
        seen.page.route(
            "**/v1/predict?stream=true",
            lambda route: route.fulfill(
                status=200,
                body=f"event: error\ndata: {found}\n\n",
                headers={"Content-Type": "text/event-stream"},
            ),
        )
        seen.open("#model=caption")
        seen.give(photo)
        expect(seen.page.get_by_role("heading", name=title)).to_be_visible()


def test_a_proxy_that_answers_in_another_language(browser: Browser, served: Site) -> None:
    with visit(browser, served, allowed=FAILED) as seen:
        seen.page.route("**/v1/models", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
        seen.open()
        expect(seen.page.get_by_role("alert")).to_contain_text("The server answered with status 502.")


def test_a_gallery_waits_for_a_busy_server(browser: Browser, served: Site, photo: Path) -> None:
    calls: list[int] = []

    def limited(route: Route) -> None:
        calls.append(1)
        if len(calls) == 1:
            found = error(429, "rate_limited", "more than 2 requests per minute", "wait", **{"Retry-After": "1"})
            route.fulfill(**found)
        else:
            route.continue_()

    with visit(browser, served, allowed=FAILED) as seen:
        seen.page.route("**/v1/predict", limited)
        seen.open("#view=many")
        seen.page.set_input_files("input[multiple]:not([webkitdirectory])", str(photo))
        expect(seen.page.get_by_text("More than 2 requests per minute.")).to_be_visible()
        expect(seen.page.get_by_text("1 of 1 answered")).to_be_visible()


def test_files_that_are_no_images_in_a_gallery(browser: Browser, served: Site, tmp_path: Path, photo: Path) -> None:
    """The server counts the images of a request, which say nothing about a photo of the gallery."""
    for name in ("letter.png", "letter.txt"):
        (tmp_path / name).write_text("Dear reader")
    with visit(browser, served, allowed=FAILED) as seen:
        seen.open("#view=many")
        files = [str(photo), str(tmp_path / "letter.png"), str(tmp_path / "letter.txt")]
        seen.page.set_input_files("input[multiple]:not([webkitdirectory])", files)
        expect(seen.page.get_by_text("2 of 2 answered")).to_be_visible()
        card = seen.page.locator(".card[data-failed] .card-answer")
        expect(card).to_have_text("the file is not an image")
        left_out = seen.page.get_by_text("1 file that is no image was left out.")
        expect(left_out).to_be_visible()
        seen.page.get_by_role("button", name="Remove all").click()
        expect(left_out).to_have_count(0)


def test_a_link_of_another_server_says_what_this_one_lacks(browser: Browser, served: Site) -> None:
    with visit(browser, served) as seen:
        seen.open("#model=other&sample=cat")
        note = seen.page.get_by_text("This server has no model called other: another one answers.")
        expect(note).to_be_visible()
        seen.answered("classify")
        assert not seen.violations()
        seen.page.get_by_role("radiogroup", name="Model").get_by_role("radio", name="segment").check(force=True)
        expect(note).to_have_count(0)
        seen.open("#sample=zebra")
        expect(seen.page.get_by_text("There is no sample photo called zebra.")).to_be_visible()


def test_an_answer_whose_connection_ends_is_cut_off(browser: Browser, served: Site, photo: Path) -> None:
    broken = """const real = fetch;
        const body = () => new ReadableStream({ pull: (control) => control.error(new TypeError("network error")) });
        const answered = (url) => String(url).includes("predict");
        window.fetch = async (url, init) => answered(url) ? new Response(body()) : real(url, init);
    """
    with visit(browser, served) as seen:
        seen.page.add_init_script(broken)
        for model in ("classify", "caption"):
            seen.open(f"#model={model}")
            seen.page.reload()
            seen.give(photo)
            expect(seen.page.get_by_role("alert")).to_contain_text("The answer was cut off.")
