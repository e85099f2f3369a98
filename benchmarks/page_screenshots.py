"""Pictures of a server's page for the documentation, taken while the server works.

python -m runtime serve --plan contiguous.json port=8001
python -m runtime serve --plan plan.json port=8000 compare_url=http://127.0.0.1:8001
python -m benchmarks.page_screenshots http://127.0.0.1:8000 docs
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import httpx
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from benchmarks.headless_chromium import open_browser, prefer_dark, resize
from benchmarks.report_screenshots import capture, paste_side_by_side

PROMPTS = Path(__file__).resolve().parents[1] / "examples" / "prompts" / "judge.jsonl"
NUM_STREAMS = 4
SETTLE_S = 4  # the load's window, and a poll
WAIT_S = 120
DESKTOP = (1200, 940)  # CSS pixels
PHONE = (360, 740)
PHONE_PARTS = ("header", "#prompt", "#map", "#detail")


@contextmanager
def work(url: str, num_streams: int) -> Iterator[None]:
    """Keep streams of held-out prompts running, as users would."""
    prompts = cycle(json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines())
    stop = threading.Event()
    lock = threading.Lock()

    def stream() -> None:
        while not stop.is_set():
            with lock:
                prompt = next(prompts)
            body = {"prompt": prompt, "max_tokens": 64, "temperature": 0.7, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_S) as answer:
                for _ in answer.iter_lines():
                    if stop.is_set():
                        break

    threads = [threading.Thread(target=stream, daemon=True) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)


def ask(browser: Chrome, prompt: str, max_tokens: int) -> None:
    """Type a prompt and wait until it is answered.

    Raises:
        TimeoutError: that takes more than two minutes.
    """
    field = browser.find_element("id", "max-tokens")
    field.clear()
    field.send_keys(str(max_tokens))
    box = browser.find_element("id", "prompt")
    box.clear()
    box.send_keys(prompt, Keys.ENTER)
    end = time.monotonic() + WAIT_S
    while not browser.find_element("id", "send").is_enabled():
        if time.monotonic() > end:
            raise TimeoutError(f"no answer after {WAIT_S} s: {browser.get_log('browser')}")
        time.sleep(0.1)


def open_page(browser: Chrome, url: str, dark: bool, size: tuple[int, int], phone: bool = False) -> None:
    """Open the page anew, as a reader with these preferences."""
    resize(browser, *size, phone=phone)
    prefer_dark(browser, dark)
    browser.get(url)
    time.sleep(1)


def chat(browser: Chrome, url: str, dark: bool) -> Image.Image:
    """A chat beside the map, on a wide screen, under load."""
    open_page(browser, url, dark, DESKTOP)
    with work(url, NUM_STREAMS):
        ask(browser, "What is the law of large numbers?", 96)
        time.sleep(SETTLE_S)
        return capture(browser)


def side_by_side(browser: Chrome, url: str) -> Image.Image:
    """One prompt to both servers at the same time, so that whatever else the machine does slows both."""
    open_page(browser, url, False, DESKTOP)
    browser.find_element("css selector", "[name=mode][value=compare]").click()
    for max_tokens in (8, 128):  # the first answers of a server take longer
        ask(browser, "The king said unto", max_tokens)
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    return capture(browser)


def phone(browser: Chrome, url: str) -> Image.Image:
    """Several screens on a phone, in dark colours, side by side."""
    open_page(browser, url, True, PHONE, phone=True)
    with work(url, NUM_STREAMS):
        ask(browser, "Who was the king?", 48)
        time.sleep(SETTLE_S)
        # 256 colours make the file of four screens small.
        return paste_side_by_side(screens(browser, PHONE_PARTS)).quantize(256, dither=Image.Dither.NONE)


def screens(browser: Chrome, parts: Sequence[str]) -> list[Image.Image]:
    """One screen from the start of each part of the page."""
    taken = []
    for selector in parts:
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)
        time.sleep(0.5)
        taken.append(capture(browser))
    return taken


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server that was started with compare_url=")
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    flags = parser.parse_args()
    with open_browser(offline=False) as browser:
        for name, take in (
            ("page", lambda: chat(browser, flags.url, dark=False)),
            ("page-dark", lambda: chat(browser, flags.url, dark=True)),
            ("page-phone-dark", lambda: phone(browser, flags.url)),
            ("page-side-by-side", lambda: side_by_side(browser, flags.url)),
        ):
            path = flags.folder / f"{name}.png"
            take().save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
