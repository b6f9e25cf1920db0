"""The reduce by a policy: it reads a patient's verdicts, oldest first, and answers once (specification 2.6).

Verdicts that exceed its context are read in consecutive chunks, each of which becomes one verdict of the next level.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from methods.phenotyping_answers import AnswerStore, Asker, Question, Said, ask, tokens_of
from methods.phenotyping_decide import Case, Origin, Reading, rule_of
from methods.phenotyping_definition import Definition
from methods.phenotyping_evidence import Group
from methods.phenotyping_prompts import (
    CLOSE,
    FINDINGS,
    OPEN,
    ROLE,
    TOGETHER,
    PromptConfig,
    ending,
    form_of,
    key_of,
    shown,
)
from methods.phenotyping_reduce import ReduceConfig
from protocols.errors import BadInput
from protocols.messages import ChatMessage


@dataclass(frozen=True)
class Verdict:
    """One line that is read: of a snippet, or of a chunk of verdicts."""

    days: tuple[int, int] | None
    """Of the first and the last text, before the last note; unknown without dates."""
    texts: int
    """How many snippets it stands for."""
    says: str
    """The answer, and how sure it is."""
    text: str = ""
    """What was quoted, or the snippet."""

    @property
    def line(self) -> str:
        """As it is read."""
        when = "undated"
        if self.days is not None:
            first, last = self.days
            when = f"{first if first == last else f'{first} to {last}'} days before the last note"
        many = f", {self.texts} texts together" if self.texts > 1 else ""
        return f"- {when}{many}: {self.says}" + (f" {OPEN}{self.text}{CLOSE}" if self.text else "")


@dataclass
class Tree:
    """A patient whose verdicts are being read."""

    definition: Definition
    parts: Sequence[str]
    """What names its questions beside their texts."""
    verdicts: list[Verdict]
    """Of the present level, oldest first."""
    asked: dict[str, Said]
    """All questions so far."""

    def question(self, verdicts: Sequence[Verdict], prompt: PromptConfig) -> Question:
        """What is asked of some of them."""
        messages = reading_of(verdicts, self.definition, prompt)
        return Question(key_of(self.parts, messages), messages, phenotype=self.definition.phenotype_id)


def check_reads(definitions: Sequence[Definition], config: PromptConfig) -> None:
    """Raises BadInput where a policy that reads nothing but snippets would have to read verdicts."""
    for one in definitions:
        if one.reduce.by == "llm" and config.variant == "bare":
            raise BadInput(
                f"definitions: {one.phenotype_id}: reduce.by: got llm, expected a formula, for prompt.variant=bare is"
                " for a policy that reads snippets alone"
            )


async def read_verdicts(
    asker: Asker,
    cases: Sequence[Case],
    said: Mapping[str, Said],
    store: AnswerStore,
    asked_for: str,
    reduce: ReduceConfig | None,
    origin: Origin,
    show: Callable[[int, int], None],
) -> dict[int, Reading]:
    """What the policy makes of each case that it reduces, by the case's place. One verdict alone is not read."""
    # An answer is chosen even where snippets are answered in writing.
    asker = replace(asker, prompt=asker.prompt.model_copy(update={"answer": "score", "variant": "plain"}))
    open_: dict[int, Tree] = {}
    for place, case in enumerate(cases):
        verdicts = verdicts_of(case, said, origin.prompt)
        if rule_of(reduce, case.definition, origin.prompt).by == "llm" and len(verdicts) > 1:
            parts = [case.definition.digest, origin.prompt.digest, origin.model]
            open_[place] = Tree(case.definition, parts, verdicts, {})
    found: dict[int, Reading] = {}
    level = 0
    while open_:
        chunks = await cut(asker, open_)
        # A verdict of a chunk that is left alone goes up as it is.
        questions = {
            place: [open_[place].question(one, asker.prompt) if not level or len(one) > 1 else None for one in some]
            for place, some in chunks.items()
        }
        flat = [one for some in questions.values() for one in some if one is not None]
        answers = await ask(asker, flat, store, asked_for, show)
        level += 1
        for place, some in chunks.items():
            tree, own = open_[place], questions[place]
            tree.asked.update({one.key: answers[one.key] for one in own if one is not None})
            told = [
                one[0] if asked is None else summed(one, answers[asked.key], asker.prompt)
                for one, asked in zip(some, own, strict=True)
            ]
            if len(told) > 1:
                tree.verdicts = told
                continue
            # None at all: the policy's context does not hold two verdicts.
            last = own[0] if own else None
            found[place] = Reading(None if last is None else answers[last.key].probs, tree.asked)
            del open_[place]
    return found


