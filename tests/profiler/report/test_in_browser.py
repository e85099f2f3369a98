"""The report in a real Chromium: opened from its file, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.headless_chromium import open_browser, open_report, prefer_dark, resize, wait_for_charts
from profiler.profile import RoutingProfile
from profiler.report import render_report
from tests.support.browser import channels, contrast, problems, require_browser
from tests.support.profiles import make_counts_profile, make_profile

HOSTILE = "<img src=x onerror=alert(1)><a href='javascript:alert(2)'>law</a>"
SHAPES = {
    "24x32": lambda: make_profile(24, 32, 4, 3000, ("code", HOSTILE, "a domain with quite a long name")),
    "58x256": lambda: make_profile(58, 256, 8, 1500, tuple("abcdefgh")),
    "counts": lambda: make_counts_profile(np.array([[4, 1, 0, 3], [0, 0, 0, 0], [2, 2, 2, 2]])),
}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    require_browser()
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a named profile, rendered once."""
    folder = tmp_path_factory.mktemp("reports")

    def render(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            profile: RoutingProfile = SHAPES[name]()
            path.write_text(render_report(profile), encoding="utf-8")
        return path

    return render


def choose(browser, selector: str, value: str) -> None:
    script = (
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    )
    browser.execute_script(script, selector, value)
    wait_for_charts(browser)


def state(browser, chart: str) -> tuple[str, str, str]:
    """First row of the map's values as drawn, its text alternative, and the line below it."""
    return tuple(
        browser.execute_script(
            "const g = document.getElementById(arguments[0]);"
            "return [JSON.stringify(g.data[0].z[1]), g.getAttribute('aria-label'),"
            " document.getElementById(arguments[0] + '-says').textContent]",
            chart,
        )
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("width", "phone"), [(1280, False), (360, True)])
def test_opens_offline_without_errors_and_without_scrolling_sideways(browser, page, name, width, phone) -> None:
    resize(browser, width, 800, phone=phone)
    prefer_dark(browser, phone)
    open_report(browser, page(name))
    assert problems(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.execute_script(
        "return [...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))"
    )
    requests = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !/^(data|blob):/.test(n))"
    assert browser.execute_script(requests) == []
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def test_selectors_change_what_is_drawn_and_said(browser, page) -> None:
    resize(browser, 1280, 800)
    prefer_dark(browser, False)
    open_report(browser, page("58x256"))
    for selector, value, chart in (
        ("popularity-view", "2", "popularity-chart"),
        ("popularity-view", "5", "popularity-chart"),
        ("affinity-pair", "56", "affinity-chart"),
        ("coactivation-layer", "57", "coactivation-chart"),
    ):
        before = state(browser, chart)
        choose(browser, selector, value)
        assert all(old != new for old, new in zip(before, state(browser, chart), strict=True))
    assert "in layer 113, " in state(browser, "affinity-chart")[2]
    assert (
        "in layer 115 " in state(browser, "affinity-chart")[2] or "in layer 115;" in state(browser, "affinity-chart")[2]
    )
    shares, _, said = state(browser, "affinity-chart")
    choose(browser, "affinity-measure", "ratio")
    assert state(browser, "affinity-chart")[0] != shares
    assert state(browser, "affinity-chart")[2] == said
    assert problems(browser) == []


def test_shares_arrive_as_they_were_counted(browser, page) -> None:
    resize(browser, 1280, 800)
    open_report(browser, page("24x32"))
    choose(browser, "affinity-pair", "7")
    drawn = np.array(
        browser.execute_script(
            "return document.getElementById('affinity-chart').data[0].customdata.map(r => r.map(c => c[0]))"
        )
    )
    statistics = SHAPES["24x32"]().statistics
    expected = statistics.affinity[7] / statistics.popularity[7][:, None]
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=expected.max() / 255 + 1e-12)


def test_every_selector_is_labelled_and_reached_by_keyboard(browser, page) -> None:
    open_report(browser, page("24x32"))
    selects = browser.execute_script(
        "return [...document.querySelectorAll('select')].map(s => [s.id, s.labels.length, s.tabIndex])"
    )
    assert len(selects) == 5
    assert all(labels == 1 and tab_index == 0 for _, labels, tab_index in selects)
    drawn = "return document.getElementById('affinity-chart').dataset.drawn"
    before = browser.execute_script(drawn)
    browser.find_element("id", "affinity-pair").send_keys("\ue015")  # arrow down
    wait_for_charts(browser)
    assert browser.execute_script("return document.getElementById('affinity-pair').value") == "1"
    assert browser.execute_script(drawn) != before


def test_colours_follow_the_reader_while_the_page_is_open(browser, page) -> None:
    resize(browser, 1280, 800)
    prefer_dark(browser, False)
    open_report(browser, page("24x32"))
    colours = (
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " document.getElementById('skew-chart').layout.font.color,"
        " document.getElementById('affinity-chart').data[0].colorscale[0][1]]"
    )
    light = browser.execute_script(colours)
    prefer_dark(browser, True)
    wait_until(browser, lambda: browser.execute_script(colours)[2] != light[2])
    dark = browser.execute_script(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert min(channels(light[0])) > 200 > 80 > max(channels(dark[0]))
    assert contrast(light[0], light[1]) > 7
    assert contrast(dark[0], dark[1]) > 7


def test_charts_follow_the_width(browser, page) -> None:
    resize(browser, 1280, 800)
    open_report(browser, page("24x32"))
    plot = (
        "const g = document.getElementById('popularity-chart');"
        "return [g.clientWidth, g._fullLayout.width, g._fullLayout._size.w]"
    )
    wide = browser.execute_script(plot)
    resize(browser, 360, 800, phone=True)
    wait_until(browser, lambda: browser.execute_script(plot)[1] < 360)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    resize(browser, 1280, 800)
    wait_until(browser, lambda: browser.execute_script(plot) == wide)
    assert problems(browser) == []


def wait_until(browser, holds: Callable[[], bool]) -> None:
    """Wait for what follows an event that the browser sends after a while."""
    for _ in range(100):
        wait_for_charts(browser)
        if holds():
            wait_for_charts(browser)
            return
        browser.execute_async_script("setTimeout(arguments[0], 50)")
    pytest.fail("did not happen within 5 s")
