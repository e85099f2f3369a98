"""The page in a real Chromium: its chat, its errors, and what it refuses."""

from __future__ import annotations

import threading

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tests.runtime.server.page.looking import answered, ask, find, load_page, map_shown, text, texts
from tests.runtime.server.page.scripted_site import PLACEMENT, ScriptedSite
from tests.support.browser import problems, wait_for

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> &amp; \u202etxet"


def test_text_is_typed_streamed_and_remembered(browser: Chrome, site: ScriptedSite) -> None:
    gate = threading.Event()
    site.pieces = ["One", gate, " two\n three"]
    ask(browser, "Count.")
    wait_for(lambda: texts(browser, ".turn.assistant .text") == ["One"], "the first piece")
    assert find(browser, "#log").get_attribute("aria-busy") == "true"
    assert not find(browser, "#send").is_enabled()
    gate.set()
    assert answered(browser) == ["One two\n three"]
    assert find(browser, "#log").get_attribute("aria-busy") == "false"
    measured = text(browser, ".turn.assistant .measured")
    assert measured.startswith("complete · 2 tokens · first after ")
    assert measured.endswith(" in all")
    ask(browser, "Again.")
    assert answered(browser, 2) == ["One two\n three"] * 2
    (path, first), (_, second) = site.seen
    assert path == "/v1/chat/completions"
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == ("team/demo", 0.7, 256, True)
    assert [message["content"] for message in second["messages"]] == ["Count.", "One two\n three", "Again."]
    find(browser, "#clear").click()
    assert texts(browser, ".turn") == []
    assert problems(browser) == []


def test_settings_are_sent_and_checked_before(browser: Chrome, site: ScriptedSite) -> None:
    for field, value in (("#temperature", "0"), ("#max-tokens", "0")):
        find(browser, field).clear()
        find(browser, field).send_keys(value)
    ask(browser, "a" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "b")
    assert not browser.execute_script("return document.querySelector('#max-tokens').validity.valid")
    assert site.seen == []
    find(browser, "#max-tokens").send_keys(Keys.BACKSPACE, "7")
    find(browser, "#send").click()
    answered(browser)
    body = site.seen[0][1]
    assert (body["temperature"], body["max_tokens"], body["messages"][0]["content"]) == (0, 7, "a\nb")
    find(browser, "#prompt").send_keys("   ", Keys.ENTER)
    assert len(site.seen) == 1


@pytest.mark.parametrize("key", [False, True])
def test_stop_ends_the_request_on_the_server(browser: Chrome, site: ScriptedSite, key: bool) -> None:
    site.pieces = ["begun", threading.Event()]
    ask(browser, "Write for ever.")
    wait_for(lambda: texts(browser, ".turn.assistant .text") == ["begun"])
    if key:
        find(browser, "#prompt").send_keys(Keys.ESCAPE)
    else:
        find(browser, "#stop").click()
    assert site.left.wait(5)
    assert answered(browser) == ["begun"]
    assert text(browser, ".turn.assistant .measured").startswith("stopped · first after")
    assert browser.switch_to.active_element.get_attribute("id") == "prompt"
    assert not find(browser, "#error").is_displayed()
    assert problems(browser) == []


def test_model_without_a_chat_template_continues_text(browser: Chrome, site: ScriptedSite) -> None:
    site.has_template = False
    ask(browser, "Once upon")
    assert answered(browser) == ["Hello, world."]
    assert find(browser, "#continues").is_displayed()
    ask(browser, "In the end")
    answered(browser, 2)
    assert [(path, body["prompt"]) for path, body in site.seen] == [
        ("/v1/completions", "Once upon"),
        ("/v1/completions", "In the end"),
    ]


def test_server_that_has_another_model_by_now(browser: Chrome, site: ScriptedSite) -> None:
    wait_for(lambda: text(browser, "#model") == "team/demo")
    site.placement = site.placement | {"model": "team/other"}
    ask(browser, "x")
    wait_for(lambda: "does not exist here" in text(browser, "#error"))
    find(browser, "#send").click()
    assert answered(browser) == ["Hello, world."]
    assert text(browser, "#model") == "team/other"


