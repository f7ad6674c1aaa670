"""Random answers lose: duels on real vLLM until a worthless provider has nothing at stake: `wwwserve duels`.

Nodes before SmolLM2, and one before a model of random weights that passes for it, with identities and ledgers as they
are in service. Users of all but that one ask, node by node; what is handed to a peer goes to two, and three others
judge, each no more than it does for one origin. The run ends when the worthless provider has no stake left and nothing
to stake, or after `--most` duels. What is reported of judges is counted from the signed votes that the first node's
journal keeps as evidence, of all duels that moved stake.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import aiohttp
import msgspec

from wwwserve.agents.arguments import Count, File, Range, UsageError, parse_args, refuse
from wwwserve.agents.protocol import MICRO, VOTE_A, VOTE_UNDECIDED
from wwwserve.eval.compare import write_json
from wwwserve.eval.live.judges import CHAT, question
from wwwserve.serving.duel.evidence import chance_of_bias, record_of
from wwwserve.serving.duel.messages import JUDGED_IN, JUDGED_TOKENS
from wwwserve.serving.engine.local_vllm import PROFILES, RANDOM, SMOLLM2, PrepareError
from wwwserve.serving.ledger.entries import Event, Settled, Stated
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.verdicts import Verdict
from wwwserve.serving.ledger.verdicts import decode as decode_stake
from wwwserve.serving.local_nodes import Accounts, NetworkError, free_ports, started, vllm

STAKE, FUNDS = 2.0, 8.0  # credits at stake, and what one has to stake in all
PROG = "wwwserve duels"
CREDIT, EXPOSURE = 10_000.0, 1000.0
JUDGES = 3
GOSSIP_S = 1.0
NODES_READY_S = 300.0


class Nodes(NamedTuple):
    """URLs and journals of those before the good engine; all keys, of which the last is the worthless provider's."""

    urls: list[str]
    keys: list[str]
    journals: list[Path]

    @property
    def worthless(self) -> str:
        """Its key."""
        return self.keys[-1]


