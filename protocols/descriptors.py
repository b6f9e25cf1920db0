"""Protobuf classes of the published messages, made in memory from the same source as the .proto files."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from protocols import codegen
from protocols.proto_schema import Block, Entry, ServiceBlock, build
from protocols.service import Service

PACKAGE = "repertory.v1"
SCALAR_TYPES = {"int64": 3, "double": 1, "bool": 8, "string": 9, "bytes": 12}
"""Numbers of the types in descriptor.proto."""
MESSAGE, ENUM = 11, 14
SINGULAR, REPEATED = 1, 3


@cache
def pool() -> DescriptorPool:
    """All published files, with the numbers of the checked-in ones."""
    published = {path.name: path.read_text("utf-8") for path in sorted(codegen.FOLDER.glob("*.proto"))}
    old = {name: block for file, text in published.items() for name, block in codegen.parse(file, text).items()}
    services, blocks = build(codegen.services())
    blocks = [codegen.number(block, old.get(block.name)) for block in blocks]
    found = DescriptorPool()
    for file in _in_order(_files(services, blocks)):
        found.Add(file)
    return found


def name_of(service: type[Service]) -> str:
    """Full name of a published service."""
    return f"{PACKAGE}.{service.__name__}"


@cache
def message_class(name: str) -> Any:
    """The protobuf class of a published message."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


def _files(services: Iterable[ServiceBlock], blocks: list[Block]) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    kinds = {block.name: block for block in blocks}
    names = {block.file for block in blocks} | {service.file for service in services}
    files = {name: descriptor_pb2.FileDescriptorProto(name=name, package=PACKAGE, syntax="proto3") for name in names}
    for block in blocks:
        if block.kind == "enum":
            _add_enum(files[block.file], block)
        else:
            _add_message(files[block.file], block, kinds)
    for service in services:
        added = files[service.file].service.add(name=service.name)
        for rpc in service.rpcs:
            added.method.add(
                name=rpc.name,
                input_type=f".{PACKAGE}.{rpc.request}",
                output_type=f".{PACKAGE}.{rpc.response}",
                server_streaming=rpc.streaming,
            )
            _depend(files[service.file], kinds[rpc.request].file, kinds[rpc.response].file)
    return files


def _depend(file: descriptor_pb2.FileDescriptorProto, *names: str) -> None:
    for name in names:
        if name != file.name and name not in file.dependency:
            file.dependency.append(name)


def _add_enum(file: descriptor_pb2.FileDescriptorProto, block: Block) -> None:
    added = file.enum_type.add(name=block.name)
    for entry in block.entries:
        added.value.add(name=entry.name, number=entry.number)


def _add_message(file: descriptor_pb2.FileDescriptorProto, block: Block, kinds: dict[str, Block]) -> None:
    message = file.message_type.add(name=block.name)
    if block.oneof:
        message.oneof_decl.add(name=block.oneof)
    for entry in block.entries:
        field = message.field.add(name=entry.name, number=entry.number)
        if block.oneof:
            field.oneof_index = 0
        _set_type(file, message, field, entry, kinds)
    # Those that stand for `optional` must follow the real ones.
    for field, entry in zip(message.field, block.entries, strict=True):
        if entry.label == "optional":
            field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{entry.name}")


def _set_type(file: Any, message: Any, field: Any, entry: Entry, kinds: dict[str, Block]) -> None:
    field.label = REPEATED if entry.label == "repeated" else SINGULAR
    type_ = entry.type
    if type_.startswith("map<"):
        type_ = type_.removeprefix("map<string, ").removesuffix(">")
        name = "".join(part.capitalize() for part in entry.name.split("_")) + "Entry"
        pair = message.nested_type.add(name=name)
        pair.options.map_entry = True
        pair.field.add(name="key", number=1, label=SINGULAR, type=SCALAR_TYPES["string"])
        value = pair.field.add(name="value", number=2)
        _set_type(file, message, value, Entry("value", type_), kinds)
        field.label, field.type, field.type_name = REPEATED, MESSAGE, f".{PACKAGE}.{message.name}.{name}"
    elif type_ in SCALAR_TYPES:
        field.type = SCALAR_TYPES[type_]
    else:
        field.type = ENUM if kinds[type_].kind == "enum" else MESSAGE
        field.type_name = f".{PACKAGE}.{type_}"
        _depend(file, kinds[type_].file)


def _in_order(files: dict[str, descriptor_pb2.FileDescriptorProto]) -> list[descriptor_pb2.FileDescriptorProto]:
    """Each after those that it imports."""
    ordered: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def visit(name: str) -> None:
        if name not in ordered:
            for dependency in files[name].dependency:
                visit(dependency)
            ordered[name] = files[name]

    for name in sorted(files):
        visit(name)
    return list(ordered.values())
