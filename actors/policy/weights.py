"""Writing and reading models in Hugging Face format."""

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from actors.policy.loading import UNREADABLE, Loaded, pretrained
from protocols.errors import BadInput, Corrupt


def write_model(
    loaded: Loaded, directory: Path, *, whole: bool, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write model and tokenizer. A model with an adapter writes the adapter alone unless `whole`, then merged.

    `state` holds the weights when the module itself has only shards of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = loaded.model
    if not isinstance(model, PeftModel):
        model.save_pretrained(directory, state_dict=state)
    elif whole and state is not None:
        raise BadInput("save: an adapter cannot be merged into a model whose weights are sharded (ZeRO-3)")
    elif whole:
        copy.deepcopy(model).merge_and_unload().save_pretrained(directory)
    else:
        # By itself peft would ask the hub whether the vocabulary has grown.
        model.save_pretrained(directory, save_embedding_layers=False, state_dict=state)
    loaded.tokenizer.save_pretrained(directory)


def read_weights(loaded: Loaded, directory: Path) -> None:
    """Copy saved weights into the loaded module. Raises Corrupt when they are missing or do not fit."""
    try:
        if isinstance(loaded.model, PeftModel):
            _read_adapter(loaded.model, directory)
        else:
            saved = pretrained(directory, next(loaded.model.parameters()).dtype, loaded.head)
            with torch.no_grad():
                loaded.model.load_state_dict(saved.state_dict())
    except UNREADABLE as error:
        raise Corrupt(f"{directory} does not hold the weights of this model: {error}") from error


def _read_adapter(model: PeftModel, directory: Path) -> None:
    saved = load_file(directory / "adapter_model.safetensors")
    different = saved.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if different:
        raise ValueError(f"{len(different)} weights of the adapter differ by name, such as {min(different)}")
    set_peft_model_state_dict(model, saved)


def files_of(directory: Path) -> list[str]:
    """All files below a directory, relative to it, sorted."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
