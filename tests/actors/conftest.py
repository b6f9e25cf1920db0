import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from actors.actor import start
from actors.policy.loading import Loaded, load
from actors.policy.policy import PolicyActor
from methods.worlds.ledger import vocabulary, write_skeleton
from protocols.policy import PolicyConfig

VOCABULARY = len(vocabulary())
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Grouped queries.
    "llama": COMMON,
    # One full and one sliding-window layer, far shorter than the prompts of the tests.
    "qwen2": COMMON | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    # Learned positions, which end at 64.
    "gpt2": {
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        **{"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    # Capped logits, in attention and output, and sliding windows.
    "gemma2": COMMON
    | {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
}

MakePolicy = Callable[..., Awaitable[PolicyActor]]
Calls = list[dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ledger_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer of the ledger world's model, without weights."""
    directory = tmp_path_factory.mktemp("ledger")
    write_skeleton(directory)
    return directory


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, ledger_dir: Path) -> dict[str, Path]:
    """A small saved model of each architecture, with the ledger world's tokenizer."""
    directories = {}
    for name, options in ARCHITECTURES.items():
        directory = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**options)).save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ledger_dir / file, directory)
        directories[name] = directory
    return directories


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def loaded(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Loaded:
    """Every architecture in turn. Tests only run it."""
    return load(PolicyConfig(model=str(model_dirs[request.param]), device="cpu"))


@pytest.fixture(scope="session")
def llama(model_dirs: dict[str, Path]) -> Loaded:
    """One architecture, for what does not depend on it. Tests only run it."""
    return load(PolicyConfig(model=str(model_dirs["llama"]), device="cpu"))


@pytest.fixture
async def make_policy(ledger_dir: Path) -> AsyncIterator[MakePolicy]:
    """Start policy actors, by default with random weights on the ledger world's configuration."""
    actors: list[PolicyActor] = []

    async def make(**options: Any) -> PolicyActor:
        defaults = {"model": str(ledger_dir), "init": "random", "threads": 1, "device": "cpu"}
        actor = PolicyActor(PolicyConfig.model_validate(defaults | options))
        actors.append(actor)
        await start(actor)
        return actor

    yield make
    for actor in actors:
        await actor.close()


@pytest.fixture
async def policy(make_policy: MakePolicy) -> PolicyActor:
    return await make_policy()


@pytest.fixture
def forward_calls() -> Callable[[Any], AbstractContextManager[Calls]]:
    """Watch a model: the keyword arguments of each of its forward calls."""

    @contextmanager
    def watch(model: Any) -> Iterator[Calls]:
        calls: Calls = []
        hook = model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()

    return watch


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: characters beyond ASCII take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(["the theme of this thesis is éé üü"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
