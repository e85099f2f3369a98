"""How tests look at the page and ask it."""

from __future__ import annotations

from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.runtime.server.page.scripted_site import ScriptedSite
from tests.support.browser import wait_for


def load_page(browser: Chrome, site: ScriptedSite) -> None:
    browser.get(site.url)
    wait_for(
        lambda: browser.execute_script("return document.querySelector('#panes') && document.readyState") == "complete"
    )


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element("css selector", selector)


def texts(browser: Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return browser.execute_script(script, selector)


def text(browser: Chrome, selector: str) -> str:
    [found] = texts(browser, selector)
    return found


def ask(browser: Chrome, prompt: str) -> None:
    find(browser, "#prompt").send_keys(prompt, Keys.ENTER)


def answered(browser: Chrome, number: int = 1) -> list[str]:
    """The answers of a chat, once there are so many complete ones."""
    wait_for(lambda: len(texts(browser, ".turn.assistant .measured")) == number, f"answer {number}")
    return texts(browser, ".turn.assistant .text")


def map_shown(browser: Chrome) -> None:
    wait_for(lambda: texts(browser, "#grid .cell") and texts(browser, "#grid .cell")[0], "a map with a load")


def choose(browser: Chrome, selector: str, value: str) -> None:
    """Choose an option, as a reader does."""
    find(browser, f"{selector} option[value={value}]").click()
