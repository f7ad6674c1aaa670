"""Five nodes under load and faults, one of them malicious: `wwwserve soak --kills 1000 --minutes 60 --json FILE`.

The nodes stand before emulated engines, speak TLS with each other and with their users, hand most requests over, sign
all they say, pay for all they get and hold duels. Users talk several turns with them. The last node plays another
adversary of `wwwserve world` in each of its lives. Meanwhile nodes are killed (SIGKILL) and frozen (SIGSTOP) at random
moments, one at a time has no space for its ledger (RLIMIT_FSIZE) or a clock that is 60 s ahead, and the network is cut
in two halves that cannot reach each other.

At the end, of the honest nodes: every journal verifies, and did after every kill; the two sides of every channel agree
to the last micro-credit; no request was paid for twice; every request that a node took ended once, or broke off with
its node; none lost more to the malicious one than its exposure in each run and a fiftieth of what was paid; none was
convicted in a duel; none has evidence against another that the faults do not explain; none grew beyond 400 MB or logged
a stack trace. Exit status 1 if anything of it is not so.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from wwwserve.agents.arguments import Count, File, Folder, Seed, UsageError, parse_args, refuse
from wwwserve.eval.compare import write_json
from wwwserve.eval.live.soak.checks import Checks
from wwwserve.eval.live.soak.faults import CALM_S, EACH, FREEZE_EACH, KILLED_IN, READY_S, Faults
from wwwserve.eval.live.soak.nodes import (
    ACCOUNTS,
    EXPOSURE,
    GPU,
    MODEL,
    NODES,
    SPEED,
    Malicious,
    Network,
    Node,
    certified,
    configured,
    users_context,
)
from wwwserve.eval.live.soak.users import Users
from wwwserve.serving.local_nodes import emulator, free_ports, programs, write_nodes

PROG = "wwwserve soak"
ENDING = 0.75  # of the kills or of the time, after which the malicious node signs what contradicts itself, too


async def play(network: Network, users: Users, faults: Faults, kills: int, most_s: float) -> None:
    """All faults, under load, for at most so long, and then calm."""
    start_s = time.monotonic()
    others = [faults.fill, faults.clock, faults.part]
    each = min(EACH, max(1, kills // len(others)))
    for node in network.nodes:
        node.start()
    for node in network.nodes:
        await network.until(f"{node.name} starts", lambda n=node: network.is_back(n), READY_S)
    await faults.all_ready()
    loading = asyncio.create_task(users.load())
    made = shown = 0
    for k in range(kills):
        spent = (time.monotonic() - start_s) / most_s
        if spent > 1.0:
            break
        for node in network.nodes:
            if isinstance(node, Malicious):
                node.ending = max(spent, k / kills) > ENDING
        await faults.kill(start_s + KILLED_IN * most_s * (k + 1) / kills)
        for problem in network.problems[shown:]:
            print(f"\n{problem}", file=sys.stderr)
        shown = len(network.problems)
        print(f"\r{faults.kills} of {kills} kills, {users.asked} requests", end="", file=sys.stderr, flush=True)
        if k % FREEZE_EACH == 0:
            faults.freeze()
        if k % each == each - 1:
            await others[made % len(others)]()
            made += 1
    for fault in others[made:]:
        await fault()
    await asyncio.sleep(2.0)
    loading.cancel()
    await users.end()
    await faults.all_ready()
    await network.until("nothing is under way", lambda: _calm(network), CALM_S)
    for node in network.nodes:
        await node.stop()
    print(file=sys.stderr)


async def _calm(network: Network) -> bool:
    """Whether nothing is under way between honest nodes."""
    honest = {node.key for node in network.honest}
    for node in network.honest:
        seen = await network.see(node)
        if seen is None or any(
            each["escrow"] or each["peer_escrow"] or each["unacknowledged"]
            for each in seen["ledger"]["channels"]
            if each["peer"] in honest
        ):
            return False
    return True


async def soak(kills: int, seed: int, rate_per_s: float, most_s: float, folder: Path) -> dict[str, Any]:
    """One run, whose files are left in `folder`."""
    ports, files = free_ports(2 * NODES), certified(folder)
    start_s = time.monotonic()
    with programs(folder) as made:
        for k, port in enumerate(ports[:NODES]):
            made.start(f"engine{k}", emulator(port, gpu=GPU, model=MODEL, speed=SPEED, seed=k))
        configs = [configured(k, ports[NODES + k], ports[k], *files) for k in range(NODES)]
        written = write_nodes(folder, configs, ACCOUNTS)
        nodes = [Node(k, made, each) for k, each in enumerate(written[:-1])]
        malicious = Malicious(NODES - 1, made, written[-1], seed)
        network = Network([*nodes, malicious])
        users, faults = Users(network, seed, rate_per_s), Faults(network, seed)
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=users_context(files[0]))
        async with aiohttp.ClientSession(connector=connector) as network.session:
            await play(network, users, faults, kills, most_s)
    checks = Checks(network.nodes, EXPOSURE, folder / "genesis.yaml")
    found = checks.all()
    return {
        "nodes": NODES, "kills": faults.kills, "journals_verified_after_kills": faults.audited, "faults": faults.done,
        "sessions": users.sessions, "requests": users.asked, "later_turns": users.turns, "ended": dict(users.ended),
        "ended_at_the_malicious": dict(users.at_malicious), **found,
        "strategies": {each: malicious.played.count(each) for each in sorted(set(malicious.played))},
        "longest_life_s": round(max(node.longest_s for node in network.nodes), 1),
        "problems": network.problems + checks.problems, "took_s": round(time.monotonic() - start_s, 1),
    }  # fmt: skip


@dataclass
class Args:
    """Kill nodes under load, see that all is accounted for."""

    kills: Count = 100
    """that are made"""
    seed: Seed = 0
    """of all that is random"""
    rate: Count = 12
    """requests/s, of all users together"""
    minutes: Count = 60
    """after which no more are killed"""
    keep: Folder = None
    """leave journals and logs there"""
    json: File = None
    """write the figures to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 where something did not hold, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    with tempfile.TemporaryDirectory(prefix="wwwserve-soak-") as made:
        folder = args.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(soak(args.kills, args.seed, args.rate, 60.0 * args.minutes, folder.absolute()))
    print(json.dumps(found, indent=2))
    if args.json:
        write_json(args.json, found)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
