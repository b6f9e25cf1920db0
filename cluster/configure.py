"""From a YAML file and `key=value` words to a method's configuration, and its description for --help."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import MethodConfig, merged
from cluster.run_directory import flatten
from protocols.errors import BadInput, describe_validation_error
from protocols.policy import PolicyConfig
from protocols.reward_model import RewardModelConfig

C = TypeVar("C", bound=MethodConfig)
PROFILES = Path(__file__).parent / "profiles"


def configure(
    kind: type[C],
    words: Sequence[str],
    file: Path | None = None,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> C:
    """The configuration that a command line means: words over file over preset over profile over defaults.

    Raises BadInput that names the key, the value and what was expected; an unknown key gets its nearest.
    """
    given: dict[str, Any] = {}
    if file is not None:
        values = read_yaml(file, "--config")
        # A run's own config.yaml can be given as it is; it also names its method.
        values.pop("method", None)
        given = merged(given, _expand(kind, values))
    for word in words:
        given = merged(given, _expand(kind, _override(kind, word)))
    _check_keys(kind, given)
    if preset is not None:
        given = merged(preset(given), given)
    given = merged(_profile(kind, given), given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise BadInput(describe_validation_error(error)) from error


def _without(values: Mapping[str, Any], paths: set[str], prefix: str = "") -> dict[str, Any]:
    """Nested mappings without what lies at the given dotted paths."""
    kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in paths}
    return {
        key: _without(value, paths, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def may_change(config: MethodConfig) -> set[str]:
    """Keys that may differ from those of a run that is continued."""
    inner = {f"{field}.{key}" for field in policy_fields(type(config)) for key in config.POLICY_MAY_CHANGE}
    inner |= {f"{field}.{key}" for field in _reward_fields(type(config)) for key in config.REWARD_MAY_CHANGE}
    return {*config.MAY_CHANGE, *inner}


def policy_fields(kind: type[BaseModel]) -> list[str]:
    """Names of the fields that hold a policy's configuration."""
    return [name for name, field in kind.model_fields.items() if _model_of(field.annotation) is PolicyConfig]


def _reward_fields(kind: type[BaseModel]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if _model_of(field.annotation) is RewardModelConfig]


def _profile(kind: type[MethodConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the profile says, its part about policies for each of the method's."""
    name = given.get("profile")
    file = PROFILES / f"{name}.yaml"
    if not isinstance(name, str) or not name or not file.is_file():
        return {}
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    policy = values.pop("policy", {})
    reward = {key: value for key, value in policy.items() if key in RewardModelConfig.model_fields}
    parts = dict.fromkeys(policy_fields(kind), policy)
    for field in _reward_fields(kind):
        default = kind.model_fields[field].default
        given_kind = (given.get(field) or {}).get("kind", default.kind if default else RewardModelConfig().kind)
        # Rules need no GPU, and what is not there by default is not to be there by profile.
        if given_kind != "rules" and (default is not None or field in given):
            parts[field] = reward
    return values | {field: part for field, part in parts.items() if given.get(field, {}) is not None}


def run_name(method: str, config: MethodConfig) -> str:
    """The run's name: the given one, or one that every equal configuration gets."""
    if config.run:
        return config.run
    values = _without(config.model_dump(mode="json"), may_change(config))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{method}-{digest[:8]}"


def describe(kind: type[MethodConfig]) -> Iterator[tuple[str, str, str, str]]:
    """Every key with its type, default and meaning."""
    keys = {row[0]: row for row in _describe(kind, None, "")}
    for name, target in kind.SHORTCUTS.items():
        _, type_name, default, meaning = keys[target]
        yield name, type_name, default, f"{meaning} Short for {target}."
    yield from keys.values()


def _describe(kind: type[BaseModel], default: BaseModel | None, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """The keys of a model. A field that holds one may have a default of its own, unlike that model's defaults."""
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        inner = _model_of(field.annotation)
        value = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        if inner is None or value is None:
            meaning = " ".join((field.description or "").split())
            yield path, _type_name(field.annotation), _shown(value), meaning
        if inner is not None:
            yield from _describe(inner, value if isinstance(value, inner) else None, f"{path}.")


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """The keys and values of a file, which errors call `what`. Raises BadInput."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{what}: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{what}: {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{what}: {file}: expected keys with values")
    return values


def _override(kind: type[MethodConfig], word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise BadInput(f"{word!r}: expected key=value")
    path = kind.SHORTCUTS.get(key, key)
    value: Any = text if _is_text(_annotation(kind, path)) else _yaml_value(key, text)
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def _yaml_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{key}: got {text!r}, which cannot be read as a value") from error


def _expand(kind: type[MethodConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Shortcuts at the top level become the keys they are short for."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(kind.SHORTCUTS.get(str(key), str(key)).split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def _check_keys(kind: type[MethodConfig], given: Mapping[str, Any]) -> None:
    """Raise BadInput for the first unknown key, with the nearest known one."""
    known = [name for name, *_ in describe(kind)]
    for path in _unknown(kind, given, ""):
        by_end = [name for name in known if name.split(".")[-1] == path.split(".")[-1]]
        alike, remote = (difflib.get_close_matches(path, known, n=1, cutoff=cutoff) for cutoff in (0.8, 0.5))
        near = alike or by_end or remote
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"{path}: unknown key{hint} (--help lists all keys)")


def _unknown(kind: type[BaseModel], given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Paths that lead nowhere. Raises BadInput for a value where more keys are expected."""
    for key, value in given.items():
        field = kind.model_fields.get(str(key))
        if field is None:
            yield next(iter(flatten({key: value}, prefix.rstrip("."))))
            continue
        inner = _model_of(field.annotation)
        if inner is None or value is None:
            continue
        if not isinstance(value, Mapping):
            example = f"{prefix}{key}.{next(iter(inner.model_fields))}"
            raise BadInput(f"{prefix}{key}: got {value!r}; expected keys below it, such as {example}=")
        yield from _unknown(inner, value, f"{prefix}{key}.")


def _annotation(kind: type[BaseModel], path: str) -> Any:
    """Type of the field at a dotted path, or None if there is none."""
    head, _, rest = path.partition(".")
    field = kind.model_fields.get(head)
    if field is None:
        return None
    inner = _model_of(field.annotation)
    if not rest:
        return field.annotation
    return _annotation(inner, rest) if inner else None


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, if it holds one (or one or nothing)."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return models[0] if len(models) == 1 else None


def _is_text(annotation: Any) -> bool:
    """Whether a word on the command line is the value itself, so that `run=007` stays as it is."""
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return annotation is str or (bool(choices) and all(isinstance(choice, str) for choice in choices))


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    # Without the modules that classes come from.
    return re.sub(r"\b[a-z_][\w.]*\.(?=[A-Z])", "", name).replace("Literal[", "one of [")


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        default = {str(key): value for key, value in default.items()}
    return json.dumps(default, default=str)
