"""Configuration and tokenizer of the embedded model, before it has learnt anything.

The tokenizer is made for copying: a word is the same tokens after a blank, a quotation mark, a bracket or a
line end. Each word is written with a blank before it; where the text has none, a mark (GLUE) before that
blank takes it away again. Digits stand alone. The fixed parts of all prompts, and the phrases in which the
model answers, are one token each.
"""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from methods.worlds.lessons import phrases
from protocols.prompts import fixed_texts
from protocols.service import Message

GLUE = "\x1f"
PAD, TURN, END = "<|pad|>", "<|assistant|>", "<|end|>"
SHORTEST_FIXED_TEXT = 5

_LETTER = r"\p{L}\p{M}"
_MARKS = string.punctuation + "\n\t“”‘’—–…•"
_PIECES = (
    rf" ?[{_LETTER}]+",
    r" ?\p{N}",
    rf" ?([^\s{_LETTER}\p{{N}}{GLUE}])\1*{GLUE}?",
    r" +(?= )",
    rf"\s{GLUE}?",
    GLUE,
)


class Shape(Message):
    """Size of the model."""

    vocabulary: int = 2048
    """Tokens, the fixed ones among them."""
    layers: int = 4
    """Transformer blocks."""
    width: int = 160
    """Width of the residual stream."""
    heads: int = 5
    """Attention heads per block."""
    hidden: int = 384
    """Width of the feed-forward layers."""
    context: int = 2048
    """Longest sequence, in tokens."""


def write_skeleton(directory: Path, shape: Shape, texts: Iterable[str]) -> None:
    """Write configuration and tokenizer in Hugging Face format, without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(shape.vocabulary, texts)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "chat_template": "{% for message in messages %}{{ message.content }}"
            "{% if message.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + TURN + "{% endif %}",
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.context,
        },
        "config.json": model_config(shape, tokenizer),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def train_tokenizer(vocabulary: int, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE over the texts, with the fixed tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _glued()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(_PIECES)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(f"{GLUE} ?"), "")])
    fixed = fixed_tokens()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(fixed),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {PAD, TURN, END}
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in fixed])
    return tokenizer


def _glued() -> normalizers.Normalizer:
    """Give a word the blank that it lacks after an opening mark and at the start, and put GLUE before it."""
    word, inside = rf"(?=[{_LETTER}\p{{N}}])", rf"(?<![{_LETTER}\p{{N}}])"
    at_start = [normalizers.Prepend(f"{GLUE} "), normalizers.Replace(Regex(rf"\A{GLUE} (?!{word})"), "")]
    # One rule per mark, because a replacement cannot repeat what was matched, and an empty match breaks offsets.
    after = [
        normalizers.Replace(Regex(("" if mark.isspace() else inside) + re.escape(mark) + word), f"{mark}{GLUE} ")
        for mark in _MARKS
    ]
    return normalizers.Sequence([*at_start, *after])


def fixed_tokens() -> list[str]:
    """Texts that are one token each: control tokens, fixed parts of prompts, phrases of the replies."""
    prompts = [text for text in fixed_texts() if len(text) >= SHORTEST_FIXED_TEXT]
    return list(dict.fromkeys([PAD, TURN, END, *prompts, *phrases()]))


def model_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """The Hugging Face configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
