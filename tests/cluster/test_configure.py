from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from cluster.config import MethodConfig
from cluster.configure import configure, describe, merged, run_name
from methods.spell_config import Config as SpellConfig
from methods.spell_config import preset as spell_preset
from protocols.errors import BadInput
from protocols.policy import PolicyConfig
from protocols.service import Message


class Optimizer(Message):
    """How it learns."""

    rate: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Two decays."""


class Model(Message):
    """What learns."""

    name: str = "tiny"
    """Name or path."""
    optimizer: Optimizer | None = Optimizer()
    """Null: it is frozen."""


class Config(MethodConfig):
    """A method's configuration."""

    SHORTCUTS: ClassVar[dict[str, str]] = {"model": "actor.name", "lr": "actor.optimizer.rate"}

    world: Literal["text", "ledger"] = "text"
    """Where documents come from."""
    mode: Literal["on", "off", "disabled", "null"] = "on"
    """Words that YAML would read as something else."""
    actor: Model = Model()
    """The model."""
    other: Model | None = None
    """A second one."""
    weights: dict[str, float] = {"a": 1.0}
    """By name."""
    limit: int | None = 5
    """Most of something."""
    title: str = ""
    """Free text."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.title == "wrong":
            raise ValueError("title and world do not go together")
        return self


def preset(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("world") != "ledger":
        return {}
    return {"seed": 3, "limit": 9, "actor": {"name": "preset", "optimizer": {"rate": 0.5}}}


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_nothing_given_is_the_defaults() -> None:
    assert configure(Config, []) == Config()


def test_words_win_over_the_file_which_wins_over_the_preset(tmp_path: Path) -> None:
    file = written(tmp_path, "world: ledger\nlimit: 2\nactor: {name: file}\nsteps: 7\n")
    config = configure(Config, ["steps=8", "actor.optimizer.betas=[0.5, 0.6]"], file, preset)
    assert (config.world, config.steps, config.limit, config.seed) == ("ledger", 8, 2, 3)
    assert config.actor == Model(name="file", optimizer=Optimizer(rate=0.5, betas=(0.5, 0.6)))


def test_of_two_words_for_a_key_the_last_counts() -> None:
    assert configure(Config, ["steps=1", "steps=2"]).steps == 2


def test_shortcuts_work_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    file = written(tmp_path, "model: big\nlr: 0.25\nactor: {optimizer: {betas: [0.1, 0.2]}}\n")
    expected = Model(name="big", optimizer=Optimizer(rate=0.25, betas=(0.1, 0.2)))
    assert configure(Config, [], file).actor == expected
    assert configure(Config, ["lr=0.25", "model=big", "actor.optimizer.betas=[0.1,0.2]"]).actor == expected


def test_dotted_keys_work_in_files_too(tmp_path: Path) -> None:
    file = written(tmp_path, "actor.optimizer.rate: 0.125\n")
    assert configure(Config, [], file).actor.optimizer == Optimizer(rate=0.125)


@pytest.mark.parametrize("text", ["007", "1e3", "true", "null", "no", "[1, 2", "a: b", "", " x ", "a=b", "#1", "*"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert configure(Config, [f"title={text}"]).title == text
    assert configure(Config, [f"model={text}"]).actor.name == text


@pytest.mark.parametrize("word", ["on", "off", "disabled", "null"])
def test_so_are_words_out_of_a_choice(word: str) -> None:
    assert configure(Config, [f"mode={word}"]).mode == word


def test_tracking_can_be_disabled() -> None:
    assert configure(Config, ["wandb=disabled"]).wandb == "disabled"


def test_null_ends_a_nested_model_and_a_key_below_begins_one() -> None:
    assert configure(Config, ["actor.optimizer=null"]).actor.optimizer is None
    assert configure(Config, ["actor.optimizer=null", "lr=0.5"]).actor.optimizer == Optimizer(rate=0.5)
    assert configure(Config, ["other.name=second"]).other == Model(name="second")
    assert configure(Config, ["limit=null"]).limit is None


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E-6", 2e-6), ("3", 3.0), (".5", 0.5)])
def test_numbers_may_be_written_in_any_way(text: str, value: float) -> None:
    assert configure(Config, [f"lr={text}"]).actor.optimizer == Optimizer(rate=value)


def test_a_mapping_may_be_written_out_or_key_by_key() -> None:
    assert configure(Config, ["weights={b: 2}"]).weights == {"b": 2.0}
    assert configure(Config, ["weights.b=2", "weights.c=3"]).weights == {"b": 2.0, "c": 3.0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stps=3", "stps: unknown key; did you mean steps? (--help lists all keys)"),
        ("rate=3", "rate: unknown key; did you mean actor.optimizer.rate? (--help lists all keys)"),
        ("actor.optimizr.rate=3", "actor.optimizr.rate: unknown key; did you mean actor.optimizer.rate?"),
        ("actr.name=x", "actr.name: unknown key; did you mean actor.name?"),
        ("actor.optimizer.rate.x=3", "actor.optimizer.rate: got {'x': 3}; input should be a valid number"),
        ("qqqqqqqq=3", "qqqqqqqq: unknown key (--help lists all keys)"),
        ("a..b=3", "a..b: unknown key"),
        ("steps", "'steps': expected key=value"),
        ("=3", "'=3': expected key=value"),
        ("--steps=3", "--steps: unknown key; did you mean steps?"),
        ("steps=many", "steps: got 'many'; input should be a valid integer"),
        ("steps=1.5", "steps: got 1.5; input should be a valid integer"),
        ("steps=", "steps: got None; input should be a valid integer"),
        ("steps=-1", "steps: got -1; input should be greater than or equal to 0"),
        ("steps=[", "steps: got '[', which cannot be read as a value"),
        ("lr=0", "actor.optimizer.rate: got 0; input should be greater than 0"),
        ("actor.optimizer.betas=[1]", "actor.optimizer.betas.1: required, but missing"),
        ("world=Ledger", "world: got 'Ledger'; input should be 'text' or 'ledger'"),
        ("actor=5", "actor: got 5; expected keys below it, such as actor.name="),
        ("other=5", "other: got 5; expected keys below it, such as other.name="),
        ("actor=null", "actor: got None; input should be"),
        ("title=wrong", "title and world do not go together"),
        ("run=..", "run: got '..'; string should match pattern"),
        ("run=a/b", "run: got 'a/b'; string should match pattern"),
    ],
)
def test_bad_words_name_the_key_the_value_and_what_was_expected(word: str, message: str) -> None:
    def fragile(given: Mapping[str, Any]) -> dict[str, Any]:
        """A preset that trusts the shape of what it is given, as those of methods do."""
        return {"seed": int((given.get("actor") or {}).get("name") == "tiny")}

    with pytest.raises(BadInput) as error:
        configure(Config, [word], preset=fragile)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\n", "is not YAML: "),
        ("- steps\n", ": expected keys with values"),
        ("", ": expected keys with values"),
        ("7", ": expected keys with values"),
        ("steps: \x00", "is not YAML: "),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadInput) as error:
        configure(Config, [], file)
    assert str(error.value).startswith(f"--config: {file}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_not_text_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--config: cannot read .*nothing\.yaml: No such file or directory"):
        configure(Config, [], tmp_path / "nothing.yaml")
    with pytest.raises(BadInput, match="Is a directory"):
        configure(Config, [], tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not YAML"):
        configure(Config, [], tmp_path / "binary")


@pytest.mark.parametrize("text", ["stps: 3", "1: 2", "null: 3", "actor: {nme: x}", "actor: [1]", "model: {a: 1}"])
def test_bad_keys_and_values_in_a_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput):
        configure(Config, [], written(tmp_path, text))


@pytest.mark.parametrize(
    "words",
    [[], ["world=ledger"], ["actor.optimizer=null"], ["title=ä: 007\n", "run=007", "weights={}", "lr=1e-7"]],
)
def test_a_runs_own_config_file_gives_the_same_configuration(tmp_path: Path, words: list[str]) -> None:
    config = configure(Config, words, preset=preset)
    saved = {"method": "some", **config.model_dump(mode="json")}
    file = written(tmp_path, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))
    again = configure(Config, [], file, preset)
    assert again == config
    assert run_name("some", again) == run_name("some", config)


def test_spells_own_config_file_gives_the_same_run(tmp_path: Path) -> None:
    config = configure(SpellConfig, ["world=ledger", "steps=3"], preset=spell_preset)
    saved = {"method": "spell", **config.model_dump(mode="json")}
    file = written(tmp_path, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))
    assert configure(SpellConfig, [], file, spell_preset) == config


def test_a_given_name_is_the_runs_name() -> None:
    assert run_name("some", Config(run="mine")) == "mine"


def test_equal_configurations_have_one_name_and_others_another() -> None:
    name = run_name("some", Config())
    assert name == run_name("some", configure(Config, ["seed=0", "model=tiny"]))
    assert name.startswith("some-")
    for word in ("seed=1", "model=big", "lr=0.5", "weights={a: 2}", "other.name=tiny"):
        assert run_name("some", configure(Config, [word])) != name
    assert run_name("another", Config()) != name


class WithPolicy(MethodConfig):
    policy: PolicyConfig = PolicyConfig()


def test_what_may_change_when_a_run_is_continued_does_not_change_its_name() -> None:
    words = [
        *("runs_dir=elsewhere", "steps=7", "transport=ray", "checkpoint_every=3", "keep_checkpoints=9"),
        *("wandb=disabled", "wandb_project=mine", "deadline_s=5", "profile=laptop"),
        "gateway.address=127.0.0.1:0",
    ]
    assert {word.partition("=")[0].partition(".")[0] for word in words} | {"run"} == Config.MAY_CHANGE
    assert run_name("some", configure(Config, words)) == run_name("some", Config())


def test_the_same_holds_inside_of_a_policy() -> None:
    words = ["policy.trainer.workers=2", "policy.trainer.zero_stage=3", "policy.resources.gpus=1"]
    words += ["policy.sampler.replicas=2", "policy.sampler.sleep=true", "policy.trainer.offload=true"]
    names = [run_name("some", configure(WithPolicy, given)) for given in ([], words, ["policy.threads=3"])]
    assert names[0] == names[1] != names[2]


def test_a_profile_is_below_the_preset_and_above_the_defaults() -> None:
    def preset(given: Any) -> Any:
        return {"policy": {"sampler": {"replicas": 3}}}

    config = configure(WithPolicy, ["profile=cluster", "policy.trainer.workers=8"], None, preset)
    assert (config.transport, config.policy.dtype, config.policy.sampler.engine) == ("ray", "bfloat16", "vllm")
    assert (config.policy.sampler.replicas, config.policy.trainer and config.policy.trainer.workers) == (3, 8)
    assert configure(WithPolicy, ["profile=node", "policy.trainer=null"]).policy.resources.gpus == 0.5
    for name in ("laptop", "node", "cluster"):
        assert configure(WithPolicy, [f"profile={name}"]).profile == name


def test_names_are_those_of_every_earlier_release() -> None:
    """With another name, the same command would begin a second run."""
    assert run_name("some", Config()) == "some-cc1c9cb2"


def test_every_key_is_described_with_type_default_and_meaning() -> None:
    keys = {key: (kind, default, meaning) for key, kind, default, meaning in describe(Config)}
    assert keys["lr"] == ("float", "0.001", "Learning rate. Short for actor.optimizer.rate.")
    assert keys["actor.optimizer.rate"] == ("float", "0.001", "Learning rate.")
    assert keys["mode"][:2] == ("one of ['on', 'off', 'disabled', 'null']", '"on"')
    # A model that may be missing is a key itself, and so is all below it.
    assert keys["other"][1:] == ("null", "A second one.")
    assert keys["other.name"] == ("str", '"tiny"', "Name or path.")
    assert "actor" not in keys
    assert all(meaning for _, _, meaning in keys.values())


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)))
def test_merging_nothing_changes_nothing(value: Any) -> None:
    mapping = {"root": value}
    assert merged(mapping, {}) == merged({}, mapping) == merged(mapping, mapping) == mapping
