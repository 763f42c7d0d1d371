"""Many clients at once, of which many leave: nothing lost, nothing left behind."""

import asyncio
import json
import random
import sys
import threading
import time

import httpx
import pytest
from http_answers import wait_until

from mptbook.bench.measure import process_bytes

CLIENTS = 64
LONGEST = 40


async def visit(client, chance, expected, tally):
    """One stream; some are left in the middle, some before the first event."""
    n = chance.randrange(len(expected))
    prompt, text = expected[n]
    body = {"model": "cat", "prompt": prompt, "max_tokens": LONGEST, "temperature": 0}
    leaves = chance.choice((None, None, 0, 3, 12))
    got, finish, events = "", None, 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if events == leaves:
                tally["left"] += 1
                return
            if line == "data: [DONE]":
                break
            if line:
                events += 1
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                got, finish = got + choice["text"], choice["finish_reason"]
    assert (got, finish) == (text, "length")
    tally["whole"] += 1


async def visits(url, expected, seconds, seed):
    tally = {"left": 0, "whole": 0}
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=0)

    async def one(number):
        chance = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            await visit(client, chance, expected, tally)

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    return tally


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_64_streams_with_disconnects_lose_and_leak_nothing(serving, seconds):
    with serving(n_slots=16) as running:
        engine, state = running.served.engine, running.server.server_state
        prompts = ["the cat", "A dog ate", "the mat — olé", "the cat sat on", "hat"]
        expected = []
        for prompt in prompts:
            found = running.complete(prompt, max_tokens=LONGEST, temperature=0).json()
            expected.append((prompt, found["choices"][0]["text"]))
        running.client.close()
        asyncio.run(visits(running.url, expected, 2, "first"))  # pools and buffers get their size

        def idle():
            return not (engine.running or engine.waiting or state.tasks or state.connections)

        wait_until(idle)
        threads, bytes_ = threading.active_count(), process_bytes("RssAnon")
        ended = sum(engine.counts.finished.values())
        tally = asyncio.run(visits(running.url, expected, seconds, "then"))
        wait_until(idle)
        assert threading.active_count() <= threads
        assert process_bytes("RssAnon") - bytes_ < 16e6
        assert min(tally.values()) > 5
        # Every choice has ended in one way, those of who left included.
        assert sum(engine.counts.finished.values()) - ended == sum(tally.values())
        assert engine.counts.finished.get("error") is None
        assert engine.works
        assert [len(kept) for kept in engine.kept] == engine.slots.lengths
        print(f"{tally} in {seconds} s, {process_bytes('RssAnon') - bytes_:+,} bytes")
