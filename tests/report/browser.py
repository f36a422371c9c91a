"""A real Chromium that opens pages: what it says, requests and measures, and what axe finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.slurm_cluster import PATIENTLY

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

CHROMIUM = "/usr/bin/chromium"
PACKAGES = ("chromium", "fonts-dejavu-core")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync"]
GRAVE = {"serious", "critical"}  # impacts of axe's findings that no page may have


def install() -> bool:
    """Whether Chromium can be started. As root on Debian, tries to install it first."""
    if not Path(CHROMIUM).exists() and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *PATIENTLY, *command], check=False, capture_output=True, env=environment)
    return Path(CHROMIUM).exists()


@dataclass
class Seen:
    """What a browser noticed of a page.

    Attributes:
        said: messages of the console, and errors of the page.
        requested: URLs.
        overflow: pixels by which the page is wider than the window.
        dialogs: texts of alerts.
        findings: of axe with a grave impact, in words.
        text: the text of the page's body.
    """

    said: list[str] = field(default_factory=list)
    requested: set[str] = field(default_factory=set)
    overflow: int = 0
    dialogs: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    text: str = ""


class Browser:
    def __init__(self, context: BrowserContext) -> None:
        self.context = context

    def see(self, page: Path, *, width: int = 1280, dark: bool = False, axe: bool = False) -> Seen:
        """Opens a page in a window of this width, with all its details open."""
        seen, tab = Seen(), self.context.new_page()
        tab.on("console", lambda message: seen.said.append(message.text))
        tab.on("pageerror", lambda error: seen.said.append(str(error)))
        tab.on("request", lambda request: seen.requested.add(request.url))
        tab.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme="dark" if dark else "light")
        tab.goto(page.resolve().as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        seen.overflow = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        seen.text = tab.inner_text("body")
        if axe:
            seen.findings = _findings(tab)
        tab.close()
        return seen


def _findings(tab: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in GRAVE]


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium with a fresh profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        try:
            yield Browser(context)
        finally:
            context.close()
