import subprocess
import sys
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional

import pytest
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, create_model

from protocols import codegen
from protocols.proto_schema import Block, Entry, camel, enum_value
from protocols.service import Empty, Message, Service, rpc
from protocols.tensor import PerToken, Tensor, TokenIds, Versions

ROOT = Path(codegen.__file__).parents[1]
FILE = "test_codegen.proto"


class Color(StrEnum):
    """Two of them."""

    RED = "red"
    DARK_BLUE = "dark-blue"


class Leaf(Message):
    """A leaf."""


class Tree(Message):
    """A tree, made of trees.

    It has a second paragraph, which is so long that it does not fit on one line of the file, and has
    to be wrapped.
    """

    children: list["Tree"]
    """Smaller ones."""
    color: Literal["green", "brown"]


class Circle(Message):
    shape: Literal["circle"] = "circle"
    radius: float


class Square(Message):
    shape: Literal["square"] = "square"
    side: float


class Loose(Message):
    shape: Literal["loose", "lost"] = "loose"


Shape = Annotated[Circle | Square, Field(discriminator="shape")]
LooseShape = Annotated[Circle | Loose, Field(discriminator="shape")]


class Number(IntEnum):
    ONE = 1


def service_of(model: type[Message]) -> type[Service]:
    class ProbeService(Service):
        """Takes the model."""

        kind: ClassVar[str] = "probe"

        @rpc()
        async def ask_once(self, request: model) -> Empty:  # type: ignore[valid-type]
            """Ask."""
            raise NotImplementedError

    return ProbeService


def generate(model: type[Message], published: dict[str, str] | None = None) -> str:
    return codegen.generate([service_of(model)], published or {})[FILE]


def blocks_of(model: type[Message]) -> dict[str, Block]:
    return codegen.parse(FILE, generate(model))


def model_with(**fields: Any) -> type[Message]:
    return create_model("Model", __base__=Message, __module__=__name__, **fields)


def declared(annotation: Any, default: Any = ...) -> str:
    (entry,) = blocks_of(model_with(x=(annotation, default)))["Model"].entries
    return entry.declared


@pytest.mark.parametrize(
    ("annotation", "line"),
    [
        (int, "int64 x"),
        (float, "double x"),
        (bool, "bool x"),
        (str, "string x"),
        (bytes, "bytes x"),
        (Annotated[int, Field(ge=0)], "int64 x"),
        (Tensor, "Tensor x"),
        (TokenIds, "Tensor x"),
        (PerToken, "Tensor x"),
        (Versions | None, "optional Tensor x"),
        (Leaf, "Leaf x"),
        (Color, "Color x"),
        (Literal["a"], "string x"),
        (Literal["a", "b"], "ModelX x"),
        (list[int], "repeated int64 x"),
        (list[Annotated[str, Field(min_length=1)]], "repeated string x"),
        (list[TokenIds], "repeated Tensor x"),
        (list[Literal["a", "b"]], "repeated ModelX x"),
        (tuple[float, ...], "repeated double x"),
        (tuple[float, float], "repeated double x"),
        (dict[str, Leaf], "map<string, Leaf> x"),
        (dict[str, PerToken], "map<string, Tensor> x"),
        (int | None, "optional int64 x"),
        (Optional[Leaf], "optional Leaf x"),  # noqa: UP045 - the older spelling is another type
        (Color | None, "optional Color x"),
        (Shape, "Shape x"),
        (Shape | None, "optional Shape x"),
        (list[Shape], "repeated Shape x"),
        (dict[str, Shape], "map<string, Shape> x"),
    ],
)
def test_types(annotation: Any, line: str) -> None:
    assert declared(annotation) == line


@pytest.mark.parametrize(
    "annotation",
    [
        object,
        Any,
        complex,
        set[int],
        list,
        dict,
        int | str,
        int | str | None,
        Circle | Square,
        list[list[int]],
        list[int | None],
        list[int] | None,
        dict[str, int] | None,
        dict[str, int | None],
        dict[str, list[int]],
        dict[int, str],
        tuple[int, str],
        Number,
        Literal[1, 2],
        Literal["a", None],
        Annotated[Circle | Square | None, Field(discriminator="shape")],
        LooseShape,
    ],
)
def test_types_without_counterpart_name_model_and_field(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"^Model\.x: "):
        declared(annotation)


def test_a_union_without_a_name_is_an_error() -> None:
    left = create_model("LeafA", __base__=Leaf, __module__=__name__, shape=(Literal["a"], "a"))
    right = create_model("LeafB", __base__=Leaf, __module__=__name__, shape=(Literal["b"], "b"))
    union = Annotated[left | right, Field(discriminator="shape")]
    with pytest.raises(TypeError, match=r"^Model\.x: .* needs a name"):
        declared(union)


