"""What the embedded model learns: examples of the three roles in their real formats.

All questions are cloze questions (methods/worlds/cloze.py), so every reply is copied from the prompt: the
words of the question are found in the text, and the word after them is the answer. Each part of a reply is copied
from one place, right after the words that lead there: a model of this size does not look things up twice.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from methods.worlds.cloze import bare, cloze_question, usable_spans, with_distractors
from protocols.prompts import NO_DOCUMENTS, question_prompt, response_prompt, verdict_prompt
from protocols.questions import LETTERS, Question, Task

Role = Literal["questioner", "responder", "verifier"]

QUOTE, THEN = 'The text says "', '", then'
GUESS = "The text is not available."
KINDS = {Task.GENERAL: "word", Task.MATH: "number", Task.CHOICE: "word"}
MARKERS = {
    Task.GENERAL: "The correct answer is",
    Task.MATH: "Therefore, the answer is",
    Task.CHOICE: "The correct answer is",
}
FIRST, SECOND, SAME, DIFFERENT = (
    'Answer 1 says "',
    '", answer 2 says "',
    '". They mean the same. [[YES]]',
    '". They differ. [[NO]]',
)
OPTIONS_START, OPTIONS_END = '\\"?", "options": {"A": "', '"}, "answer": "A'
ANSWER_START, JSON_END = '\\"?", "answer": "', '"}\n```'


@dataclass(frozen=True)
class Lesson:
    """One prompt and the reply to it."""

    role: Role
    task: Task
    prompt: str
    reply: str


@dataclass(frozen=True)
class Span:
    """Words of the text, and the bare word that follows them."""

    document: int
    words: str
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, and whether they mean the same."""

    task: Task
    question: str
    answer: str
    reference: str
    same: bool

    @property
    def reply(self) -> str:
        """The first answer as a responder gives it."""
        return f"{MARKERS[self.task]} {self.answer}."


def phrases() -> list[str]:
    """Parts that all replies, and all questions, have in common."""
    opened = [json_start(task) for task in (Task.GENERAL, Task.MATH)]
    asked = [f'Which {kind} follows "' for kind in ("word", "number")]
    answers = [f'". {MARKERS[Task.GENERAL]}', f'". {MARKERS[Task.MATH]}', f". {MARKERS[Task.CHOICE]}"]
    guesses = [f"{GUESS} {marker}" for marker in dict.fromkeys(MARKERS.values())]
    letters = [f"\n({letter})" for letter in LETTERS]
    options = [f'", "{letter}": "' for letter in LETTERS[1:]]
    verdicts = [FIRST, SECOND, SAME, DIFFERENT]
    ends = [OPTIONS_START, OPTIONS_END, ANSWER_START, JSON_END]
    return [NO_DOCUMENTS, QUOTE, THEN, *opened, *asked, *answers, *guesses, *letters, *options, *verdicts, *ends]


def json_start(task: Task) -> str:
    """Up to the words of the question."""
    return f'```json\n{{"question": "Which {KINDS[task]} follows \\"'


def proposal_reply(task: Task, span: Span, others: list[str]) -> str:
    """What a questioner writes, without a derivation. The right option comes first, whichever was asked for:
    the questioner shuffles options before anybody sees them."""
    start = f"{json_start(task)}{span.words}"
    if task is not Task.CHOICE:
        return f"{start}{ANSWER_START}{span.answer}{JSON_END}"
    wrong = "".join(f'", "{name}": "{text}' for name, text in zip(LETTERS[1:], others, strict=True))
    return f"{start}{OPTIONS_START}{span.answer}{wrong}{OPTIONS_END}{JSON_END}"


def response_reply(task: Task, span: str, word: str, answer: str) -> str:
    """What a responder writes: the question's words, then its answer; before a letter, the next word of the text."""
    found = f"{THEN} {word}" if task is Task.CHOICE else '"'
    return f"{QUOTE}{span}{found}. {MARKERS[task]} {answer}."


def guess_reply(task: Task, answer: str) -> str:
    """What a responder writes who is not given the text."""
    return f"{GUESS} {MARKERS[task]} {answer}."


def verdict_reply(answer: str, reference: str, same: bool) -> str:
    """What a verifier writes: both answers, then its decision."""
    return f"{FIRST}{answer}{SECOND}{reference}{SAME if same else DIFFERENT}"


def draw_lesson(
    rng: random.Random, role: Role, task: Task, documents: list[str], wrong: float = 0.0
) -> Lesson | None:
    """An example of a role over the documents, or None if they hold nothing to ask.

    `wrong` is the share of responders that answer as a careless reader does.
    """
    spans = [Span(*parts) for parts in usable_spans(task, documents)]
    if len(spans) < 4:
        return None
    draw: dict[Role, Callable[[], Lesson]] = {
        "questioner": lambda: _questioner(rng, task, documents, spans),
        "responder": lambda: _responder(rng, task, documents, spans, wrong),
        "verifier": lambda: _verifier(rng, task, spans),
    }
    return draw[role]()


