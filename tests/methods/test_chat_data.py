"""Forms of public chat data, and what each bad row is told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from methods.chat_data import Candidate, Conversation, Judged, read_conversations, read_judged
from protocols.errors import BadInput
from protocols.messages import ChatMessage


def user(content: str) -> ChatMessage:
    return ChatMessage(role="user", content=content)


def model(content: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=content)


def a_file(folder: Path, *rows: Any) -> list[str]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(file)]


PAIR = [Candidate(text="yes", rank=1), Candidate(text="no", rank=2)]
JUDGED: list[tuple[dict[str, Any], list[ChatMessage], list[Candidate]]] = [
    (
        {
            "prompt": "why?",
            "responses": [{"text": "a", "score": 1, "votes": 9}, {"text": "b", "score": 0.5, "model": "m"}],
        },
        [user("why?")],
        [Candidate(text="a", score=1), Candidate(text="b", score=0.5, model="m")],
    ),
    ({"prompt": "why?", "better": "yes", "worse": "no", "source": "s"}, [user("why?")], PAIR),
    ({"prompt": "why?", "chosen": "yes", "rejected": "no"}, [user("why?")], PAIR),
    (
        {
            "prompt": "ignored",
            "chosen": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "no"}],
            "score_chosen": 8.0,
        },
        [user("why?")],
        PAIR,
    ),
    (
        {
            "prompt": "\n\nHuman: why? \n\nAssistant: so. \n\nHuman: and\n\nthen?\n\nAssistant: ",
            "answers": [{"answer": "yes", "rank": 1.0, "model": "gpt-4"}, {"answer": "no", "rank": 7}],
            "turns": 2,
        },
        [user("why?"), model("so."), user("and\n\nthen?")],
        [Candidate(text="yes", rank=1, model="gpt-4"), Candidate(text="no", rank=7)],
    ),
    (
        {
            "instruction": "why?",
            "completions": [{"response": "yes", "overall_score": 8.5, "model": "m", "annotations": {}}],
            "models": ["m"],
        },
        [user("why?")],
        [Candidate(text="yes", score=8.5, model="m")],
    ),
]


@pytest.mark.parametrize(("row", "messages", "replies"), JUDGED)
def test_forms_of_preferences(
    row: dict[str, Any], messages: list[ChatMessage], replies: list[Candidate], tmp_path: Path
) -> None:
    files = a_file(tmp_path, row, {"id": "own", **row}, {"id": 7, **row}, {"id": None, **row})
    names = [f"{files[0]} line 1", "own", "7", f"{files[0]} line 4"]
    assert list(read_judged(files)) == [Judged(id=name, messages=messages, replies=replies) for name in names]


CONVERSATIONS: list[tuple[dict[str, Any], list[ChatMessage], str]] = [
    ({"prompt": "why?"}, [user("why?")], ""),
    ({"prompt": "why?", "reference": "so", "category": "c"}, [user("why?")], "so"),
    ({"instruction": "add", "input": "1 2", "output": "3"}, [user("add\n\n1 2")], "3"),
    ({"instruction": "add", "input": "", "output": "3"}, [user("add")], "3"),
    ({"instruction": "add", "input": None, "output": None}, [user("add")], ""),
    (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]},
        [ChatMessage(role="system", content="s"), user("why?")],
        "",
    ),
    (
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
        [user("why?")],
        "so",
    ),
]


@pytest.mark.parametrize(("row", "messages", "reply"), CONVERSATIONS)
def test_forms_of_conversations(row: dict[str, Any], messages: list[ChatMessage], reply: str, tmp_path: Path) -> None:
    files = a_file(tmp_path, {"id": "own", **row})
    assert list(read_conversations(files)) == [Conversation(id="own", messages=messages, reply=reply)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "got the fields none; expected one of responses, answers, completions, chosen, better"),
        ({"prompt": "p", "response": "r"}, "got the fields prompt, response; expected one of responses"),
        ({"responses": [{"text": "a"}]}, "prompt: required, but missing"),
        ({"prompt": "p", "responses": []}, r"responses: got \[\]; list should have at least 1 item"),
        ({"prompt": "p", "responses": [{"text": 5}]}, r"responses.0.text: got 5; .* valid string"),
        ({"prompt": "p", "responses": [{"text": "a", "score": "x"}]}, "responses.0.score: got 'x'; .* valid number"),
        ({"prompt": "p", "responses": [{"text": "a", "score": 1e999}]}, "responses.0.score: .* finite"),
        ({"prompt": "p", "responses": [{"text": "a", "rank": 0}]}, "responses.0.rank: got 0; .* or equal to 1"),
        (
            {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "rank": 2}]},
            "expected a score of every reply, or a rank of every reply",
        ),
        ({"prompt": " ", "better": "a", "worse": "b"}, "prompt: got an empty text"),
        ({"prompt": "p", "better": "a"}, "worse: required, but missing"),
        ({"prompt": "p", "better": None, "worse": "b"}, "better: required, but missing"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "got a conversation without turns"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
                "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}],
            },
            "chosen, rejected: expected conversations that differ in their last turn alone",
        ),
        ({"prompt": "why?", "answers": [{"answer": "a", "rank": 1}]}, "prompt: got 'why.'; expected turns after"),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]},
            "chosen, rejected: expected conversations that end with a turn of the assistant",
        ),
        ({"prompt": "\n\nHuman: \n\nAssistant: ", "answers": [{"answer": "a", "rank": 1}]}, "prompt: .*turns after"),
        ({"prompt": "x\n\nHuman: y", "answers": [{"answer": "a", "rank": 1}]}, "prompt: .*expected turns after"),
        ({"instruction": "i", "completions": [{"response": "r"}]}, "completions.0.overall_score: required"),
    ],
)
def test_bad_preferences(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"prompt": "p", "better": "a", "worse": "b"}
    files = a_file(tmp_path, good, row)
    rows = read_judged(files)
    assert next(rows).messages == [user("p")]
    with pytest.raises(BadInput, match=rf"^preferences: .*rows.jsonl line 2: {message}"):
        next(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "got the fields question; expected one of messages, conversations, instruction, prompt"),
        ({"messages": [{"role": "robot", "content": "c"}]}, "messages.0.role: got 'robot'; .* 'user' or 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "c"}]}, "expected a turn of the user before"),
        (
            {"conversations": [{"from": "bing", "value": "v"}]},
            "conversations.from: got 'bing'; expected one of",
        ),
        ({"conversations": [{"value": "v"}]}, "conversations.0.from: required, but missing"),
        ({"instruction": "", "output": "o"}, "prompt: got an empty text"),
    ],
)
def test_bad_conversations(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"^prompts: .*rows.jsonl line 1: {message}"):
        list(read_conversations(a_file(tmp_path, row)))


@pytest.mark.data
@pytest.mark.skipif("REPERTORY_DATA" not in os.environ, reason="REPERTORY_DATA is not set")
def test_real_rows() -> None:
    folder = Path(os.environ["REPERTORY_DATA"]) / "seft"
    pairs = list(read_judged([str(folder / "preference_pairs.jsonl")]))
    assert len(pairs) == 195 and all([o.rank for o in one.replies] == [1, 2] for one in pairs)
    files = [str(folder / name) for name in ("prompts_seed_tasks.jsonl", "prompts_vicuna_bench.jsonl")]
    prompts = list(read_conversations(files))
    assert len(prompts) == 175 + 61 and sum(bool(one.reply) for one in prompts) == 175
