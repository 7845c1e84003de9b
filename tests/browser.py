"""Debian's Chromium without a window, for tests that look at a page as a reader would."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, DRIVER = "chromium", "chromedriver"
SECONDS = 120
"""How long a page or a script may take before the driver gives up: a slow machine is no failure."""


class Browser:
    """A browser with one tab. It reaches this machine alone: every name but localhost is unknown to it.

    Attributes:
        driver: Selenium's, to find, click and type.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self._console: list[dict[str, Any]] = []
        self._requests: list[str] = []

    def open(
        self, page: str | Path, *, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
    ) -> None:
        """Opens a page and waits until it is loaded; what was logged before is forgotten.

        Args:
            page: An address, or a file.
            width, height: Size of the viewport, CSS pixels.
            scheme: What the page's `prefers-color-scheme` sees.
        """
        # a blank page between two visits, so that the same address with another #fragment is loaded anew
        self.driver.get("about:blank")
        self.resize(width, height)
        # without motion: an element that is scrolled to is there at once
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.forget()
        self.driver.get(page.absolute().as_uri() if isinstance(page, Path) else page)

    def resize(self, width: int, height: int = 900) -> None:
        """Sets the size of the viewport, which a window cannot be as narrow as."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def console(self) -> list[str]:
        """What the page's console has shown, as "LEVEL text", refused and failed requests too."""
        self._console += self.driver.get_log("browser")
        return [f"{entry['level']} {entry['message']}" for entry in self._console]

    def errors(self) -> list[str]:
        """The console's errors."""
        return [line for line in self.console() if line.startswith("SEVERE")]

    def requests(self) -> list[str]:
        """Every address that the page has asked for, the page itself first, data: URLs left out.

        With those that were blocked, failed or opened as WebSockets.
        """
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            params = message.get("params", {})
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(params["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                self._requests.append(params["url"])
        return [url for url in self._requests if not url.startswith(("data:", "about:"))]

    def forget(self) -> None:
        """Drops console lines and requests so far."""
        self.console()
        self.requests()
        self._console, self._requests = [], []

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than its viewport."""
        return int(
            self.driver.execute_script(
                "const page = document.documentElement;"
                "return Math.max(page.scrollWidth, document.body.scrollWidth) - page.clientWidth"
            )
        )

    def screenshot(self, file: Path) -> None:
        """Writes the page as PNG, in its full height."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))


def missing() -> str:
    """Why no browser can be started here; "" where one can."""
    if find_spec("selenium") is None:
        return "no selenium: pip install -e .[dev]"
    absent = [name for name in (CHROMIUM, DRIVER) if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} on PATH: apt-get install chromium chromium-driver" if absent else ""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; it ends with the block."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(CHROMIUM) or CHROMIUM
    arguments = [
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--no-first-run",
        "--no-proxy-server",
        "--force-color-profile=srgb",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1, EXCLUDE [::1]",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium has none for root
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which(DRIVER) or DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(SECONDS)
        driver.set_script_timeout(SECONDS)
        yield Browser(driver)
    finally:
        driver.quit()
