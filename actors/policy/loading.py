"""Loading a model and its tokenizer in Hugging Face format."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from protocols.errors import BadInput
from protocols.policy import LoRAConfig, PolicyConfig

# A run has its own display; bars of every save and load would tear it.
transformers_logging.disable_progress_bar()

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass
class Loaded:
    """A model ready to run, and what sampling needs to know of it."""

    model: Any
    tokenizer: Any
    eos_token_ids: list[int]
    context_length: int
    trainable: bool

    @property
    def pad_token_id(self) -> int:
        """Any valid token: padded places are masked."""
        return int(self.tokenizer.pad_token_id or 0)


def load(config: PolicyConfig) -> Loaded:
    """Load the model of a policy onto its device. Raises BadInput when there is no such model."""
    source = resolve(config.model)
    trainable = config.trainer is not None
    frozen_half = config.dtype == "bfloat16" and not trainable
    dtype = torch.bfloat16 if frozen_half else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = _random_model(source, config.seed, dtype) if config.init == "random" else None
        model = model or AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise BadInput(f"model: cannot load {config.model!r}: {_first_line(error)}") from error
    if config.lora is not None and trainable:
        model = _with_adapter(model, config.lora, config.seed)
    model.requires_grad_(trainable) if config.lora is None else None
    model.to(device_of(config.device)).eval()
    return Loaded(model, tokenizer, _eos_ids(model, tokenizer), _context_length(model), trainable)


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
    return model


def device_of(name: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA if there is one. Raises BadInput for an unknown device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"device: {name!r} is not a torch device such as cpu or cuda:0") from error


def _random_model(source: str, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)


def _with_adapter(model: Any, config: LoRAConfig, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = config.target_modules
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, adapter)


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def _context_length(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
