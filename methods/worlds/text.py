"""Real documents as a world: clusters to train on, gold questions to be measured by, audits where possible."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from methods.worlds.cloze import bare, gold_cloze, parse_cloze, words_after
from methods.worlds.documents import Library, passages, read_documents, read_rows, similar_groups
from protocols.errors import BadInput, describe_validation_error
from protocols.questions import LETTERS, Cluster, GoldQuestion, Proposal, Question, Task
from protocols.service import Message

MATH_SOURCE = "docmath"


class TextConfig(Message):
    """Where real documents come from."""

    documents: str = ""
    """File or folder of .txt, .md and .jsonl (`id`, `title`, `text`)."""
    clusters: str = ""
    """JSONL of clusters (`question_id`, `data_source`, `paragraph_ids` or `paragraphs`); empty: documents
    with similar words are put together."""
    qa: str = ""
    """JSONL of gold questions (`id`, `question_id`, `task`, `question`, `answer`, `evidence_ids`, `options`);
    empty: cloze questions over held-out clusters."""
    cluster_size: int = Field(default=20, ge=1)
    """n: documents per cluster, where clusters are built; larger given ones are cut if passages are."""
    passage_words: int = Field(default=0, ge=0)
    """Cut documents into passages of so many words; 0 leaves them whole."""
    tasks: list[Task] = Field(default=[Task.GENERAL, Task.CHOICE], min_length=1)
    """Tasks among which clusters are shared out, except those with a `docmath` source, which are numerical."""
    heldout_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the clusters kept for evaluation, where gold questions are not given; at least one."""
    gold_on_evidence: bool = False
    """Ask given gold questions over their evidence documents alone instead of the whole cluster."""


class TextWorld:
    """Clusters over real documents."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        self._library = read_documents(Path(config.documents))
        self._config = config
        clusters = _clusters(config, self._library, seed)
        if config.qa:
            self.training = clusters
            self.heldout, self._gold = _given_gold(Path(config.qa), clusters, config)
        else:
            self.training, self.heldout = _split(clusters, config.heldout_share, seed)
            rng = random.Random(f"cloze {seed}")
            self._gold = [question for cluster in self.heldout for question in gold_cloze(cluster, 40, rng)]
        self._seed = seed

    def notes(self) -> list[str]:
        """What a reader of the results must know about the input."""
        library = self._library
        left_out = [f"{library.empty} empty", f"{library.repeated} repeated"]
        return [
            f"{len(library.documents)} documents ({', '.join(left_out)} left out), {len(self.training)} training"
            f" clusters, {len(self._gold)} gold questions ({'given' if self._config.qa else 'cloze'})"
        ]

    def gold(self, clusters: Sequence[Cluster]) -> list[GoldQuestion]:
        """Gold questions about the clusters."""
        names = {cluster.question_id for cluster in clusters}
        if clusters is self.training and not self._config.qa:
            rng = random.Random(f"cloze training {self._seed}")
            return [question for cluster in clusters for question in gold_cloze(cluster, 40, rng)]
        return [question for question in self._gold if question.question_id in names]

    def verdict_pairs(self) -> list[tuple[Question, str, str, bool]]:
        """Question, reply, reference, and whether they mean the same: gold answers with themselves and with
        those of the next question of the task."""
        free = [question for question in self._gold if question.task is not Task.CHOICE][:64]
        pairs = []
        for question, other in zip(free, free[1:] + free[:1], strict=True):
            asked = Question(task=question.task, question=question.question)
            if question.task is other.task and question.answer.lower() != other.answer.lower():
                for answer in (question.answer, other.answer):
                    pairs.append((asked, _reply(question.task, answer), question.answer, answer == question.answer))
        return pairs

    def audit(self, cluster: Cluster, proposal: Proposal) -> bool | None:
        """Whether a cloze question's reference is what follows its span; None for any other question."""
        span = parse_cloze(proposal.question)
        if span is None:
            return None
        answer = proposal.options[LETTERS.index(proposal.answer)] if proposal.options else proposal.answer
        truths = words_after(span, cluster.paragraphs)
        return bare(answer).lower() in {word.lower() for word in truths}

    def same(self, answer: str, reference: str) -> bool | None:
        """Unknown: real answers have many forms."""
        return None

    def hops(self, question: str) -> int | None:
        """Unknown, except that a cloze question takes one step."""
        return 1 if parse_cloze(question) else None


def _reply(task: Task, answer: str) -> str:
    return f"Therefore, the answer is {answer}." if task is Task.MATH else f"The correct answer is {answer}."


def _clusters(config: TextConfig, library: Library, seed: int) -> list[Cluster]:
    """All clusters, given or built, each with its task."""
    if config.clusters:
        groups = _given_groups(Path(config.clusters), library)
    else:
        cut = list(library.documents.values())
        if config.passage_words:
            cut = [piece for document in cut for piece in passages(document, config.passage_words)]
        texts = {document.id: document.text for document in cut}
        built = similar_groups(cut, config.cluster_size, seed)
        groups = [(f"cluster-{i:04d}", "text", [texts[j] for j in ids]) for i, ids in enumerate(built)]
    if config.clusters and config.passage_words:
        groups = [piece for group in groups for piece in _cut_group(group, config)]
    return _with_tasks(groups, config.tasks, seed)


