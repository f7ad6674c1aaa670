"""What it costs to hand a request over, signed and paid: `wwwserve delegated --json FILE`.

A node whose own engine is full hands every request to a second one, whose bare engine answers at once. The node that
is asked has a core to itself; the second node, both engines and the client share the other, so how fast requests go is
no measure of the first: `cpu_us` is the CPU time for a request of each of the two, and `one_core_carries_per_s` what a
core could carry of it. Measured without a ledger and with one, and beside that a node with a ledger that runs requests
on its own engine. `split_us` is what signing, verifying and the journal take of it, each timed alone in this process.
With `--tls` what is handed over is measured without and with `tls`, for the client and between the nodes, and nothing
else.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import uvloop

from wwwserve.agents.arguments import Count, File, Range, UsageError, parse_args, refuse
from wwwserve.agents.protocol import LATENESS, MICRO
from wwwserve.eval.compare import write_json
from wwwserve.eval.live import overhead
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.ledger.channel_ledger import WHOLE, ChannelLedger, Grant
from wwwserve.serving.ledger.journal import Journal, MemoryJournal, SqliteJournal
from wwwserve.serving.ledger.statements import Served, Terms, digest
from wwwserve.serving.local_nodes import Accounts, NetworkError, cpu_s, free_ports, local_urls, look, programs, started
from wwwserve.serving.market import Promise

PROG = "wwwserve delegated"
# So full that the peer looks better with all that is sent to it between two adverts, which is thousands here.
BUSY = b"vllm:num_requests_running 256\nvllm:num_requests_waiting 1000000\nvllm:kv_cache_usage_perc 1\n"
ACCOUNTS = Accounts(credit=100_000_000.0, stake=4.0, exposure=100_000.0)
TOGETHER = 32  # entries in a transaction, for the split
PATH = "/peer/v1/chat/completions"


async def measure(
    port: int, pids: Sequence[int], seconds: float, connections: int, tls: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Keep asking at `port`, which speaks TLS if `tls`; CPU time of the processes for a request."""
    wire = overhead.request(port, False)
    callers = [await overhead.connect(port, tls) for _ in range(connections)]
    times: list[float] = []
    for _ in range(200):
        start_s = time.perf_counter()
        await callers[0].request(wire)
        times.append(time.perf_counter() - start_s)
    used_s = [cpu_s(pid) for pid in pids]
    asked, took_s = await overhead.keep_asking(callers, wire, seconds)
    used = [1e6 * (cpu_s(pid) - before) / asked for pid, before in zip(pids, used_s, strict=True)]
    return {
        "requests": asked, "requests_per_s": round(asked / took_s, 1), "p50_ms": round(1e3 * median(times), 3),
        "cpu_us": [round(each, 1) for each in used],
        "one_core_carries_per_s": [round(1e6 / each) if each else None for each in used],
    }  # fmt: skip


