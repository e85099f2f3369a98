"""Side by side in a real Chromium: one prompt to two servers."""

from __future__ import annotations

import threading

from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tests.runtime.server.page.looking import ask, choose, find, load_page, map_shown, text, texts
from tests.runtime.server.page.scripted_site import ScriptedSite
from tests.support.browser import problems, wait_for


def compare(browser: Chrome) -> None:
    find(browser, "[name=mode][value=compare]").click()
    wait_for(lambda: texts(browser, ".pane h3") == ["This server: step_time", "Second server: contiguous"])


def answers(browser: Chrome) -> list[str]:
    return texts(browser, ".pane .text")


def verdict(browser: Chrome) -> str:
    return wait_for(lambda: text(browser, "#verdict"), "a verdict")


def test_both_streams_with_their_times(browser: Chrome, site: ScriptedSite, second: ScriptedSite) -> None:
    compare(browser)
    gate = threading.Event()
    second.pieces = ["Hello", gate, ", ", "world."]
    ask(browser, "Greet.")
    wait_for(lambda: answers(browser) == ["Hello, world.", "Hello"])
    # Of three figures a side, the last are the totals.
    wait_for(lambda: texts(browser, ".times dd:not(.note)")[2] != "–")
    assert texts(browser, ".times dd:not(.note)")[5] == "–"
    gate.set()
    assert verdict(browser).startswith("Identical text. Tokens/s: step_time has ")
    assert verdict(browser).endswith("those of contiguous.")
    assert "–" not in texts(browser, ".times dd:not(.note)")
    assert len(browser.find_elements("css selector", ".pane.same")) == 2
    [(_, ours)], [(_, theirs)] = site.seen, second.seen
    assert ours == theirs
    assert ours["temperature"] == 0
    assert not find(browser, "#temperature").is_enabled()
    assert find(browser, "#prompt").get_attribute("value") == "Greet."
    assert problems(browser) == []


def test_texts_that_differ_and_answers_in_turn(browser: Chrome, site: ScriptedSite, second: ScriptedSite) -> None:
    compare(browser)
    choose(browser, "#order", "turns")
    gate = threading.Event()
    site.pieces = ["Hello", gate, " you."]
    second.pieces = ["Hello", " there."]
    ask(browser, "Greet.")
    wait_for(lambda: answers(browser) == ["Hello", ""])
    assert second.seen == []
    gate.set()
    assert verdict(browser).startswith("The texts differ from character 7 on. Tokens/s: step_time has ")
    assert browser.find_elements("css selector", ".pane.same") == []
    find(browser, "#clear").click()
    assert answers(browser) == ["", ""]


def test_stop_ends_both(browser: Chrome, site: ScriptedSite, second: ScriptedSite) -> None:
    compare(browser)
    for server in (site, second):
        server.pieces = ["begun", threading.Event()]
    ask(browser, "x")
    wait_for(lambda: answers(browser) == ["begun", "begun"])
    find(browser, "#prompt").send_keys(Keys.ESCAPE)
    assert site.left.wait(5)
    assert second.left.wait(5)
    assert verdict(browser) == "Stopped."


def test_side_that_fails_does_not_end_the_other(browser: Chrome, site: ScriptedSite, second: ScriptedSite) -> None:
    compare(browser)
    second.stop()
    ask(browser, "x")
    assert "Second server: contiguous: The server refuses: the second server does not answer" in verdict(browser)
    assert answers(browser)[0] == "Hello, world."
    second.restart()
    find(browser, "#send").click()
    wait_for(lambda: text(browser, "#verdict").startswith("Identical text."))


def test_map_of_the_second_server(browser: Chrome, site: ScriptedSite, second: ScriptedSite) -> None:
    map_shown(browser)
    second.load = second.load | {"tokens": [[[10, 10], [40, 40]], *second.load["tokens"][1:]]}
    choose(browser, "#whose", "there")
    wait_for(lambda: texts(browser, "#grid .cell")[0] == "0.40×")
    assert "strategy contiguous" in text(browser, "#about")
    choose(browser, "#whose", "here")
    wait_for(lambda: texts(browser, "#grid .cell")[0] == "1.20×")


def test_server_without_a_second_one_says_how_to_start_it(browser: Chrome, site: ScriptedSite) -> None:
    alone = ScriptedSite()
    try:
        load_page(browser, alone)
        find(browser, "[name=mode][value=compare]").click()
        wait_for(lambda: find(browser, "#no-second").is_displayed())
        assert "compare_url=http://127.0.0.1:8001" in text(browser, "#no-second pre")
        assert not find(browser, "#prompt").is_displayed()
        find(browser, "[name=mode][value=chat]").click()
        assert find(browser, "#prompt").is_displayed()
        assert problems(browser) == []
    finally:
        alone.stop()
