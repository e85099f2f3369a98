"""Pictures of a profiler's report for the documentation.

python -m profiler report ../shared/traces/gpt-oss-20b.safetensors -o report.html
python -m benchmarks.report_screenshots report.html docs/report-gpt-oss-20b.png --show top
python -m benchmarks.report_screenshots report.html docs/report-phone-dark.png --show phone
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome

from benchmarks.headless_chromium import open_browser, open_report, prefer_dark, resize, wait_for_charts

DESKTOP = (1120, 1560)  # CSS pixels: the summary and the first map
MAPS = (760, 900)
MAPS_PARTS = ("#popularity", "#affinity", "#coactivation", "#drift")
PHONE = (360, 740)
PHONE_PARTS = ("header", "#popularity", "#affinity", "#active")  # side by side, each one screen from its start
GAP = 24


def capture(browser: Chrome) -> Image.Image:
    """What the page shows now."""
    return Image.open(BytesIO(base64.b64decode(browser.get_screenshot_as_base64()))).convert("RGB")


def desktop(browser: Chrome, page: Path) -> Image.Image:
    """The top of the page on a wide screen."""
    resize(browser, *DESKTOP)
    prefer_dark(browser, False)
    open_report(browser, page)
    return capture(browser)


def maps(browser: Chrome, page: Path) -> Image.Image:
    """The maps of the page in light colours, side by side."""
    resize(browser, *MAPS)
    prefer_dark(browser, False)
    return side_by_side(browser, page, MAPS_PARTS)


def phone(browser: Chrome, page: Path) -> Image.Image:
    """Several screens of the page on a phone, in dark colours, side by side."""
    resize(browser, *PHONE, phone=True)
    prefer_dark(browser, True)
    return side_by_side(browser, page, PHONE_PARTS)


def side_by_side(browser: Chrome, page: Path, parts: Sequence[str]) -> Image.Image:
    """One screen from the start of each part of the page, at half size."""
    open_report(browser, page)
    screens = []
    for selector in parts:
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)
        wait_for_charts(browser)
        screens.append(capture(browser))
    return paste_side_by_side(screens)


def paste_side_by_side(screens: Sequence[Image.Image]) -> Image.Image:
    """Screens of one size beside each other, at half size."""
    width, height = screens[0].size
    sheet = Image.new("RGB", (len(screens) * (width + GAP) - GAP, height), "white")
    for index, screen in enumerate(screens):
        sheet.paste(screen, (index * (width + GAP), 0))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Take one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a report (.html)")
    parser.add_argument("picture", type=Path, help="picture to write (.png)")
    parser.add_argument("--show", choices=("top", "maps", "phone"), default="top")
    flags = parser.parse_args()
    take = {"top": desktop, "maps": maps, "phone": phone}[flags.show]
    with open_browser() as browser:
        take(browser, flags.page).save(flags.picture, optimize=True)
    print(f"{flags.picture}: {flags.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
