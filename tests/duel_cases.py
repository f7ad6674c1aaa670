"""Duels as they are stated, made by those who take part: what honest ones sign, and what cheats would."""

from collections.abc import Mapping

from wwwserve.agents.protocol import MICRO
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import digest, sign
from wwwserve.serving.ledger.verdicts import Answer, Case, DuelOpening, Party, Stake, Staked, Verdict, Vote, committed


def staked(who: Identity, amount: int, number: int = 1) -> Staked:
    """A statement of a stake."""
    stake = Stake(who.name, number, amount)
    return Staked(stake, sign(who, "stake", stake))


def case_of(
    stakes: Stakes, origin: Identity, one: Identity, other: Identity, *, nonce: str = "nonce", height: int = 1,
    amount: int = 2 * MICRO, number: int = 1, request: bytes = b"r",
) -> Case:  # fmt: skip
    """A duel of two, each with `amount` at stake by its statement of that number; its A is `one` if that has the
    smaller name."""
    executors = sorted((one, other), key=lambda each: each.name)
    parties = [Party(each.name, committed(f"{each.name} {nonce}")) for each in executors]
    bond = staked(origin, max(amount, MICRO), number) if stakes.epoch else None
    opening = DuelOpening(origin.name, stakes.epoch, digest(request), *parties, committed(nonce), bond).signed(origin)
    answers = [
        Answer(
            each.name, opening.name(), digest(each.name.encode()), f"{each.name} {nonce}",
            staked(each, amount, number) if stakes.epoch else None,
        ).signed(each)
        for each in executors
    ]  # fmt: skip
    return Case(opening, nonce, height, *answers)


def verdict_on(case: Case, votes: Mapping[Identity, int]) -> Verdict:
    """A verdict with the votes of some, as agents.protocol numbers them."""
    return Verdict(case, tuple(Vote(case.name(), judge.name, vote).signed(judge) for judge, vote in votes.items()))


def side_of(case: Case, executor: Identity) -> int:
    """The vote for an executor: VOTE_A or VOTE_B."""
    return 1 + (case.b.executor == executor.name)
