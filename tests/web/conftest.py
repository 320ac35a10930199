"""Tests of the page drive a browser against `vitrail serve` with the bundled models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = Path("/usr/bin/chromium")
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"

for _name, _how in (("playwright", "dev"), ("fastapi", "serve"), ("uvicorn", "serve")):
    pytest.importorskip(_name, reason=f"needs pip install 'vitrail[{_how}]'")
for _path, _how in ((CHROMIUM, "apt-get install chromium"), (AXE, "make page")):
    if not _path.is_file():
        pytest.skip(f"the tests of the page need {_path.name}: {_how}", allow_module_level=True)

from playwright.sync_api import Browser, Playwright, sync_playwright  # noqa: E402
from web.driving import Site, site  # noqa: E402

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="session")
def browser(playwright: Playwright) -> Iterator[Browser]:
    found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
    yield found
    found.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The server, and the page once more at an address of its own."""
    with site(tmp_path_factory.mktemp("site")) as found:
        yield found