def test_two_classes_of_one_name_are_an_error() -> None:
    other = create_model("Leaf", __base__=Message, __module__=__name__)
    with pytest.raises(TypeError, match="both be called Leaf"):
        generate(model_with(a=(Leaf, ...), b=(other, ...)))


def test_enum_values_of_one_name_are_an_error() -> None:
    with pytest.raises(TypeError, match="ModelX: two of MODEL_X_UNSPECIFIED, MODEL_X_A_B, MODEL_X_A_B"):
        declared(Literal["a-b", "a_b"])
    with pytest.raises(TypeError, match="the same"):
        declared(Literal["unspecified", "b"])


@pytest.mark.parametrize(
    ("annotation", "default", "line"),
    [
        (int, 0, "int64 x"),
        (str, "", "string x"),
        (bool, False, "bool x"),
        (list[int], [], "repeated int64 x"),
        (int, 3, "optional int64 x"),
        (bool, True, "optional bool x"),
        (Color, Color.RED, "optional Color x"),
        (Leaf, Leaf(), "optional Leaf x"),
        (float | None, None, "optional double x"),
        (float | None, 2.0, "optional double x"),
        (float, Field(default_factory=lambda: 2.0), "optional double x"),
    ],
)
def test_a_default_other_than_zero_makes_a_field_optional(annotation: Any, default: Any, line: str) -> None:
    assert declared(annotation, default) == line


@pytest.mark.parametrize(("annotation", "default"), [(list[int], [1]), (dict[str, int], {"a": 1})])
def test_a_repeated_field_cannot_have_a_default(annotation: Any, default: Any) -> None:
    with pytest.raises(TypeError, match=r"^Model\.x: an empty value would be taken for the default"):
        declared(annotation, default)


def test_defaults_are_told() -> None:
    text = generate(
        model_with(
            a=(int, Field(default=3, description="How many.")),
            b=(Color, Color.DARK_BLUE),
            c=(bool, True),
            d=(float | None, 2.0),
        )
    )
    assert "  // How many. Default: 3.\n  optional int64 a = 1;" in text
    assert '  // Default: "dark-blue".\n' in text
    assert "  // Default: true.\n" in text
    assert "2.0" not in text


def test_a_whole_file() -> None:
    assert generate(model_with(tree=(Tree, ...), shape=(Shape, ...), color=(Color, ...))) == (
        """\
// Written by `python -m protocols.codegen` from protocols/test_codegen.py. Do not edit.
syntax = "proto3";

package repertory.v1;

import "service.proto";

// Takes the model.
service ProbeService {
  // Say whether the actor can serve.
  rpc Health(HealthRequest) returns (HealthResponse);
  // Write the actor's whole state under a directory.
  rpc Save(CheckpointRequest) returns (CheckpointResponse);
  // Take the state that `save` wrote. Raises Corrupt if it is not one.
  rpc Load(CheckpointRequest) returns (CheckpointResponse);
  // Refuse new calls with Unavailable, finish those that are running, then return.
  rpc Drain(Empty) returns (Empty);
  // Ask.
  rpc AskOnce(Model) returns (Empty);
}

// Two of them.
enum Color {
  COLOR_UNSPECIFIED = 0;
  COLOR_RED = 1;
  COLOR_DARK_BLUE = 2;
}

// A tree, made of trees.
//
// It has a second paragraph, which is so long that it does not fit on one line of the file, and has
// to be wrapped.
message Tree {
  // Smaller ones.
  repeated Tree children = 1;
  TreeColor color = 2;
}

// Values of `Tree.color`.
enum TreeColor {
  TREE_COLOR_UNSPECIFIED = 0;
  TREE_COLOR_GREEN = 1;
  TREE_COLOR_BROWN = 2;
}

message Circle {
  // Default: "circle".
  optional string shape = 1;
  double radius = 2;
}

message Square {
  // Default: "square".
  optional string shape = 1;
  double side = 2;
}

// Exactly one of these; the name of the field is the member's `shape`.
message Shape {
  oneof shape {
    Circle circle = 1;
    Square square = 2;
  }
}

message Model {
  Tree tree = 1;
  Shape shape = 2;
  Color color = 3;
}
"""
    )


def test_one_file_per_module() -> None:
    files = codegen.generate([service_of(model_with(x=(TokenIds, ...)))], {})
    assert list(files) == ["service.proto", "tensor.proto", FILE]
    assert 'import "service.proto";\nimport "tensor.proto";\n' in files[FILE]
    assert "import" not in files["service.proto"]


def test_names() -> None:
    assert camel("forward_backward") == "ForwardBackward"
    assert enum_value("FinishReason", "stop_text") == "FINISH_REASON_STOP_TEXT"
    assert enum_value("GRPOLossNormalize", "token") == "GRPO_LOSS_NORMALIZE_TOKEN"