def _questioner(rng: random.Random, task: Task, documents: list[str], spans: list[Span]) -> Lesson:
    remembered = rng.choice((0, 0, 1, 2, 3))
    span, *others = rng.sample(spans, remembered + 1)
    letter = rng.choice(LETTERS)
    history = [(cloze_question(task, other.words), other.answer) for other in others]
    options = with_distractors(span.answer, documents, rng)[0] if task is Task.CHOICE else []
    wrong = [option for option in options if option != span.answer]
    prompt = question_prompt(task, documents, history, letter)
    return Lesson("questioner", task, prompt, proposal_reply(task, span, wrong))


def _responder(rng: random.Random, task: Task, documents: list[str], spans: list[Span], wrong: float) -> Lesson:
    span = rng.choice(spans)
    question, right = _asked(rng, task, documents, span)
    if rng.random() < 0.04:
        guesses = {Task.GENERAL: span.words.split(), Task.MATH: ["1", "2", "10", "100"], Task.CHOICE: LETTERS}
        guess = bare(rng.choice(guesses[task])) or "the"
        return Lesson("responder", task, response_prompt(None, question), guess_reply(task, guess))
    word = span.answer
    if rng.random() < wrong:
        word = mistaken(rng, task, documents, span, question.options)
        right = LETTERS[question.options.index(word)] if question.options else word
    prompt = response_prompt(documents, question)
    return Lesson("responder", task, prompt, response_reply(task, span.words, word, right))


def mistaken(rng: random.Random, task: Task, documents: list[str], span: Span, options: list[str]) -> str:
    """What a careless reader answers: another option, another number, or a word too early or too late."""
    if task is Task.CHOICE:
        return rng.choice([option for option in options if option != span.answer])
    if task is Task.MATH:
        numbers = {other for _, _, other in usable_spans(task, documents)} - {span.answer}
        return rng.choice(sorted(numbers)) if numbers else span.answer
    words = documents[span.document].split()
    asked = span.words.split()
    place = next(i for i in range(len(words)) if words[i : i + len(asked)] == asked) + len(asked)
    near = [bare(word) for word in (words[place - 1], *words[place + 1 : place + 2])]
    return rng.choice([word for word in near if word and word != span.answer] or [span.answer])


def _asked(rng: random.Random, task: Task, documents: list[str], span: Span) -> tuple[Question, str]:
    """The question about a span, and its answer: a word, a number or a letter."""
    options: list[str] = []
    answer = span.answer
    if task is Task.CHOICE:
        options, answer = with_distractors(span.answer, documents, rng)
    text = cloze_question(task, span.words)
    return Question(task=task, question=text, options=options), answer


def _verifier(rng: random.Random, task: Task, spans: list[Span]) -> Lesson:
    pair = draw_pair(rng, Task.GENERAL if task is Task.CHOICE else task, spans)
    question = Question(task=pair.task, question=pair.question)
    prompt = verdict_prompt(question, pair.answer, pair.reference)
    return Lesson("verifier", task, prompt, verdict_reply(pair.answer, pair.reference, pair.same))


def draw_pair(rng: random.Random, task: Task, spans: list[Span]) -> Pair:
    """Two answers to one question, as often the same in other words as not."""
    span, other = rng.sample(spans, 2)
    if rng.random() < 0.5:
        answer, reference = reworded(rng, task, span.answer), reworded(rng, task, span.answer)
    else:
        answer, reference = different(rng, task, span.answer, other.answer), span.answer
    return Pair(task, cloze_question(task, span.words), answer, reference, plain(answer) == plain(reference))


def plain(answer: str) -> str:
    """An answer without case, outer punctuation, articles, thousands commas and idle zeros."""
    words = [word for word in bare(answer).lower().replace(",", "").split() if word not in ("a", "an", "the")]
    text = " ".join(words)
    return text.rstrip("0").rstrip(".") if "." in text and text.replace(".", "").isdigit() else text


def reworded(rng: random.Random, task: Task, answer: str) -> str:
    """The answer itself, or another way to write it."""
    if rng.random() < 0.6:
        return answer
    if task is Task.MATH:
        number = answer.replace(",", "")
        more = number + ("0" if "." in number else ".0")
        return rng.choice((number, more, f"{float(number):,.10g}" if float(number) < 1e9 else number))
    return rng.choice((answer.lower(), answer.capitalize(), f"the {answer}", f"{answer},", answer.upper()))


def different(rng: random.Random, task: Task, answer: str, other: str) -> str:
    """Another answer: often another of the text, sometimes one that looks alike."""
    if rng.random() < 0.6:
        return other
    if task is Task.MATH:
        place = rng.choice([i for i, c in enumerate(answer) if c.isdigit()])
        return answer[:place] + rng.choice("123456789".replace(answer[place], "")) + answer[place + 1 :]
    return rng.choice((answer + "s", f"{answer} {other}", answer[: max(1, len(answer) // 2)], other))
