"""The page's routes: headers, files, and what the second server gets and gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from fastapi.testclient import TestClient

from profiler.errors import InputError
from runtime.server import create_app
from runtime.server_settings import ServerSettings
from tests.runtime.server.page.scripted_site import ScriptedSite
from tests.runtime.server.scripted_engine import ScriptedEngine, byte_level_tokenizer


@pytest.fixture(scope="module")
def second() -> Iterator[ScriptedSite]:
    site = ScriptedSite(strategy="contiguous")
    yield site
    site.stop()


@pytest.fixture(scope="module")
def site(second: ScriptedSite) -> Iterator[ScriptedSite]:
    site = ScriptedSite(second.url)
    yield site
    site.stop()


@pytest.fixture(autouse=True)
def fresh(site: ScriptedSite, second: ScriptedSite) -> None:
    site.reset()
    second.reset()


def test_page_and_all_files_it_names_are_served_under_a_strict_policy(site: ScriptedSite) -> None:
    page = httpx.get(site.url)
    assert page.headers["content-type"].startswith("text/html")
    names = {"page/style.css", "page/page.js"}
    assert all(f'"{name}"' in page.text for name in names)
    seen: set[str] = set()
    while names:
        name = names.pop()
        seen.add(name)
        answer = httpx.get(f"{site.url}/{name}")
        assert answer.status_code == 200, name
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        imports = [line.split('"')[1] for line in answer.text.splitlines() if line.startswith("import ")]
        names |= {f"page/{path.removeprefix('./')}" for path in imports} - seen
    assert len(seen) > 8


@pytest.mark.parametrize("name", ["no.js", "..%2f__init__.py", "../__init__.py", "%2e%2e/app.py", "page.pyc"])
def test_other_files_are_not_served(site: ScriptedSite, name: str) -> None:
    assert httpx.get(f"{site.url}/page/{name}").status_code == 404


def test_second_server_gets_the_request_and_its_answer_comes_back(site: ScriptedSite, second: ScriptedSite) -> None:
    second.key = "secret"
    body = {"model": "team/demo", "prompt": "Who?", "stream": True}
    refused = httpx.post(f"{site.url}/compare/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    headers = {"Authorization": "Bearer secret", "Cookie": "private=1"}
    answer = httpx.post(f"{site.url}/compare/v1/completions", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert second.seen == [("/v1/completions", body)]
    assert second.headers["authorization"] == "Bearer secret"
    assert "cookie" not in second.headers
    assert site.seen == []
    second.full = True
    full = httpx.post(f"{site.url}/compare/v1/completions", json=body, headers=headers)
    assert (full.status_code, full.headers["retry-after"]) == (429, "7")
    placement = httpx.get(f"{site.url}/compare/v1/placement", headers=headers).json()
    assert placement["strategy"] == "contiguous"


@pytest.mark.parametrize("name", ["Accept", "Content-Type"])
def test_header_beyond_ascii_reaches_the_second_server(site: ScriptedSite, name: str) -> None:
    answer = httpx.get(f"{site.url}/compare/v1/models", headers={name: "text/é".encode("latin-1")})
    assert answer.status_code == 200


def test_api_key_guards_the_second_server_and_not_the_page(second: ScriptedSite) -> None:
    app = create_app(ScriptedEngine(), byte_level_tokenizer(), "demo", 0, api_key="secret", compare_url=second.url)
    client = TestClient(app)
    for path in ("/", "/page/page.js", "/page/settings"):
        assert client.get(path).status_code == 200
    assert client.get("/compare/v1/models").status_code == 401
    known = client.get("/compare/v1/models", headers={"Authorization": "Bearer secret"})
    assert known.json()["data"][0]["id"] == "team/demo"
    assert not any(path.startswith(("/page", "/compare")) for path in app.openapi()["paths"])


def test_only_the_second_server_and_its_known_routes_are_reached(site: ScriptedSite) -> None:
    for path in ("compare/", "compare/metrics", "compare/v1/../metrics", "compare/http://127.0.0.1:1/", "compare/v1/x"):
        assert httpx.get(f"{site.url}/{path}").status_code == 404
    assert httpx.post(f"{site.url}/compare/v1/models", json={}).status_code == 405
    assert httpx.get(f"{site.url}/page/settings").json() == {"compare": True}


def test_stream_arrives_piece_by_piece_and_a_client_that_leaves_ends_it(
    site: ScriptedSite, second: ScriptedSite
) -> None:
    gate = threading.Event()
    second.pieces = ["first", gate, "second"]
    body = {"model": "team/demo", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{site.url}/compare/v1/completions", json=body, timeout=10) as answer:
        lines = answer.iter_lines()  # held: the stream is closed with it
        assert "first" in next(lines)
        assert not second.left.is_set()
    assert second.left.wait(5)


def test_stream_ends_with_an_error_where_this_server_stops_or_the_second_one_dies(
    site: ScriptedSite, second: ScriptedSite
) -> None:
    body = {"model": "team/demo", "prompt": "x", "stream": True}
    for end, code in ((stop_forwarding, "server_stopping"), (restart_second, "second_server_down")):
        second.reset()
        second.pieces = ["first", threading.Event()]
        with httpx.stream("POST", f"{site.url}/compare/v1/completions", json=body, timeout=10) as answer:
            lines = answer.iter_lines()
            assert "first" in next(lines)
            end(site, second)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
        assert second.left.wait(5)


def stop_forwarding(site: ScriptedSite, second: ScriptedSite) -> None:
    site.on_loop(lambda: site.forwarded[-1].abort("the server is stopping"))


def restart_second(site: ScriptedSite, second: ScriptedSite) -> None:
    second.stop()
    second.restart()


def test_second_server_that_is_missing_or_down_is_told() -> None:
    alone = ScriptedSite()
    try:
        answer = httpx.get(f"{alone.url}/compare/v1/models")
        assert answer.status_code == 404
        assert "compare_url" in answer.json()["error"]["message"]
        assert httpx.get(f"{alone.url}/page/settings").json() == {"compare": False}
    finally:
        alone.stop()
    widow = ScriptedSite(alone.url)
    try:
        answer = httpx.get(f"{widow.url}/compare/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "second_server_down")
        assert alone.url not in answer.text
    finally:
        widow.stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8001", "https://host.example", "http://[::1]:8001"])
def test_compare_url(url: str) -> None:
    assert ServerSettings(compare_url=url).compare_url == url


NO_SERVERS = (
    *("", 8001, True, "127.0.0.1:8001", "ftp://a", "file:///etc/passwd", "http://", "http://a:b", "http://a b"),
    *("http://ä", "http://a/", "http://a/v1", "http://a?x", "http://a#", "http://u:p@a", "http://a\n"),
)


@pytest.mark.parametrize("url", NO_SERVERS)
def test_compare_url_that_is_none(url: object) -> None:
    with pytest.raises(InputError, match="compare_url=") as caught:
        ServerSettings(compare_url=url)  # type: ignore[arg-type]
    assert "expected http://HOST:PORT" in str(caught.value)
