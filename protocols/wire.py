"""Messages as protobuf bytes and back, by the rules that `proto_schema` states."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from protocols.descriptors import PACKAGE, message_class, pool
from protocols.errors import BadInput, classify
from protocols.proto_schema import bare, camel, discriminator, enum_value
from protocols.service import Message
from protocols.tensor import Tensor

M = TypeVar("M", bound=Message)
MOST_ENTRIES = 65536
"""Of one list or map: bytes that are cheap to send must not cost minutes to check."""
ABSENT: Any = object()
"""Left out of what pydantic is given, so that a default applies, or that a field is missing."""


def to_bytes(message: Message) -> bytes:
    """Encode. Raises BadInput for a value that protobuf cannot hold, such as an integer beyond 64 bits."""
    proto = message_class(type(message).__name__)()
    _encode(message, proto)
    return bytes(proto.SerializeToString())


def from_bytes(model: type[M], data: bytes) -> M:
    """Decode and validate. Raises BadInput that names the wrong fields, or says that these are no such bytes."""
    proto = message_class(model.__name__)()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise BadInput(f"request: not a {model.__name__} in protobuf: {error}") from error
    try:
        return model.model_validate(_decode(model, proto))
    except ValidationError as error:
        raise classify(error) from error


def _encode(message: Message, proto: Any) -> None:
    for name, field in _fields(type(message)).items():
        value = getattr(message, name)
        if value is not None:
            try:
                field.write(proto, name, value)
            except (ValueError, TypeError, OverflowError, UnicodeError) as error:
                raise BadInput(f"{type(message).__name__}.{name}: {error}") from error


def _decode(model: type[Message], proto: Any) -> dict[str, Any]:
    found = {name: field.read(proto, name) for name, field in _fields(model).items()}
    return {name: value for name, value in found.items() if value is not ABSENT}


@dataclass(frozen=True)
class Kind:
    """One type: a scalar is brought to and from its protobuf value, a message is written into a protobuf message."""

    write: Callable[[Any, Any], Any]
    """(value, protobuf message to fill); a scalar takes None and returns the protobuf value."""
    read: Callable[[Any], Any]
    message: bool


@dataclass(frozen=True)
class Field:
    """One field of a model: its kind, and how often the kind occurs."""

    kind: Kind
    shape: str
    """`one`, `list` or `map`."""
    optional: bool
    """None is a value of it."""

    def write(self, proto: Any, name: str, value: Any) -> None:
        """Put the field's value into its protobuf message."""
        if self.shape == "one":
            self._write_one(proto, name, value)
        elif self.shape == "list":
            self._write_list(getattr(proto, name), value)
        else:
            entries = getattr(proto, name)
            for key, item in value.items():
                if self.kind.message:
                    self.kind.write(item, entries[key])
                else:
                    entries[key] = self.kind.write(item, None)

    def _write_one(self, proto: Any, name: str, value: Any) -> None:
        if not self.kind.message:
            setattr(proto, name, self.kind.write(value, None))
            return
        inner = getattr(proto, name)
        inner.SetInParent()
        self.kind.write(value, inner)

    def _write_list(self, entries: Any, value: Any) -> None:
        if self.kind.message:
            for item in value:
                self.kind.write(item, entries.add())
        else:
            entries.extend(self.kind.write(item, None) for item in value)

    def read(self, proto: Any, name: str) -> Any:
        """What pydantic is given for the field."""
        if self.shape != "one" and len(getattr(proto, name)) > MOST_ENTRIES:
            raise BadInput(f"{name}: got {len(getattr(proto, name))} entries, expected at most {MOST_ENTRIES}")
        if self.shape == "list":
            found = [self.kind.read(item) for item in getattr(proto, name)]
            return [None if item is ABSENT else item for item in found]
        if self.shape == "map":
            entries = getattr(proto, name)
            # protobuf's own order changes from process to process, and would get into files.
            return {key: self.kind.read(entries[key]) for key in sorted(entries)}
        if proto.DESCRIPTOR.fields_by_name[name].has_presence and not proto.HasField(name):
            return None if self.optional else ABSENT
        return self.kind.read(getattr(proto, name))


@cache
def _fields(model: type[Message]) -> dict[str, Field]:
    return {name: _field(model, name) for name in model.model_fields}


def _field(model: type[Message], name: str) -> Field:
    info = model.model_fields[name]
    if info.discriminator is not None:
        return Field(_union(info.annotation, str(info.discriminator)), "one", False)
    hint, optional = bare(info.annotation), False
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        hint, optional = next(arg for arg in get_args(hint) if arg is not NoneType), True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple):
        return Field(_kind(arguments[0], model, name), "list", optional)
    if origin is dict:
        return Field(_kind(arguments[1], model, name), "map", optional)
    return Field(_kind(hint, model, name), "one", optional)


def _kind(hint: Any, model: type[Message], name: str) -> Kind:
    if tag := discriminator(hint):
        return _union(get_args(hint)[0], tag)
    hint = bare(hint)
    if hint is Tensor:
        return Kind(_write_tensor, _read_tensor, message=True)
    if isinstance(hint, type) and issubclass(hint, Message):
        return Kind(_encode, lambda proto: _decode(hint, proto), message=True)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum(hint.__name__, [one.value for one in hint])
    if len(values := get_args(hint)) > 1:  # a Literal
        return _enum(model.__name__ + camel(name), list(values))
    return Kind(lambda value, _: value, lambda value: value, message=False)


def _enum(name: str, values: list[str]) -> Kind:
    published = pool().FindEnumTypeByName(f"{PACKAGE}.{name}").values_by_name
    numbers = {value: published[enum_value(name, value)].number for value in values}
    texts = {number: value for value, number in numbers.items()}

    def read(number: int) -> Any:
        return texts.get(number, f"unknown value {number}") if number else ABSENT

    return Kind(lambda value, _: numbers[str(value)], read, message=False)


def _union(union: Any, tag: str) -> Kind:
    """A message with a oneof, whose set field names the member."""
    members: dict[str, type[Message]] = {
        str(get_args(one.model_fields[tag].annotation)[0]): one for one in get_args(union)
    }

    def write(value: Message, proto: Any) -> None:
        inner = getattr(proto, getattr(value, tag))
        inner.SetInParent()
        _encode(value, inner)

    def read(proto: Any) -> dict[str, Any]:
        name = proto.WhichOneof(tag)
        return {tag: name} | _decode(members[name], getattr(proto, name)) if name else {}

    return Kind(write, read, message=True)


def _write_tensor(value: Tensor, proto: Any) -> None:
    wire = value.wire()
    proto.dtype, proto.data = wire["dtype"], wire["data"]
    proto.shape.extend(wire["shape"])


def _read_tensor(proto: Any) -> dict[str, Any]:
    return {"dtype": proto.dtype, "shape": list(proto.shape), "data": proto.data}
