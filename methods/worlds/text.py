"""Real documents as a world: clusters to train on, gold questions to be measured by, audits where possible."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from methods.worlds.cloze import gold_cloze, parse_cloze, reference_right
from methods.worlds.documents import Document, Library, passages, read_documents, read_rows, similar_groups
from protocols.errors import BadInput, describe_validation_error
from protocols.questions import LETTERS, Cluster, GoldQuestion, Proposal, Question, Task
from protocols.service import Message

MATH_SOURCE = "docmath"
CLOZE_PER_CLUSTER = 40


class TextConfig(Message):
    """Where real documents come from."""

    documents: str = ""
    """File or folder of .txt, .md and .jsonl (`id`, `title`, `text`)."""
    clusters: str = ""
    """JSONL of clusters (`question_id`, `data_source`, `paragraph_ids` or `paragraphs`; the id of a text file is its
    path in the folder); empty: documents with similar words are put together. Clusters of other documents than the
    given ones are left out and counted."""
    qa: str = ""
    """JSONL of gold questions (`id`, `question_id`, `task`, `question`, `answer`, `evidence_ids`, `options`);
    empty: cloze questions over held-out clusters. Questions about clusters that are left out are left out too."""
    cluster_size: int = Field(default=20, ge=1)
    """n: documents per cluster, where clusters are built; larger given ones are cut if passages are."""
    passage_words: int = Field(default=0, ge=0)
    """Cut documents into passages of so many words; 0 leaves them whole."""
    tasks: list[Task] = Field(default=[Task.GENERAL, Task.CHOICE], min_length=1)
    """Tasks among which clusters are shared out, except those with a `docmath` source, which are numerical."""
    heldout_share: float = Field(default=0.15, ge=0, lt=1)
    """Share of the clusters (of those with gold questions, where these are given) kept for evaluation, at least one.
    0 with given questions: none is kept, they are asked over clusters that are also trained on, without labels."""
    gold_on_evidence: bool = False
    """Ask given gold questions over their evidence documents alone instead of the whole cluster."""


class TextWorld:
    """Clusters over real documents."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        self._library = read_documents(Path(config.documents))
        self._config = config
        self._seed = seed
        groups = _groups(config, self._library, seed)
        clusters = _with_tasks(groups.kept, config.tasks, seed)
        self._given, self._untold = _given_gold(Path(config.qa), groups, self._library) if config.qa else ([], 0)
        self._absent = len(groups.absent)
        asked = {question.question_id for question in self._given}
        eligible = [one for one in clusters if one.question_id in asked] if config.qa else clusters
        if config.qa and not config.heldout_share:
            self.training, self.heldout = clusters, eligible
        else:
            self.training, self.heldout = _split(clusters, eligible, config.heldout_share, seed)
        self._tests = self._questions(self.heldout, f"cloze {seed}")

    def _questions(self, clusters: Sequence[Cluster], rng_name: str) -> list[GoldQuestion]:
        """The given questions about the clusters, or else new cloze questions."""
        if self._config.qa:
            names = {cluster.question_id for cluster in clusters}
            return [question for question in self._given if question.question_id in names]
        rng = random.Random(rng_name)
        return [question for cluster in clusters for question in gold_cloze(cluster, CLOZE_PER_CLUSTER, rng)]

    def notes(self) -> list[str]:
        """What a reader of the results must know about the input."""
        library, kind = self._library, "given" if self._config.qa else "cloze"
        left_out = [f"{len(library.empty)} empty", f"{len(library.repeated)} repeated"]
        notes = [
            f"{len(library.documents)} documents ({', '.join(left_out)} left out), {len(self.training)} training"
            f" clusters, {len(self._tests)} gold questions ({kind}) over {len(self.heldout)} held-out clusters"
        ]
        if self.heldout and self.heldout[0] in self.training:
            notes.append("The gold questions are about documents that are trained on (text.heldout_share=0).")
        if self._absent or self._untold:
            notes.append(
                f"left out: {self._absent} clusters of documents that are not here, {self._untold} gold questions"
                " about those or about documents that were cut apart"
            )
        return notes

    def gold(self, clusters: Sequence[Cluster]) -> list[GoldQuestion]:
        """Gold questions about the training or the held-out clusters; none is about both."""
        names = {cluster.question_id for cluster in clusters}
        questions = self._tests
        if clusters is self.training:
            tests = {cluster.question_id for cluster in self.heldout}
            taught = [cluster for cluster in clusters if cluster.question_id not in tests]
            questions = self._questions(taught, f"cloze training {self._seed}")
        return [question for question in questions if question.question_id in names]

    def verdict_pairs(self) -> list[tuple[Question, str, str, bool]]:
        """Question, reply, reference, and whether they mean the same: gold answers with themselves and with
        those of the next question of the task."""
        free = [question for question in self._tests if question.task is not Task.CHOICE][:64]
        pairs = []
        for question, other in zip(free, free[1:] + free[:1], strict=True):
            asked = Question(task=question.task, question=question.question)
            if question.task is other.task and question.answer.lower() != other.answer.lower():
                for answer in (question.answer, other.answer):
                    pairs.append((asked, _reply(question.task, answer), question.answer, answer == question.answer))
        return pairs

    def audit(self, cluster: Cluster, proposal: Proposal) -> bool | None:
        """Whether a cloze question's reference is what follows its span; None for any other question."""
        return reference_right(proposal, cluster.paragraphs)

    def same(self, answer: str, reference: str) -> bool | None:
        """Unknown: real answers have many forms."""
        return None

    def hops(self, question: str) -> int | None:
        """Unknown, except that a cloze question takes one step."""
        return 1 if parse_cloze(question) else None


