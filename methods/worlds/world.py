"""What a method may ask of the place its documents come from."""

from collections.abc import Sequence
from typing import Protocol

from protocols.questions import Cluster, GoldQuestion, Proposal, Question


class World(Protocol):
    """Documents, gold questions, and the truth as far as it is known."""

    training: list[Cluster]
    """Clusters to learn from."""
    heldout: list[Cluster]
    """Clusters that gold questions are asked over."""

    def gold(self, clusters: Sequence[Cluster]) -> list[GoldQuestion]:
        """Questions with true answers about some clusters."""

    def verdict_pairs(self) -> list[tuple[Question, str, str, bool]]:
        """Question, reply, reference, and whether both answers mean the same."""

    def audit(self, cluster: Cluster, proposal: Proposal) -> bool | None:
        """Whether a proposal's reference answer is true; None if that is not known."""

    def same(self, answer: str, reference: str) -> bool | None:
        """Whether two answers mean the same; None if that is not known."""

    def hops(self, question: str) -> int | None:
        """How many facts a question joins; None if that is not known."""

    def notes(self) -> list[str]:
        """What a reader of the results must know about the input."""
