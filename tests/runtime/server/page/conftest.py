"""A browser, and two servers that do what each test tells them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from benchmarks.headless_chromium import open_browser, prefer_dark, resize
from tests.runtime.server.page.looking import load_page
from tests.runtime.server.page.scripted_site import ScriptedSite
from tests.support.browser import problems, require_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    require_browser()
    with open_browser(offline=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def sites() -> Iterator[tuple[ScriptedSite, ScriptedSite]]:
    """A server, and the second one behind it."""
    second = ScriptedSite(strategy="contiguous")
    first = ScriptedSite(second.url)
    yield first, second
    first.stop()
    second.stop()


@pytest.fixture
def second(sites: tuple[ScriptedSite, ScriptedSite]) -> ScriptedSite:
    return sites[1]


@pytest.fixture
def site(sites: tuple[ScriptedSite, ScriptedSite], browser: Chrome) -> ScriptedSite:
    """The server as at the beginning, its page open on a wide screen in light colours."""
    for server in sites:
        server.reset()
    problems(browser)
    resize(browser, 1280, 900)
    prefer_dark(browser, False)
    load_page(browser, sites[0])
    return sites[0]
