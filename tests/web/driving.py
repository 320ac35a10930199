"""The server and a browser's page for tests, and what must hold of every page at its end."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Download, Locator, Page, ViewportSize, expect

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "src" / "vitrail" / "serve" / "page"
AXE = (ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js").read_text()
PATIENCE = 60_000
"""milliseconds after which a test that waits has failed"""
PHONE: ViewportSize = {"width": 390, "height": 844}
DESKTOP: ViewportSize = {"width": 1280, "height": 860}

expect.set_options(timeout=PATIENCE)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Site:
    url: str
    """of the server"""
    apart: str
    """of the page alone, on another origin"""


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """`vitrail serve` with the bundled models on a free port, and the page's files behind another port."""
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(PAGE)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    apart = f"http://127.0.0.1:{files.server_address[1]}"
    command = [sys.executable, "-m", "vitrail", "serve", "classify", "caption", "segment", "--port", "0"]
    command += ["--measure", "0", "--allow-origin", apart]
    with (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vitrail is ready at "), (folder / "err").read_text()
        yield Site(line.split()[-1], apart)
    finally:
        process.terminate()
        process.wait(120)
        files.shutdown()


@dataclass
class Visit:
    """A page in a browser, and what went wrong on it."""

    page: Page
    site: Site
    problems: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    """requests to other origins"""

    def open(self, fragment: str = "") -> None:
        self.page.goto(f"{self.site.url}/{fragment}")

    def give(self, *files: Path) -> None:
        self.page.set_input_files(".sources input[type=file]", [str(file) for file in files])

    def answered(self, model: str) -> Locator:
        """Waits until the answer of a model is announced; the text that a screen reader says."""
        found = self.page.locator("[role=status]", has_text=f"{model}: ")
        expect(found.first).to_be_attached()
        return found.first

    def model(self, name: str) -> None:
        self.page.get_by_role("radiogroup", name="Model").get_by_role("radio", name=name).check(force=True)

    def violations(self) -> list[str]:
        """What axe-core finds: its rule and the elements."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [f"{rule['id']}: {[node['html'][:150] for node in rule['nodes']]}" for rule in found["violations"]]

    def until(self, expression: str) -> None:
        """Waits until an expression is true. (`wait_for_function` needs eval, which the page's policy forbids.)"""
        end = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(50)

    def painted(self) -> None:
        """Waits until the window shows the colours of a photo."""
        self.until(
            """() => {
                const canvas = document.querySelector('.window-frame > canvas');
                const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
                copy.drawImage(canvas, 0, 0);
                const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
                const seen = new Set();
                for (let i = 0; i < data.length; i += 4 * 97) seen.add(data.slice(i, i + 3).join());
                return seen.size > 60;
            }"""
        )

    def saved(self, name: str) -> Download:
        with self.page.expect_download(timeout=PATIENCE) as found:
            self.page.get_by_role("button", name=name).click()
        return found.value


@contextmanager
def visit(browser: Browser, served: Site, allowed: str = "", **options: Any) -> Iterator[Visit]:
    """A page of its own. At its end nothing was written to the console but what holds `allowed`, and no other origin
    was contacted."""
    context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    found = Visit(page, served)
    origins = {urlsplit(served.url).netloc, urlsplit(served.apart).netloc}

    def written(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not (allowed and allowed in message.text):
            found.problems.append(message.text)

    page.on("console", written)
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.on(
        "request",
        lambda request: (
            found.strangers.append(request.url)
            if urlsplit(request.url).scheme in ("http", "https") and urlsplit(request.url).netloc not in origins
            else None
        ),
    )
    try:
        yield found
        assert not found.problems, found.problems
        assert not found.strangers, found.strangers
    finally:
        context.close()


def text_of(download: Download, folder: Path) -> str:
    path = folder / download.suggested_filename
    download.save_as(path)
    return path.read_text(encoding="utf-8")


def error(status: int, code: str, message: str, hint: str, **headers: str) -> dict[str, Any]:
    """A response of the server that is an error, to put in the place of its own."""
    body = json.dumps({"error": {"code": code, "message": message, "hint": hint}})
    return {"status": status, "body": body, "headers": {"Content-Type": "application/json", **headers}}


def answer(**row: Any) -> dict[str, Any]:
    """A response with one answer, to put in the place of the server's own."""
    body = json.dumps({"model": "stand-in", "predictions": [row]})
    return {"status": 200, "body": body, "headers": {"Content-Type": "application/json"}}
