"""The questioner: writes questions with reference answers over a policy, and remembers the solvable ones."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from actors.actor import Actor
from actors.proposals import ParsedProposal, parse_proposal
from actors.rules import is_supported, misquoted, normalize
from protocols.errors import BadInput
from protocols.messages import ChatMessage, Completion, FinishReason, Prompt
from protocols.policy import PolicyService, Sampled, SampleRequest, TokenizeRequest
from protocols.prompts import question_prompt
from protocols.questioner import (
    HistoryEntry,
    HistoryRequest,
    HistoryResponse,
    ProposeRequest,
    ProposeResponse,
    QuestionerConfig,
    QuestionerService,
    RememberRequest,
)
from protocols.questions import LETTERS, Cluster, Proposal, ProposalStatus, Task
from protocols.service import Empty, Message

READABLE = frozenset({ProposalStatus.OK, ProposalStatus.DUPLICATE, ProposalStatus.UNSUPPORTED})
"""What a question that could be read may be."""


class Memory(Message):
    """What a questioner remembers."""

    entries: dict[str, list[HistoryEntry]] = {}
    """History of every cluster by `task/question_id`, oldest entry first."""


@dataclass(frozen=True)
class Plan:
    """What one question will be asked over, before the policy writes it."""

    history: list[HistoryEntry]
    evidence: list[int]
    fresh: list[int]
    letter: str
    prompt: Prompt
    dropped_history: int = 0
    dropped_documents: int = 0
    too_long: bool = False


class QuestionerActor(Actor, QuestionerService):
    """The questioner's role over a policy handle."""

    def __init__(self, config: QuestionerConfig, policy: PolicyService) -> None:
        super().__init__()
        self._config = config
        self._policy = policy
        self._memory = Memory()

    def state(self) -> Memory:
        """The history memory."""
        return self._memory

    def load_state(self, text: str) -> None:
        """Take back a history memory."""
        self._memory = Memory.model_validate_json(text)

    async def propose(self, request: ProposeRequest) -> ProposeResponse:
        """One proposal per cluster: plan the prompts, let the policy write, read what it wrote."""
        _check_request(request)
        plans = [await self._plan(cluster, uid, request) for cluster, uid in _pairs(request)]
        asked = [i for i, plan in enumerate(plans) if not plan.too_long]
        written: dict[int, Sampled] = {}
        if asked:
            prompts = [plans[i].prompt for i in asked]
            response = await self._policy.sample(SampleRequest(prompts=prompts, params=request.params))
            written = dict(zip(asked, response.results, strict=True))
        proposals = [
            self._read(cluster, uid, plans[i], written.get(i), request.seed)
            for i, (cluster, uid) in enumerate(_pairs(request))
        ]
        return ProposeResponse(proposals=await self._check_answer_lengths(proposals))

    async def remember(self, request: RememberRequest) -> Empty:
        """Add questions to the memory; the oldest of a cluster leave first. Raises BadInput for one that is none."""
        for proposal in request.proposals:
            check_question(proposal)
        for proposal in request.proposals:
            documents = proposal.fresh if self._config.stores == "new" else proposal.evidence
            entry = HistoryEntry(question=proposal.question, answer=answer_in_words(proposal), documents=documents)
            key = _key(proposal.task, proposal.question_id)
            kept = [*self._memory.entries.get(key, []), entry]
            self._memory.entries[key] = kept[len(kept) - min(len(kept), self._config.history) :]
        return Empty()

    async def history(self, request: HistoryRequest) -> HistoryResponse:
        """What is remembered of a cluster."""
        key = _key(request.task, request.question_id)
        return HistoryResponse(entries=self._memory.entries.get(key, []))

    async def _plan(self, cluster: Cluster, uid: str, request: ProposeRequest) -> Plan:
        """Choose documents and history that fit the prompt.

        First the oldest questions go, each with the documents that only it had brought in; then documents.
        """
        rng = random.Random(f"{request.seed}/{uid}")
        remembered = self._memory.entries.get(_key(cluster.task, cluster.question_id), [])
        highest = max((index for entry in remembered for index in entry.documents), default=0)
        if highest >= len(cluster.paragraphs):
            raise BadInput(
                f"cluster {cluster.question_id!r}: has {len(cluster.paragraphs)} paragraphs, but a remembered one"
                f" is about number {highest}"
            )
        evidence, fresh = choose_documents(
            len(cluster.paragraphs), remembered, request.documents or self._config.documents, rng
        )
        letter = rng.choice(LETTERS)
        wanted, history = len(evidence), list(remembered)
        while True:
            prompt = self._prompt(cluster, evidence, history, letter, uid, rng.randrange(2**63))
            fits = await self._length(prompt) <= self._config.max_prompt_tokens
            if fits or (not history and len(evidence) == 1):
                break
            if history:
                history = history[1:]
                evidence = documents_of(history, fresh) or evidence
            else:
                evidence = sorted(rng.sample(evidence, max(1, len(evidence) * 3 // 4)))
                fresh = [i for i in fresh if i in evidence]
        return Plan(
            history,
            evidence,
            fresh,
            letter,
            prompt,
            dropped_history=len(remembered) - len(history),
            dropped_documents=wanted - len(evidence),
            too_long=not fits,
        )

    def _prompt(
        self,
        cluster: Cluster,
        evidence: list[int],
        history: list[HistoryEntry],
        letter: str,
        uid: str,
        seed: int,
    ) -> Prompt:
        paragraphs = [cluster.paragraphs[i] for i in evidence]
        shown = [(entry.question, entry.answer) for entry in history]
        text = question_prompt(cluster.task, paragraphs, shown, letter)
        return Prompt(messages=[ChatMessage(role="user", content=text)], seed=seed, uid=uid)

    async def _length(self, prompt: Prompt) -> int:
        response = await self._policy.tokenize(TokenizeRequest(prompts=[prompt]))
        return len(response.tokens[0])

    def _read(self, cluster: Cluster, uid: str, plan: Plan, written: Sampled | None, seed: int) -> Proposal:
        """Turn what the policy wrote into a proposal with its status."""
        blank = Proposal(
            uid=uid,
            question_id=cluster.question_id,
            task=cluster.task,
            evidence=plan.evidence,
            fresh=plan.fresh,
            status=ProposalStatus.OVERLONG,
            reason=f"the prompt exceeds {self._config.max_prompt_tokens} tokens with one document",
            history_used=len(plan.history),
            dropped_history=plan.dropped_history,
            dropped_documents=plan.dropped_documents,
        )
        if written is None:
            return blank
        completion = written.completions[0]
        parsed = parse_proposal(cluster.task, completion.text)
        status, reason = self._judge(cluster, plan, parsed, completion)
        options, answer = shuffled_options(parsed, random.Random(f"{seed}/{uid}/options"))
        return blank.model_copy(
            update={
                "status": status,
                "reason": reason,
                "question": parsed.question,
                "options": options,
                "answer": answer,
                "prompt_tokens": written.prompt_tokens,
                "completion": completion,
            }
        )

    def _judge(
        self, cluster: Cluster, plan: Plan, parsed: ParsedProposal, completion: Completion
    ) -> tuple[ProposalStatus, str]:
        """Status of a written question. All checks here are rules: none of them asks the weights."""
        if parsed.status is not ProposalStatus.OK:
            cut = completion.finish_reason is FinishReason.LENGTH and parsed.status is ProposalStatus.TRUNCATED
            return parsed.status, "cut off at the token limit" if cut else parsed.reason
        remembered = self._memory.entries.get(_key(cluster.task, cluster.question_id), [])
        words = answer_words(parsed)
        for entry in remembered:
            if repeats(parsed.question, words, entry, self._config.duplicate_overlap):
                return ProposalStatus.DUPLICATE, f"repeats: {entry.question}"
        shown = [cluster.paragraphs[i] for i in plan.evidence]
        if self._config.require_support:
            if wrong := misquoted(parsed.question, shown):
                return ProposalStatus.UNSUPPORTED, f"no document says: {wrong[0]}"
            if not is_supported(cluster.task, words, shown):
                return ProposalStatus.UNSUPPORTED, "the answer does not follow from the documents by rule"
        return ProposalStatus.OK, ""

    async def _check_answer_lengths(self, proposals: list[Proposal]) -> list[Proposal]:
        """Refuse free answers that are too long in policy tokens.

        This comes before all other reasons, since the parser's verdict (`bad_answer`) is not penalised.
        """
        free = [i for i, p in enumerate(proposals) if p.status in READABLE and p.task is Task.GENERAL]
        if not free:
            return proposals
        prompts = [Prompt(text=proposals[i].answer) for i in free]
        response = await self._policy.tokenize(TokenizeRequest(prompts=prompts))
        limit = self._config.max_answer_tokens
        for i, tokens in zip(free, response.tokens, strict=True):
            if len(tokens) > limit:
                update = {
                    "status": ProposalStatus.BAD_ANSWER,
                    "reason": f"{len(tokens)} tokens, limit {limit}",
                }
                proposals[i] = proposals[i].model_copy(update=update)
        return proposals


def choose_documents(
    total: int, remembered: Sequence[HistoryEntry], new: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Indices of the documents to read, and those among them that are new, both ascending.

    The documents of all remembered questions, and up to `new` of the rest (SPELL section 2.3).
    """
    known = documents_of(remembered, [])
    rest = [i for i in range(total) if i not in known]
    fresh = sorted(rng.sample(rest, min(new, len(rest))))
    return documents_of(remembered, fresh), fresh


def documents_of(remembered: Sequence[HistoryEntry], fresh: Sequence[int]) -> list[int]:
    """Indices of the documents of the remembered questions and of the new ones, ascending."""
    return sorted({i for entry in remembered for i in entry.documents}.union(fresh))


def repeats(question: str, answer: str, entry: HistoryEntry, overlap: float) -> bool:
    """Whether a question is one asked before: the same words, or nearly the same and the same answer."""
    a, b = _words(question), _words(entry.question)
    if a == b:
        return True
    near = len(a & b) > overlap * len(a | b)
    return near and normalize(answer) == normalize(entry.answer)


def shuffled_options(parsed: ParsedProposal, rng: random.Random) -> tuple[list[str], str]:
    """Options in a random order, and the letter where the right one came to stand."""
    if len(parsed.options) != len(LETTERS) or parsed.answer not in LETTERS:
        return list(parsed.options), parsed.answer
    order = rng.sample(range(len(LETTERS)), len(LETTERS))
    right = order.index(LETTERS.index(parsed.answer))
    return [parsed.options[i] for i in order], LETTERS[right]


def answer_words(parsed: ParsedProposal) -> str:
    """The answer itself; for multiple choice the text of the right option."""
    return parsed.options[LETTERS.index(parsed.answer)] if parsed.options else parsed.answer


def check_question(proposal: Proposal) -> None:
    """Raise BadInput unless the proposal can be asked."""
    letters = LETTERS if proposal.task is Task.CHOICE else ()
    if len(proposal.options) != len(letters):
        raise BadInput(f"proposal {proposal.uid!r}: {proposal.task.value} takes {len(letters)} options")
    if letters and proposal.answer not in letters:
        raise BadInput(f"proposal {proposal.uid!r}: got answer {proposal.answer[:80]!r}, expected a letter of A to D")
    if any(index < 0 for index in (*proposal.evidence, *proposal.fresh)):
        raise BadInput(f"proposal {proposal.uid!r}: expected indices of documents from 0")


def answer_in_words(proposal: Proposal) -> str:
    """The answer itself; for multiple choice the text of the right option."""
    return proposal.options[LETTERS.index(proposal.answer)] if proposal.options else proposal.answer


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _key(task: str, question_id: str) -> str:
    return f"{task}/{question_id}"


def _pairs(request: ProposeRequest) -> list[tuple[Cluster, str]]:
    return list(zip(request.clusters, request.uids, strict=True))


def _check_request(request: ProposeRequest) -> None:
    if len(request.uids) != len(request.clusters):
        raise BadInput(f"uids: expected {len(request.clusters)}, one per cluster, got {len(request.uids)}")
    names = [_key(cluster.task, cluster.question_id) for cluster in request.clusters]
    repeated = next((name for name, times in Counter(names).items() if times > 1), None)
    if repeated:
        raise BadInput(f"clusters: {repeated} occurs twice in one call")
