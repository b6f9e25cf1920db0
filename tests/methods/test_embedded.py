"""The embedded model: its lessons, its tokenizer, the script that makes it, and the checkpoint that comes along."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from actors.policy.loading import EMBEDDED
from actors.proposals import parse_proposal
from actors.rules import is_supported, parse_answer, rule_score
from actors.votes import parse_vote
from cluster.cluster import Cluster
from methods.embedded import Config, heldout_clusters, make_exam
from methods.worlds import corpus
from methods.worlds.cloze import parse_cloze, same_word, usable_spans, words_after
from methods.worlds.lessons import Lesson, Role, Span, draw_lesson, draw_pair, plain
from methods.worlds.skeleton import Shape, fixed_tokens, train_tokenizer
from protocols.policy import PolicyConfig
from protocols.prompts import document_block
from protocols.questions import LETTERS, ProposalStatus, Task

RETRAIN = "the prompt templates have changed: train the checkpoint again (see actors/policy/embedded/README.md)"
TINY = Shape(vocabulary=600, layers=1, width=16, heads=2, hidden=16, context=1024)


def lessons(role: Role, task: Task, count: int, seed: str = "tests") -> list[tuple[Lesson, list[str]]]:
    """Lessons with the documents that they are about."""
    rng, found = random.Random(f"{seed} {role} {task}"), []
    while len(found) < count:
        documents = corpus.documents(rng, rng.randint(1, 4), 40)
        lesson = draw_lesson(rng, role, task, documents)
        if lesson:
            found.append((lesson, documents))
    return found


# Lessons


@pytest.mark.parametrize("task", Task)
def test_questioner_lessons_are_usable_proposals_with_right_references(task: Task) -> None:
    for lesson, documents in lessons("questioner", task, 60):
        parsed = parse_proposal(task, lesson.reply)
        assert parsed.status is ProposalStatus.OK, (lesson.reply, parsed.reason)
        assert (len(parsed.options) == 4) == (task is Task.CHOICE)
        answer = parsed.options[LETTERS.index(parsed.answer)] if parsed.options else parsed.answer
        span = parse_cloze(parsed.question)
        assert span is not None
        assert any(same_word(answer, word) for word in words_after(span, documents))
        assert is_supported(task, answer, documents)
        assert rule_score(task, parsed.answer, parsed.answer) == 1


def test_the_right_option_comes_first() -> None:
    for lesson, _ in lessons("questioner", Task.CHOICE, 40):
        assert parse_proposal(Task.CHOICE, lesson.reply).answer == "A"


def test_questioner_lessons_do_not_repeat_the_history() -> None:
    with_history = 0
    for lesson, _ in lessons("questioner", Task.GENERAL, 60):
        question = parse_proposal(Task.GENERAL, lesson.reply).question
        assert question not in lesson.prompt
        with_history += "asked about the text before" in lesson.prompt
    assert 20 < with_history < 55


@pytest.mark.parametrize("task", Task)
def test_responder_lessons_answer_their_question(task: Task) -> None:
    guesses = 0
    for lesson, documents in lessons("responder", task, 80):
        answer = parse_answer(task, lesson.reply)
        assert answer is not None
        if not lesson.prompt.startswith(document_block(documents)):
            guesses += 1
            continue
        question = lesson.prompt.rpartition("Question: ")[2].partition("\nThink")[0].partition("\nWork")[0]
        first, *options = question.split("\n")
        given = options[LETTERS.index(answer)][4:] if options else answer
        assert any(same_word(given, word) for word in words_after(parse_cloze(first) or "", documents))
    assert guesses < 12


def test_wrong_responder_lessons_keep_the_format() -> None:
    rng, right = random.Random(5), 0
    for _ in range(60):
        documents = corpus.documents(rng, 2, 40, heldout=True)
        lesson = draw_lesson(rng, "responder", Task.GENERAL, documents, wrong=1.0)
        if lesson is None or not lesson.prompt.startswith(document_block(documents)):
            continue
        answer = parse_answer(Task.GENERAL, lesson.reply)
        assert answer is not None
        question = lesson.prompt.rpartition("Question: ")[2].partition("\n")[0]
        right += any(same_word(answer, word) for word in words_after(parse_cloze(question) or "", documents))
    assert right < 12


@pytest.mark.parametrize("task", [Task.GENERAL, Task.MATH])
def test_verifier_lessons_are_votes_that_are_right(task: Task) -> None:
    yes = 0
    for lesson, _ in lessons("verifier", task, 80):
        first, second = (lesson.prompt.partition(f"\nAnswer {i}: ")[2].partition("\n")[0] for i in (1, 2))
        assert parse_vote(lesson.reply) == (plain(first) == plain(second))
        yes += parse_vote(lesson.reply)
    assert 20 < yes < 60


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("3.10", "3.10.", True),
        ("the Standards", "standards", True),
        ("12", "12.0", True),
        ("1,234", "1234", True),
        ("100", "10", False),
        ("method", "methods", False),
        ("0.5", "5", False),
    ],
)
def test_plain_answers(a: str, b: str, same: bool) -> None:
    assert (plain(a) == plain(b)) is same


def test_pairs_of_answers_are_read_as_they_are_written() -> None:
    rng = random.Random(3)
    for task in (Task.GENERAL, Task.MATH):
        for _ in range(40):
            documents = corpus.documents(rng, 2, 40)
            spans = [Span(*parts) for parts in usable_spans(task, documents)]
            if len(spans) > 1:
                pair = draw_pair(rng, task, spans)
                assert plain(parse_answer(task, pair.reply) or "") == plain(pair.answer)


# Text


def test_the_library_has_text_to_learn_from() -> None:
    library = corpus.library()
    assert sum(len(text.split()) for module in library.training for text in module) > 100_000
    held_out = {text for module in library.heldout for text in module}
    assert held_out
    assert not held_out & {text for module in library.training for text in module}


@pytest.mark.parametrize("make", [corpus.sentences, corpus.table, corpus.jumble])
def test_generated_text_has_the_length_asked_for(make) -> None:  # type: ignore[no-untyped-def]
    for words in (10, 40):
        text = make(random.Random(words), words)
        assert words - 1 <= len(text.split()) <= words
        assert "\n" not in text


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_tokenizer(900, [" ".join(corpus.documents(rng, 2, 60)) for _ in range(300)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "word",
        'He said: "Which word?" (or not)',
        "3.10 1,234.5 12% $5.2 (13) -7",
        "don't foo_bar a/b x=1 __init__ C++",
        "two  blanks   and\ttab\n\nlines\n  indented ",
        "Été “quoted” – naïve… 漢字 ﬁ 😀",
        'end.\n```json\n{"question": "x"}\n```',
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_word_has_the_same_tokens_everywhere(tokenizer: Tokenizer) -> None:
    for word in ("equality", "3.10", "1,234", "Zyqua", "don't"):
        pieces = tokenizer.encode(f"the {word}").tokens[-len(tokenizer.encode(word).tokens) + 1 :]
        for text in (f"{word}", f'"{word}', f"({word}", f"end.\n{word}", f"end\n{word}", f"Answer 1: {word}"):
            assert tokenizer.encode(text).tokens[-len(pieces) :] == pieces, text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("x 2024").tokens) == len(tokenizer.encode("x").tokens) + 4


def test_fixed_texts_are_one_token_each(tokenizer: Tokenizer) -> None:
    for text in fixed_tokens():
        assert len(tokenizer.encode(text).ids) == 1, text


# The checkpoint


def test_the_checkpoint_has_the_phrases_of_prompts_and_replies() -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    assert not [text for text in fixed_tokens() if len(tokenizer.encode(text).ids) != 1], RETRAIN


@pytest.mark.slow
async def test_the_checkpoint_plays_the_roles_on_text_that_it_was_not_trained_on(tmp_path: Path) -> None:
    config = Config(runs_dir=str(tmp_path), test_questions=48)
    async with Cluster(config, method="embedded", run="exam") as cluster:
        policy = await cluster.policy(PolicyConfig(trainer=None, threads=1))
        exam = await make_exam(cluster, policy, config)
        clusters = heldout_clusters(Task.GENERAL)
        measures = await exam.take(clusters, config.test_questions)
    assert measures["readable"] >= 0.8
    assert measures["references_right"] >= 0.5
    assert measures["own_spread"] >= 0.4
    assert measures["gold_spread"] >= 0.3
    assert 0.25 <= measures["gold_right"] <= 0.9
    assert measures["verdict"] >= 0.6