def test_what_is_written_is_text_whatever_it_says(browser: Chrome, site: ScriptedSite) -> None:
    site.pieces = [HOSTILE]
    site.placement = PLACEMENT | {
        "strategy": HOSTILE,
        "predicted": {"step_us": {"plan": {"1": 1.0}, HOSTILE: {"1": 2.0}}},
    }
    load_page(browser, site)
    ask(browser, HOSTILE)
    assert answered(browser) == [HOSTILE]
    map_shown(browser)
    assert HOSTILE in text(browser, "#about")
    assert HOSTILE in texts(browser, "#predictions th")
    assert browser.execute_script("return document.querySelectorAll('main img, main script, main b').length") == 0
    assert problems(browser) == []


def test_everything_comes_from_the_server_and_inline_code_is_refused(browser: Chrome, site: ScriptedSite) -> None:
    ask(browser, "x")
    answered(browser)
    map_shown(browser)
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 10
    assert all(name.startswith(site.url + "/") for name in names)
    assert problems(browser) == []
    script = """
        const done = arguments[0], refused = [];
        document.addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
        const attempts = [
            () => { document.body.innerHTML = "<b>x</b>"; },
            () => document.body.setAttribute("onclick", "window.broken = 1"),
            () => document.body.append(Object.assign(document.createElement("img"), { src: "/x.png" })),
            () => fetch("http://127.0.0.1:9/").catch(() => {}),
        ];
        for (const attempt of attempts) { try { attempt(); } catch (error) { refused.push(error.name); } }
        setTimeout(() => done(refused), 100);
    """
    refused = browser.execute_async_script(script)
    assert {"TypeError", "require-trusted-types-for", "img-src", "connect-src"} == set(refused)


def test_server_that_is_gone_and_comes_back(browser: Chrome, site: ScriptedSite) -> None:
    map_shown(browser)
    site.stop()
    ask(browser, "Anybody?")
    wait_for(lambda: find(browser, "#error").is_displayed())
    assert "does not answer" in text(browser, "#error")
    assert find(browser, "#prompt").get_attribute("value") == "Anybody?"
    assert texts(browser, ".turn") == []
    wait_for(lambda: "Asking again" in text(browser, "#state"))
    site.restart()
    wait_for(lambda: not find(browser, "#state").is_displayed(), "the map's recovery")
    find(browser, "#send").click()
    assert answered(browser) == ["Hello, world."]
    assert not find(browser, "#error").is_displayed()


def test_server_that_breaks_off(browser: Chrome, site: ScriptedSite) -> None:
    site.pieces = ["half", RuntimeError("rank 1 ended with code -9")]
    ask(browser, "x")
    assert answered(browser) == ["half"]
    assert text(browser, ".turn.assistant .measured").startswith("broken off")
    assert "rank 1 ended with code -9" in text(browser, "#error")
    gate = threading.Event()
    site.pieces = ["more", gate]
    ask(browser, Keys.CONTROL + "a" + Keys.NULL + "y")
    wait_for(lambda: texts(browser, ".turn.assistant .text") == ["half", "more"])
    site.stop()
    wait_for(lambda: len(texts(browser, ".turn.assistant .measured")) == 2)
    assert find(browser, "#error").is_displayed()
    site.restart()


def test_api_key_is_asked_for_and_used(browser: Chrome, site: ScriptedSite) -> None:
    assert not find(browser, "#key").is_displayed()
    site.key = "secret"
    load_page(browser, site)
    wait_for(lambda: find(browser, "#key").is_displayed(), "the key's field")
    ask(browser, "x")
    wait_for(lambda: "wants an API key" in text(browser, "#error"))
    find(browser, "#key").send_keys("secret")
    find(browser, "#send").click()
    assert answered(browser) == ["Hello, world."]
    map_shown(browser)
    assert text(browser, "#model") == "team/demo"
    assert browser.execute_script("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_full_server_says_when_to_come_back(browser: Chrome, site: ScriptedSite) -> None:
    site.full = True
    ask(browser, "x")
    wait_for(lambda: find(browser, "#error").is_displayed())
    assert text(browser, "#error") == "The server has too much to do (8 requests wait). Send again in 7 s."
    site.full = False
    find(browser, "#send").click()
    assert answered(browser) == ["Hello, world."]