def verdicts_of(case: Case, said: Mapping[str, Said], prompt: PromptConfig) -> list[Verdict]:
    """A case's verdicts, undated ones first, then the oldest; those of one day in the order of their words."""
    found = [
        verdict_of(group, answer, prompt)
        for group, question in zip(case.evidence.groups, case.questions, strict=True)
        if (answer := said[question.key]).probs is not None
    ]
    return sorted(found, key=lambda one: (one.days is not None, -one.days[0] if one.days else 0, one.line))


def verdict_of(group: Group, said: Said, prompt: PromptConfig) -> Verdict:
    """A snippet's."""
    days = None if group.days_before is None else (group.days_before, group.days_before)
    text = shown(group.finding, mask=prompt.mask)
    if said.quote is not None:
        text = text[slice(*said.quote)]
    return Verdict(days, 1, says_of(said, prompt), " ".join(text.split()))


def says_of(said: Said, prompt: PromptConfig) -> str:
    """An answer in the prompt's own words, with its status or else its probability."""
    answer = "failed" if said.answer == "failed" else prompt.labels[said.answer]
    sure = "" if said.probs is None else f"p {said.probs[0]:.2f}"
    return f"{answer}, {said.status or sure}"


def summed(chunk: Sequence[Verdict], said: Said, prompt: PromptConfig) -> Verdict:
    """What was answered about a chunk, as one verdict."""
    days = [day for one in chunk if one.days is not None for day in one.days]
    return Verdict((max(days), min(days)) if days else None, sum(one.texts for one in chunk), says_of(said, prompt))


def reading_of(verdicts: Sequence[Verdict], definition: Definition, prompt: PromptConfig) -> list[ChatMessage]:
    """One turn."""
    lines = [ROLE, f"Disease: {definition.name}. What counts: {definition.description}"]
    if definition.ever_or_current == "current":
        lines.append("A disease that is over does not count.")
    lines += [FINDINGS, *(one.line for one in verdicts)]
    lines += [TOGETHER.format(description=definition.description), form_of(prompt), ending(prompt)]
    return [ChatMessage(role="user", content="\n".join(lines))]


async def cut(asker: Asker, trees: Mapping[int, Tree]) -> dict[int, list[list[Verdict]]]:
    """Each patient's verdicts in as many chunks as are needed for each prompt to fit; none where nothing fits."""
    wholes = [tree.question(tree.verdicts, asker.prompt) for tree in trees.values()]
    sizes: list[int] = []
    for start in range(0, len(wholes), asker.per_call):
        sizes += map(len, await tokens_of(asker, wholes[start : start + asker.per_call]))
    return {
        place: [tree.verdicts] if size <= asker.room else await chunks_of(asker, tree)
        for (place, tree), size in zip(trees.items(), sizes, strict=True)
    }


async def chunks_of(asker: Asker, tree: Tree) -> list[list[Verdict]]:
    """Consecutive chunks, each of which fits, together all verdicts. Empty if they do not become fewer by it."""

    async def sizes(chunks: Sequence[Sequence[Verdict]]) -> list[int]:
        return [len(ids) for ids in await tokens_of(asker, [tree.question(one, asker.prompt) for one in chunks])]

    # One that does not fit alone is read without its text, not left out.
    alone = await sizes([[one] for one in tree.verdicts])
    verdicts = [
        one if size <= asker.room else replace(one, text="") for one, size in zip(tree.verdicts, alone, strict=True)
    ]
    empty, *costs = await sizes([[], *([one] for one in verdicts)])
    if max(costs) > asker.room:
        return []
    chunks = packed(verdicts, [cost - empty for cost in costs], asker.room - empty)
    # Tokens of lines need not add up to those of the whole.
    while any(too_long := [size > asker.room for size in await sizes(chunks)]):
        chunks = [
            part
            for chunk, long in zip(chunks, too_long, strict=True)
            for part in ([chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]] if long else [chunk])
        ]
    shrinks = len(chunks) < len(verdicts) or any(one.text for one in tree.verdicts)
    return chunks if shrinks else []


def packed(verdicts: Sequence[Verdict], costs: Sequence[int], room: int) -> list[list[Verdict]]:
    """As many in each chunk as there is room for, at least one."""
    chunks: list[list[Verdict]] = []
    left = 0
    for one, cost in zip(verdicts, costs, strict=True):
        if not chunks or cost > left:
            chunks.append([])
            left = room
        chunks[-1].append(one)
        left -= cost
    return chunks
