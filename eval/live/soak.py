"""Five nodes under load that are killed, cut off and filled up: `wwwserve soak --kills 100 --json FILE`.

The nodes stand before emulated engines, hand most requests over, sign all they say and pay for all they get. Meanwhile
nodes are killed (SIGKILL) at random moments and started again, one at a time in turn with three other faults: no space
for a node's ledger (RLIMIT_FSIZE), a clock that is 60 s ahead, a network in two halves that cannot reach each other. At
the end: every journal verifies, and did after every kill; the two sides of every channel agree to the last
micro-credit; no request was paid for twice; every request that a node took ended once, or broke off with its node.
Exit status 1 if anything of it is not so.
"""

import asyncio
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import tyro

from wwwserve.agents.arguments import Count, File, Folder, Seed, UsageError, parse_args, refuse
from wwwserve.agents.protocol import MICRO
from wwwserve.eval.compare import write_json
from wwwserve.serving.ledger.audit import Audit, audit, compare, settled
from wwwserve.serving.ledger.entries import Settled
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.statements import WHOLE
from wwwserve.serving.local_nodes import (
    Accounts,
    Command,
    NodeFiles,
    Process,
    Programs,
    emulator,
    free_ports,
    local_urls,
    programs,
    write_nodes,
)

PROG = "wwwserve soak"
NODES = 5
MODEL, GPU, SPEED = "qwen3-8b", "rtx-4090", 10.0
ACCOUNTS = Accounts(credit=400.0, stake=4.0, exposure=50.0)
READY_S, CALM_S, ANSWER_S = 300.0, 120.0, 90.0
MOST_DOWN = 2  # nodes, killed and not back yet
OFF_S = 60.0  # of a clock
LARGEST = resource.RLIM_INFINITY


