"""Hostile callers of the HTTP door: every answer is a documented status, and the door goes on.

REPERTORY_FUZZ is the number of requests of test_fuzz.py; here they are a fifth.
"""

import asyncio
import collections
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from cluster.gateway.auth import hash_of
from methods.worlds.ledger import write_skeleton
from tests.cluster.gateway.test_conformance import WORDS, a_company
from tests.cluster.gateway.test_fuzz import FLOATS, NUMBERS, REQUESTS, TEXTS

COUNT, AT_ONCE = REQUESTS // 5, 12
DOCUMENTED = {200, 400, 401, 403, 404, 409, 429}
CHAT = {
    **{"model": "policy", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 4, "n": 1, "seed": 1},
    **{"temperature": 1.0, "top_p": 1.0, "stop": ["x"], "stream": False, "logprobs": True, "top_logprobs": 0},
    **{"stream_options": {"include_usage": True}, "response_format": {"type": "text"}, "logit_bias": {}},
}
TEXT = {"model": "policy", "prompt": [WORDS], "max_tokens": 4, "n": 2, "logprobs": 1, "stream": True, "top_k": 3}
EMBED = {"model": "policy", "input": [WORDS, WORDS], "encoding_format": "base64"}
PATHS: dict[str, Any] = {"chat/completions": CHAT, "completions": TEXT, "embeddings": EMBED}


def a_value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON can hold; Python's writer also lets through what JSON has not."""
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [a_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 3, 200]))]
    if kind == 5:
        return {rng.choice(["type", "role", "content", "x", ""]): a_value(rng, depth + 1)}
    return rng.choice([NUMBERS, FLOATS, [*TEXTS, "\ud800", "policy", "user"], [None, True, False]][kind])


def hostile(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of one request."""
    path = rng.choice(sorted(PATHS))
    body = json.loads(json.dumps(PATHS[path]))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        place: Any = body
        while isinstance(place, dict | list) and place:
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
            inner = place[key]
            if not isinstance(inner, dict | list) or rng.random() < 0.5:
                place[key] = a_value(rng)
                break
            place = inner
    data = json.dumps(body).encode()
    if rng.random() < 0.2:
        cut = rng.randrange(len(data) + 1)
        data = rng.choice([data[:cut], data[:cut] + rng.randbytes(5), b"[" * 50_000, b"\xff\xfe", data * 2])
    token = "trainer-token" if rng.random() < 0.95 else rng.choice(["", "forged", "boss-token", "ü"])
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    if rng.random() < 0.03:
        headers["Content-Type"] = rng.choice(["text/plain", "x", "application/json; charset=utf-16"])
    return path, data, headers


@pytest.mark.slow
async def test_hostile_requests(tmp_path: Path) -> None:
    write_skeleton(tmp_path / "model")
    tokens = tmp_path / "tokens.yaml"
    roles = {"trainer": ["infer", "train"], "boss": ["admin"]}
    known = [{"name": name, "sha256": hash_of(f"{name}-token"), "roles": role} for name, role in roles.items()]
    tokens.write_text(yaml.safe_dump(known))
    given = {"address": "127.0.0.1:0", "http": "127.0.0.1:0", "tokens": str(tokens), "max_message_mb": 1}
    cluster, _ = await a_company(tmp_path, tmp_path / "model", given | {"tokens_at_once": 800, "queue": 8})
    gateway = cluster._gateway
    assert gateway is not None
    statuses: collections.Counter[int] = collections.Counter()
    numbers = iter(range(COUNT))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:

        async def attack() -> None:
            for i in numbers:
                path, data, headers = hostile(random.Random(i))
                async with session.post(f"{gateway.base_url}/{path}", data=data, headers=headers) as response:
                    text = await response.text(errors="strict")
                statuses[response.status] += 1
                assert response.status in DOCUMENTED, (i, response.status, text)
                assert "internal" not in text, (i, text)

        await asyncio.gather(*(attack() for _ in range(AT_ONCE)))
        print(dict(statuses))
        assert {200, 400, 401, 403, 404, 429} <= statuses.keys()
        assert all(lane.used == 0 and lane.waiting == 0 for lane in gateway.admission.lanes.values())
        headers = {"Authorization": "Bearer trainer-token"}
        for path, body in PATHS.items():
            async with session.post(f"{gateway.base_url}/{path}", json=body, headers=headers) as response:
                assert response.status == 200
    await cluster.__aexit__()
