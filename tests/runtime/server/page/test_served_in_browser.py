"""The page over the real server: the bundled model on two ranks, by a plan and by the contiguous placement."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium.webdriver import Chrome

from tests.runtime.server.page.looking import answered, ask, choose, find, text, texts
from tests.support.browser import problems, wait_for
from tests.support.plans import make_plan
from tests.support.serve_process import ServeProcess

MODEL = Path(__file__).resolve().parents[4] / "examples" / "demo-moe"
PROMPT = "The expert who routes every token"


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The server by a plan with copies, and the second one behind it."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers: list[ServeProcess] = []
    try:
        for kind, *settings in (
            ("replicated", "port=0", f"compare_url=http://127.0.0.1:{port}"),
            ("contiguous", f"port={port}"),
        ):
            plan = folder / f"{kind}.json"
            make_plan(str(MODEL), kind, 2).save(plan)
            arguments = ("serve", "--plan", str(plan), "device=cpu", *settings)
            servers.append(ServeProcess(folder / f"{kind}.log", *arguments))
        yield [server.wait_ready() for server in servers]
    finally:
        for server in servers:
            server.kill()


def test_chat_map_and_side_by_side(browser: Chrome, urls: list[str]) -> None:
    problems(browser)
    browser.get(urls[0])
    wait_for(lambda: text(browser, "#model") == "demo-moe")
    assert "8 MoE layers of 16 experts, top-2, on 2 GPUs" in text(browser, "#about")
    assert "strategy replicated" in text(browser, "#about")
    assert len(texts(browser, "#grid .cell")) == 16
    assert text(browser, "#map-says").startswith("No load yet")

    find(browser, "#max-tokens").clear()
    find(browser, "#max-tokens").send_keys("48")
    ask(browser, PROMPT)
    [answer] = answered(browser)
    assert answer
    assert re.match(r"(complete|cut at max tokens) · \d+ tokens? · first after ", text(browser, ".measured"))
    wait_for(lambda: text(browser, "#map-says").startswith(("Balance", "Idle")), "a load")
    assert all(re.fullmatch(r"\d\.\d\d×", cell) for cell in texts(browser, "#grid .cell"))
    shown = {cell.get_attribute("aria-label") for cell in browser.find_elements("css selector", "#grid .cell")}
    assert len(shown) == 16
    assert "ms" in texts(browser, "#figures dd:not(.note)")[0]

    find(browser, "[name=mode][value=compare]").click()
    wait_for(lambda: texts(browser, ".pane h3") == ["This server: replicated", "Second server: contiguous"])
    ask(browser, PROMPT)
    verdict = wait_for(lambda: text(browser, "#verdict"), "both answers", 60)
    assert verdict.startswith("Identical text. Tokens/s: replicated has ")
    ours, theirs = texts(browser, ".pane .text")
    assert ours == theirs
    assert ours
    choose(browser, "#whose", "there")
    wait_for(lambda: "strategy contiguous" in text(browser, "#about"))
    assert problems(browser) == []


def test_stop_frees_the_place_on_both_servers(browser: Chrome, urls: list[str]) -> None:
    browser.get(urls[0])
    wait_for(lambda: text(browser, "#model") == "demo-moe")
    find(browser, "#max-tokens").clear()
    find(browser, "#max-tokens").send_keys("1900")
    find(browser, "[name=mode][value=compare]").click()
    wait_for(lambda: texts(browser, ".pane h3")[1] == "Second server: contiguous")
    ask(browser, PROMPT)
    wait_for(lambda: all(texts(browser, ".pane .text")), "text of both", 60)
    assert [running(url) for url in urls] == [1, 1]
    find(browser, "#stop").click()
    assert wait_for(lambda: text(browser, "#verdict")) == "Stopped."
    for url in urls:
        wait_for(lambda url=url: running(url) == 0, "a free place")
    assert problems(browser) == []


def running(url: str) -> int:
    return int(httpx.get(f"{url}/v1/placement/load").json()["running"])
