"""Arrays in messages: one type, numpy in memory, raw little-endian bytes on the wire."""

import base64
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

DType = Literal["bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
DTYPES: tuple[str, ...] = get_args(DType)


class Tensor:
    """An immutable array: `dtype`, `shape` and the values.

    bfloat16 has no numpy type; its bit patterns are held as uint16 and `numpy()` widens them to float32.
    """

    __slots__ = ("array", "dtype")

    def __init__(self, values: Any, dtype: DType | None = None) -> None:
        """Copy nothing if `values` is already an array of `dtype`; otherwise convert it.

        Raises ValueError for an unknown dtype and for values that cannot be converted to it.
        """
        array = np.asarray(values)
        name = dtype or str(array.dtype)
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"expected numbers, got an array of {array.dtype}")
        if name == "bfloat16" and array.dtype != np.uint16:
            array = _to_bfloat16_bits(array)
        elif name != "bfloat16" and str(array.dtype) != name:
            array = array.astype(name)
        # Not ascontiguousarray, which would give a scalar an axis.
        array = np.asarray(array, order="C").view()
        array.flags.writeable = False
        self.array: NDArray[Any] = array
        self.dtype: str = name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __eq__(self, other: object) -> bool:
        """Equal dtype, shape and bytes (so NaN equals NaN)."""
        return (
            isinstance(other, Tensor)
            and self.dtype == other.dtype
            and self.shape == other.shape
            and self.array.tobytes() == other.array.tobytes()
        )

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, self.array.tobytes()))

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}{list(self.shape)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tensor, (self.array, self.dtype))

    def numpy(self) -> NDArray[Any]:
        """The values as a read-only numpy array; bfloat16 is widened to float32 (exact)."""
        if self.dtype != "bfloat16":
            return self.array
        bits = self.array.astype(np.uint32)
        bits <<= 16
        bits.flags.writeable = False
        return bits.view(np.float32)

    def tolist(self) -> list[Any]:
        """The values as nested Python lists."""
        values: list[Any] = self.numpy().tolist()
        return values

    def torch(self, *, copy: bool = True) -> "TorchTensor":
        """The values as a torch tensor, in this dtype, on the CPU. One that is no copy must not be written."""
        import torch

        tensor = torch.from_numpy(self.array.copy() if copy else self.array)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    @classmethod
    def from_torch(cls, tensor: "TorchTensor") -> "Tensor":
        """Bring a torch tensor of one of the supported dtypes to the CPU, without conversion."""
        import torch

        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return cls(tensor.view(torch.uint16).numpy(), "bfloat16")
        return cls(tensor.numpy())

    @classmethod
    def parse(cls, value: Any) -> "Tensor":
        """Accept a Tensor, an array, a (nested) list of numbers, or {dtype, shape, data}.

        `data` is bytes or base64 text. Raises ValueError that says what is wrong.
        """
        if isinstance(value, Tensor):
            return value
        if isinstance(value, dict):
            return cls._from_wire(value)
        if isinstance(value, np.ndarray):
            return cls(value)
        if not isinstance(value, Iterable) or isinstance(value, str | bytes):
            raise ValueError("expected an array, a list of numbers, or {dtype, shape, data}")
        array = np.asarray(value if isinstance(value, list | tuple) else list(value))
        if array.dtype.kind not in "biuf" and array.size:
            raise ValueError("expected numbers")
        return cls(array)

    @classmethod
    def _from_wire(cls, value: dict[str, Any]) -> "Tensor":
        if set(value) != {"dtype", "shape", "data"}:
            raise ValueError(f"expected the keys dtype, shape, data; got {', '.join(map(str, value))}")
        dtype, shape, data = value["dtype"], _sizes(value["shape"]), value["data"]
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(data, str | bytes | bytearray | memoryview):
            raise ValueError(f"data: expected bytes or base64 text, got {type(data).__name__}")
        raw = base64.b64decode(data, validate=True) if isinstance(data, str) else bytes(data)
        storage = np.dtype(np.uint16 if dtype == "bfloat16" else dtype).newbyteorder("<")
        expected = storage.itemsize * math.prod(shape)
        if len(raw) != expected:
            raise ValueError(f"{dtype}{list(shape)} takes {expected} bytes; got {len(raw)}")
        return cls(np.frombuffer(raw, storage).reshape(shape), dtype)

    def wire(self) -> dict[str, Any]:
        """{dtype, shape, data} with the little-endian, row-major bytes of the values."""
        little = self.array.astype(self.array.dtype.newbyteorder("<"), copy=False)
        return {"dtype": self.dtype, "shape": list(self.shape), "data": little.tobytes()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(_to_json, when_used="json"),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "object", "properties": {"dtype": {}, "shape": {}, "data": {}}}


def _sizes(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(f"shape: expected a list of integers, got {shape!r}") from None
    if not all(0 <= size < 2**31 for size in sizes):
        raise ValueError(f"shape: expected sizes from 0 to 2**31 - 1, got {shape!r}")
    return sizes


def _to_json(tensor: Tensor) -> dict[str, Any]:
    wire = tensor.wire()
    return wire | {"data": base64.b64encode(wire["data"]).decode()}


def _to_bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round float values to bfloat16 (nearest, ties to even) and return the bit patterns."""
    wide = np.asarray(values, dtype=np.float32, order="C")
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded).astype(np.uint16)


@dataclass(frozen=True)
class Axes:
    """Field annotation: the dtype that values are brought to, and the names of the axes."""

    dtype: DType
    axes: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, tensor: Tensor) -> Tensor:
        expected = f"{self.dtype}[{', '.join(self.axes)}]"
        if len(tensor.shape) != len(self.axes):
            raise ValueError(f"expected {expected}, got {tensor!r}")
        if tensor.dtype == self.dtype:
            return tensor
        converted = Tensor(tensor.numpy(), self.dtype)
        if "float" not in self.dtype and not np.array_equal(converted.array, tensor.numpy()):
            raise ValueError(f"expected {expected}; {tensor!r} does not fit without loss")
        return converted


TokenIds = Annotated[Tensor, Axes("int32", "T")]
"""Token ids of one sequence, int32[T]."""
PerToken = Annotated[Tensor, Axes("float32", "T")]
"""One float per token, float32[T]."""
Vectors = Annotated[Tensor, Axes("float32", "BD")]
"""One vector per row, float32[B, D]."""
Versions = Annotated[Tensor, Axes("int32", "T")]
"""The weight version that produced each token, int32[T]."""
Ends = Annotated[Tensor, Axes("int32", "T")]
"""Where each token ends in the text that they make up, in characters, int32[T]."""
