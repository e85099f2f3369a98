"""How the page looks in a real Chromium: on phones, in the dark, with large models, by keyboard, to assistive tools."""

from __future__ import annotations

from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.keys import Keys

from benchmarks.headless_chromium import prefer_dark, resize
from tests.runtime.server.page.looking import answered, ask, find, load_page, map_shown, text, texts
from tests.runtime.server.page.scripted_site import LOAD, PLACEMENT, ScriptedSite
from tests.support.browser import channels, contrast, problems, wait_for

# Elements with text of their own that are shown, with the colours around them.
COLOURS = """
const found = [], clear = /, 0\\)$/;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const style = getComputedStyle(element);
  if (!own || !element.checkVisibility() || element.matches(":disabled, .unseen, .skip, noscript, option")) continue;
  let ground = element;
  while (ground.parentElement && clear.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
  const name = `${element.tagName}.${element.className}#${element.id}`;
  found.push([name, style.color, getComputedStyle(ground).backgroundColor]);
}
return found;
"""


def large_model(num_layers: int, num_experts: int, num_gpus: int) -> tuple[dict[str, Any], dict[str, Any]]:
    per_gpu = num_experts // num_gpus
    layer = [list(range(gpu * per_gpu, (gpu + 1) * per_gpu)) for gpu in range(num_gpus)]
    placement = PLACEMENT | {"layer_ids": list(range(3, 3 + num_layers)), "slots": [layer] * num_layers}
    placement |= {"num_experts": num_experts, "top_k": 8, "gpus": num_gpus}
    tokens = [[[1 + (expert * index) % 7 for expert in gpu] for gpu in layer] for index in range(num_layers)]
    active = [[float(per_gpu)] * num_gpus] * num_layers
    return placement, LOAD | {"tokens": tokens, "active": active, "balancedness": [0.9] * num_layers}


@pytest.mark.parametrize("mode", ["chat", "compare"])
@pytest.mark.parametrize("shape", [None, (58, 256, 8), (4, 64, 32)])
def test_phone_never_scrolls_sideways(browser: Chrome, site: ScriptedSite, mode: str, shape: Any) -> None:
    if shape:
        site.placement, site.load = large_model(*shape)
    site.pieces = ["long" * 60, " ", "word " * 60]
    resize(browser, 320, 740, phone=True)
    load_page(browser, site)
    num_slots = shape[1] // shape[2] if shape else len(PLACEMENT["slots"][0][0])
    wait_for(lambda: len(texts(browser, "#slots li")) == num_slots)
    find(browser, f"[name=mode][value={mode}]").click()
    ask(browser, "x" * 300)
    wait_for(lambda: site.seen and find(browser, "#send").is_enabled())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    assert problems(browser) == []


def test_colours_follow_the_reader_and_can_be_read(browser: Chrome, site: ScriptedSite) -> None:
    ask(browser, "Hello?")
    answered(browser)
    map_shown(browser)
    find(browser, "[name=mode][value=compare]").click()
    site.full = True
    ask(browser, "Hello?")
    wait_for(lambda: text(browser, "#verdict"))
    background = "return getComputedStyle(document.body).backgroundColor"
    fill = "return document.querySelector('#grid .cell').style.background"
    light = browser.execute_script(fill)
    for dark in (False, True):
        prefer_dark(browser, dark)
        wait_for(lambda dark=dark: (browser.execute_script(fill) != light) == dark)
        wait_for(lambda: not browser.execute_script("return document.getAnimations().length"))
        assert (max(channels(browser.execute_script(background))) < 60) == dark
        for mode in ("chat", "compare"):
            find(browser, f"[name=mode][value={mode}]").click()
            seen = browser.execute_script(COLOURS)
            assert len(seen) > 40
            poor = [item for item in seen if contrast(item[1], item[2]) < 4.5]
            assert poor == []


def test_everything_is_reached_by_keyboard_and_has_a_name(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    load_page(browser, site)
    map_shown(browser)
    reached = []
    for _ in range(20):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        if element.tag_name == "body":
            break
        reached.append(element.get_attribute("id") or element.get_attribute("class") or element.get_attribute("name"))
        assert element.accessible_name, reached[-1]
    expected = "skip mode log prompt temperature max-tokens send clear whose measure detail"
    assert [name for name in reached if name in expected.split()] == expected.split()
    assert any("cell" in name for name in reached)
    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.HOME).key_up(Keys.CONTROL).perform()
    browser.execute_script("document.querySelector('.skip').focus()")
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    wait_for(lambda: browser.switch_to.active_element.get_attribute("id") == "prompt")


def test_detail_stays_in_sight_and_hides_nothing_focused(browser: Chrome, site: ScriptedSite) -> None:
    site.placement, site.load = large_model(58, 256, 8)
    load_page(browser, site)
    wait_for(lambda: len(texts(browser, "#slots li")) == 32)
    script = """
        const box = (e) => e.getBoundingClientRect(), cell = document.activeElement;
        const detail = box(document.querySelector("#detail"));
        return [box(cell).top, box(cell).bottom, detail.top, detail.bottom, innerHeight];
    """
    browser.execute_script("document.querySelector('#grid [tabindex=\"0\"]').focus()")
    for _ in range(57):
        ActionChains(browser, duration=0).send_keys(Keys.ARROW_DOWN).perform()
        top, bottom, detail_top, detail_bottom, height = browser.execute_script(script)
        assert 0 <= top < bottom <= detail_top < detail_bottom <= height + 1
    assert text(browser, "#detail-title") == "Layer 60, GPU 0"


def test_mode_is_changed_by_arrow_keys(browser: Chrome, site: ScriptedSite) -> None:
    browser.execute_script("document.querySelector('[name=mode]').focus()")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(lambda: find(browser, "#compare").is_displayed())
    assert not find(browser, "#chat").is_displayed()
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    wait_for(lambda: find(browser, "#chat").is_displayed())


def test_answers_and_errors_are_announced(browser: Chrome, site: ScriptedSite) -> None:
    roles = {"#log": "log", "#error": "alert", "#state": "status", "#verdict": "status", "#grid": "grid"}
    for selector, role in roles.items():
        assert find(browser, selector).get_attribute("role") == role
    for label in browser.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')].map(e => e.labels.length)"
    ):
        assert label == 1
