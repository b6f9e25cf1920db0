"""Small models over a few dozen words, without weights: encoders and policies of built-in worlds."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, CLS, SEP, MASK, TURN, END = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[TURN]", "[END]"
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}" + TURN


def tokens_of(words: Sequence[str]) -> list[str]:
    """All tokens in the order of their ids: special ones, then a world's words."""
    return [PAD, CLS, SEP, MASK, TURN, END, *words]


def write_tiny(
    folder: Path,
    words: Sequence[str],
    *,
    width: int,
    masked: bool,
    spread: float,
    layers: int = 2,
    context: int = 128,
) -> None:
    """Write configuration and tokenizer: a few layers, a token per word, words apart by blanks.

    `spread`: deviation of fresh weights.
    """
    # They take seconds to load, and whoever asks for help needs none of them.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

    tokens = tokens_of(words)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": PAD, "mask_token": MASK, "eos_token": END}
    shape: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": spread,
        "pad_token_id": tokens.index(PAD),
        "eos_token_id": tokens.index(END),
    }
    if masked:
        special |= {"cls_token": CLS, "sep_token": SEP}
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config.architectures = ["BertForMaskedLM"]
    else:
        config = LlamaConfig(**shape, tie_word_embeddings=True)
        config.architectures = ["LlamaForCausalLM"]
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **special).save_pretrained(staging)
    config.save_pretrained(staging)
    folder.mkdir(parents=True, exist_ok=True)
    # Another run may be reading the same files.
    for file in staging.iterdir():
        os.replace(file, folder / file.name)
    staging.rmdir()
