"""The map of layers and GPUs in a real Chromium: colours, numbers, and the experts of each slot."""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.keys import Keys

from benchmarks.headless_chromium import resize
from tests.runtime.server.page.looking import choose, find, load_page, map_shown, text, texts
from tests.runtime.server.page.scripted_site import LOAD, PLACEMENT, ScriptedSite
from tests.support.browser import channels, problems, wait_for


def cell(browser: Chrome, layer: int, gpu: int) -> Any:
    return find(browser, f"[data-row='{layer}'][data-gpu='{gpu}']")


def colours(browser: Chrome, layer: int, gpu: int) -> tuple[str, str]:
    element = cell(browser, layer, gpu)
    script = "const s = getComputedStyle(arguments[0]); return [s.backgroundColor, s.color]"
    wait_for(lambda: not browser.execute_script("return document.getAnimations().length"), "settled colours")
    return tuple(browser.execute_script(script, element))


def shown_slots(browser: Chrome) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#slots li')].map(l => [...l.children].map(e => e.textContent))"
    return [slot[:3] for slot in browser.execute_script(script)]


def test_map_and_figures_show_the_placement_and_its_load(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    assert texts(browser, "#grid thead th") == ["Layer", "GPU 0", "GPU 1", "Balance"]
    assert texts(browser, "#grid tbody th") == ["3", "4", "5"]
    assert texts(browser, "#grid .cell") == ["1.20×", "0.80×", "1.00×", "1.00×", "1.00×", "1.00×"]
    assert texts(browser, "#grid .balance") == ["0.83", "1.00", "1.00"]
    assert text(browser, "#map-says") == "Balance 0.94 over the layers, 0.83 in the worst, layer 3."
    warm, cool, even = (colours(browser, *place)[0] for place in ((0, 0), (0, 1), (1, 0)))
    assert channels(warm)[0] > channels(warm)[2] + 60
    assert channels(cool)[2] > channels(cool)[0] + 60
    assert max(channels(even)) - min(channels(even)) < 10
    figures = dict(zip(texts(browser, "#figures dt"), texts(browser, "#figures dd:not(.note)"), strict=True))
    assert figures == {
        "Step, measured": "1.25 ms",
        "Step, predicted": "400 µs",
        "Tokens/s": "321",
        "Requests": "3 running",
    }
    notes = texts(browser, "#figures .note")
    assert notes == ["p95 2.5 ms", "measured is 3.13×", "128 steps so far", "1 waiting"]
    assert texts(browser, "#predictions th") == ["Placement", "1 token", "8 tokens", "this plan", "contiguous"]
    assert texts(browser, "#predictions td") == ["400 µs", "900 µs", "600 µs (1.50×)", "1.08 ms (1.20×)"]
    assert "3 MoE layers of 4 experts, top-2, on 2 GPUs" in text(browser, "#about")


def test_map_follows_the_load_and_keeps_the_last_one(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    before = colours(browser, 0, 0)
    site.load = LOAD | {"tokens": [[[10, 10], [40, 40]], *LOAD["tokens"][1:]]}
    wait_for(lambda: cell(browser, 0, 0).text == "0.40×")
    assert colours(browser, 0, 0) != before
    zero = copy.deepcopy(LOAD["tokens"])
    for layer in zero:
        for slots in layer:
            slots[:] = [0] * len(slots)
    site.load = LOAD | {"tokens": zero, "running": 0, "balancedness": [1.0] * 3}
    wait_for(lambda: text(browser, "#map-says").startswith("Idle; this is the last load. Balance"))
    assert cell(browser, 0, 0).text == "0.40×"
    load_page(browser, site)
    wait_for(lambda: text(browser, "#map-says").startswith("No load yet"))
    assert set(texts(browser, "#grid .cell")) == {""}
    site.load = LOAD | {"predicted_step_us": None, "step_ms": {"median": None, "p95": None}}
    wait_for(lambda: texts(browser, "#figures .note")[:2] == ["no step yet", "not in the plan"])
    assert problems(browser) == []


def test_experts_of_a_slot_on_hover_and_on_touch(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    assert text(browser, "#detail-title") == "Layer 3, GPU 0"
    ActionChains(browser).move_to_element(cell(browser, 1, 0)).perform()
    wait_for(lambda: text(browser, "#detail-title") == "Layer 4, GPU 0")
    assert shown_slots(browser) == [
        ["Expert 0", "2 copies: GPU 0, 1", "10%"],
        ["Expert 1", "1 copy", "20%"],
        ["Expert 2", "1 copy", "20%"],
    ]
    assert "1.00× the mean of the GPUs' tokens, 50% of the layer's tokens" in text(browser, "#detail-says")
    assert "2.5 of them are active in a step" in text(browser, "#detail-says")
    ActionChains(browser).move_to_element(find(browser, "h1")).perform()
    wait_for(lambda: text(browser, "#detail-title") == "Layer 3, GPU 0")
    resize(browser, 360, 740, phone=True)
    browser.execute_script("document.querySelector('#grid').scrollIntoView()")
    target = cell(browser, 2, 1)
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", target)
    assert min(box["width"], box["height"]) >= 24
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for kind, points in (("touchStart", [point]), ("touchEnd", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    wait_for(lambda: text(browser, "#detail-title") == "Layer 5, GPU 1")
    assert shown_slots(browser) == [["Expert 1", "1 copy", "25%"], ["Expert 0", "1 copy", "25%"]]


def test_map_is_walked_by_keyboard(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    assert len(browser.find_elements("css selector", "#grid [tabindex='0']")) == 1
    browser.execute_script("document.querySelector('#measure').focus()")
    ActionChains(browser).send_keys(Keys.TAB).perform()

    def place() -> list[str]:
        return browser.execute_script("const d = document.activeElement.dataset; return [d.row, d.gpu]")

    assert place() == ["0", "0"]
    walk = (
        (Keys.ARROW_DOWN, ["1", "0"]),
        (Keys.ARROW_RIGHT, ["1", "1"]),
        (Keys.ARROW_RIGHT, ["1", "1"]),
        (Keys.ARROW_DOWN, ["2", "1"]),
        (Keys.ARROW_DOWN, ["2", "1"]),
        (Keys.HOME, ["2", "0"]),
        (Keys.END, ["2", "1"]),
        (Keys.ARROW_UP, ["1", "1"]),
    )
    for key, expected in walk:
        ActionChains(browser).send_keys(key).perform()
        assert place() == expected
    assert text(browser, "#detail-title") == "Layer 4, GPU 1"
    focused = browser.switch_to.active_element
    assert focused.get_attribute("aria-label").startswith("Layer 4, GPU 1: 1.00× the mean of the GPUs' tokens, 50%")
    assert focused.get_attribute("aria-selected") == "true"
    polls = site.polls
    wait_for(lambda: site.polls > polls + 1)
    assert place() == ["1", "1"]


def test_other_measures(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    choose(browser, "#measure", "active")
    assert texts(browser, "#grid .cell")[:4] == ["1.14×", "0.86×", "1.33×", "0.67×"]
    assert texts(browser, "#grid .balance") == ["0.88", "0.75", "1.00"]
    choose(browser, "#measure", "slots")
    assert set(texts(browser, "#grid .cell")) == {""}
    striped = browser.execute_script("return arguments[0].style.background", cell(browser, 1, 0))
    # Of the layer's 120 pairs, 24 for each of its five slots on average: 10 are few, 20 nearly as many.
    few, *others = re.findall(r"rgb\(.*?\)", striped)[::2]
    assert others[0] == others[1] != few
    assert "4× or more" in find(browser, "#legend").get_attribute("aria-label")


@pytest.mark.parametrize("predicted", [{}, {"step_us": {"eplb": {"1": 2.0}}}, {"step_us": {"plan": ["x", None]}}])
def test_plan_that_predicts_nothing(browser: Chrome, site: ScriptedSite, predicted: dict[str, Any]) -> None:
    site.placement = PLACEMENT | {"predicted": predicted}
    load_page(browser, site)
    map_shown(browser)
    assert not find(browser, "#predicted").is_displayed()
    assert problems(browser) == []


def test_server_that_is_started_anew_with_another_plan(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    slots = [[[0], [1], [2], [3]]]
    site.placement = PLACEMENT | {"slots": slots, "layer_ids": [7], "gpus": 4}
    tokens = [[[4], [2], [1], [1]]]
    site.load = LOAD | {"tokens": tokens, "active": [[1.0] * 4], "balancedness": [0.5]}
    wait_for(lambda: texts(browser, "#grid .cell") == ["2.00×", "1.00×", "0.50×", "0.50×"])
    assert texts(browser, "#grid tbody th") == ["7"]
    assert problems(browser) == []


def test_nothing_is_asked_while_nobody_looks(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    here = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        wait_for(lambda: stays(site), "a pause")
    finally:
        browser.close()
        browser.switch_to.window(here)
    polls = site.polls
    wait_for(lambda: site.polls > polls)


def stays(site: ScriptedSite) -> bool:
    """Whether no question comes for longer than the interval between two."""
    polls = site.polls
    threading.Event().wait(1.3)
    return site.polls == polls
