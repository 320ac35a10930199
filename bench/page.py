"""How heavy the page of `vitrail serve` is, and how long it takes on this machine; also the figures of docs/page.md.

    python bench/page.py                                       script, time to the first click, time to draw an answer
    python bench/page.py --figures --street streets/0001.jpg   also docs/page-welcome.webp and docs/page-street.webp

It needs Debian's chromium and the package playwright. A page is interactive when its first sample photo can be clicked:
the models are listed, and the main thread has answered a message. An answer is on screen with the frame after it.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from harness import ROOT, Parser, record
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGE = ROOT / "src" / "vitrail" / "serve" / "page"
CHROMIUM = "/usr/bin/chromium"
WATCH = """
window.marks = {};
new MutationObserver(() => {
    const mark = name => requestAnimationFrame(() => setTimeout(() => { window.marks[name] ??= performance.now(); }));
    if (document.querySelector('.samples button')) mark('ready');
    if (document.querySelector('.answer :is(.bars, .legend)') || document.querySelector('.caption:not([data-draft])'))
        mark('answered');
}).observe(document, {subtree: true, childList: true});
"""
"""a script that notes when things are on screen"""


def parser() -> Parser:
    parser = Parser(__doc__, rounds=1)
    parser.add_argument("--rounds", type=int, default=9, help="visits of each kind")
    parser.add_argument("--figures", action="store_true", help="write the screenshots of docs/page.md")
    parser.add_argument("--street", type=Path, help="the photo of the second one; default: the sample `temple`")
    return parser


@contextmanager
def serving() -> Iterator[str]:
    """The address of `vitrail serve` with the bundled models."""
    command = [sys.executable, "-m", "vitrail", "serve", "classify", "caption", "segment", "--port", "0"]
    process = subprocess.Popen([*command, "--measure", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def weights() -> dict[str, int]:
    """Bytes of the build, and of its scripts as gzip makes them."""
    scripts = sorted(PAGE.rglob("*.js"))
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    return {
        "script, bytes compressed": sum(len(gzip.compress(path.read_bytes(), 9, mtime=0)) for path in scripts),
        "script, bytes": sum(path.stat().st_size for path in scripts),
        "whole page, bytes": sum(path.stat().st_size for path in files),
    }


def wait(page: Page, expression: str) -> None:
    """Until it is true. (`wait_for_function` needs eval, which the page's policy forbids.)"""
    while not page.evaluate(expression):
        page.wait_for_timeout(20)


def visit(browser: Browser, url: str, model: str) -> dict[str, float]:
    """Milliseconds of one visit with an empty cache: until interactive, and from a response to its answer on screen."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(f"{url}/#model={model}")
    wait(page, "window.marks.ready")
    page.locator(".samples button").first.click()
    wait(page, "window.marks.answered")
    found: dict[str, float] = page.evaluate(
        """() => {
            const response = performance.getEntriesByType('resource').filter(each => each.name.includes('/v1/predict'));
            return {interactive: window.marks.ready, drawn: window.marks.answered - response.at(-1).responseEnd};
        }"""
    )
    context.close()
    return found


def shoot(browser: Browser, url: str, street: Path | None) -> None:
    """The screenshots of docs/page.md."""
    looks: tuple[tuple[str, Literal["light", "dark"], str], ...] = (
        ("welcome", "light", ""),
        ("street", "dark", "#model=segment"),
    )
    for name, scheme, fragment in looks:
        context = browser.new_context(
            viewport={"width": 1280, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.goto(f"{url}/{fragment}")
        page.locator(".samples button").first.wait_for()
        if name == "street":
            if street:
                page.set_input_files(".sources input[type=file]", str(street))
            else:
                page.get_by_role("button", name="sample photo: temple").click()
            page.locator(".masks").wait_for()
        page.evaluate("document.fonts.ready")
        page.wait_for_timeout(1500)
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(
            ROOT / "docs" / f"page-{name}.webp", quality=82, method=6
        )
        context.close()


def main() -> None:
    args = parser().parse_args()
    from playwright.sync_api import sync_playwright

    rows: dict[str, Any] = dict(weights())
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        rows["browser"] = f"chromium {browser.version}"
        visit(browser, url, "classify")  # the first one starts processes of the browser
        for model in ("classify", "caption", "segment"):
            found = [visit(browser, url, model) for _ in range(args.rounds)]
            rows[model] = {
                "interactive, median ms": round(median(each["interactive"] for each in found)),
                "interactive, slowest ms": round(max(each["interactive"] for each in found)),
                "answer drawn after its response, median ms": round(median(each["drawn"] for each in found)),
                "answer drawn after its response, slowest ms": round(max(each["drawn"] for each in found)),
            }
            print(model, rows[model], flush=True)
        if args.figures:
            shoot(browser, url, args.street)
        browser.close()
    print(rows)
    record("page", rows, args.results)


if __name__ == "__main__":
    main()