# --- numbers ---------------------------------------------------------------------------------------------


def numbers(text: str, name: str = "Model") -> dict[str, int]:
    return {entry.name: entry.number for entry in codegen.parse(FILE, text)[name].entries}


def after(*versions: type[Message]) -> str:
    """The file after the model went through all these versions."""
    text = ""
    for version in versions:
        text = generate(version, {FILE: text} if text else {})
    return text


def ints(names: str) -> type[Message]:
    return model_with(**dict.fromkeys(names, (int, ...)))


def test_reordered_fields_keep_their_numbers() -> None:
    assert numbers(after(ints("abc"), ints("cab"))) == {"c": 3, "a": 1, "b": 2}


def test_a_new_field_gets_the_next_number_wherever_it_stands() -> None:
    assert numbers(after(ints("ab"), ints("xab"))) == {"x": 3, "a": 1, "b": 2}


def test_a_removed_field_is_reserved_for_good() -> None:
    text = after(ints("abc"), ints("ac"), ints("acd"), ints("cd"))
    assert numbers(text) == {"c": 3, "d": 4}
    assert '  reserved 1, 2;\n  reserved "a", "b";\n' in text


def test_a_name_that_comes_back_gets_a_new_number() -> None:
    text = after(ints("ab"), ints("a"), ints("ab"))
    assert numbers(text) == {"a": 1, "b": 3}
    assert "  reserved 2;\n" in text
    assert 'reserved "' not in text


def test_enum_values_and_union_members_keep_their_numbers() -> None:
    text = after(
        model_with(x=(Literal["a", "b"], ...), y=(Shape, ...)),
        model_with(y=(Shape, ...), x=(Literal["c", "b"], ...)),
    )
    assert numbers(text, "ModelX") == {"MODEL_X_UNSPECIFIED": 0, "MODEL_X_C": 3, "MODEL_X_B": 2}
    assert '  reserved 1;\n  reserved "MODEL_X_A";\n' in text
    swapped = text.replace("Circle circle = 1;", "Circle circle = 9;")
    again = generate(model_with(y=(Shape, ...), x=(Literal["c", "b"], ...)), {FILE: swapped})
    assert numbers(again, "Shape") == {"circle": 9, "square": 2}


def test_what_is_left_of_a_removed_message_and_enum() -> None:
    text = after(model_with(tree=(Tree, ...), n=(int, ...)), ints("n"))
    assert text.endswith(
        """
// Removed.
message Tree {
  reserved 1, 2;
  reserved "children", "color";
}

// Removed.
enum TreeColor {
  reserved 1, 2;
  reserved "TREE_COLOR_BROWN", "TREE_COLOR_GREEN";
  TREE_COLOR_UNSPECIFIED = 0;
}
"""
    )
    assert generate(ints("n"), {FILE: text}) == text
    assert numbers(generate(model_with(tree=(Tree, ...)), {FILE: text}), "Tree") == {
        "children": 3,
        "color": 4,
    }


def test_nothing_is_left_of_a_message_without_numbers() -> None:
    assert "Leaf" not in codegen.parse(FILE, after(model_with(leaf=(Leaf, ...)), ints("n")))


def test_reserved_lines_are_valid_protobuf(tmp_path: Path) -> None:
    """In a message, an enum, a union, and in what is left of a removed message and enum."""
    model = model_with(shape=(Shape, ...), color=(Color, ...))
    text = after(model_with(tree=(Tree, ...)), model)
    text = text.replace("    Square square = 2;\n", "    Square square = 2;\n    Leaf leaf = 3;\n")
    text = text.replace("  COLOR_RED = 1;\n", "  COLOR_RED = 1;\n  COLOR_PINK = 3;\n")
    files = codegen.generate([service_of(model)], {FILE: text})
    assert files[FILE].count("reserved ") == 2 * 5
    for name, contents in files.items():
        (tmp_path / name).write_text(contents)
    assert protoc.main(["protoc", f"-I{tmp_path}", f"--python_out={tmp_path}", *files]) == 0


def test_a_message_that_moves_to_another_file_keeps_its_numbers() -> None:
    moved = after(ints("abc"), ints("bca"))
    files = codegen.generate([service_of(ints("bca"))], {"elsewhere.proto": moved})
    assert files[FILE] == moved
    assert "elsewhere.proto" not in files


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        (int, float, "published as `int64 x = 1`, cannot become `double x`"),
        (int, list[int], "published as `int64 x = 1`, cannot become `repeated int64 x`"),
        (list[int], int | None, "published as `repeated int64 x = 1`, cannot become `optional int64 x`"),
        (Leaf, Tensor, "published as `Leaf x = 1`, cannot become `Tensor x`"),
        (dict[str, int], dict[str, str], "published as `map<string, int64> x = 1`"),
    ],
)
def test_a_published_field_cannot_change_its_type(before: Any, now: Any, text: str) -> None:
    with pytest.raises(TypeError) as error:
        after(model_with(x=(before, ...)), model_with(x=(now, ...)))
    assert str(error.value).startswith("Model.x: ")
    assert text in str(error.value)


