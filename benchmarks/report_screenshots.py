"""Pictures of a profiler's report for the documentation: desktop in light colours, and a phone in dark ones.

python -m profiler report ../shared/traces/gpt-oss-20b.safetensors -o report.html
python -m benchmarks.report_screenshots report.html docs/report-gpt-oss-20b.png docs/report-phone-dark.png
"""

from __future__ import annotations

import argparse
import base64
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome

from benchmarks.headless_chromium import open_browser, open_report, prefer_dark, resize, wait_for_charts

DESKTOP = (1120, 1560)  # CSS pixels: the summary and the first map
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


def phone(browser: Chrome, page: Path) -> Image.Image:
    """Several screens of the page on a phone, side by side."""
    resize(browser, *PHONE, phone=True)
    prefer_dark(browser, True)
    open_report(browser, page)
    screens = []
    for selector in PHONE_PARTS:
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)
        wait_for_charts(browser)
        screens.append(capture(browser))
    width, height = screens[0].size
    sheet = Image.new("RGB", (len(screens) * (width + GAP) - GAP, height), "white")
    for index, screen in enumerate(screens):
        sheet.paste(screen, (index * (width + GAP), 0))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a report (.html)")
    parser.add_argument("desktop", type=Path, help="picture to write (.png)")
    parser.add_argument("phone", type=Path, help="picture to write (.png)")
    flags = parser.parse_args()
    with open_browser() as browser:
        for take, path in ((desktop, flags.desktop), (phone, flags.phone)):
            take(browser, flags.page).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
