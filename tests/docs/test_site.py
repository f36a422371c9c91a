"""The site builds without a warning, and its pages need nothing from other hosts and report no error in a browser."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

from tests.report.browser import CHROMIUM, FLAGS, install
from tests.services import require

ROOT = Path(__file__).parents[2]
# Pages with everything that could load a script: a drawing, highlighted code, generated reference, wide tables.
SHOWN = [
    "index.html",
    "tutorial.html",
    "architecture.html",
    "reference/python.html",
    "reference/commands.html",
    "k8s.html",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """URL of the site, on a server of this test."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require(install(), "chromium, which `apt-get install chromium` installs,")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize("page", SHOWN)
def test_pages_load_nothing_from_elsewhere(browser: Browser, address: str, page: str) -> None:
    requests: list[str] = []
    messages: list[str] = []
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(f"{address}/{page}", wait_until="networkidle")
    wide = tab.evaluate("document.documentElement.scrollWidth")
    tab.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert messages == []
    assert wide <= 390, "the page is wider than a telephone"


def test_the_search_finds_a_page(browser: Browser, address: str) -> None:
    tab = browser.new_page()
    tab.goto(f"{address}/index.html?q=near-duplicates")
    tab.wait_for_selector(".md-search-result__link", state="attached")
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_links_can_be_told_apart(browser: Browser, address: str, scheme: Any) -> None:
    tab = browser.new_page(color_scheme=scheme, reduced_motion="reduce")
    for page in ("tutorial.html", "reference/losses.html"):
        tab.goto(f"{address}/{page}", wait_until="networkidle")
        rules = {"runOnly": ["color-contrast", "link-in-text-block"]}
        assert Axe().run(tab, options=rules).response["violations"] == []
    tab.close()