Group = tuple[str, str, list[str]]
"""Name, data source and paragraphs of a cluster."""


def _given_groups(file: Path, library: Library) -> list[Group]:
    groups: dict[str, Group] = {}
    for place, row in _rows(file, "clusters"):
        name = _text(row, "question_id", place, "clusters")
        if name in groups:
            raise BadInput(f"clusters: {place}: the question_id {name!r} occurs twice")
        groups[name] = (name, str(row.get("data_source", "text")), _paragraphs(row, place, library))
    if not groups:
        raise BadInput(f"clusters: {file} holds no clusters")
    return list(groups.values())


def _paragraphs(row: dict[str, Any], place: str, library: Library) -> list[str]:
    given = row.get("paragraphs", row.get("paragraph_ids"))
    if not isinstance(given, list) or not given or not all(isinstance(item, str) for item in given):
        raise BadInput(
            f"clusters: {place}: field paragraph_ids: got {given!r}, expected a list of ids, or paragraphs with texts"
        )
    if "paragraphs" in row:
        return given
    unknown = next((item for item in given if item not in library.documents), None)
    if unknown is not None:
        raise BadInput(f"clusters: {place}: field paragraph_ids: there is no document {unknown!r}")
    return [library.documents[item].text for item in dict.fromkeys(given)]


def _cut_group(group: Group, config: TextConfig) -> Iterator[Group]:
    from methods.worlds.documents import Document

    name, source, paragraphs = group
    cut = [piece.text for text in paragraphs for piece in passages(Document("", text), config.passage_words)]
    size = config.cluster_size
    for i in range(0, len(cut), size):
        yield f"{name}/{i // size}", source, cut[i : i + size]


def _with_tasks(groups: list[Group], tasks: list[Task], seed: int) -> list[Cluster]:
    """Share the clusters out among the tasks at random, in equal parts, each to one task for good."""
    free = [name for name, source, _ in groups if not source.startswith(MATH_SOURCE)]
    random.Random(f"tasks {seed}").shuffle(free)
    task_of = {name: tasks[i % len(tasks)] for i, name in enumerate(free)}
    return [
        Cluster(question_id=name, task=task_of.get(name, Task.MATH), data_source=source, paragraphs=paragraphs)
        for name, source, paragraphs in groups
    ]


def _split(clusters: list[Cluster], share: float, seed: int) -> tuple[list[Cluster], list[Cluster]]:
    """Training and held-out clusters, the latter spread over the tasks."""
    if len(clusters) < 2:
        raise BadInput(
            "documents: one cluster cannot be split into training and held-out text; give more documents, a smaller"
            " text.cluster_size, or gold questions (qa=)"
        )
    shuffled = random.Random(f"heldout {seed}").sample(clusters, len(clusters))
    shuffled.sort(key=lambda cluster: cluster.task)
    stride = max(2, round(1 / share))
    names = {cluster.question_id for cluster in shuffled[::stride]}
    return [c for c in clusters if c.question_id not in names], [c for c in clusters if c.question_id in names]


def _given_gold(file: Path, clusters: list[Cluster], config: TextConfig) -> tuple[list[Cluster], list[GoldQuestion]]:
    """Gold questions, and the clusters they are asked over."""
    known = {cluster.question_id: cluster for cluster in clusters}
    questions, used = [], {}
    for place, row in _rows(file, "qa"):
        fields: dict[str, Any] = {
            key: row[key] for key in ("id", "question_id", "task", "question", "hops") if key in row
        }
        fields["answer"] = str(row.get("answer", ""))
        if row.get("options"):
            fields["options"] = _options(row["options"], place)
        try:
            question = GoldQuestion.model_validate(fields)
        except ValidationError as error:
            raise BadInput(f"qa: {place}: {describe_validation_error(error)}") from error
        cluster = known.get(question.question_id)
        if cluster is None:
            raise BadInput(f"qa: {place}: field question_id: there is no cluster {question.question_id!r}")
        questions.append(question)
        used[cluster.question_id] = cluster
    return list(used.values()), questions


def _options(given: Any, place: str) -> list[str]:
    values = [given.get(letter) for letter in LETTERS] if isinstance(given, dict) else given
    if not isinstance(values, list) or len(values) != 4 or not all(isinstance(v, str) for v in values):
        raise BadInput(f"qa: {place}: field options: got {given!r}, expected four texts")
    return values


def _rows(file: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise BadInput(f"{what}: {str(file)!r} does not exist")
    return read_rows(file, what)


def _text(row: dict[str, Any], name: str, place: str, what: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise BadInput(f"{what}: {place}: field {name}: got {value!r}, expected text")
    return value
