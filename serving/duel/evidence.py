"""What follows from the signed statements of a duel: in which order a judge sees the answers, and what votes say of
it."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from wwwserve.agents.protocol import (
    TIE,
    VOTE_A,
    VOTE_B,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    duel_outcome,
)
from wwwserve.serving.ledger.verdicts import Verdict, Vote


@dataclass(slots=True)
class Record:
    """What one saw of a judge."""

    votes: int = 0
    undecided: int = 0  # of the votes
    outvoted: int = 0
    silent: int = 0
    said_first: int = 0  # votes for the answer that it was shown first


def b_first(seed: str, judge: str) -> bool:
    """Whether a judge is shown B before A in the case of that seed."""
    return bool(hashlib.sha256(f"{seed} {judge}".encode()).digest()[0] & 1)


def as_shown(vote: int, seed: str, judge: str) -> int:
    """A vote on A and B as one on the first and the second that a judge was shown, or the other way round."""
    if vote in (VOTE_A, VOTE_B) and b_first(seed, judge):
        return VOTE_A + VOTE_B - vote
    return vote


def chance_of_bias(first: int, votes: int) -> float:
    """How likely it is that of `votes` for one of two answers, shown in random order, as far from half or farther are
    for the first, by one to whom the order does not matter (two-sided exact binomial test)."""
    far = abs(2 * first - votes)
    return sum(comb(votes, k) for k in range(votes + 1) if abs(2 * k - votes) >= far) / (1 << votes)


def record_of(verdicts: Iterable[Verdict], judge: str) -> Record:
    """What the evidence says of a judge; of whom a verdict has no vote it says nothing."""
    record = Record()
    for verdict in verdicts:
        votes = {vote.judge: vote.vote for vote in verdict.votes}
        if judge in votes:
            count_vote(record, judge, verdict.case.seed(), votes)
    return record


def count_vote(record: Record, judge: str, seed: str, votes: Mapping[str, int]) -> None:
    """Take a judge's vote in a case of that seed, one of all the `votes`, into what one saw of it."""
    vote = votes[judge]
    record.votes += vote != VOTE_SILENT
    record.undecided += vote == VOTE_UNDECIDED
    record.silent += vote == VOTE_SILENT
    record.said_first += as_shown(vote, seed, judge) == VOTE_A
    outcome = duel_outcome(np.array(list(votes.values()), np.int64))
    record.outvoted += outcome != TIE and vote in (VOTE_A, VOTE_B) and vote != outcome


def votes_by(judges: Sequence[str], votes: Iterable[Vote]) -> dict[str, int]:
    """What each judge voted, VOTE_SILENT if it did not."""
    said = {vote.judge: vote.vote for vote in votes}
    return {judge: said.get(judge, VOTE_SILENT) for judge in judges}
