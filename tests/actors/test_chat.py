from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.policy.chat import TextTail, encode, ends_of, vocabulary_digest
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Prompt

TURNS = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="the theme?")]
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Few letters, so that stop texts often begin and sometimes occur; characters of one to four bytes.
TEXTS = st.text("thes é√日🜂", max_size=30)
STOPS = st.lists(st.text("thes é日", min_size=1, max_size=4), max_size=3)


def pushed(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextTail]:
    """What each token adds until a stop text is complete, and last what `finish` adds."""
    tail = TextTail(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(tail.push(token))
        if tail.stopped:
            break
    return [*pieces, tail.finish()], tail


def test_tokens_are_taken_as_they_are(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(Prompt(tokens=[5, 6, 250]), byte_tokenizer).tolist() == [5, 6, 250]


def test_text_is_tokenized_as_it_stands(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(Prompt(text="the theme"), byte_tokenizer)
    assert ids.dtype == "int32"
    assert byte_tokenizer.decode(ids) == "the theme"


def test_a_conversation_ends_with_the_assistants_turn_opened(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    try:
        ids = encode(Prompt(messages=TURNS), byte_tokenizer)
    finally:
        byte_tokenizer.chat_template = None
    assert byte_tokenizer.decode(ids) == "<system>Be brief.<user>the theme?<assistant>"


def test_without_a_template_the_turns_are_lines(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert byte_tokenizer.decode(encode(Prompt(messages=TURNS), byte_tokenizer)) == "Be brief.\nthe theme?"


@pytest.mark.parametrize("prompt", [Prompt(text="", uid="q7"), Prompt(tokens=[], uid="q7")])
def test_an_empty_prompt_is_refused_by_name(prompt: Prompt, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadInput, match=r"'q7'.*at least one token"):
        encode(prompt, byte_tokenizer)


@given(text=TEXTS)
@settings(max_examples=60)
def test_pieces_make_the_text_and_characters_come_whole(text: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, tail = pushed(byte_tokenizer, byte_tokenizer(text)["input_ids"])
    assert "".join(pieces) == text == tail.text
    assert pieces[-1] == "" and not any("�" in piece for piece in pieces)


@given(text=TEXTS, stop=STOPS)
@example(text="the theme", stop=["theme", "them"])
@example(text="ththe", stop=["the"])
@settings(max_examples=150)
def test_text_ends_before_the_first_stop_text(
    text: str, stop: list[str], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces, tail = pushed(byte_tokenizer, byte_tokenizer(text)["input_ids"], stop)
    # Tokens come one by one: a longer stop text that begins earlier is not waited for.
    first = min((end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), default=None)
    if first is None:
        assert not tail.stopped and tail.text == text
    else:
        assert tail.stopped and tail.text in {text[: text.find(s)] for s in stop if s in text}
        assert not any(s in tail.text for s in stop)
    assert "".join(pieces) == tail.text


def test_what_may_begin_a_stop_text_is_held_back(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = [byte_tokenizer.convert_tokens_to_ids(letter) for letter in "xenxend"]
    pieces, _ = pushed(byte_tokenizer, tokens, ["end"])
    assert pieces == ["x", "", "", "enx", "", "", "", ""]
    pieces, _ = pushed(byte_tokenizer, tokens[:3], ["end"])
    assert pieces == ["x", "", "", "en"]


@given(tokens=st.lists(st.integers(0, 299), max_size=20))
@settings(max_examples=60)
def test_any_tokens_make_their_decoded_text(tokens: list[int], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, _ = pushed(byte_tokenizer, tokens)
    assert "".join(pieces) == byte_tokenizer.decode(tokens, skip_special_tokens=True)


# Where tokens end.


def check_ends(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """What must hold for any tokens; where they end."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    found = ends_of(np.asarray(tokens, np.int32), tokenizer)
    assert found.dtype == np.int32
    ends = found.tolist()
    assert len(ends) == len(tokens)
    assert ends == sorted(ends)
    assert ends[-1:] == [len(text)][: len(tokens)]
    assert "".join(text[start:end] for start, end in pairwise([0, *ends])) == text
    return ends


@given(tokens=st.lists(st.integers(0, 299), max_size=20))
@example(tokens=[])
@settings(max_examples=100)
def test_any_tokens_share_their_text_out(tokens: list[int], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    check_ends(byte_tokenizer, tokens)


@given(text=TEXTS)
@settings(max_examples=100)
def test_tokens_of_a_text_end_with_their_characters(text: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    found = byte_tokenizer(text, return_offsets_mapping=True)
    ends = check_ends(byte_tokenizer, found["input_ids"])
    # The tokenizer itself says which characters a token touches; one that ends within a character does not have it.
    for i, (_, touched) in enumerate(found["offset_mapping"]):
        assert touched - 1 <= ends[i] <= touched
        whole = i + 1 == len(ends) or found["offset_mapping"][i + 1][0] == touched
        assert (ends[i] == touched) == whole


def test_ends_in_characters_of_several_bytes(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    # é is one token by its merge; 日 has three bytes and 🜂 four, one token each.
    tokens = byte_tokenizer("é日a🜂")["input_ids"]
    assert len(tokens) == 1 + 3 + 1 + 4
    assert check_ends(byte_tokenizer, tokens) == [1, 1, 1, 2, 3, 3, 3, 3, 4]
    end = byte_tokenizer.eos_token_id
    assert check_ends(byte_tokenizer, [*tokens[:3], end]) == [1, 1, 1, 2]
    assert check_ends(byte_tokenizer, [end, tokens[0], end]) == [0, 1, 1]


def test_a_digest_names_a_vocabulary(byte_tokenizer: PreTrainedTokenizerFast, ledger_dir: Path) -> None:
    other = AutoTokenizer.from_pretrained(ledger_dir)
    digests = [vocabulary_digest(one) for one in (byte_tokenizer, other, AutoTokenizer.from_pretrained(ledger_dir))]
    assert digests[0] != digests[1] == digests[2]
    other.add_tokens(["a new one"])
    assert vocabulary_digest(other) not in digests


def test_an_unfinished_character_comes_with_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, tail = pushed(byte_tokenizer, byte_tokenizer("a日")["input_ids"][:-1])
    assert pieces == ["a", "", "", "�"] and tail.text == "a�"


def test_blanks_between_words_of_a_metaspace_tokenizer_stay() -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {
        token: i for i, token in enumerate(["<unk>", "<end>", "▁to", "▁be", "or", "<0xE6>", "<0x97>", "<0xA5>"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    pieces, _ = pushed(fast, [2, 3, 4, 1, 3, 5, 6, 7, 2])
    assert pieces == ["to", " be", "or", "", " be", "", "", "日", " to", ""]


def test_the_ledger_worlds_texts(ledger_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ledger_dir)
    prompt = Prompt(messages=[ChatMessage(role="user", content="K0 is V1. K0 leads to K2.")])
    ids = encode(prompt, tokenizer)
    assert len(ids) == 2 and tokenizer.unk_token_id not in ids
    assert "".join(pushed(tokenizer, ids.tolist())[0]) == "K0 is V1.K0 leads to K2."
