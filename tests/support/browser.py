"""What tests of pages in a real Chromium share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome

from benchmarks.headless_chromium import missing_programs


def require_browser() -> None:
    """Skip where there is no Chromium; fail where CI is set, which must not skip."""
    if (missing := missing_programs()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


def problems(browser: Chrome) -> list[str]:
    """What the pages' consoles said since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def wait_for(holds: Callable[[], Any], what: str = "it", seconds: float = 10) -> Any:
    """Wait until a condition holds, and return what it gave."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds} s")
        time.sleep(0.02)
    return found


def channels(colour: str) -> list[int]:
    """Red, green and blue of a computed colour."""
    return [int(channel) for channel in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if (c := channel / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for channel in channels(colour)
        ]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
