"""Clients that ask one thing after another, all at once, and what each of them sees."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from speed.servers import Server


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one answer, in seconds.

    Attributes:
        first: from the request to the first text.
        between: from one token to the next, on average.
    """

    first: float
    between: float


@dataclass(frozen=True, slots=True)
class Load:
    """So many clients, and what they ask.

    Attributes:
        clients: that ask at once.
        requests: of all of them.
        tokens: of each answer.
        prompts: texts, taken in turn.
    """

    clients: int
    requests: int
    tokens: int
    prompts: Sequence[str]


def measure(server: Server, load: Load) -> dict[str, float | None]:
    """Put a load on a server; returns its throughput and the median client's waits."""
    with server.awake():
        before = server.cpu_seconds()
        begun = time.perf_counter()
        seen = asyncio.run(_all(server, load))
        took = time.perf_counter() - begun
        after = server.cpu_seconds()
    tokens = load.requests * load.tokens
    return {
        "tokens_per_second": tokens / took,
        "first_token_seconds": statistics.median(s.first for s in seen),
        "between_tokens_seconds": statistics.median(s.between for s in seen),
        "tokens_per_cpu_second": (
            tokens / max(after - before, 1e-9) if before is not None and after is not None else None
        ),
    }


async def _all(server: Server, load: Load) -> list[Seen]:
    waiting = iter(range(load.requests))
    seen: list[Seen] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for number in waiting:
            prompt = load.prompts[number % len(load.prompts)]
            seen.append(await _one(session, server, prompt, load.tokens))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(load.clients)))
    return seen


async def _one(session: aiohttp.ClientSession, server: Server, prompt: str, tokens: int) -> Seen:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = time.perf_counter()
    first = last = 0.0
    counted = None
    headers = {"authorization": f"Bearer {server.key}"} if server.key else {}
    async with session.post(f"{server.url}/completions", json=body, headers=headers) as response:
        if response.status != 200:
            raise SystemExit(f"{server.name} refuses: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "choices" not in chunk:
                raise SystemExit(f"{server.name} fails: {line.decode()}")
            if any(choice.get("text") for choice in chunk["choices"]):
                last = time.perf_counter()
                first = first or last
            counted = chunk.get("usage") or counted
    if counted is None or counted["completion_tokens"] != tokens or not first:
        raise SystemExit(f"{server.name} gave {counted}, not {tokens} tokens")
    return Seen(first - begun, (last - first) / max(tokens - 1, 1))
