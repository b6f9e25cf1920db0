import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from actors.policy import loading
from actors.policy.loading import device_of, load, resolve
from protocols.errors import BadInput
from protocols.policy import PolicyConfig


def config(directory: Path, **options: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"model": str(directory), "device": "cpu"} | options)


@pytest.fixture
def broken(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model that a test may spoil."""
    return Path(shutil.copytree(model_dirs["llama"], tmp_path / "model"))


# Where a model comes from.


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such", "~/no-such", "no-such", "a/b/c", ""])
def test_a_path_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"^model: "):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"model: .*weights.bin' does not exist; expected"):
        resolve(str(tmp_path / "weights.bin"))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model: .* is a folder without config.json"):
        resolve(str(tmp_path))


def test_without_a_network_a_hub_name_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def no_network(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise socket.gaierror("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s to ask again"))
    with pytest.raises(BadInput, match=r"model: 'nobody/no-such-model' is no folder, and the hub cannot be asked"):
        load(PolicyConfig(model="nobody/no-such-model", device="cpu"))
    assert len(attempts) <= 2


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "file_exists", lambda *_: False)
    with pytest.raises(BadInput, match="'nobody/no-such-model' is neither a folder nor a model on the hub"):
        resolve("nobody/no-such-model")


def test_a_model_in_the_hubs_cache_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert resolve("org/cached") == "org/cached"


def test_a_name_that_is_no_hub_name() -> None:
    with pytest.raises(BadInput, match=r"^model: 'a b/c d' is no folder, .* alphanumeric"):
        resolve("a b/c d")


# What can be wrong with it.


def spoil_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_a_weight(directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


SPOILERS = {
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "cut weights": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:1000]
    ),
    "empty weights": lambda path: (path / "model.safetensors").write_bytes(b""),
    "a missing weight": drop_a_weight,
    "another width": lambda path: spoil_config(path, intermediate_size=40),
    "another kind": lambda path: spoil_config(path, model_type="gpt2", n_embd=32),
    "an unknown kind": lambda path: spoil_config(path, model_type="no-such-kind"),
    "no JSON": lambda path: (path / "config.json").write_text("{"),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "a cut tokenizer": lambda path: (path / "tokenizer.json").write_text('{"version": "1.0"'),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_a_spoiled_model_is_refused(what: str, broken: Path) -> None:
    SPOILERS[what](broken)
    with pytest.raises(BadInput, match=r"^model: cannot load '.*': \S"):
        load(config(broken))


def test_the_message_of_a_missing_weight_names_it(broken: Path) -> None:
    drop_a_weight(broken)
    with pytest.raises(BadInput, match=r"1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        load(config(broken))


# What is loaded.


def weights(loaded: loading.Loaded) -> dict[str, torch.Tensor]:
    return dict(loaded.model.state_dict())


def test_saved_weights_are_loaded_exactly(model_dirs: dict[str, Path]) -> None:
    saved = load_file(model_dirs["llama"] / "model.safetensors")
    loaded = weights(load(config(model_dirs["llama"])))
    assert all(torch.equal(loaded[name], values) for name, values in saved.items())


def test_models_that_are_loaded_side_by_side_are_those_loaded_alone(
    ledger_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers replaces `tie_weights` of all models while it loads one, torch has one generator of numbers."""
    tie_weights = PreTrainedModel.tie_weights
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie_weights)
    wanted = [config(ledger_dir, init="random", seed=seed, lora={"rank": 1}) for seed in range(8)]
    wanted += [PolicyConfig(device="cpu")] * 8
    alone = [weights(load(one)) for one in wanted]
    with ThreadPoolExecutor(4) as pool:
        for one, loaded in zip(alone, pool.map(load, wanted), strict=True):
            found = weights(loaded)
            assert found.keys() == one.keys()
            assert all(torch.equal(found[name], values) for name, values in one.items())
    assert PreTrainedModel.tie_weights is tie_weights


def test_random_weights_depend_on_the_seed_alone(ledger_dir: Path) -> None:
    before = torch.get_rng_state()
    first = weights(load(config(ledger_dir, init="random", seed=5)))
    torch.rand(3)
    second, other = (weights(load(config(ledger_dir, init="random", seed=seed))) for seed in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    torch.set_rng_state(before)
    assert not load(config(ledger_dir, init="random")).model.training
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_are_not_the_saved_ones(model_dirs: dict[str, Path]) -> None:
    saved, fresh = (weights(load(config(model_dirs["llama"], init=init))) for init in ("pretrained", "random"))
    assert not torch.equal(saved["lm_head.weight"], fresh["lm_head.weight"])


@pytest.mark.parametrize(
    ("dtype", "trainer", "kept"),
    [
        ("float32", {}, torch.float32),
        ("bfloat16", {}, torch.float32),
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
    ],
)
def test_only_frozen_weights_are_held_in_half_precision(
    dtype: str, trainer: dict[str, Any] | None, kept: torch.dtype, model_dirs: dict[str, Path]
) -> None:
    loaded = load(config(model_dirs["llama"], dtype=dtype, trainer=trainer))
    assert {p.dtype for p in loaded.model.parameters()} == {kept}
    assert {p.requires_grad for p in loaded.model.parameters()} == {trainer is not None}
    assert loaded.trainable == (trainer is not None) and not loaded.model.training


def test_a_frozen_policy_has_no_adapter(model_dirs: dict[str, Path]) -> None:
    loaded = load(config(model_dirs["llama"], trainer=None, lora={}))
    assert not any(p.requires_grad or "lora" in name for name, p in loaded.model.named_parameters())


def test_an_adapter_alone_is_trainable(model_dirs: dict[str, Path]) -> None:
    loaded = load(config(model_dirs["llama"], lora={"rank": 2, "target_modules": "q_proj, v_proj"}))
    trained = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    assert all("q_proj" in name or "v_proj" in name for name in trained)


def test_an_adapter_without_a_place(model_dirs: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"lora.target_modules: got 'no_such'"):
        load(config(model_dirs["llama"], lora={"target_modules": "no_such"}))


def test_facts_about_the_model(loaded: loading.Loaded) -> None:
    assert (loaded.context_length, loaded.vocab_size, loaded.pad_token_id) == (64, 182, 0)
    assert loaded.tokenizer.eos_token_id in loaded.eos_token_ids


def test_end_tokens_of_generation_and_tokenizer_count(broken: Path) -> None:
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = load(config(broken))
    assert loaded.eos_token_ids == sorted({7, 9, loaded.tokenizer.eos_token_id})


# Devices.


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=f"^device: '{name}' is no device of this machine; expected auto, cpu"):
        load(config(model_dirs["llama"], device=name))


def test_the_device_is_cuda_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")