@asynccontextmanager
async def nodes(good_url: str, bad_url: str, count: int, funds: float) -> AsyncIterator[Nodes]:
    """`count` nodes before a good engine and one before a bad one; they end with the context. Raises NetworkError."""
    configured: list[dict[str, Any]] = []
    for k, port in enumerate(free_ports(count + 1)):
        bad = k == count
        configured.append({
            "name": "worthless" if bad else f"n{k + 1}", "port": port, "policy": "random", "seed": k, "stake": STAKE,
            "serves": [SMOLLM2], "log": "warning",
            "engine": {
                "url": bad_url if bad else good_url,
                "profile": {"kind": "measured", **PROFILES[RANDOM if bad else SMOLLM2]},
            },
            "market": {"duel_probability": 1.0, "judges": JUDGES, "stake_rule": "fixed", "gossip_s": GOSSIP_S},
        })  # fmt: skip
    context = started(configured, [], accounts=Accounts(CREDIT, funds, EXPOSURE))
    network = await asyncio.to_thread(context.__enter__)  # what runs in this loop goes on
    try:
        yield Nodes(network.urls[:count], network.keys, [each.ledger for each in network.files[:count]])
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def look(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What a node says of itself and its peers."""
    async with session.get(f"{url}/network") as response:
        seen: dict[str, Any] = await response.json()
        return seen


async def duels_of(session: aiohttp.ClientSession, urls: Sequence[str]) -> dict[str, int]:
    """Duels of nodes by their outcome."""
    counts = Counter[str]()
    for url in urls:
        async with session.get(f"{url}/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith("wwwserve_duels_total{"):
                    counts[line.split('"')[1]] += int(float(line.split()[-1]))
    return dict(counts)


async def fight(
    good_url: str,
    bad_url: str,
    *,
    count: int = 5,
    most: int = 200,
    tokens: int = 24,
    at_once: int = 4,
    funds: float = FUNDS,
) -> dict[str, Any]:
    """Ask until the worthless provider has nothing left, or for `most` duels; returns what came of it."""
    async with nodes(good_url, bad_url, count, funds) as made, aiohttp.ClientSession() as session:
        for url in made.urls:
            await _until(session, url, count)
        began_s, number, over = time.monotonic(), 0, False
        failed = 0

        async def request() -> None:
            nonlocal number, failed
            while not over:
                number += 1
                asked = question(number, tokens) | {"seed": number}
                async with session.post(made.urls[number % count] + CHAT, json=asked) as response:
                    await response.read()
                    failed += response.status != 200

        async def watch() -> None:
            nonlocal over
            while sum((outcomes := await duels_of(session, made.urls)).values()) < most:
                left = await asyncio.to_thread(lambda: funds_after(evidence(made.journals[0]), made, funds))
                state = f"{outcomes}, the worthless provider has {left:g} credits left to stake"
                print(f"{PROG}: {time.monotonic() - began_s:.0f} s, {state}", file=sys.stderr, flush=True)
                if left == 0.0:
                    break
                await asyncio.sleep(GOSSIP_S)
            over = True

        await asyncio.gather(watch(), *(request() for _ in range(at_once)))
        took_s = time.monotonic() - began_s
        outcomes = await duels_of(session, made.urls)
        seen = [await look(session, url) for url in made.urls]
        worthless = [peer for each in seen for peer in each["peers"] if peer["key"] == made.worthless]
        verdicts, paid = evidence(made.journals[0]), [fee for journal in made.journals for fee in fees(journal)]
    return {
        "duels": sum(outcomes.values()), "outcomes": outcomes, "requests": number, "failed": failed,
        "s": round(took_s, 1), "funds_left": funds_after(verdicts, made, funds),
        "votes_paid": len(paid), "paid_for_votes": round(sum(paid), 6),
        "worthless": {
            "stake": worthless[0]["stake"],
            **{key: sum(each[key] for each in worthless) for key in ("duels_won", "duels_lost")},
        },
        **judged(verdicts, made, funds),
    }  # fmt: skip


async def _until(session: aiohttp.ClientSession, url: str, peers: int) -> None:
    """Until a node sees all others and their stakes. Raises NetworkError."""
    until_s = time.monotonic() + NODES_READY_S
    while True:
        seen = (await look(session, url))["peers"]
        if sum(peer["there"] and peer["stake"] == STAKE for peer in seen) == peers:
            return
        if time.monotonic() > until_s:
            raise NetworkError(f"{url} did not see {peers} peers with their stake, but {seen}")
        await asyncio.sleep(0.1)


def events(journal: Path) -> list[Event]:
    """All that a node's journal keeps."""
    opened = SqliteJournal(journal, read_only=True)
    try:
        return [msgspec.json.decode(entry.body, type=Event) for entry in opened.entries()]
    finally:
        opened.close()


def evidence(journal: Path) -> list[Verdict]:
    """The verdicts that a node's journal keeps, each verified again, in their order."""
    stated = [decode_stake(event.statement) for event in events(journal) if isinstance(event, Stated)]
    return [each for each in stated if isinstance(each, Verdict)]


def fees(journal: Path) -> list[float]:
    """What a node paid for votes, credits."""
    receipts = [event.receipt for event in events(journal) if isinstance(event, Settled)]
    return [each.due / MICRO for each in receipts if each.promise == JUDGED_IN and each.served.tokens == JUDGED_TOKENS]


def funds_after(verdicts: Sequence[Verdict], made: Nodes, funds: float) -> float:
    """What verdicts leave the worthless provider to stake, credits."""
    stakes = Stakes({key: round(funds * MICRO) for key in made.keys}, agreed=True)
    for verdict in verdicts:
        stakes.heard(verdict)
    return stakes.funds[made.worthless] / MICRO


def judged(verdicts: list[Verdict], made: Nodes, funds: float) -> dict[str, Any]:
    """What judges made of the worthless provider's answers, when its funds were gone, what each judge's votes show."""
    gone_after = None
    against = lost = votes = wrong = undecided = 0
    for k, verdict in enumerate(verdicts):
        executors = (verdict.case.a.executor, verdict.case.b.executor)
        if made.worthless in executors:
            against += 1
            good = VOTE_A + (executors[0] == made.worthless)
            cast = [vote.vote for vote in verdict.votes]
            votes += len(cast)
            undecided += cast.count(VOTE_UNDECIDED)
            wrong += sum(vote not in (good, VOTE_UNDECIDED) for vote in cast)
            lost += 2 * cast.count(good) > len(cast) - cast.count(VOTE_UNDECIDED)
        if gone_after is None and funds_after(verdicts[: k + 1], made, funds) == 0.0:
            gone_after = k + 1
    records = {key[:8]: record_of(verdicts, key) for key in made.keys}
    return {
        "verdicts": len(verdicts), "verdicts_until_nothing_is_left": gone_after,
        "with_the_worthless": {
            "verdicts": against, "lost": lost, "votes": votes, "wrong_votes": wrong, "undecided": undecided,
            "judges_error_rate": round((wrong + 0.5 * undecided) / votes, 4) if votes else None,
        },
        "judges": {
            name: {
                "votes": record.votes, "undecided": record.undecided, "outvoted": record.outvoted,
                "silent": record.silent, "said_first": record.said_first,
                "chance_of_bias": round(chance_of_bias(record.said_first, record.votes - record.undecided), 4),
            }
            for name, record in records.items()
        },
    }  # fmt: skip


@dataclass
class Args:
    """Hold duels on real vLLM until a worthless provider has nothing at stake."""

    nodes: Annotated[int, Range(5)] = 5
    """before SmolLM2, on one core"""
    most: Count = 200
    """duels, after which it ends anyhow"""
    tokens: Count = 24
    """of an answer at most"""
    json: File = None
    """write the figures to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if the worthless provider has something left to stake."""
    try:
        args = parse_args(Args, PROG, argv)
        with vllm([SMOLLM2, RANDOM], name=SMOLLM2) as (urls, _):
            result = asyncio.run(fight(*urls, count=args.nodes, most=args.most, tokens=args.tokens))
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        if args.json:
            write_json(args.json, result)
    except (UsageError, NetworkError, PrepareError) as error:
        return refuse(PROG, error)
    return int(result["funds_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
