"""Hostile callers: whatever comes in, the answer is a documented code, and the gateway goes on.

REPERTORY_FUZZ is the number of requests.
"""

import asyncio
import collections
import ctypes
import gc
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cluster.gateway.auth import hash_of
from methods.worlds.ledger import write_skeleton
from protocols import codegen
from protocols.client import Credentials, connect
from protocols.descriptors import message_class
from protocols.policy import PolicyService
from protocols.proto_schema import camel
from protocols.service import Empty
from protocols.wire import to_bytes
from tests.cluster.gateway.scripted import raw
from tests.cluster.gateway.test_conformance import CALLS, a_company

REQUESTS, AT_ONCE, PARTS = int(os.environ.get("REPERTORY_FUZZ", "10000")), 32, 5
DOCUMENTED = {
    "OK", "INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "DATA_LOSS", "UNIMPLEMENTED",
}  # fmt: skip
CHANGING = ("drain", "save", "optim_step")
"""Calls that a caller with the right to make them may end the actors with, fill a disk, or spoil all weights."""
GROWTH_MB = 64
"""What the process may grow by between the first fifth of the requests and the last."""
NUMBERS = [0, -1, 1, 7, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-300, 1e300]
TEXTS = [
    "",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    "%n%s",
    "ü" * 100,
    "a" * 10_000,
    "int32",
    "complex64",
    "bfloat16",
]
TOKENS = ["", "x", "asker-token", "trainer-token", "boss-token", "asker-token ", hash_of("asker-token")]


def spoil(rng: random.Random, proto: Any, depth: int = 0) -> None:
    """Give one field, however deep, a value that a caller should not give."""
    fields = list(proto.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    if field.message_type and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        if value.message_type and depth < 5:
            spoil(rng, getattr(proto, field.name)[rng.choice(TEXTS)], depth + 1)
    elif field.message_type:
        inner = getattr(proto, field.name)
        if field.is_repeated:
            many = rng.random() < 0.05
            inner = inner.add() if many or not len(inner) else rng.choice(inner)
        if depth < 8:
            spoil(rng, inner, depth + 1)
    else:
        value = a_value(rng, field)
        if field.is_repeated:
            getattr(proto, field.name).extend([value] * rng.choice([1, 3, 1000]))
        else:
            setattr(proto, field.name, value)


def a_value(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_INT64, field.CPPTYPE_INT32):
        return rng.choice(NUMBERS)
    if kind == field.CPPTYPE_ENUM:
        return rng.choice([0, 1, 77, -1])
    if kind == field.CPPTYPE_DOUBLE:
        return rng.choice(FLOATS)
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == field.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 7, 4096]))
    return rng.choice(TEXTS)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or nest bytes."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.choice([1, 10, 1000]))
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        return data * rng.choice([2, 50])
    if kind == 3:
        for _ in range(rng.choice([10, 200])):
            data = b"\x0a" + varint(len(data)) + data
        return data[: 1 << 16]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 5]) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def hostile(rng: random.Random) -> tuple[str, bytes, list[tuple[str, str]]]:
    """Path, bytes and metadata of one request."""
    service, method, message = rng.choice([call for call in CALLS if call[1] not in CHANGING])
    if rng.random() < 0.02:
        service = rng.choice(codegen.services())
    proto = message_class(type(message).__name__).FromString(to_bytes(message))
    if rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 1, 3])):
            spoil(rng, proto)
    data = proto.SerializeToString()
    if rng.random() < 0.5:
        data = damage(rng, data)
    if rng.random() < 0.002:
        data = b"\x0a" * (5 << 20)
    path = f"{service.__name__}/{camel(method)}"
    if rng.random() < 0.05:
        path, data = (
            "PolicyService/Save",
            message_class("CheckpointRequest")(path=rng.choice(TEXTS)).SerializeToString(),
        )
    token = rng.choice(TOKENS) if rng.random() < 0.1 else "trainer-token"
    metadata = [("authorization", f"Bearer {token}".strip())] if rng.random() < 0.98 else []
    if rng.random() < 0.02:
        metadata.append(("repertory-actor", rng.choice(["policy", "", "verifier", "../x"])))
    return path, data, metadata


def resident_mb() -> float:
    """What is in use: memory that was freed and not yet given back is no leak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory as Linux has it")
async def test_hostile_requests(tmp_path: Path) -> None:
    write_skeleton(tmp_path / "model")
    tokens = tmp_path / "tokens.yaml"
    roles = {"asker": ["infer"], "trainer": ["infer", "train"], "boss": ["admin"]}
    known = [{"name": name, "sha256": hash_of(f"{name}-token"), "roles": role} for name, role in roles.items()]
    tokens.write_text(yaml.safe_dump(known))
    given = {"address": "127.0.0.1:0", "tokens": str(tokens), "max_message_mb": 4, "tokens_at_once": 2000}
    cluster, _ = await a_company(tmp_path, tmp_path / "model", given)
    gateway = cluster._gateway
    assert gateway is not None
    codes: collections.Counter[str] = collections.Counter()
    memory: list[float] = []

    async with raw(gateway) as send:

        async def attack(numbers: Iterator[int]) -> None:
            for i in numbers:
                path, data, metadata = hostile(random.Random(i))
                try:
                    await send(path, data, metadata)
                    code = "OK"
                except grpc.aio.AioRpcError as error:
                    code = error.code().name
                codes[code] += 1
                assert code in DOCUMENTED, (i, code)

        for part in range(PARTS):
            numbers = iter(range(part * REQUESTS // PARTS, (part + 1) * REQUESTS // PARTS))
            await asyncio.gather(*(attack(numbers) for _ in range(AT_ONCE)))
            memory.append(resident_mb())
    assert sum(codes.values()) == REQUESTS
    assert {"OK", "INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"} <= codes.keys()
    print(dict(codes), [round(one) for one in memory])
    assert memory[-1] - memory[0] < GROWTH_MB
    assert all(lane.used == 0 and lane.waiting == 0 for lane in gateway.admission.lanes.values())
    policy = connect(gateway.address, PolicyService, credentials=Credentials(token="asker-token"))
    assert (await policy.info(Empty())).vocab_size > 0
    await cluster.__aexit__()
