"""What services look like in protobuf, before field numbers: messages, enums and rpcs.

    int, float, bool, str, bytes         int64, double, bool, string, bytes
    Tensor, also annotated               Tensor
    Message, StrEnum                     a message, an enum
    Literal of several strings           an enum named after model and field; of one string: string
    A | B with a discriminator           a message named like the module-level alias, holding a oneof
    list[X], tuple[X, ...]               repeated X
    dict[str, X]                         map<string, X>
    X | None                             optional X; unset is None, whatever Python's default is

A field whose default is not the zero value is optional too, so that a caller who leaves it unset gets the
default and not zero. Only what a service reaches is published; configs are not.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from inspect import cleandoc, getdoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from protocols.service import Message, Service
from protocols.tensor import DTYPES, Tensor

SCALARS: dict[type, str] = {int: "int64", float: "double", bool: "bool", str: "string", bytes: "bytes"}


@dataclass(frozen=True)
class Entry:
    """A field of a message, or a value of an enum (no type)."""

    name: str
    type: str = ""
    label: str = ""
    comment: str = ""
    number: int = -1

    @property
    def declared(self) -> str:
        """Label, type and name, as they stand in the file."""
        return " ".join(filter(None, (self.label, self.type, self.name)))


@dataclass(frozen=True)
class Block:
    """A message or an enum.

    `oneof` is the discriminator of a union, of which the entries are the members; `position` is where the
    class, the alias or the class with the Literal stands in its Python module.
    """

    kind: str
    name: str
    file: str
    comment: str = ""
    entries: tuple[Entry, ...] = ()
    oneof: str = ""
    position: int = 0
    reserved_numbers: frozenset[int] = frozenset()
    reserved_names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rpc:
    """One remote method."""

    name: str
    request: str
    response: str
    streaming: bool
    comment: str


@dataclass(frozen=True)
class ServiceBlock:
    """A service and its remote methods, the inherited ones first."""

    name: str
    file: str
    comment: str
    rpcs: tuple[Rpc, ...]


class Site(NamedTuple):
    """Where a type is used; errors name it."""

    model: type[Message]
    field: str

    def __str__(self) -> str:
        return f"{self.model.__name__}.{self.field}"


def build(services: Iterable[type[Service]]) -> tuple[list[ServiceBlock], list[Block]]:
    """The services, and every message and enum that they reach, in the order of their Python modules.

    Raises TypeError that names model and field if a type has no counterpart in protobuf.
    """
    reach = _Reach()
    published = [reach.service(service) for service in services]
    return published, sorted(reach.blocks.values(), key=lambda block: block.position)


def camel(name: str) -> str:
    """forward_backward -> ForwardBackward."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def enum_value(enum: str, value: str) -> str:
    """Name of an enum value: (FinishReason, stop) -> FINISH_REASON_STOP."""
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", enum)
    return re.sub(r"\W", "_", f"{prefix}_{value}").upper()


