"""Whether a reply's final answer is the right one: rewards by rule.

By equality, never by substring: "1" is part of "11", and "{" of most LaTeX (Q-RM, specification 4.1). Which part of a
reply is its answer, and whether two formulas are equal, is math-verify's business.
"""

import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from actors.rules import after_thinking, covers
from protocols.errors import Unavailable
from protocols.reward_model import Match

MOST_CHARACTERS = 20_000
"""Of longer replies the end is read: final answers stand there."""
ANSWER = 300
"""Characters at the end of a reply in which a number that cannot be worked out is looked for."""
SECONDS = 5
"""For one comparison; math-verify's own limit, which ends sympy where it can be interrupted."""
HANGING, STARTING = 10.0, 120.0
"""Seconds after which the process that compares is given up, and for which its first answer is waited."""

# What sympy would work out in one uninterruptible go: towers, large exponents, factorials.
_COSTLY = re.compile(r"(?:\^|\*\*)[\s{(]*\d+\s*(?:\^|\*\*)|(?:\^|\*\*)[\s{(+-]*\d[\d{},]{3,}|\d{4,}\s*!|!\s*!")


def texts_match(reply: str, reference: str, match: Match) -> bool:
    """`exact`, `cover` and `wildcard`; see RewardModelConfig.match."""
    if match == "exact":
        return _plain(reply) == _plain(reference)
    if match == "cover":
        return covers(reply, reference)
    text = reply.strip()
    return len(text) == len(reference) and all(r in ("?", t) for t, r in zip(text, reference, strict=True))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def mathematically_equal(reply: str, reference: str) -> tuple[bool, str | None]:
    """Whether the final answer of a reply equals the reference, and that answer as text, if there is one.

    Works in the main thread of a process only: its time limit is a signal.
    """
    from math_verify import parse, verify

    text = (after_thinking(reply) or "")[-MOST_CHARACTERS:]
    if _COSTLY.search(text.rpartition("boxed")[2][-ANSWER:]) or _COSTLY.search(reference):
        return text.strip() == reference.strip(), None
    answer = parse(text, parsing_timeout=SECONDS)
    right = parse(rf"\boxed{{{reference}}}", parsing_timeout=SECONDS)
    if not answer:
        return False, None
    return bool(right and verify(right, answer, timeout_seconds=SECONDS)), str(answer[-1])


class MathMatcher:
    """Compares answers in a process of its own, which is given up when it hangs. Not for several threads at once."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Make the process and let it import what it needs. Raises Unavailable when it does not answer."""
        # Not forked: this process has threads.
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        try:
            ready, _ = self._pool.submit(mathematically_equal, "1", "1").result(timeout=STARTING)
        except (TimeoutError, BrokenProcessPool) as error:
            self.close()
            raise Unavailable("rules: the process that compares answers does not start") from error
        if not ready:
            raise Unavailable("rules: math-verify does not find 1 equal to 1")

    def compare(self, reply: str, reference: str) -> tuple[bool, str | None]:
        """As `mathematically_equal`; what cannot be compared in time is not equal."""
        if self._pool is None:
            raise Unavailable("rules: the process that compares answers has been closed")
        try:
            return self._pool.submit(mathematically_equal, reply, reference).result(timeout=HANGING)
        except (TimeoutError, BrokenProcessPool):
            self.close()
            self.start()
            return False, None

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
