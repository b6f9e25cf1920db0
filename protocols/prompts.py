"""The texts in which one policy plays its three roles: questioner, responder, verifier (SPELL section 3).

Documents come first and instructions last, so that prompts over the same documents share a prefix.
Every template is fixed text with slots; `fixed_texts` lists the fixed parts, from which the tokenizers
of the embedded models are made.
"""

from collections.abc import Sequence
from string import Formatter

from protocols.questions import LETTERS, Question, Task

DOCUMENTS = "<text>\n{documents}\n</text>\n"

HISTORY = "These questions have been asked about the text before. Yours must be harder than each of them{ways}.\n"
HISTORY_WAYS = {
    Task.GENERAL: ": more calculation, comparison or superlatives, conditions and causes, text joined with numbers",
    Task.CHOICE: ": more calculation, comparison or superlatives, conditions and causes, text joined with numbers",
    Task.MATH: ": period over period, ratios, filter and aggregate, what-if",
}
HISTORY_ENTRY = "Question: {question}\nAnswer: {answer}\n"

_COMMON_RULES = (
    'The question must stand on its own (never say "the text" or "Article 1"), be in English, have one'
    " unambiguous answer, and need several pieces of the text in more than one step. First derive the answer"
    " step by step, then end with a fenced json block.\n"
)
QUESTION = {
    Task.GENERAL: "Write one hard question about the text above. "
    + _COMMON_RULES
    + "The answer must be concise, under 20 tokens.\n"
    '```json\n{{"question": "...", "answer": "..."}}\n```\n',
    Task.MATH: "Write one hard numerical question about the text above. "
    + _COMMON_RULES
    + "The answer must be one number and not zero; ask for its unit inside the question. Do not ask to count or"
    " to look up a number, and do not quote the key numbers.\n"
    '```json\n{{"question": "...", "answer": 0.0}}\n```\n',
    Task.CHOICE: "Write one hard multiple choice question about the text above. "
    + _COMMON_RULES
    + "Give four options of which exactly one is right. The right option is {letter}.\n"
    '```json\n{{"question": "...", "options": {{"A": "...", "B": "...", "C": "...", "D": "..."}}, "answer": "..."}}\n'
    "```\n",
}

RESPONSE = {
    Task.GENERAL: "Answer a question from the text above. Think it through, then end with"
    ' "The correct answer is X." where X is the concise answer.\nQuestion: {question}',
    Task.MATH: "Answer a question from the text above. Work step by step, then end with"
    ' "Therefore, the answer is X." where X is a number.\nQuestion: {question}',
    Task.CHOICE: "Answer a question from the text above. Think it through, then end with"
    ' "The correct answer is X." where X is the letter of one option.\nQuestion: {question}',
}
NO_DOCUMENTS = "(the text is not available)"

VERDICT = (
    "Question: {question}\nAnswer 1: {answer}\nAnswer 2: {reference}\n"
    "Do both answers mean the same? Do not solve the question. Numbers within 0.15 % of each other are the"
    " same. Explain briefly, then decide: [[YES]] or [[NO]].\n"
)


def document_block(paragraphs: Sequence[str]) -> str:
    """The documents as one text block, joined by a newline, in the given order."""
    return DOCUMENTS.format(documents="\n".join(paragraphs))


def question_prompt(task: Task, paragraphs: Sequence[str], history: Sequence[tuple[str, str]], letter: str) -> str:
    """Ask for a question over the paragraphs that exceeds the (question, answer) pairs of the history.

    `letter` is the option that must be right; other tasks do not use it.
    """
    parts = [document_block(paragraphs)]
    if history:
        parts.append(HISTORY.format(ways=HISTORY_WAYS[task]))
        parts.extend(HISTORY_ENTRY.format(question=question, answer=answer) for question, answer in history)
    parts.append(QUESTION[task].format(letter=letter))
    return "".join(parts)


def stated(question: Question) -> str:
    """The question with its options, if it has any, as four lines `(A) ...` to `(D) ...`."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    return "\n".join([question.question, *lines])


def response_prompt(paragraphs: Sequence[str] | None, question: Question) -> str:
    """Ask the question over the paragraphs; None withholds them (the grounding probe)."""
    block = document_block(paragraphs if paragraphs is not None else [NO_DOCUMENTS])
    return block + RESPONSE[question.task].format(question=stated(question))


def verdict_prompt(question: Question, answer: str, reference: str) -> str:
    """Ask whether two answers to a question mean the same, without the documents."""
    return VERDICT.format(question=stated(question), answer=answer, reference=reference)


def fixed_texts() -> list[str]:
    """The fixed parts of all templates, longest first, without repetitions."""
    templates = [DOCUMENTS, HISTORY_ENTRY, VERDICT, *QUESTION.values(), *RESPONSE.values()]
    templates += [HISTORY.format(ways=ways) for ways in HISTORY_WAYS.values()]
    parts = {part for template in templates for part in _fixed_parts(template) if part}
    return sorted(parts, key=lambda part: (-len(part), part))


def _fixed_parts(template: str) -> list[str]:
    """The text between the slots; an escaped brace does not end a part."""
    parts = [""]
    for literal, slot, *_ in Formatter().parse(template):
        parts[-1] += literal
        if slot is not None:
            parts.append("")
    return parts
