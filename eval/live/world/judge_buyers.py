"""Those who would buy verdicts, or make them up."""

from typing import Any

import msgspec

from wwwserve.agents.protocol import VOTE_A, VOTE_B
from wwwserve.eval.live.world.adversaries import Forger, tell
from wwwserve.eval.live.world.nodes import Node
from wwwserve.serving.duel.evidence import as_shown
from wwwserve.serving.duel.messages import Pair
from wwwserve.serving.ledger.exchange import Telling
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.ledger.verdicts import Answer, Case, DuelOpening, Party, Verdict, Vote, committed


class JudgeBuyer(Forger):
    """One of a coalition: it votes for its own and against the others, hides what its own lose, and tells everyone
    verdicts with votes that it made up, cast twice, or on a case that it changed."""

    name = "judge buyer"

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        super().begin(node)
        pool, peers, world = node.dispatcher.judge_pool, node.dispatcher.delegation.duels.peers, node.world
        compare, settle = pool._compare, peers.settle

        async def vote(origin: str, pair: Pair, *more: Any) -> int:
            ours = [not world.by_name[each.executor].honest for each in (pair.case.a, pair.case.b)]
            if ours[0] == ours[1]:
                return await compare(origin, pair, *more)
            return as_shown(VOTE_A if ours[0] else VOTE_B, pair.case.seed(), node.name)

        def hide(verdict: Verdict) -> None:
            for_a = sum(each.vote == VOTE_A for each in verdict.votes) * 2 > len(verdict.votes)
            if world.by_name[(verdict.case.b if for_a else verdict.case.a).executor].honest:
                settle(verdict)

        duels = node.dispatcher.delegation.duels
        judge, ask = duels._judge, duels._votes

        async def judge_twice(*given: Any) -> str:  # by other secrets, of which one may draw a better jury
            await judge(*given)
            return await judge(*given)

        async def ask_twice(judges: list[str], pair: Pair) -> list[Vote]:
            higher = msgspec.structs.replace(pair.case, height=pair.case.height + 1)
            await ask(judges, msgspec.structs.replace(pair, case=higher))
            return await ask(judges, pair)

        duels._judge, duels._votes = judge_twice, ask_twice  # type: ignore[method-assign, assignment]
        pool._compare = vote  # type: ignore[method-assign, assignment]
        peers.settle = hide  # type: ignore[method-assign]

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        known = [each for each in node.ledger.stakes.slashes.values() if isinstance(each, Verdict)]
        case = node.random.choice(known).case if known and node.random.random() < 0.7 else made_up(node)
        if case is not None:
            await tell(node, peer, Telling((msgspec.json.encode(spoilt(node, case)).decode(),)))


class Crowd(JudgeBuyer):
    """One of many keys without a stake that say the same of verdicts."""

    name = "crowd"
    granted = False


def made_up(node: Node) -> Case | None:
    """A duel of two others that never was, as far as one node can sign it."""
    dice, stakes = node.random, node.ledger.stakes
    staked = [name for name in node.world.names if name != node.name and name in stakes.latest]
    if len(staked) < 2:
        return None
    names, secret = sorted(dice.sample(staked, 2)), str(dice.random())
    one, other = (Party(name, committed(name + secret)) for name in names)
    bond = stakes.latest.get(node.name)
    opening = DuelOpening(node.name, stakes.epoch, digest(b""), one, other, committed(secret), bond)
    opening = opening.signed(node.identity)
    answers = [
        Answer(name, opening.name(), digest(b""), name + secret, stakes.latest[name]).signed(node.identity)
        for name in names
    ]
    return Case(opening, secret, 1 + stakes.height(*names), *answers)


def spoilt(node: Node, case: Case) -> Verdict:
    """A verdict on a case, or on one that differs from it, by which an honest node would lose if it counted."""
    dice, world = node.random, node.world
    if dice.random() < 0.5:
        case = msgspec.structs.replace(case, height=dice.choice([0, 1, case.height + 1, 1 << 40]))
    against = VOTE_B if world.by_name[case.a.executor].honest else VOTE_A
    judges = [name for name in world.names if name not in case.opening.parties()]
    own = [each.identity for each in world.nodes if not each.honest]
    how = dice.choice(["forged", "friends", "both", "party"])
    votes = [Vote(case.name(), each.name, against).signed(each) for each in own if each.name in judges]
    if how == "forged":
        votes = [Vote(case.name(), name, against).signed(node.identity) for name in judges]
    elif how == "both":
        votes += [Vote(case.name(), each.judge, VOTE_A + VOTE_B - against) for each in votes]
    elif how == "party":
        votes += [Vote(case.name(), name, against).signed(node.identity) for name in case.opening.parties()]
    return Verdict(case, tuple(votes))
