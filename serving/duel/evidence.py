"""What follows from the signed statements of a duel: which answer is A, who judges, and what votes say of a judge."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np

from wwwserve.agents.generator import make_generators
from wwwserve.agents.protocol import (
    TIE,
    VOTE_A,
    VOTE_B,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    draw_by_stake,
    duel_outcome,
)
from wwwserve.serving.ledger.stakes import Answer, Verdict, Vote, duel_name
from wwwserve.serving.ledger.statements import digest


@dataclass(slots=True)
class Record:
    """What one saw of a judge."""

    votes: int = 0
    undecided: int = 0  # of the votes
    outvoted: int = 0
    silent: int = 0
    said_first: int = 0  # votes for the answer that it was shown first


class Drawn(NamedTuple):
    """Who judges a duel."""

    duel: str
    judges: tuple[str, ...]


def in_order(one: Answer, other: Answer) -> tuple[Answer, Answer]:
    """Which is A, and which B, by what neither executor knows of the other."""
    return (one, other) if _key(one) < _key(other) else (other, one)


def draw(a: Answer, b: Answer, electors: Mapping[str, int], count: int) -> Drawn:
    """The judges of a duel, by stake, with uniforms that both signatures make."""
    duel = duel_name(a, b)
    names = sorted(electors)
    stake = np.array([electors[name] for name in names], np.float64)
    drawn = np.zeros(max(count, 1), np.int64)
    uniforms = make_generators(int(duel, 16))[0]
    found = draw_by_stake(stake, np.ones(len(names), np.bool_), count, uniforms, drawn)
    return Drawn(duel, tuple(names[k] for k in drawn[:found]))


def b_first(duel: str, judge: str) -> bool:
    """Whether a judge is shown B before A."""
    return bool(hashlib.sha256(f"{duel} {judge}".encode()).digest()[0] & 1)


def as_shown(vote: int, duel: str, judge: str) -> int:
    """A vote on A and B as one on the first and the second that a judge was shown, or the other way round."""
    if vote in (VOTE_A, VOTE_B) and b_first(duel, judge):
        return VOTE_A + VOTE_B - vote
    return vote


def chance_of_bias(first: int, votes: int) -> float:
    """How likely it is that of `votes` for one of two answers, shown in random order, as far from half or farther are
    for the first, by one to whom the order does not matter (two-sided exact binomial test)."""
    far = abs(2 * first - votes)
    return sum(comb(votes, k) for k in range(votes + 1) if abs(2 * k - votes) >= far) / (1 << votes)


def record_of(verdicts: Iterable[Verdict], judge: str) -> Record:
    """What the evidence says of a judge."""
    record = Record()
    for verdict in verdicts:
        if judge in verdict.judges:
            count_vote(record, judge, duel_name(verdict.a, verdict.b), votes_by(verdict.judges, verdict.votes))
    return record


def count_vote(record: Record, judge: str, duel: str, votes: Mapping[str, int]) -> None:
    """Take a judge's vote in a duel, one of all the `votes`, into what one saw of it."""
    vote = votes[judge]
    record.votes += vote != VOTE_SILENT
    record.undecided += vote == VOTE_UNDECIDED
    record.silent += vote == VOTE_SILENT
    record.said_first += as_shown(vote, duel, judge) == VOTE_A
    outcome = duel_outcome(np.array(list(votes.values()), np.int64))
    record.outvoted += outcome != TIE and vote in (VOTE_A, VOTE_B) and vote != outcome


def votes_by(judges: Sequence[str], votes: Iterable[Vote]) -> dict[str, int]:
    """What each judge voted, VOTE_SILENT if it did not."""
    said = {vote.judge: vote.vote for vote in votes}
    return {judge: said.get(judge, VOTE_SILENT) for judge in judges}


def _key(answer: Answer) -> str:
    return digest(f"{answer.answer} {answer.executor} {answer.request}".encode())