def _reply(task: Task, answer: str) -> str:
    return f"Therefore, the answer is {answer}." if task is Task.MATH else f"The correct answer is {answer}."


@dataclass(frozen=True)
class Group:
    """Documents that make a cluster, before it has its task. Passages keep the id of their document."""

    name: str
    source: str
    documents: list[Document]


@dataclass
class Groups:
    """All groups, the pieces that each was cut into, and the names of those that are left out."""

    kept: list[Group] = field(default_factory=list)
    pieces: dict[str, list[Group]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)


def _groups(config: TextConfig, library: Library, seed: int) -> Groups:
    """Documents put together, as given or by similar words."""
    if config.clusters:
        groups = _given_groups(Path(config.clusters), library)
    else:
        cut = _cut(list(library.documents.values()), config.passage_words)
        # Passages of one document have its id, so here they go by their number.
        numbered = [Document(str(i), document.text) for i, document in enumerate(cut)]
        built = similar_groups(numbered, config.cluster_size, seed)
        kept = [Group(f"cluster-{i:04d}", "text", [cut[int(j)] for j in ids]) for i, ids in enumerate(built)]
        groups = Groups(kept, {group.name: [group] for group in kept})
    if config.clusters and config.passage_words:
        groups.pieces = {group.name: list(_cut_group(group, config)) for group in groups.kept}
        groups.kept = [piece for pieces in groups.pieces.values() for piece in pieces]
    return groups


def _given_groups(file: Path, library: Library) -> Groups:
    groups, first_missing = Groups(), ""
    for place, row in _rows(file, "clusters"):
        name = _text(row, "question_id", place, "clusters")
        if name in groups.pieces or name in groups.absent:
            raise BadInput(f"clusters: {place}: the question_id {name!r} occurs twice")
        source = _text(row, "data_source", place, "clusters") if "data_source" in row else "text"
        documents = _documents(row, place, library)
        if documents:
            groups.kept.append(Group(name, source, documents))
            groups.pieces[name] = groups.kept[-1:]
        else:
            groups.absent.add(name)
            first_missing = first_missing or f"; the first, at {place}, is {row['paragraph_ids'][0]!r}"
    if not groups.kept:
        found = f"only paragraph_ids without a document{first_missing}" if groups.absent else "no clusters"
        raise BadInput(f"clusters: {file} holds {found}")
    return groups


def _documents(row: dict[str, Any], place: str, library: Library) -> list[Document]:
    """The documents of a row; none if the library has not one of them. Raises BadInput if it has only some."""
    name = "paragraphs" if "paragraphs" in row else "paragraph_ids"
    given = row.get(name)
    expected = "a list of texts" if name == "paragraphs" else "a list of ids (or paragraphs with texts)"
    if not isinstance(given, list) or not given or not all(isinstance(item, str) for item in given):
        raise BadInput(f"clusters: {place}: field {name}: got {given!r}, expected {expected}")
    if name == "paragraphs":
        texts = dict.fromkeys(text for text in given if text.strip())
        if not texts:
            raise BadInput(f"clusters: {place}: field paragraphs: expected at least one text that is not blank")
        return [Document("", text) for text in texts]
    unknown = [item for item in given if not library.knows(item)]
    if unknown and len(unknown) < len(given):
        raise BadInput(f"clusters: {place}: field paragraph_ids: there is no document {unknown[0]!r}")
    documents = library.find(given)
    if not documents and not unknown:
        raise BadInput(f"clusters: {place}: field paragraph_ids: none of the documents holds text")
    return documents


def _cut(documents: Sequence[Document], words: int) -> list[Document]:
    """Passages of the documents, each with its document's id; the documents themselves if words is 0."""
    if not words:
        return list(documents)
    return [Document(one.id, piece.text) for one in documents for piece in passages(one, words)]


def _cut_group(group: Group, config: TextConfig) -> Iterator[Group]:
    cut, size = _cut(group.documents, config.passage_words), config.cluster_size
    for i in range(0, len(cut), size):
        yield Group(f"{group.name}/{i // size}", group.source, cut[i : i + size])


