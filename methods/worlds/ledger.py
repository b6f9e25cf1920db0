"""The fact ledger: a generated world in which truth is known (SPELL specification, section 5.1).

Eight keys, four values with two surface forms each (V0 and W0 mean the same). A document states the value of
a key and the key that it leads to. 1-hop questions ask for a key's value, 2-hop questions for the value of
the key that a key leads to. Prompts and outputs are those of real text, but every fixed text, fact, question and
answer sentence is one token: so a model of 0.13 M weights can play all three roles, and learns to within a minute
on one core.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocols.prompts import fixed_texts
from protocols.questions import Cluster, GoldQuestion, Proposal, Question, Task

KEYS = [f"K{i}" for i in range(8)]
FORMS = [[f"V{i}", f"W{i}"] for i in range(4)]
SURFACES = [surface for forms in FORMS for surface in forms]
DOCUMENTS_PER_CLUSTER = 6

YES, NO = "[[YES]]", "[[NO]]"
PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"


def fact(key: str, surface: str) -> str:
    """The sentence that states a key's value."""
    return f"{key} is {surface}."


def link(key: str, target: str) -> str:
    """The sentence that states where a key leads."""
    return f"{key} leads to {target}."


def one_hop(key: str) -> str:
    """The question for a key's value."""
    return f"What is {key}?"


def two_hop(key: str) -> str:
    """The question for the value of the key that a key leads to."""
    return f"What is the key that {key} leads to?"


PROPOSAL_START = '```json\n{"question": "'


def proposal_text(question: str, answer: str) -> str:
    """What a questioner writes."""
    return PROPOSAL_START + question + _proposal_end(answer)


def _proposal_end(answer: str) -> str:
    return f'", "answer": "{answer}"}}\n```'


def answer_text(surface: str) -> str:
    """What a responder writes."""
    return f"The correct answer is {surface}."


@dataclass(frozen=True)
class Ledger:
    """The facts of one cluster: per key its surface form and its target, in document order."""

    values: dict[str, str]
    targets: dict[str, str]

    def documents(self) -> list[str]:
        """One document per key."""
        return [f"{fact(key, value)} {link(key, self.targets[key])}" for key, value in self.values.items()]

    def answer(self, question: str) -> str | None:
        """The surface form that the facts give, or None if they do not answer the question."""
        key, hops = parse_question(question)
        if hops == 2:
            key = self.targets.get(key, "")
        return self.values.get(key)


def parse_question(question: str) -> tuple[str, int]:
    """Key and number of hops of a question; an empty key and 0 if it is none of this world."""
    for pattern, hops in ((r"What is (K\d)\?", 1), (r"What is the key that (K\d) leads to\?", 2)):
        if match := re.fullmatch(pattern, question.strip()):
            return match[1], hops
    return "", 0


def same_value(a: str, b: str) -> bool:
    """Whether two surface forms mean the same value."""
    return a in SURFACES and b in SURFACES and a[1:] == b[1:]


def random_ledger(rng: random.Random) -> Ledger:
    """Six keys of the eight, random values in random forms, every link to another of the six."""
    keys = rng.sample(KEYS, DOCUMENTS_PER_CLUSTER)
    values = {key: rng.choice(SURFACES) for key in keys}
    targets = {key: rng.choice([other for other in keys if other != key]) for key in keys}
    return Ledger(values, targets)


class LedgerWorld:
    """Training clusters, held-out clusters, and the truth about both."""

    def __init__(self, seed: int, training_clusters: int, heldout_clusters: int) -> None:
        rng = random.Random(f"ledger {seed}")
        self._ledgers = {f"train-{i:04d}": random_ledger(rng) for i in range(training_clusters)}
        held_out = {f"heldout-{i:04d}": random_ledger(rng) for i in range(heldout_clusters)}
        self._ledgers |= held_out
        self.training = [self._cluster(name) for name in self._ledgers if name not in held_out]
        self.heldout = [self._cluster(name) for name in held_out]

    def _cluster(self, name: str) -> Cluster:
        documents = self._ledgers[name].documents()
        return Cluster(question_id=name, task=Task.GENERAL, data_source="ledger", paragraphs=documents)

    def gold(self, clusters: Sequence[Cluster]) -> list[GoldQuestion]:
        """All 1-hop and 2-hop questions about the clusters, with both forms of the true answer."""
        questions = []
        for cluster in clusters:
            ledger = self._ledgers[cluster.question_id]
            for hops, ask in ((1, one_hop), (2, two_hop)):
                for key in ledger.values:
                    answer = ledger.answer(ask(key)) or ""
                    questions.append(
                        GoldQuestion(
                            id=f"{cluster.question_id}-{key}-{hops}",
                            question_id=cluster.question_id,
                            task=Task.GENERAL,
                            question=ask(key),
                            answer=answer,
                            aliases=[form for form in SURFACES if form != answer and same_value(form, answer)],
                            hops=hops,
                        )
                    )
        return questions

    def verdict_pairs(self) -> list[tuple[Question, str, str, bool]]:
        """Question, reply, reference and whether they mean the same: as many equal as different pairs."""
        question = Question(task=Task.GENERAL, question=one_hop(KEYS[0]))
        pairs = [(question, answer_text(a), b, same_value(a, b)) for a in SURFACES for b in SURFACES]
        equal = [pair for pair in pairs if pair[3]]
        different = [pair for pair in pairs if not pair[3]]
        return equal + random.Random(0).sample(different, len(equal))

    def audit(self, cluster: Cluster, proposal: Proposal) -> bool | None:
        """Whether the reference answer is true; a question that the cluster cannot answer has none."""
        truth = self._ledgers[cluster.question_id].answer(proposal.question)
        return truth is not None and same_value(truth, proposal.answer)

    def same(self, answer: str, reference: str) -> bool | None:
        """Whether two answers mean the same."""
        return same_value(answer, reference)

    def hops(self, question: str) -> int | None:
        """Number of hops, or None if the question is none of this world."""
        return parse_question(question)[1] or None

    def notes(self) -> list[str]:
        """What a reader of the results must know about the input."""
        return [f"fact ledger: {len(self.training)} training and {len(self.heldout)} held-out clusters"]


def vocabulary() -> list[str]:
    """Every token of the world: control tokens, fixed prompt texts, sentences, questions, answers."""
    questions = [ask(key) for ask in (one_hop, two_hop) for key in KEYS]
    facts = [fact(key, surface) for key in KEYS for surface in SURFACES]
    links = [link(a, b) for a in KEYS for b in KEYS if a != b]
    answers = [text(surface) for text in (answer_text, _proposal_end) for surface in SURFACES]
    prompts = [text for text in fixed_texts() if text.strip()]
    return [
        *(PAD, UNKNOWN, END, YES, NO, PROPOSAL_START),
        *(*prompts, *questions, *facts, *links, *answers, *SURFACES),
    ]


def write_skeleton(directory: Path) -> None:
    """Write configuration and tokenizer of an untrained model in Hugging Face format (no weights)."""
    tokens = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": _model_config(ids),
        "tokenizer.json": _tokenizer(tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "eos_token": END,
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1))


def _model_config(ids: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(ids),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def _tokenizer(tokens: list[str]) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {PAD, UNKNOWN, END}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": token in special, **flags} for i, token in enumerate(tokens)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": UNKNOWN},
    }
