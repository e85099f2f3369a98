"""A Chromium without a screen that reaches this machine at most, for looking at the pages that the project writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 60
# Root and containers have no user namespaces for Chromium's sandbox; only our own pages are opened.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def missing_programs() -> str | None:
    """What has to be installed before `open_browser` works, in one line; None if nothing."""
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        return "no Chromium with chromedriver found; install them, on Debian: apt-get install chromium chromium-driver"
    return None


@contextmanager
def open_browser(*, offline: bool = True) -> Iterator[Chrome]:
    """Start a browser, and end it.

    Args:
        offline: it reaches nothing; otherwise servers on 127.0.0.1, and no other.

    Yields:
        The browser; its log holds every message of the pages' consoles.

    Raises:
        RuntimeError: a program is missing; the message says which.
    """
    if (missing := missing_programs()) is not None:
        raise RuntimeError(missing)
    options = ChromeOptions()
    options.binary_location = str(next(filter(None, map(shutil.which, BROWSERS))))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.set_page_load_timeout(WAIT_S)
        browser.execute_cdp_cmd("Network.enable", {})
        if offline:
            network = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            browser.execute_cdp_cmd("Network.emulateNetworkConditions", network)
        yield browser
    finally:
        browser.quit()


def resize(browser: Chrome, width: int, height: int, *, phone: bool = False) -> None:
    """Set the page's size in CSS pixels; a phone has a touch screen and two pixels per CSS pixel."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def prefer_dark(browser: Chrome, dark: bool) -> None:
    """Tell the page which colours its reader prefers."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_report(browser: Chrome, page: Path) -> None:
    """Open a report from its file and wait until all charts are drawn."""
    browser.get(page.resolve().as_uri())
    wait_for_charts(browser)


def wait_for_charts(browser: Chrome) -> None:
    """Wait until every chart of the report is drawn and none is being drawn.

    Raises:
        TimeoutError: that takes more than a minute.
    """
    settled = "return [...document.querySelectorAll('.chart')].every(c => c.dataset.drawn) && !running.size && !pending"
    end = time.monotonic() + WAIT_S
    while not browser.execute_script(settled):
        if time.monotonic() > end:
            raise TimeoutError(f"charts are not drawn after {WAIT_S} s: {browser.get_log('browser')}")
        time.sleep(0.05)
