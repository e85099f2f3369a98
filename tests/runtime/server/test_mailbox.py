"""Items reach their queues in order, whichever threads they come from, and the loop is not woken for each."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest import mock

from runtime.server.mailbox import Mailbox

ITEMS = 2000


def test_items_of_several_threads_arrive_in_the_order_of_each() -> None:
    async def receive() -> list[list[int]]:
        loop, queues = asyncio.get_running_loop(), [asyncio.Queue[int]() for _ in range(3)]
        mailbox = Mailbox.of(loop)
        assert Mailbox.of(loop) is mailbox

        def send(queue: asyncio.Queue[int]) -> None:
            for number in range(ITEMS):
                mailbox.put(loop, queue, number)

        threads = [threading.Thread(target=send, args=(queue,)) for queue in queues]
        for thread in threads:
            thread.start()
        return [[await asyncio.wait_for(queue.get(), 30) for _ in range(ITEMS)] for queue in queues]

    assert asyncio.run(receive()) == [list(range(ITEMS))] * 3


def test_the_loop_is_woken_once_for_what_comes_together() -> None:
    async def receive() -> tuple[int, list[int]]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()
        with mock.patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as wake:
            for number in range(64):
                Mailbox.of(loop).put(loop, queue, number)
            return wake.call_count, [await asyncio.wait_for(queue.get(), 30) for _ in range(64)]

    assert asyncio.run(receive()) == (1, list(range(64)))


def test_a_closed_loop_gets_nothing() -> None:
    async def leave() -> tuple[asyncio.AbstractEventLoop, Mailbox, asyncio.Queue[Any]]:
        loop = asyncio.get_running_loop()
        return loop, Mailbox.of(loop), asyncio.Queue()

    loop, mailbox, queue = asyncio.run(leave())
    mailbox.put(loop, queue, 1)
    assert queue.empty()
