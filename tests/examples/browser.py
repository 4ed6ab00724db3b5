"""A headless browser for tests that look at pages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--disable-dev-shm-usage",
)  # fmt: skip


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a fresh profile; skips the test where there is none, but not in CI.

    Args:
        profile: folder for its user data.
    """
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if chromium is None or driver is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # With both paths given, selenium looks for no driver and downloads none.
    service = Service(executable_path=driver)
    running = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(running)
    finally:
        running.quit()


class Browser:
    """One page at a time, at any width and in any theme."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, **media: str) -> None:
        """Show a file.

        Args:
            path: of the page.
            width: of the screen in CSS pixels; below 600 a phone's.
            media: media features, such as `prefers_color_scheme="dark"`.
        """
        self.resize(width)
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.logs()  # of the page before
        self.driver.get(path.as_uri())

    def resize(self, width: int) -> None:
        """Change the width of the screen."""
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def run(self, script: str) -> Any:
        """The value of a function body of JavaScript."""
        return self.driver.execute_script(script)

    def logs(self) -> tuple[list[str], list[str]]:
        """What the page asked for, and what it complained of, since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        requested = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return requested, [entry["message"] for entry in self.driver.get_log("browser")]
