"""Loading a model and its tokenizer in Hugging Face format."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from protocols.errors import BadInput
from protocols.model import Head, LoRAConfig, ModelConfig

# A run has its own display; bars of every save and load would tear it.
transformers_logging.disable_progress_bar()

UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for a model that is missing, damaged, or does not fit its configuration."""

EMBEDDED = Path(__file__).parent / "embedded"

ONE_AT_A_TIME = RLock()
"""To be held while a model is made. What transformers and torch change for that time belongs to the whole process:
of two threads that load, one would leave all later models untied, and each draws the other's random numbers."""


@dataclass
class Loaded:
    """A model ready to run, and what sampling needs to know of it."""

    model: Any
    tokenizer: Any
    eos_token_ids: list[int]
    context_length: int
    trainable: bool
    head: Head = "vocabulary"

    @property
    def vocab_size(self) -> int:
        """Size of the output distribution."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def pad_token_id(self) -> int:
        """Any valid token: padded places are masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def adapter(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The adapter's weights by name; none if there is no adapter."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if ".lora_" in name]

    def check_tokens(self, tokens: NDArray[np.int32], name: str, *, room: int = 0) -> None:
        """Raise BadInput unless the model can read them and has `room` for more."""
        limit = self.context_length - room
        if not 1 <= len(tokens) <= limit:
            raise BadInput(f"{name}: got {len(tokens)} tokens, expected 1 to {limit}")
        self.check_ids(tokens, name)

    def check_ids(self, tokens: NDArray[np.int32], name: str) -> None:
        """Raise BadInput unless they are of the model's vocabulary."""
        limit = self.vocab_size - 1
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= limit:
            raise BadInput(f"{name}: got token ids {tokens.min()} to {tokens.max()}, expected 0 to {limit}")


def load(config: ModelConfig, *, frozen: bool = False) -> Loaded:
    """Load a model onto its device. Raises BadInput when there is no such model.

    `frozen`: as it is trained, adapter included, but to be sampled from alone.
    """
    device = device_of(config.device)
    source = resolve(config.model)
    trainable = config.trainer is not None and not frozen
    frozen_half = config.dtype == "bfloat16" and not trainable
    dtype = torch.bfloat16 if frozen_half else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = _drawn_from(config, source, dtype)
    except UNREADABLE as error:
        raise BadInput(f"model: cannot load {config.model!r}: {_first_line(error)}") from error
    if config.head == "scalar" and model.config.get_text_config().pad_token_id is None:
        # Whoever scores batches with the saved model must know where its rows end.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if config.lora is not None and config.trainer is not None:
        model = _with_adapter(model, config.lora, config.seed, config.head)
    else:
        # A sampler's copy says the same as the trainer's: it decides on kernels, so on the last bits.
        model.requires_grad_(config.trainer is not None)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # The faster kernels leave the cap out without a word.
        model.set_attn_implementation("eager")
    model.to(device).eval()
    return Loaded(model, tokenizer, _eos_ids(model, tokenizer), _context_length(model), trainable, config.head)


def load_outline(config: ModelConfig) -> Loaded:
    """A model without its weights, for an engine that holds them: names, shapes, vocabulary, tokenizer."""
    source = resolve(config.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with ONE_AT_A_TIME, torch.device("meta"):
            model = _random_model(source, config.head, torch.float32)
            if config.lora is not None:
                model = _with_adapter(model, config.lora, config.seed, config.head)
    except UNREADABLE as error:
        raise BadInput(f"model: cannot load {config.model!r}: {_first_line(error)}") from error
    model.requires_grad_(False)
    with suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(source)
    return Loaded(model, tokenizer, _eos_ids(model, tokenizer), _context_length(model), False, config.head)


def pretrained(source: str | Path, dtype: torch.dtype, head: Head = "vocabulary", *, new_head: bool = False) -> Any:
    """A model with all of its weights (transformers makes up what is missing). Raises one of UNREADABLE.

    `new_head`: a scalar head may be missing, and is then drawn at random.
    """
    if head == "vocabulary":
        with ONE_AT_A_TIME:
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    else:
        with ONE_AT_A_TIME, quiet():  # it reports a missing head, which is what is expected of a base model
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=dtype, num_labels=1, output_loading_info=True
            )
        score_tokens(model)
    missing = sorted(set(info["missing_keys"]) - ({"score.weight"} if new_head else set()))
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing of weights that are missing."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def score_tokens(model: Any) -> None:
    """Make a sequence classifier answer with the scores of all tokens, or those to keep, not of the last alone.

    It keeps the names of its class and weights, so that what it saves is a sequence classifier. Raises ValueError
    when it has no plain head.
    """
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear head named `score`, so its tokens cannot be scored")

    def forward(
        self: Any, input_ids: torch.Tensor, logits_to_keep: Any = slice(None), **inputs: Any
    ) -> SequenceClassifierOutput:
        states_BTD = self.base_model(input_ids=input_ids, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(states_BTD[:, logits_to_keep]))

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})


def resolve(model: str) -> str:
    """Directory or hub name of a model. Raises BadInput for a path that does not exist."""
    if model == "embedded":
        return str(EMBEDDED)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"model: {model!r} is a folder without config.json, not a Hugging Face model")
        return str(path)
    if path.is_file() or model.startswith((".", "/", "~")) or model.count("/") > 1 or os.sep not in model:
        raise BadInput(
            f"model: {model!r} does not exist; expected `embedded`, a folder with a Hugging Face model, or a hub"
            " name such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    _ask_hub(model)
    return model


def _ask_hub(name: str) -> None:
    """Ask once whether the hub has a model; its library would retry for a minute without a network."""
    try:
        found = isinstance(try_to_load_from_cache(name, "config.json"), str) or file_exists(name, "config.json")
    except Exception as error:
        raise BadInput(f"model: {name!r} is no folder, and the hub cannot be asked: {_first_line(error)}") from error
    if not found:
        raise BadInput(f"model: {name!r} is neither a folder nor a model on the hub that can be read from here")


def device_of(name: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA if there is one. Raises BadInput if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device: {name!r} is no device of this machine; expected auto, cpu, or such as cuda:0"
            f" ({_first_line(error)})"
        ) from error


def _drawn_from(config: ModelConfig, source: str, dtype: torch.dtype) -> Any:
    """The model with its weights; what is drawn at random depends on the seed alone."""
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.init == "random":
            return _random_model(source, config.head, dtype)
        # Nobody would train the head of a model that does not learn.
        return pretrained(source, dtype, config.head, new_head=config.trainer is not None)


def _random_model(source: str, head: Head, dtype: torch.dtype) -> Any:
    shape = AutoConfig.from_pretrained(source)
    if head == "vocabulary":
        return AutoModelForCausalLM.from_config(shape, dtype=dtype)
    shape.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(shape, dtype=dtype)
    score_tokens(model)
    return model


def _with_adapter(model: Any, config: LoRAConfig, seed: int, head: Head) -> Any:
    from peft import LoraConfig, get_peft_model

    names = config.target_modules
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        task_type="CAUSAL_LM" if head == "vocabulary" else None,
        # A head that starts at random has nothing to adapt.
        modules_to_save=["score"] if head == "scalar" else None,
    )
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, adapter)
        except ValueError as error:
            raise BadInput(f"lora.target_modules: got {names!r}; {_first_line(error)}") from error


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    # First the one that ends a turn of a conversation: whoever teaches an end teaches this one.
    return own + sorted({int(i) for i in ids if i is not None} - set(own))


def _context_length(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