class Node:
    """One of the nodes: its files, and its process while it runs."""

    def __init__(self, k: int, programs: Programs, files: NodeFiles) -> None:
        self.k, self.programs, self.files = k, programs, files
        self.url, self.ledger = files.url, files.ledger
        self.blocked = programs.folder / f"n{k}.blocked"
        self.process: Process | None = None
        self.lives = 0

    @property
    def port(self) -> str:
        """Where it listens."""
        return self.url.rpartition(":")[2]

    @property
    def up(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self, off_s: float = 0.0) -> None:
        """Run it, with a clock that is off by so much."""
        self.lives += 1
        command = [sys.executable, "-m", "wwwserve.eval.live.soak", "--serve-node", str(self.files.config), str(off_s),
                   str(self.blocked)]  # fmt: skip
        self.process = self.programs.start(f"n{self.k}", Command(command))

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def stop(self) -> None:
        """As an operator stops it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(self.process.wait)

    def limit(self, size: int) -> None:
        """No file of it may grow beyond `size` bytes."""
        assert self.process is not None
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, LARGEST))


class Soak:
    """One run."""

    def __init__(self, nodes: list[Node], seed: int, rate_per_s: float) -> None:
        self.nodes, self.rate_per_s = nodes, rate_per_s
        self.draw = random.Random(seed)
        self.session: aiohttp.ClientSession
        self.ended: Counter[str] = Counter()
        self.asked = 0
        self.problems: list[str] = []
        self.faults: dict[str, Any] = {}
        self.kills = self.audited = 0
        self._asking: set[asyncio.Task[None]] = set()
        self._returning: dict[Node, asyncio.Task[None]] = {}

    # Nodes.

    async def see(self, node: Node) -> dict[str, Any] | None:
        """What a node says of itself; None while it does not."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with self.session.get(node.url + "/network", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                seen: dict[str, Any] = await response.json()
                return seen
        return None

    async def until(self, what: str, true: Any, for_s: float) -> bool:
        """Wait until `true` says so; a problem if it does not in time."""
        until_s = time.monotonic() + for_s
        while not await true():
            if time.monotonic() > until_s:
                self.problems.append(f"{what}: not within {for_s:g} s")
                return False
            await asyncio.sleep(0.1)
        return True

    async def ready(self, nodes: Sequence[Node], peers: int) -> bool:
        """Whether all of these have their engine and see so many peers."""
        for node in nodes:
            seen = await self.see(node)
            if seen is None or not seen["engine"]["up"] or sum(each["there"] for each in seen["peers"]) != peers:
                return False
        return True

    async def all_ready(self) -> None:
        """Until every node is back and sees all others."""
        await asyncio.gather(*self._returning.values())
        await self.until("all nodes see each other", lambda: self.ready(self.nodes, NODES - 1), READY_S)

    # Load.

    async def load(self) -> None:
        """Ask, until cancelled."""
        while True:
            task = asyncio.create_task(self.request())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
            await asyncio.sleep(self.draw.expovariate(self.rate_per_s))

    async def request(self) -> None:
        """One request to a node that runs, and how it ended."""
        running = [node for node in self.nodes if node.up]
        if not running:
            return
        node, stream = self.draw.choice(running), self.draw.random() < 0.5
        hang_up = self.draw.random() < 0.1
        self.asked += 1
        body = {
            "model": MODEL, "stream": stream, "max_tokens": self.draw.randrange(20, 300),
            "messages": [{"role": "user", "content": f"Request {self.asked}."}],
        }  # fmt: skip
        life, read, status = node.lives, b"", 0
        try:
            timeout = aiohttp.ClientTimeout(total=self.draw.uniform(0.05, 0.5) if hang_up else ANSWER_S)
            async with self.session.post(node.url + "/v1/chat/completions", json=body, timeout=timeout) as response:
                status = response.status
                read = await response.read()
            outcome = self._outcome(status, stream, read)
        except TimeoutError:
            outcome = "hung up" if hang_up else "no end"
        except (aiohttp.ClientError, OSError):
            outcome = "broken off" if node.lives == life and node.up and status else "node down"
        if outcome in ("no end", "not one end", "broken off"):
            self.problems.append(f"request {self.asked} at n{node.k} ({status}, stream {stream}): {outcome}")
        self.ended[outcome] += 1

    def _outcome(self, status: int, stream: bool, body: bytes) -> str:
        if status != 200:
            return "refused" if status in (502, 503) else "not one end"
        if not stream:
            return "answered" if body.startswith(b"{") and body.count(b'"usage"') == 1 else "not one end"
        ends = body.count(b"data: [DONE]\n\n")
        errors = body.count(b'data: {"error"')
        if ends == 1 and errors == 0 and body.endswith(b"data: [DONE]\n\n"):
            return "answered"
        return "ended with an error" if errors == 1 and ends == 0 else "not one end"

    # Faults.

    async def kill(self) -> None:
        """Kill a node at some moment; it is back later. Two may be down at once."""
        while len(self._returning) >= MOST_DOWN:
            await asyncio.wait(self._returning.values(), return_when=asyncio.FIRST_COMPLETED)
        node = self.draw.choice([each for each in self.nodes if each not in self._returning])
        await asyncio.sleep(self.draw.uniform(0.0, 1.0))
        node.kill()
        self.kills += 1
        task = self._returning[node] = asyncio.create_task(self.bring_back(node, self.kills))
        task.add_done_callback(lambda done: self._returning.pop(node, None))

    async def bring_back(self, node: Node, kill: int) -> None:
        """Check what a node left when it was killed, and start it again."""
        problems = await asyncio.to_thread(_problems, node.ledger)
        self.audited += 1
        self.problems += [f"after kill {kill}, n{node.k}: {each}" for each in problems]
        node.start()

        async def back() -> bool:
            seen = await self.see(node)
            return seen is not None and bool(seen["engine"]["up"])

        await self.until(f"n{node.k} is back after kill {kill}", back, READY_S)

    async def fill(self) -> None:
        """Leave a node no space for its ledger, and then some again."""
        node = self.draw.choice(self.nodes)
        await self.all_ready()
        node.limit(1)

        async def full() -> bool:
            seen = await self.see(node)
            return seen is not None and bool(seen["ledger"]["full"])

        await self.until(f"n{node.k} notices that there is no space", full, CALM_S)
        before = await self.see(node)
        answered = 0

        async def serves() -> bool:
            nonlocal answered
            seen = await self.see(node)
            answered = seen["requests"]["answered"] - before["requests"]["answered"] if before and seen else 0
            return answered > 0

        await self.until(f"n{node.k} serves somebody while there is no space for its ledger", serves, CALM_S)
        node.limit(LARGEST)

        async def writable() -> bool:
            return not await full()

        await self.until(f"n{node.k} notices that there is space", writable, CALM_S)
        self._count("full disk", answered_meanwhile=answered)

    async def clock(self) -> None:
        """Run a node whose clock is ahead, and then with the right one."""
        await self.all_ready()
        node = self.draw.choice(self.nodes)
        node.kill()
        node.start(OFF_S)

        async def alone() -> bool:
            seen = await self.see(node)
            return seen is not None and bool(seen["engine"]["up"]) and not any(each["there"] for each in seen["peers"])

        await self.until(f"n{node.k} with a clock that is off is alone", alone, READY_S)
        await asyncio.sleep(3.0)
        seen = await self.see(node)
        answered = seen["requests"]["answered"] if seen else 0
        node.kill()
        node.start()
        await self.all_ready()
        self._count("clock off", answered_meanwhile=answered)

    async def part(self) -> None:
        """Cut the network in two halves, and heal it."""
        await self.all_ready()
        nodes = self.draw.sample(self.nodes, NODES)
        halves = nodes[:2], nodes[2:]
        for half, other in (halves, halves[::-1]):
            for node in half:
                node.blocked.write_text(" ".join(each.port for each in other))
        for half in halves:
            await self.until("each half sees itself", lambda h=half: self.ready(h, len(h) - 1), CALM_S)
        await asyncio.sleep(3.0)
        for node in nodes:
            node.blocked.unlink()
        await self.all_ready()
        self._count("partition")

    def _count(self, fault: str, **more: int) -> None:
        found = self.faults.setdefault(fault, {"times": 0} | dict.fromkeys(more, 0))
        found["times"] += 1
        for name, value in more.items():
            found[name] += value

    # The run.

    async def run(self, kills: int, most_s: float) -> None:
        """All faults, under load, for at most so long, and then calm."""
        until_s = time.monotonic() + most_s
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as self.session:
            for node in self.nodes:
                node.start()
            await self.all_ready()
            loading = asyncio.create_task(self.load())
            others = [self.fill, self.clock, self.part]
            for k in range(kills):
                if time.monotonic() > until_s:
                    break
                await self.kill()
                print(f"\r{self.kills} of {kills} kills, {self.asked} requests", end="", file=sys.stderr)
                if k % max(kills // 6, 1) == 0:
                    await others[k // max(kills // 6, 1) % 3]()
            for fault in others[len(self.faults) :]:
                await fault()
            await asyncio.sleep(2.0)
            loading.cancel()
            await asyncio.gather(loading, *self._asking, return_exceptions=True)
            await self.all_ready()
            await self.until("nothing is under way", self._calm, CALM_S)
            for node in self.nodes:
                await node.stop()
        print(file=sys.stderr)

    async def _calm(self) -> bool:
        for node in self.nodes:
            seen = await self.see(node)
            if seen is None or any(
                each["escrow"] or each["peer_escrow"] or each["unacknowledged"] for each in seen["ledger"]["channels"]
            ):
                return False
        return True

    def check(self) -> dict[str, Any]:
        """What the journals say in the end."""
        found = [audit(node.ledger) for node in self.nodes]
        for node, each in zip(self.nodes, found, strict=True):
            self.problems += [f"n{node.k}: {problem}" for problem in each.problems]
        agreed = 0
        for k, one in enumerate(found):
            for i in range(k + 1, NODES):
                differ = compare(one, found[i])
                if not differ and not settled(one, found[i]):
                    differ = ["the two do not own the same by either's account"]
                self.problems += [f"n{k} and n{i}: {each}" for each in differ]
                agreed += not differ
        twice = _billed_twice([node.ledger for node in self.nodes])
        self.problems += [f"a request was paid for twice: {each}" for each in twice]
        return {
            "nodes": NODES, "kills": self.kills, "journals_verified_after_kills": self.audited, "faults": self.faults,
            "requests": self.asked, "ended": dict(self.ended), "channels_that_agree": agreed,
            "receipts": sum(channel.number for each in found for channel in each.books.channels.values()),
            "paid_credits": sum(channel.total for each in found for channel in each.books.channels.values()) / MICRO,
            "short_credits": sum(c.short for each in found for c in each.books.channels.values()) / MICRO,
            "entries": sum(each.entries for each in found), "billed_twice": len(twice), "problems": self.problems,
        }  # fmt: skip


def _problems(ledger: Path) -> list[str]:
    found: Audit = audit(ledger)
    return found.problems


def _billed_twice(ledgers: Sequence[Path]) -> list[str]:
    """Digests of requests, no two of which are alike, that have two receipts for a whole answer."""
    paid: Counter[str] = Counter()
    for ledger in ledgers:
        journal = SqliteJournal(ledger, read_only=True)
        for entry in journal.entries():
            if b'"type":"settle"' in entry.body[:20]:
                receipt = msgspec.json.decode(entry.body, type=Settled).receipt
                paid[receipt.request] += receipt.served.came == WHOLE
        journal.close()
    return [name for name, times in paid.items() if times > 1]


def configured(k: int, port: int, engine: int) -> dict[str, Any]:
    """The configuration of node k before the engine at that port."""
    [url] = local_urls([engine])
    return {
        "name": f"n{k}", "port": port, "policy": "random", "seed": k,
        "engine": {
            "url": url, "timeout_s": 20.0,
            "profile": {"kind": "catalogue", "gpu": GPU, "model": MODEL, "max_num_seqs": 64},
        },
        "market": {"speed": SPEED, "gossip_s": 5.0, "tick_s": 2.0},
        "log": "warning",
    }  # fmt: skip


async def soak(kills: int, seed: int, rate_per_s: float, most_s: float, folder: Path) -> dict[str, Any]:
    """One run, whose files are left in `folder`."""
    ports = free_ports(2 * NODES)
    start_s = time.monotonic()
    with programs(folder) as made:
        for k, port in enumerate(ports[:NODES]):
            made.start(f"engine{k}", emulator(port, gpu=GPU, model=MODEL, speed=SPEED, seed=k))
        configs = [configured(k, ports[NODES + k], ports[k]) for k in range(NODES)]
        nodes = [Node(k, made, files) for k, files in enumerate(write_nodes(folder, configs, ACCOUNTS))]
        run = Soak(nodes, seed, rate_per_s)
        await run.run(kills, most_s)
    return run.check() | {"took_s": round(time.monotonic() - start_s, 1)}


def serve_node(file: str, off_s: float, blocked: Path) -> int:
    """Be a node, with a clock that is off by so much, which reaches no port that the file `blocked` names."""
    real = time.time
    time.time = lambda: real() + off_s

    request = aiohttp.ClientSession._request

    async def unless_blocked(self: aiohttp.ClientSession, method: str, url: Any, **more: Any) -> Any:
        with suppress(OSError):
            if any(f":{port}/" in str(url) for port in blocked.read_text().split()):
                raise aiohttp.ClientConnectionError("the network is parted")
        return await request(self, method, url, **more)

    aiohttp.ClientSession._request = unless_blocked  # type: ignore[method-assign, assignment]
    from wwwserve.serving import cli  # not before: what it imports binds the clock

    return cli.main(["node", file])


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
    serve_node: Annotated[tuple[str, float, Path] | None, tyro.conf.arg(metavar="FILE SECONDS FILE")] = None
    """for its own processes: be a node"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 where something did not hold, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    if args.serve_node:
        return serve_node(args.serve_node[0], float(args.serve_node[1]), Path(args.serve_node[2]))
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
