"""Writing and reading models in Hugging Face format."""

import copy
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.policy.loading import Loaded
from protocols.errors import Corrupt


def write_model(loaded: Loaded, directory: Path, *, whole: bool) -> None:
    """Write model and tokenizer. A model with an adapter writes the adapter alone unless `whole`, then merged."""
    directory.mkdir(parents=True, exist_ok=True)
    model = loaded.model
    if whole and isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)


def read_weights(loaded: Loaded, directory: Path) -> None:
    """Copy saved weights into the loaded module. Raises Corrupt when they are missing or do not fit."""
    try:
        if isinstance(loaded.model, PeftModel):
            set_peft_model_state_dict(loaded.model, load_file(directory / "adapter_model.safetensors"))
        else:
            saved = AutoModelForCausalLM.from_pretrained(directory, dtype=next(loaded.model.parameters()).dtype)
            with torch.no_grad():
                loaded.model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise Corrupt(f"{directory} does not hold the weights of this model: {error}") from error