@dataclass
class _Reach:
    """Walks from services to messages and enums, and collects a block of each."""

    blocks: dict[str, Block] = field(default_factory=dict)
    sources: dict[str, object] = field(default_factory=dict)

    def service(self, service: type[Service]) -> ServiceBlock:
        rpcs = tuple(
            Rpc(
                name=camel(name),
                request=self.message(method.request),
                response=self.message(method.response),
                streaming=method.streaming,
                comment=getdoc(getattr(service, name)) or "",
            )
            for name, method in service.methods().items()
        )
        return ServiceBlock(service.__name__, _file(service.__module__), _doc(service), rpcs)

    def message(self, model: type[Message]) -> str:
        block = _block("message", model)
        if self._is_new(block, model):
            fields = model.model_fields.items()
            entries = tuple(self._entry(Site(model, name), info) for name, info in fields)
            self.blocks[block.name] = replace(block, entries=entries)
        return block.name

    def _is_new(self, block: Block, source: object) -> bool:
        """Add the block unless it is there already."""
        known = self.sources.setdefault(block.name, source)
        if known != source:
            raise TypeError(f"{source} and {known} would both be called {block.name}")
        return self.blocks.setdefault(block.name, block) is block

    def _entry(self, site: Site, info: FieldInfo) -> Entry:
        hint: Any = info.annotation
        if info.discriminator is not None:
            hint = Annotated[hint, Field(discriminator=info.discriminator)]
        label, type_ = self._labelled(hint, site)
        entry = Entry(site.field, type_, label, info.description or "")
        default = _default(info)
        if not default or label == "optional":
            return entry
        if label == "repeated" or type_.startswith("map<"):
            raise TypeError(f"{site}: an empty value would be taken for the default {default!r}; make that empty")
        return replace(entry, label="optional", comment=f"{entry.comment}{_default_text(default)}")

    def _labelled(self, hint: Any, site: Site) -> tuple[str, str]:
        hint = bare(hint)
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
            return "optional", self._single(args[args[0] is NoneType], site)
        if origin in (list, tuple) and args and all(arg in (args[0], ...) for arg in args):
            return "repeated", self._single(args[0], site)
        if origin is dict and args[0] is str:
            return "", f"map<string, {self._single(args[1], site)}>"
        return "", self._single(hint, site)

    def _single(self, hint: Any, site: Site) -> str:
        hint = bare(hint)
        if hint is Tensor:
            return self._tensor()
        if isinstance(hint, type) and hint in SCALARS:
            return SCALARS[hint]
        if isinstance(hint, type) and issubclass(hint, Message):
            return self.message(hint)
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            return self._enum(_block("enum", hint), [value.value for value in hint], hint)
        if get_origin(hint) is Literal:
            return self._literal(get_args(hint), site)
        if discriminator(hint):
            return self._union(hint, site)
        raise TypeError(f"{site}: {hint} has no protobuf type; protocols/proto_schema.py says which types have")

    def _literal(self, values: tuple[Any, ...], site: Site) -> str:
        if not all(type(value) is str for value in values):
            raise TypeError(f"{site}: expected a Literal of strings, got {values}")
        if len(values) == 1:
            return "string"
        name = site.model.__name__ + camel(site.field)
        block = replace(_block("enum", site.model), name=name, comment=f"Values of `{site}`.")
        return self._enum(block, values, site)

    def _enum(self, block: Block, values: Sequence[str], source: object) -> str:
        names = [enum_value(block.name, value) for value in ("unspecified", *values)]
        if len(set(names)) < len(names):
            raise TypeError(f"{block.name}: two of {', '.join(names)} are the same; choose other values")
        self._is_new(replace(block, entries=tuple(map(Entry, names))), source)
        return block.name

    def _union(self, hint: Any, site: Site) -> str:
        union, tag = get_args(hint)[0], discriminator(hint)
        members = get_args(union)
        if not all(isinstance(member, type) and issubclass(member, Message) for member in members):
            raise TypeError(f"{site}: expected a union of messages alone, got {union}")
        name, module = _alias(union, site)
        comment = f"Exactly one of these; the name of the field is the member's `{tag}`."
        position = _position(module, name)
        block = Block("message", name, _file(module), comment, oneof=tag, position=position)
        if self._is_new(block, union):
            entries = tuple(Entry(_tag_value(member, tag, site), self.message(member)) for member in members)
            self.blocks[name] = replace(block, entries=entries)
        return name

    def _tensor(self) -> str:
        fields = (
            Entry("dtype", "string", comment=f"One of {', '.join(DTYPES)}."),
            Entry("shape", "int64", "repeated", comment="Sizes of the axes."),
            Entry("data", "bytes", comment="Values, little-endian, row-major; bfloat16 as 16 bits each."),
        )
        block = replace(_block("message", Tensor), comment="An array.", entries=fields)
        self._is_new(block, Tensor)
        return block.name


def _block(kind: str, cls: type) -> Block:
    position = _position(cls.__module__, cls.__name__)
    return Block(kind, cls.__name__, _file(cls.__module__), _doc(cls), position=position)


def _position(module: str, name: str) -> int:
    names = list(vars(sys.modules[module]))
    return names.index(name) if name in names else len(names)


def _file(module: str) -> str:
    return module.rpartition(".")[2] + ".proto"


def _doc(cls: type) -> str:
    # getdoc would give a class without docstring that of its base.
    return cleandoc(cls.__doc__ or "")


def bare(hint: Any) -> Any:
    """The type without its annotations; a discriminated union keeps them."""
    return get_args(hint)[0] if get_origin(hint) is Annotated and not discriminator(hint) else hint


def discriminator(hint: Any) -> str:
    """Name of the field that tells the members of an annotated union apart, or the empty string."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, FieldInfo) and isinstance(note.discriminator, str):
            return note.discriminator
    return ""


def _alias(union: Any, site: Site) -> tuple[str, str]:
    """Name and module of the alias of a discriminated union; it must stand beside one of the members."""
    for module in (member.__module__ for member in get_args(union)):
        for name, value in vars(sys.modules[module]).items():
            if get_origin(value) is Annotated and get_args(value)[0] == union:
                return name, module
    raise TypeError(f"{site}: {union} needs a name, a module-level alias in the module of one of its members")


def _tag_value(member: type[Message], tag: str, site: Site) -> str:
    values = get_args(member.model_fields[tag].annotation)
    if len(values) != 1 or not re.fullmatch(r"[a-z][a-z0-9_]*", str(values[0])):
        raise TypeError(f"{site}: {member.__name__}.{tag} must be a Literal of one lower_snake name")
    return str(values[0])


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def _default_text(default: object) -> str:
    """A sentence for the comment; the defaults of a message stand in the message."""
    return f"\nDefault: {json.dumps(default)}." if isinstance(default, str | int | float) else ""
