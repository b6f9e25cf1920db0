"""Questions whose answer stands in the text, word by word: `Which word follows "..."?`

This is what the embedded model can ask about any text. The truth of such a question can be looked up, so
references are audited, and held-out gold questions made, without labels and without a judge.
"""

import random
import re
import string

from protocols.questions import LETTERS, Cluster, GoldQuestion, Proposal, Task

SPAN_WORDS = 4
_QUESTION = re.compile(r'Which (word|number) follows "([^"]+)"\?')


def cloze_question(task: Task, span: str) -> str:
    """The question for what follows a span of words."""
    return f'Which {"number" if task is Task.MATH else "word"} follows "{span}"?'


def parse_cloze(question: str) -> str | None:
    """The span that a question asks about, or None if it is no such question."""
    match = _QUESTION.fullmatch(question.strip().split("\n")[0])
    return match[2] if match else None


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    return word.strip(string.punctuation + "“”‘’—–…")


def same_word(answer: str, truth: str) -> bool:
    """Whether an answer is a word of the text, or the same number: `12.5` is `12.50`."""
    a, b = bare(answer), bare(truth)
    return a.lower() == b.lower() or (_is_number(a) and _is_number(b) and _value(a) == _value(b))


def words_after(span: str, paragraphs: list[str]) -> set[str]:
    """Every word, bare, that follows the span somewhere in the paragraphs."""
    wanted, found = span.split(), set()
    for paragraph in paragraphs:
        words = paragraph.split()
        for i in range(len(words) - len(wanted)):
            if words[i : i + len(wanted)] == wanted:
                found.add(bare(words[i + len(wanted)]))
    return found - {""}


def reference_right(proposal: Proposal, paragraphs: list[str]) -> bool | None:
    """Whether a cloze question's reference is what follows its span; None for any other question."""
    span = parse_cloze(proposal.question)
    if span is None:
        return None
    answer = proposal.options[LETTERS.index(proposal.answer)] if proposal.options else proposal.answer
    return any(same_word(answer, truth) for truth in words_after(span, paragraphs))


def usable_spans(task: Task, paragraphs: list[str]) -> list[tuple[int, str, str]]:
    """All (paragraph index, span, next word) that make a question with one answer.

    The span occurs once and holds no quotation mark; the next word is a word, or a number for numerical
    questions.
    """
    candidates: dict[str, list[tuple[int, str]]] = {}
    for index, paragraph in enumerate(paragraphs):
        words = paragraph.split()
        for i in range(len(words) - SPAN_WORDS):
            span = " ".join(words[i : i + SPAN_WORDS])
            candidates.setdefault(span, []).append((index, bare(words[i + SPAN_WORDS])))
    return [
        (places[0][0], span, places[0][1])
        for span, places in candidates.items()
        if len(places) == 1 and '"' not in span and "\\" not in span and _answers(task, places[0][1])
    ]


def _answers(task: Task, word: str) -> bool:
    if task is Task.MATH:
        return _is_number(word) and _value(word) != 0
    # An article alone is no answer: the rule that compares answers leaves articles out. "X" is a placeholder to it.
    return bool(re.fullmatch(r"\w[\w.'/-]*", word)) and word.lower() not in ("a", "an", "the", "x")


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"([0-9]{1,3}(,[0-9]{3}){1,3}|[0-9]{1,9})(\.[0-9]+)?", word))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def gold_cloze(cluster: Cluster, count: int, rng: random.Random) -> list[GoldQuestion]:
    """Up to `count` questions with true answers about a cluster."""
    spans = usable_spans(cluster.task, cluster.paragraphs)
    chosen = rng.sample(spans, min(count, len(spans)))
    return [_gold(cluster, i, *parts, rng) for i, parts in enumerate(chosen)]


def _gold(cluster: Cluster, number: int, index: int, span: str, word: str, rng: random.Random) -> GoldQuestion:
    options: list[str] = []
    answer = word
    if cluster.task is Task.CHOICE:
        options, answer = with_distractors(word, cluster.paragraphs, rng)
    return GoldQuestion(
        id=f"{cluster.question_id}-cloze-{number}",
        question_id=cluster.question_id,
        task=cluster.task,
        question=cloze_question(cluster.task, span),
        options=options,
        answer=answer,
        evidence=[index],
    )


def with_distractors(word: str, paragraphs: list[str], rng: random.Random) -> tuple[list[str], str]:
    """Four options in random order, three of them other words of the paragraphs, and the right letter."""
    known = {bare(w) for paragraph in paragraphs for w in paragraph.split()}
    others = sorted(w for w in known if _answers(Task.CHOICE, w) and w.lower() != word.lower())
    others += [f"none of these {i}" for i in range(3 - len(others))]
    options = [word, *rng.sample(others, 3)]
    rng.shuffle(options)
    return options, LETTERS[options.index(word)]