def test_a_field_may_become_optional() -> None:
    text = after(model_with(x=(int, ...)), model_with(x=(int | None, None)))
    assert "  optional int64 x = 1;\n" in text


def test_a_message_cannot_become_an_enum() -> None:
    with pytest.raises(TypeError, match="ModelX: published as message, cannot become enum"):
        generate(model_with(x=(Literal["a", "b"], ...)), {FILE: "message ModelX {}\n"})


@pytest.mark.parametrize("line", ["<<<<<<< ours", "  int32_t x", "option java_package = 1;"])
def test_a_file_of_another_hand_is_an_error(line: str) -> None:
    text = generate(ints("a"))
    with pytest.raises(ValueError, match=rf"^{FILE}:3: expected a line as codegen writes it, got '{line}'"):
        generate(ints("a"), {FILE: text.replace("\n\n", f"\n{line}\n", 1)})


def test_parse_reads_back_what_generate_writes() -> None:
    block = codegen.parse(FILE, after(ints("abc"), model_with(c=(int, ...), d=(Shape | None, None))))["Model"]
    assert block == Block(
        "message",
        "Model",
        FILE,
        entries=(Entry("c", "int64", number=3), Entry("d", "Shape", "optional", number=4)),
        reserved_numbers=frozenset({1, 2}),
        reserved_names=frozenset({"a", "b"}),
    )


NAMES = st.lists(st.sampled_from("abcdefg"), unique=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=8))
def test_no_number_is_ever_used_twice(history: list[list[str]]) -> None:
    """Any sequence of adding, removing and reordering, for fields and for enum values."""
    text = ""
    now: dict[str, dict[str, int]] = {"Model": {}, "Kind": {}}
    ever: dict[str, set[int]] = {"Model": set(), "Kind": set()}
    for names in history:
        kind = StrEnum("Kind", {name.upper(): name for name in names}, module=__name__)
        model = model_with(kind=(kind, ...), **dict.fromkeys(names, (int, ...)))
        text = generate(model, {FILE: text} if text else {})
        for name, block in codegen.parse(FILE, text).items():
            if name in now:
                new = {entry.name: entry.number for entry in block.entries}
                assert len(set(new.values())) == len(new)
                for key, number in new.items():
                    assert now[name][key] == number if key in now[name] else number not in ever[name]
                ever[name] |= set(new.values())
                now[name] = new
                assert block.reserved_numbers == ever[name] - set(new.values())
    assert text == generate(model, {FILE: text})


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    protos, docs = tmp_path / "proto", tmp_path / "docs"
    protos.mkdir(), docs.mkdir()
    (docs / "rpcs.md").write_text("")
    monkeypatch.setattr(codegen, "FOLDER", protos)
    monkeypatch.setattr(codegen, "TABLE", docs / "rpcs.md")
    monkeypatch.setattr(codegen, "services", lambda: [service_of(ints("ab"))])
    return protos


def test_main_writes_and_says_what_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codegen.main([]) == 0
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(first) == ["service.proto", FILE]
    lines = first[FILE].count("\n")
    assert f"{FILE}: {lines} lines added, 0 removed\n" in capsys.readouterr().out
    assert codegen.TABLE.read_text() == codegen.table(codegen.services())
    assert codegen.main([]) == 0
    assert capsys.readouterr().out == ""


def test_main_deletes_a_file_without_contents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old.proto").write_text("service OldService {\n}\n")
    assert codegen.main([]) == 0
    assert not (folder / "old.proto").exists()
    assert "old.proto: 0 lines added, 2 removed\n" in capsys.readouterr().out


def test_check_prints_a_diff_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codegen.main([]) == 0
    assert codegen.main(["--check"]) == 0
    capsys.readouterr()
    old = (folder / FILE).read_text().replace("int64 b = 2;", "int64 old_b = 2;")
    (folder / FILE).write_text(old)
    assert codegen.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert f"--- checked in: {FILE}\n+++ generated: {FILE}\n" in out
    assert "\n-  int64 old_b = 2;\n" in out
    assert "\n+  int64 b = 3;\n" in out
    assert (folder / FILE).read_text() == old


def test_the_command_needs_no_torch_ray_or_grpc() -> None:
    code = (
        "import sys; from protocols import codegen; codegen.main(['--check']);"
        "print([name for name in ('torch', 'ray', 'grpc', 'google.protobuf') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
