import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from grpc_tools import protoc

from protocols import codegen
from protocols.proto_schema import build, camel
from protocols.service import Service

PUBLISHED = {path.name: path.read_text("utf-8") for path in sorted(codegen.FOLDER.glob("*.proto"))}
SERVICES = codegen.services()
BLOCKS = {name: block for file, text in PUBLISHED.items() for name, block in codegen.parse(file, text).items()}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The modules that protoc makes of the published files, by file name."""
    out = tmp_path_factory.mktemp("protoc")
    arguments = [f"-I{codegen.FOLDER}", f"--python_out={out}", f"--grpc_python_out={out}", *PUBLISHED]
    assert protoc.main(["protoc", *arguments]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(out))
        for path in sorted(out.glob("*_pb2_grpc.py")):
            importlib.import_module(path.stem)
        return {file: importlib.import_module(file.replace(".proto", "_pb2")) for file in PUBLISHED}


def descriptor(modules: dict[str, ModuleType], file: str) -> FileDescriptor:
    found = modules[file].DESCRIPTOR
    assert isinstance(found, FileDescriptor)
    return found


def test_the_files_are_what_codegen_writes() -> None:
    """If not: python -m protocols.codegen"""
    assert codegen.generate(SERVICES, PUBLISHED) == PUBLISHED


def test_every_service_module_is_published() -> None:
    defining = {
        path.stem for path in Path(codegen.__file__).parent.glob("*.py") if "(Service):" in path.read_text("utf-8")
    }
    # The workers of a policy move weights, which never leave a cluster.
    assert defining - {"workers"} == {service.__module__.removeprefix("protocols.") for service in SERVICES}
    assert {service.kind for service in SERVICES} >= {"policy", "questioner", "verifier"}


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.__name__)
def test_services_have_exactly_the_methods_of_their_class(
    service: type[Service], modules: dict[str, ModuleType]
) -> None:
    file = service.__module__.removeprefix("protocols.") + ".proto"
    published = descriptor(modules, file).services_by_name[service.__name__]
    assert published.full_name == f"repertory.v1.{service.__name__}"
    assert [
        (rpc.name, rpc.input_type.name, rpc.output_type.name, rpc.client_streaming, rpc.server_streaming)
        for rpc in published.methods
    ] == [
        (camel(name), method.request.__name__, method.response.__name__, False, method.streaming)
        for name, method in service.methods().items()
    ]


def test_no_other_services(modules: dict[str, ModuleType]) -> None:
    names = [name for file in modules for name in descriptor(modules, file).services_by_name]
    assert sorted(names) == sorted(service.__name__ for service in SERVICES)


def published_numbers(found: Descriptor | EnumDescriptor) -> dict[str, int]:
    if isinstance(found, EnumDescriptor):
        return {value.name: value.number for value in found.values}
    return {field.name: field.number for field in found.fields}


def test_codegen_reads_the_numbers_that_protoc_reads(modules: dict[str, ModuleType]) -> None:
    types = {
        name: found
        for file in modules
        for by_name in (
            descriptor(modules, file).message_types_by_name,
            descriptor(modules, file).enum_types_by_name,
        )
        for name, found in by_name.items()
    }
    assert {name: published_numbers(found) for name, found in types.items()} == {
        name: {entry.name: entry.number for entry in block.entries} for name, block in BLOCKS.items()
    }


def test_codegen_overlooks_no_number() -> None:
    """Every number in the text is one that parse returns, so none can be given away a second time."""
    for file, text in PUBLISHED.items():
        written = sorted(int(match) for match in re.findall(r"= (\d+);", text))
        read = [entry.number for block in BLOCKS.values() if block.file == file for entry in block.entries]
        assert sorted(read) == written


def test_published_numbers_do_not_depend_on_the_order_of_the_models() -> None:
    _, blocks = build(SERVICES)
    for block in blocks:
        published = {entry.name: entry.number for entry in BLOCKS[block.name].entries}
        turned = codegen.number(replace(block, entries=block.entries[::-1]), BLOCKS[block.name])
        assert {entry.name: entry.number for entry in turned.entries} == published
        assert turned.reserved_numbers == BLOCKS[block.name].reserved_numbers


def test_messages_cross_the_wire(modules: dict[str, ModuleType]) -> None:
    request = modules["policy.proto"].SampleRequest(n=2)
    request.prompts.add(uid="a").tokens.data = b"\x01\x00\x00\x00"
    again = modules["policy.proto"].SampleRequest.FromString(request.SerializeToString())
    assert (again.n, again.prompts[0].uid, again.prompts[0].tokens.data) == (2, "a", b"\x01\x00\x00\x00")
    assert not again.HasField("params")
    assert not again.prompts[0].HasField("text")