def _with_tasks(groups: Sequence[Group], tasks: list[Task], seed: int) -> list[Cluster]:
    """Share the clusters out among the tasks at random, in equal parts, each to one task for good."""
    free = [group.name for group in groups if group.source.split("_")[0] != MATH_SOURCE]
    random.Random(f"tasks {seed}").shuffle(free)
    task_of = {name: tasks[i % len(tasks)] for i, name in enumerate(free)}
    return [
        Cluster(
            question_id=group.name,
            task=task_of.get(group.name, Task.MATH),
            data_source=group.source,
            paragraphs=[document.text for document in group.documents],
        )
        for group in groups
    ]


def _split(
    clusters: list[Cluster], eligible: Sequence[Cluster], share: float, seed: int
) -> tuple[list[Cluster], list[Cluster]]:
    """Training and held-out clusters, the latter from the eligible ones and spread over the tasks."""
    if len(clusters) < 2:
        raise BadInput(
            "documents: one cluster cannot be split into training and held-out text; give more documents, a smaller"
            " text.cluster_size, or gold questions (qa=) and text.heldout_share=0"
        )
    shuffled = random.Random(f"heldout {seed}").sample(eligible, len(eligible))
    shuffled.sort(key=lambda cluster: cluster.task)
    count = min(max(1, round(share * len(eligible))), len(clusters) - 1)
    names = {shuffled[i * len(eligible) // count].question_id for i in range(count)}
    return [c for c in clusters if c.question_id not in names], [c for c in clusters if c.question_id in names]


def _given_gold(file: Path, groups: Groups, library: Library) -> tuple[list[GoldQuestion], int]:
    """Gold questions about the groups, and how many others there are."""
    questions: dict[str, GoldQuestion] = {}
    left_out = 0
    for place, row in _rows(file, "qa"):
        name = _text(row, "question_id", place, "qa")
        if name in groups.absent:
            left_out += 1
            continue
        if name not in groups.pieces:
            raise BadInput(f"qa: {place}: field question_id: there is no cluster {name!r}")
        evidence = _evidence(row, place, groups.pieces[name], library)
        piece = _piece_with(evidence, groups.pieces[name])
        if piece is None:
            left_out += 1
            continue
        question = _gold_question(row, place, piece, evidence)
        if question.id in questions:
            raise BadInput(f"qa: {place}: the id {question.id!r} occurs twice")
        questions[question.id] = question
    if not questions:
        raise BadInput(f"qa: {file} holds no question about one of the clusters")
    return list(questions.values()), left_out


def _evidence(row: dict[str, Any], place: str, pieces: Sequence[Group], library: Library) -> set[str]:
    """Ids of the documents that a question needs. Raises BadInput for one that is not in its cluster."""
    given = row.get("evidence_ids", [])
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise BadInput(f"qa: {place}: field evidence_ids: got {given!r}, expected a list of ids")
    own = {document.id for piece in pieces for document in piece.documents}
    names: list[str] = given
    wanted = {library.repeated.get(name, name) for name in names} - library.empty
    if unknown := sorted(wanted - own):
        raise BadInput(f"qa: {place}: field evidence_ids: the cluster has no document {unknown[0]!r}")
    return wanted


def _piece_with(evidence: set[str], pieces: Sequence[Group]) -> Group | None:
    """The first piece that holds all passages of the evidence; without evidence, only an uncut cluster will do."""
    if not evidence:
        return pieces[0] if len(pieces) == 1 else None
    passages_of = Counter(document.id for piece in pieces for document in piece.documents)
    for piece in pieces:
        own = Counter(document.id for document in piece.documents)
        if all(own[name] == passages_of[name] for name in evidence):
            return piece
    return None


def _gold_question(row: dict[str, Any], place: str, piece: Group, evidence: set[str]) -> GoldQuestion:
    fields: dict[str, Any] = {name: row[name] for name in ("id", "task", "hops", "aliases") if name in row}
    fields["question_id"] = piece.name
    fields["question"] = _text(row, "question", place, "qa")
    fields["evidence"] = [i for i, document in enumerate(piece.documents) if document.id in evidence]
    if row.get("options"):
        fields["options"] = _options(row["options"], place)
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise BadInput(f"qa: {place}: field answer: got {answer!r}, expected a text or a number")
    fields["answer"] = str(answer)
    try:
        question = GoldQuestion.model_validate(fields)
    except ValidationError as error:
        raise BadInput(f"qa: {place}: {describe_validation_error(error)}") from error
    if question.task is Task.CHOICE and question.answer not in LETTERS:
        raise BadInput(f"qa: {place}: field answer: got {answer!r}, expected a letter of A to D")
    return question


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
