"""What the parties of a duel ask of each other."""

import msgspec

from wwwserve.serving.ledger.verdicts import Case, DuelOpening
from wwwserve.serving.market import Promise

ATTEST_PATH, JUDGE_PATH = "/peer/attest", "/peer/judge"
COMMITMENT = "x-wwwserve-commitment"  # of an executor, in the head of its answer

# Judging is paid as a request of so many tokens, after a prompt of half a token for each byte of question and answers,
# which a judge's engine reads about twice; within that time.
JUDGED_TOKENS = 16
JUDGED_IN = Promise(60.0, 0.0)


class Declined(Exception):
    """What a peer asks of a judge or an executor is not done; the message says why."""


class Attest(msgspec.Struct, frozen=True):
    """To an executor: sign what you answered, and tell the secret to which you committed yourself."""

    opening: DuelOpening
    answer: str  # digest


class Pair(msgspec.Struct, frozen=True):
    """To a judge: a case, what was asked, and two answers."""

    case: Case
    path: str
    stream: bool
    request: str
    answer_a: str
    answer_b: str

    def prompt(self) -> int:
        """Tokens of the prompt as which judging it is paid."""
        return 1 + sum(len(text.encode()) for text in (self.request, self.answer_a, self.answer_b)) // 2
