"""Protobuf bytes of messages: whatever a message holds comes back, and what is no message is refused by name."""

import contextlib
import math
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from protocols import codegen
from protocols.descriptors import message_class, pool
from protocols.errors import BadInput
from protocols.losses import GRPOLoss, SFTLoss
from protocols.messages import Prompt, SamplingParams
from protocols.policy import SampleDelta, SampleRequest, ScoreRequest
from protocols.proto_schema import bare, discriminator
from protocols.service import Message
from protocols.tensor import Axes, Tensor
from protocols.training import ForwardBackwardRequest, TermReport, TrainRow
from protocols.wire import from_bytes, to_bytes


def reached(hints: list[Any]) -> Iterator[type[Message]]:
    """All messages that messages hold."""
    seen: set[type[Message]] = set()
    while hints:
        hint = hints.pop()
        if isinstance(hint, type) and issubclass(hint, Message) and hint not in seen:
            seen.add(hint)
            yield hint
            hints += [field.annotation for field in hint.model_fields.values()]
        hints += get_args(hint)


MESSAGES = sorted(
    reached([m for s in codegen.services() for one in s.methods().values() for m in (one.request, one.response)]),
    key=lambda model: model.__name__,
)


def values(hint: Any, notes: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold, within its bounds."""
    if not discriminator(hint):
        notes += getattr(hint, "__metadata__", ())
    plain = bare(hint) if not discriminator(hint) else get_args(hint)[0]
    origin, inner = get_origin(plain), get_args(plain)
    if origin in (Union, UnionType):
        return st.one_of(*(st.none() if one is NoneType else values(one, notes) for one in inner))
    if origin in (list, tuple):
        least = next((note.min_length for note in notes if isinstance(note, annotated_types.MinLen)), 0)
        return st.lists(values(inner[0]), min_size=least, max_size=max(3, least))
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), values(inner[1]), max_size=3)
    if origin is Literal:
        return st.sampled_from(inner)
    if plain is Tensor:
        return tensors(next((note for note in notes if isinstance(note, Axes)), None))
    if issubclass(plain, Message):
        return messages(plain)
    if issubclass(plain, Enum):
        return st.sampled_from(list(plain))
    bounds = {kind: getattr(note, kind) for note in notes for kind in ("ge", "gt", "le", "lt") if hasattr(note, kind)}
    if plain is bool:
        return st.booleans()
    if plain is int:
        low = bounds.get("ge", bounds.get("gt", -(2**63)))
        return st.integers(low, bounds.get("le", 2**63 - 1))
    if plain is float:
        return st.floats(bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt")))
    return st.text(st.characters(codec="utf-8"), max_size=8)


def tensors(axes: Axes | None) -> st.SearchStrategy[Tensor]:
    names = [axes.dtype] if axes else ["bool", "uint8", "int32", "int64", "float16", "float32", "float64", "bfloat16"]
    least = len(axes.axes) if axes else 0
    shapes = arrays.array_shapes(min_dims=least, max_dims=least if axes else 3, min_side=0, max_side=4)

    def of(name: str) -> st.SearchStrategy[Tensor]:
        stored = "float32" if name == "bfloat16" else name
        return arrays.arrays(stored, shapes).map(lambda array: Tensor(array, name))  # type: ignore[arg-type]

    return st.sampled_from(names).flatmap(of)


def messages(model: type[Message]) -> st.SearchStrategy[Any]:
    fields = {}
    for name, info in model.model_fields.items():
        hint: Any = info.annotation
        strategy = (
            st.one_of(*map(messages, get_args(hint))) if info.discriminator else values(hint, tuple(info.metadata))
        )
        fields[name] = strategy

    def valid(given: dict[str, Any]) -> bool:
        try:
            model.model_validate(given)
        except ValidationError:
            return False
        return True

    required = {name: one for name, one in fields.items() if model.model_fields[name].is_required()}
    left = {name: one for name, one in fields.items() if name not in required}
    return st.fixed_dictionaries(required, optional=left).filter(valid).map(model.model_validate)


ANY = {"suppress_health_check": list(HealthCheck), "deadline": None, "max_examples": 30}


def same(one: Any, other: Any) -> bool:
    """Equal, and NaN is NaN."""
    if isinstance(one, Message):
        return type(one) is type(other) and all(
            same(getattr(one, n), getattr(other, n)) for n in type(one).model_fields
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.__name__)
def test_every_message_comes_back(model: type[Message]) -> None:
    @given(messages(model))
    @settings(**ANY)
    def check(message: Message) -> None:
        assert same(from_bytes(model, to_bytes(message)), message)

    check()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """What protoc makes of the checked-in files."""
    out = tmp_path_factory.mktemp("protoc") / "set"
    files = [path.name for path in codegen.FOLDER.glob("*.proto")]
    assert protoc.main(["protoc", f"-I{codegen.FOLDER}", f"--descriptor_set_out={out}", *files]) == 0
    return {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}


def test_the_classes_are_those_of_the_checked_in_files(compiled: dict[str, FileDescriptorProto]) -> None:
    assert compiled
    for name, expected in compiled.items():
        found = FileDescriptorProto()
        pool().FindFileByName(name).CopyToProto(found)
        for one in (found, expected):
            one.dependency.sort()
            for message in one.message_type:
                for field in message.field:
                    field.ClearField("json_name")
                for inner in message.nested_type:
                    for field in inner.field:
                        field.ClearField("json_name")
        assert found == expected


def test_what_is_left_out_has_its_default() -> None:
    proto = message_class("SampleRequest")()
    proto.prompts.add(text="hello")
    request = from_bytes(SampleRequest, proto.SerializeToString())
    assert request == SampleRequest(prompts=[Prompt(text="hello")])
    assert (request.n, request.params.max_tokens) == (1, 256)
    delta = message_class("SampleDelta")(prompt_index=1)
    for name in ("tokens", "logprobs", "versions"):
        getattr(delta, name).dtype = "float32" if name == "logprobs" else "int32"
        getattr(delta, name).shape.append(0)
    assert from_bytes(SampleDelta, delta.SerializeToString()).finish_reason is None


def test_maps_come_in_one_order() -> None:
    names = [f"metric_{i}" for i in range(20)]
    report = TermReport(loss=0.0, count=1.0, metrics=dict.fromkeys(reversed(names), 0.0))
    assert list(from_bytes(TermReport, to_bytes(report)).metrics) == sorted(names)


def test_fields_that_a_newer_client_sends_are_passed_over() -> None:
    unknown = b"\xfa\x3e\x03abc"  # field 999
    assert from_bytes(SamplingParams, to_bytes(SamplingParams()) + unknown) == SamplingParams()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.ClearField("prompts"), r"prompts: got \[\]; list should have at least 1 item"),
        (lambda p: p.prompts.add(), "expected exactly one of messages, text and tokens"),
        (lambda p: setattr(p, "n", 0), "n: got 0; input should be greater than or equal to 1"),
        (lambda p: setattr(p, "n", -5), "n: got -5; input should be greater than or equal to 1"),
        (lambda p: setattr(p.params, "temperature", math.nan), "params.temperature: got nan"),
        (lambda p: p.params.stop.append("x" * 257), r"params.stop: got .*expected texts of 1 to 256 characters"),
        (lambda p: p.params.stop.extend(["x"] * 65), r"params.stop: got .*at most 64 items"),
        (lambda p: setattr(p.params, "temperature", 1e7), "params.temperature: got 10000000.0"),
        (lambda p: p.prompts.add().messages.add(content="x"), r"prompts.1.messages.0.role: required, but missing"),
        (lambda p: setattr(p.prompts.add().messages.add(content="x"), "role", 77), "got 'unknown value 77'"),
        (lambda p: setattr(p.prompts.add().tokens, "dtype", "complex"), "prompts.1.tokens: got .*dtype 'complex'"),
        (lambda p: p.prompts.add().tokens.MergeFrom(an_array("float64", [2], b"\0" * 15)), r"prompts.1.tokens: got"),
        (lambda p: p.prompts.add().tokens.MergeFrom(an_array("int32", [-1], b"")), r"prompts.1.tokens: got"),
    ],
)
def test_what_makes_no_sense_is_named(change: Any, message: str) -> None:
    proto = message_class("SampleRequest")()
    proto.prompts.add(text="hello")
    change(proto)
    with pytest.raises(BadInput, match=message):
        from_bytes(SampleRequest, proto.SerializeToString())


def an_array(dtype: str, shape: list[int], data: bytes) -> Any:
    return message_class("Tensor")(dtype=dtype, shape=shape, data=data)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x04\x12\x02\xff\xfe"])
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(BadInput, match="request: not a SampleRequest in protobuf"):
        from_bytes(SampleRequest, data)


@given(st.binary(max_size=200), st.sampled_from(MESSAGES))
@settings(max_examples=2000, deadline=None)
def test_random_bytes_are_a_message_or_bad_input(data: bytes, model: type[Message]) -> None:
    with contextlib.suppress(BadInput):
        assert isinstance(from_bytes(model, data), model)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_what_protobuf_cannot_hold_is_named(seed: int) -> None:
    with pytest.raises(BadInput, match=r"Prompt\.seed: .*out of range"):
        to_bytes(SampleRequest(prompts=[Prompt(text="x", seed=seed)]))
    with pytest.raises(BadInput, match=r"Prompt\.text"):
        to_bytes(Prompt(text="\ud800"))


def test_arrays_keep_their_bits() -> None:
    row = TrainRow(
        row_id="r",
        tokens=np.arange(3),
        terms={"a": [0.0, 0.1, 1.0], "b": [0.0, 0.0, 1.0]},
        sampled_logprobs=[math.nan, -0.0, -1e-45],
    )
    request = ForwardBackwardRequest(rows=[row], losses={"a": SFTLoss(), "b": GRPOLoss(clip_high=0.28)})
    back = from_bytes(ForwardBackwardRequest, to_bytes(request))
    assert back == request
    assert isinstance(back.losses["b"], GRPOLoss)
    big = ScoreRequest(sequences=[np.arange(100_000, dtype=np.int32)])
    assert len(to_bytes(big)) < 400_100
    assert from_bytes(ScoreRequest, to_bytes(big)) == big