def split(repeats: int) -> dict[str, float]:
    """CPU time of the parts of a request that is handed over, µs, by whom."""
    a, b = Identity.generate(), Identity.generate()
    one, other = Messages(a, lambda name: True), Messages(b, lambda name: True)
    body = overhead.request(1, False).split(b"\r\n\r\n", 1)[1]
    terms = {"x-wwwserve-prompt": "20", "x-wwwserve-tariff": "100000 25000 1000000", "x-wwwserve-escrow": "v3 1 50000"}
    found = {"sign": timed(repeats, lambda: one.sign(b.name, other.run, PATH, terms, body))}
    signatures = iter([one.sign(b.name, other.run, PATH, terms, body) for _ in range(repeats + 1)])

    def verify() -> None:
        sent = [(name.encode(), value.encode()) for name, value in (terms | {SIGNATURE: next(signatures)}).items()]
        other.open(PATH, sent).check(body)

    found["verify"] = timed(repeats, verify)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("origin", "executor"):
            journal = SqliteJournal(Path(folder, f"{kind}.db"))
            found[f"journal_{kind}"] = timed(repeats // TOGETHER, journalling(a, b, journal, kind)) / TOGETHER
            journal.close()
    return {name: round(value, 1) for name, value in found.items()}


def journalling(a: Identity, b: Identity, journal: SqliteJournal, kind: str) -> Callable[[], None]:
    """A transaction of `TOGETHER` requests, as the origin or the executor writes it."""
    grants = [{each.name: Grant(10**15, 10**15, "limits")} for each in (b, a)]
    journals: tuple[Journal, Journal] = (journal, MemoryJournal()) if kind == "origin" else (MemoryJournal(), journal)
    one, other = (
        ChannelLedger(who, kept, granted, {}, exposure=10**14, payment=LATENESS)
        for who, kept, granted in zip((a, b), journals, grants, strict=True)
    )

    asyncio.run(_open(one, other))
    request, terms, promise = digest(b"request"), Terms((100_000, 25_000, MICRO), 20, MICRO), Promise(0.1, 0.01)
    served = Served(digest(b"answer"), 20, 0, 50, 600, WHOLE)

    def transaction() -> None:
        for _ in range(TOGETHER):
            id = one.lock(b.name, terms, request)
            other.take(a.name, id, terms, request, promise)
            other.delivered(a.name, id, served, 0)
            one.settle(b.name, id, promise, served, 1000)
        (one if kind == "origin" else other).flush()

    return transaction


async def _open(one: ChannelLedger, other: ChannelLedger) -> None:
    for _ in range(2):  # it is opened, and reconciled by the one that pays
        await _exchange(one, other)
    await _exchange(other, one)


async def _exchange(one: ChannelLedger, other: ChannelLedger) -> None:
    message = await one.message(other.name)
    assert message is not None
    receiving = asyncio.ensure_future(other.received(one.name, message))
    while not receiving.done():
        await asyncio.sleep(0)
        other.flush()
    replying = asyncio.ensure_future(one.replied(other.name, await receiving))
    while not replying.done():
        await asyncio.sleep(0)
        one.flush()
    await replying


def timed(repeats: int, act: Callable[[], object]) -> float:
    """Mean CPU time of an act, µs, after the first."""
    act()
    start_s = time.process_time()
    for _ in range(repeats):
        act()
    return 1e6 * (time.process_time() - start_s) / repeats


class Measured(NamedTuple):
    """One network of two nodes."""

    name: str
    accounts: Accounts | None = ACCOUNTS
    own_engine: bool = False  # requests are not handed over
    tls: bool = False


def run(seconds: float, connections: int, repeats: int, tls: bool = False) -> dict[str, Any]:
    """Measure all of it, or with `tls` what is handed over without and with TLS. Raises NetworkError for what does not
    start."""
    plain = [Measured("signed", None), Measured("signed_and_paid")]
    if tls:
        all_of_it = [each for one in plain for each in (one, one._replace(name=f"{one.name}_tls", tls=True))]
    else:
        all_of_it = [*plain, Measured("own_engine", own_engine=True)]
    cores = sorted(os.sched_getaffinity(0))
    results: dict[str, Any] = {}
    full_port, engine_port = free_ports(2)
    with programs() as engines:
        for option, port in (("--serve-full", full_port), ("--serve-engine", engine_port)):
            command = [sys.executable, "-m", "wwwserve.eval.live.delegated", option, str(port)]
            overhead.pinned(engines, option, command, cores[-1], port)
        for name, accounts, own_engine, secure in all_of_it:
            listening = zip(free_ports(2), (engine_port if own_engine else full_port, engine_port), strict=True)
            nodes = [configured(k, port, engine, secure) for k, (port, engine) in enumerate(listening)]
            with (
                started(nodes, [], accounts=accounts, cores=(cores[0], cores[-1])) as network,
                overhead.only_core(cores[-1]),
            ):
                if accounts:
                    for url in network.pages:
                        _wait_for_channel(url)
                pids = [process.pid for process in network.nodes]
                results[name] = uvloop.run(measure(nodes[0]["port"], pids, seconds, connections, secure))
                results[name]["handed_over"] = look(network.pages[0])["requests"]["handed_over"]
            print(f"{name}: {results[name]}", flush=True)
    if tls:
        return results
    results["split_us"] = split(repeats)
    print(f"split_us: {results['split_us']}", flush=True)
    return results


def configured(k: int, port: int, engine: int, tls: bool = False) -> dict[str, Any]:
    """The configuration of a node before the engine at that port."""
    [url] = local_urls([engine])
    secured: dict[str, Any] = {"tls": {}, "admin": {"port": free_ports(1)[0]}} if tls else {}
    return secured | {
        "name": f"n{k}", "port": port, "policy": "earliest_finish", "engine": {"url": url, "profile": overhead.PROFILE},
        "log": "error",
    }  # fmt: skip


def _wait_for_channel(url: str) -> None:
    """Until a node can pay its peer, and be paid. Raises NetworkError."""
    until_s = time.monotonic() + overhead.READY_S
    while not any(each["reconciled"] for each in look(url)["ledger"]["channels"]):
        if time.monotonic() > until_s:
            raise NetworkError(f"{url} opens no channel")
        time.sleep(0.1)


@dataclass
class Args:
    """Measure what it costs to hand a request over."""

    seconds: Count = 5
    """of requests, each time"""
    connections: Count = 32
    """requests at once"""
    repeats: Annotated[int, Range(TOGETHER)] = 3200
    """of each part that is timed"""
    tls: bool = False
    """measure without and with TLS what is handed over, and nothing else"""
    json: File = None
    """write the figures to this file"""
    serve_engine: int | None = None
    """for its own processes: be the bare engine at this port"""
    serve_full: int | None = None
    """for its own processes: be a full engine at this port"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    if args.serve_full is not None:
        overhead.METRICS = BUSY
        uvloop.run(overhead.serve_engine(args.serve_full))
    elif args.serve_engine is not None:
        uvloop.run(overhead.serve_engine(args.serve_engine))
    else:
        results = run(args.seconds, args.connections, args.repeats, args.tls)
        if args.json:
            write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
