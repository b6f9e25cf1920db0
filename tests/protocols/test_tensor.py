import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from protocols.errors import describe_validation_error
from protocols.service import Message
from protocols.tensor import DTYPES, PerToken, Tensor, TokenIds

ANY = TypeAdapter(Tensor)


class Row(Message):
    tokens: TokenIds
    weights: PerToken | None = None
    anything: Tensor | None = None


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every dtype with any bit pattern: NaN with payloads, infinities, subnormals, no elements."""
    dtype: Any = draw(st.sampled_from(DTYPES))
    storage = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    shape = draw(SHAPES)
    size = int(np.prod(shape)) * storage.itemsize
    raw = bytes(draw(st.integers(0, 1)) for _ in range(size)) if dtype == "bool" else draw(st.binary(min_size=size))
    return Tensor(np.frombuffer(raw[:size], storage).reshape(shape), dtype)


# --- exact values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values", "data"),
    [
        ("bool", [True, False], "0100"),
        ("uint8", [1, 255], "01ff"),
        ("int32", [1, -2], "01000000feffffff"),
        ("int64", [1, -2], "0100000000000000feffffffffffffff"),
        ("float16", [1.0, -2.0], "003c00c0"),
        ("bfloat16", [1.0, -2.0], "803f00c0"),
        ("float32", [1.0, -2.0], "0000803f000000c0"),
        ("float64", [1.0, -2.0], "000000000000f03f00000000000000c0"),
    ],
)
def test_wire_bytes(dtype: Any, values: list[float], data: str) -> None:
    tensor = Tensor(values, dtype)
    assert tensor.wire() == {"dtype": dtype, "shape": [2], "data": bytes.fromhex(data)}
    assert tensor.tolist() == values
    assert Tensor.parse(tensor.wire()) == tensor


def test_the_wire_is_row_major() -> None:
    columns = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    assert Tensor(columns).wire() == {"dtype": "uint8", "shape": [3, 2], "data": bytes([0, 3, 1, 4, 2, 5])}


def test_the_wire_is_little_endian() -> None:
    assert Tensor(np.array([1], dtype=">i4"), "int32").wire()["data"] == b"\x01\x00\x00\x00"


def test_a_scalar_has_no_axes() -> None:
    for dtype in DTYPES:
        tensor = Tensor(1, dtype)  # type: ignore[arg-type]
        assert tensor.shape == ()
        assert tensor.wire()["shape"] == []
        assert tensor.tolist() == 1
        assert Tensor.parse(tensor.wire()) == tensor


def test_nothing_is_copied_and_nothing_can_be_written() -> None:
    array = np.array([1.0, 2.0], dtype=np.float32)
    tensor = Tensor(array)
    assert np.shares_memory(tensor.array, array)
    assert array.flags.writeable
    for values in (tensor.array, tensor.numpy(), Tensor(array, "bfloat16").numpy()):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 5.0


def test_equality_is_of_dtype_shape_and_bytes() -> None:
    tensor = Tensor([1.0, np.nan], "float32")
    assert tensor == Tensor([1.0, np.nan], "float32")
    assert hash(tensor) == hash(Tensor([1.0, np.nan], "float32"))
    assert tensor != Tensor([1.0, np.nan], "float64")
    assert tensor != Tensor([[1.0, np.nan]], "float32")
    assert Tensor([0.0]) != Tensor([-0.0])
    assert Tensor([0.0]) != [0.0]


def test_length_and_repr() -> None:
    assert len(Tensor(np.zeros((3, 2), np.int32))) == 3
    assert repr(Tensor(np.zeros((3, 2), np.int32))) == "Tensor(int32[3, 2])"


# --- round trips -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(tensors())
def test_round_trip_through_the_wire(tensor: Tensor) -> None:
    assert Tensor.parse(tensor.wire()) == tensor


@settings(deadline=None)
@given(tensors())
def test_round_trip_through_json(tensor: Tensor) -> None:
    assert ANY.validate_json(ANY.dump_json(tensor)) == tensor
    row = Row(tokens=[1], anything=tensor)
    assert Row.model_validate_json(row.model_dump_json()) == row
    assert Row.model_validate(row.model_dump()) == row


@settings(deadline=None)
@given(tensors(), st.booleans())
def test_round_trip_through_pickle(tensor: Tensor, out_of_band: bool) -> None:
    buffers: list[pickle.PickleBuffer] = []
    raw = pickle.dumps(tensor, protocol=5, buffer_callback=buffers.append if out_of_band else None)
    again = pickle.loads(raw, buffers=buffers)
    assert again == tensor
    assert not again.array.flags.writeable


def test_pickle_copies_nothing_out_of_band() -> None:
    buffers: list[pickle.PickleBuffer] = []
    tensor = Tensor(np.arange(1000))
    raw = pickle.dumps(tensor, protocol=5, buffer_callback=buffers.append)
    assert len(raw) < 500
    assert np.shares_memory(pickle.loads(raw, buffers=buffers).array, tensor.array)


@settings(deadline=None)
@given(tensors())
def test_round_trip_through_torch(tensor: Tensor) -> None:
    copy = tensor.torch()
    assert copy.dtype is getattr(torch, tensor.dtype)
    assert tuple(copy.shape) == tensor.shape
    assert Tensor.from_torch(copy) == tensor


def test_torch_gets_a_copy_that_it_may_change() -> None:
    tensor = Tensor([1.0, 2.0], "float32")
    tensor.torch()[0] = 5.0
    assert tensor.tolist() == [1.0, 2.0]


def test_from_torch_takes_views_with_gradients() -> None:
    weights = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert Tensor.from_torch(weights.T) == Tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], "float32")
    assert Tensor.from_torch(weights[:, 1].bfloat16()) == Tensor([1.0, 4.0], "bfloat16")
    with pytest.raises(ValueError, match="dtype 'complex64' is not one of bool, uint8"):
        Tensor.from_torch(torch.zeros(1, dtype=torch.complex64))


# --- bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1.00390625, 0x3F80),  # half way: down to even
        (1.01171875, 0x3F82),  # half way: up to even
        (1.00390637, 0x3F81),  # just above half way
        (-1.01171875, 0xBF82),
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (3.3895314e38, 0x7F7F),  # the largest
        (3.4e38, 0x7F80),  # rounds to infinity
        (float("-inf"), 0xFF80),
        (9.2e-41, 0x0001),  # the smallest
        (float("nan"), 0x7FC0),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert Tensor([value], "bfloat16").array.tolist() == [bits]


@settings(deadline=None)
@given(hnp.arrays(np.uint32, hnp.array_shapes(max_side=20), elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_rounds_as_torch_does(bits: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
    values = bits.view(np.float32)
    ours = Tensor(values, "bfloat16")
    theirs = Tensor.from_torch(torch.from_numpy(values.copy()).bfloat16())
    nan = np.isnan(values)
    # The bits of a NaN depend on torch's code path.
    assert np.array_equal(ours.array[~nan], theirs.array[~nan])
    assert np.isnan(ours.numpy()[nan]).all()
    assert np.array_equal(ours.numpy(), ours.torch().float().numpy(), equal_nan=True)


@settings(deadline=None)
@given(hnp.arrays(np.uint16, SHAPES, elements=st.integers(0, 2**16 - 1)))
def test_bfloat16_widens_exactly(bits: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
    tensor = Tensor(bits, "bfloat16")
    nan = np.isnan(tensor.numpy())
    assert np.array_equal(Tensor(tensor.numpy(), "bfloat16").array[~nan], bits[~nan])


# --- what is accepted, and what is said of the rest ------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        (1, 2),
        range(1, 3),
        iter([1, 2]),
        np.array([1, 2]),
        np.array([1.0, 2.0], dtype=np.float16),
        Tensor([1, 2], "uint8"),
        {"dtype": "int32", "shape": [2], "data": b"\x01\0\0\0\x02\0\0\0"},
        {"dtype": "int32", "shape": (2,), "data": bytearray(b"\x01\0\0\0\x02\0\0\0")},
        {"dtype": "int32", "shape": [2], "data": "AQAAAAIAAAA="},
        {"dtype": "bfloat16", "shape": [2], "data": bytes.fromhex("803f0040")},
    ],
)
def test_what_becomes_token_ids(value: Any) -> None:
    assert Row(tokens=value).tokens == Tensor([1, 2], "int32")


def test_no_tokens_at_all() -> None:
    row = Row(tokens=[], weights=())
    assert (row.tokens.dtype, row.tokens.shape) == ("int32", (0,))
    assert row.weights == Tensor([], "float32")


def test_floats_are_rounded_to_the_dtype_of_the_field() -> None:
    assert Row(tokens=[], weights=[0.1]).weights == Tensor(np.array([0.1], np.float32))


WIRE = {"dtype": "int32", "shape": [1], "data": b"\0\0\0\0"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", "expected an array, a list of numbers, or {dtype, shape, data}"),
        (5, "expected an array, a list of numbers, or {dtype, shape, data}"),
        (None, "expected an array"),
        (["1"], "expected numbers"),
        ([None], "expected numbers"),
        ([1j], "expected numbers"),
        (np.array(["1"]), "dtype '<U1' is not one of bool, uint8, int32"),
        (np.array([1], np.int16), "dtype 'int16' is not one of"),
        (np.array(5), "expected int32[T], got Tensor(int64[])"),
        ([[1]], "expected int32[T], got Tensor(int64[1, 1])"),
        ([[1], [1, 2]], "inhomogeneous shape"),
        ([1.5], "expected int32[T]; Tensor(float64[1]) does not fit without loss"),
        ([2**31], "expected int32[T]; Tensor(int64[1]) does not fit without loss"),
        ({"dtype": "int32"}, "expected the keys dtype, shape, data; got dtype"),
        (WIRE | {"extra": 1}, "expected the keys dtype, shape, data; got dtype, shape, data, extra"),
        (WIRE | {"dtype": "int33"}, "dtype 'int33' is not one of"),
        (WIRE | {"dtype": None}, "dtype None is not one of"),
        (WIRE | {"shape": [2]}, "int32[2] takes 8 bytes; got 4"),
        (WIRE | {"shape": 1}, "shape: expected a list of integers, got 1"),
        (WIRE | {"shape": None}, "shape: expected a list of integers, got None"),
        (WIRE | {"shape": [1.0]}, "shape: expected a list of integers, got [1.0]"),
        (WIRE | {"shape": ["1"]}, "shape: expected a list of integers, got ['1']"),
        (WIRE | {"shape": [-1]}, "shape: expected sizes from 0 to 2**31 - 1, got [-1]"),
        (WIRE | {"shape": [0, -1], "data": b""}, "shape: expected sizes from 0"),
        (WIRE | {"shape": [2**64]}, "shape: expected sizes from 0"),
        (WIRE | {"data": 4}, "data: expected bytes or base64 text, got int"),
        (WIRE | {"data": [0, 0, 0, 0]}, "data: expected bytes or base64 text, got list"),
        (WIRE | {"data": None}, "data: expected bytes or base64 text, got NoneType"),
        (WIRE | {"data": "!!!!"}, "only base64 data is allowed"),
        (WIRE | {"data": "AAAA"}, "int32[1] takes 4 bytes; got 3"),
    ],
)
def test_errors_name_the_field_and_what_was_expected(value: Any, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Row(tokens=value)
    text = describe_validation_error(error.value)
    assert text.startswith("tokens: got ")
    assert message in text


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_is_no_token() -> None:
    with pytest.raises(ValidationError, match="does not fit without loss"):
        Row(tokens=[np.nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_are_a_value_error(dtype: Any) -> None:
    for values in ([None], ["x"], {}, [1j]):
        with pytest.raises(ValueError, match="expected numbers, got an array of"):
            Tensor(values, dtype)


def test_an_unknown_dtype_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is not one of bool, uint8, int32, int64, float16, bfloat16"):
        Tensor([1], "int8")  # type: ignore[arg-type]
