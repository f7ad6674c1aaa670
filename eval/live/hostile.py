"""Hostile input to a live node: `wwwserve hostile --inputs 50000`.

A node process with an emulated engine gets inputs of seven kinds over its HTTP port: bytes that are no HTTP, requests
that nearly are, bodies of users, peers' requests with signatures that are nearly right, requests that a peer did sign
and whose content is hostile, the same of payment and duels, and adverts of either sort. A seed gives the same inputs,
but for keys and times.

A fault is an answer that is no HTTP, one of 400 or more that is not the JSON of an error, one of 500, which is what a
node answers to its own mistakes, any trace of a Python stack in an answer or in the node's log, a node that ends, and
one that does not serve afterwards. The node's memory is printed, when a tenth of the inputs was sent and at the end.
"""

import asyncio
import contextlib
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from wwwserve.agents.arguments import Count, File, Seed, UsageError, parse_args, refuse
from wwwserve.eval.compare import write_json
from wwwserve.eval.live import hostile_guided
from wwwserve.eval.live.hostile_inputs import CHAT, KINDS, LIMIT, MODEL, Made, http
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages
from wwwserve.serving.local_nodes import Process, emulator, free_ports, look, programs, rss_mb, sees, write_nodes

PROG = "wwwserve hostile"
READY_S = 300.0
SPEED = 20.0  # of the engine
RECEIVE_S = 1.0  # that a request may take to come; those that never come to their end are answered then
ANSWER_S = 30.0  # after which a node counts as hanging
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TRACES = (b"Traceback", b'File "', b"site-packages")


class Seen(NamedTuple):
    """What came of all inputs."""

    statuses: dict[str, Counter[str]]  # by kind of input
    faults: list[str]
    rss_mb: tuple[float, float]
    seconds: float


class Node(NamedTuple):
    """The node under attack."""

    process: Process
    url: str
    key: str
    log: Path


@contextlib.contextmanager
def node(peer: str) -> Iterator[Node]:
    """A node that knows one peer, which is not there."""
    engine_port, port = free_ports(2)
    config = {
        "name": "n", "port": port, "policy": "single", "serves": [MODEL], "log": "warning",
        "engine": {
            "url": f"http://127.0.0.1:{engine_port}",
            "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": MODEL, "max_num_seqs": 64},
        },
        "peers": [{"key": peer, "url": "http://127.0.0.1:9"}], "market": {"speed": SPEED},
        "limits": {"receive_s": RECEIVE_S},
    }  # fmt: skip
    with programs() as made:
        made.start("engine", emulator(engine_port, model=MODEL, speed=SPEED))
        limits = {peer: {"ours": LIMIT, "theirs": LIMIT}}
        config["ledger"] = {"file": str(made.folder / "ledger.db"), "limits": limits}
        [files] = write_nodes(made.folder, [config])
        process = made.start("node", files.command())
        made.wait([files.url], lambda url: sees(url, 0, files.key), READY_S)
        try:
            yield Node(process, files.url, files.key, made.log("node"))
        finally:
            made.stop(process)


def fault_of(answer: bytes) -> str | None:
    """What is wrong with the bytes that came back, if anything is."""
    if not answer:
        return None  # the connection was closed
    head, _, rest = answer.removeprefix(CONTINUE).partition(b"\r\n\r\n")
    if any(trace in answer for trace in TRACES):
        return "a trace of the stack"
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    if status is None:
        return "not HTTP"
    if status[1] == b"500":
        return "500"
    if int(status[1]) >= 400 and (length := re.search(rb"content-length: (\d+)", head)) and rest:
        try:
            error = orjson.loads(rest[: int(length[1])])["error"]
            return None if isinstance(error["message"] if isinstance(error, dict) else error, str) else "no message"
        except (ValueError, KeyError, TypeError):
            return "an error that is not JSON"
    return None


async def send(port: int, wire: bytes) -> bytes:
    """What comes back for some bytes: an answer, or nothing if the connection was closed. Raises TimeoutError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(wire)
        async with asyncio.timeout(ANSWER_S):
            while not _is_whole(answer, wire.startswith(b"HEAD")) and (part := await reader.read(65536)):
                answer += part
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return answer


def _is_whole(answer: bytes, headless: bool) -> bool:
    head, end, rest = answer.removeprefix(CONTINUE).partition(b"\r\n\r\n")
    if not end or headless:
        return bool(end)
    length = re.search(rb"content-length: (\d+)", head)
    return len(rest) >= int(length[1]) if length else rest.endswith(b"0\r\n\r\n")


async def works(port: int) -> bool:
    """Whether the node still answers a user."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    for _ in range(100):  # what was sent before may still run
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(http(CHAT, orjson.dumps(asked), {"connection": "close"}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10.0):
                answer = await reader.read()
                if b"200 OK" in answer and b'"usage"' in answer:
                    writer.close()
                    return True
        writer.close()
        await asyncio.sleep(0.1)
    return False


async def attack(pid: int, port: int, made: Made, inputs: int, connections: int) -> Seen:
    """Send the inputs, as many at once."""
    statuses: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
    faults: list[str] = []
    sent, start_s, first_mb = 0, time.monotonic(), 0.0

    async def one_after_the_other() -> None:
        nonlocal sent, first_mb
        while sent < inputs:
            sent += 1
            if sent == max(1, inputs // 10):
                first_mb = rss_mb(pid)
            kind = KINDS[sent % len(KINDS)]
            wire = kind(made)
            try:
                answer = await send(port, wire)
            except OSError as error:  # TimeoutError is one
                faults.append(f"{kind.__name__}: {type(error).__name__} {error}: {wire[:300]!r}")
                continue
            if fault := fault_of(answer):
                faults.append(f"{kind.__name__}: {fault}: {wire[:300]!r} -> {answer[:300]!r}")
            statuses[kind.__name__][answer[9:12].decode("latin-1") or "none"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one_after_the_other())
    if not await works(port):
        faults.append("the node does not serve afterwards")
    return Seen(statuses, faults, (first_mb, rss_mb(pid)), time.monotonic() - start_s)


def run(inputs: int, connections: int, seed: int) -> Seen:
    """Start a node and attack it."""
    peer, stranger = (Messages(Identity.generate(), lambda name: True) for _ in range(2))
    with node(peer.name) as attacked:
        port = int(attacked.url.rpartition(":")[2])
        made = Made(random.Random(seed), peer, stranger, attacked.key, int(look(attacked.url)["run"]))
        seen = asyncio.run(attack(attacked.process.pid, port, made, inputs, connections))
        if attacked.process.poll() is not None:
            seen.faults.append(f"the node ended with {attacked.process.returncode}")
        log = attacked.log.read_bytes()
        if any(trace in log for trace in TRACES):
            at = min(log.find(trace) for trace in TRACES if trace in log)
            seen.faults.append(f"its log: {log[max(0, at - 300) : at + 1500].decode(errors='replace')}")
    return seen


@dataclass
class Args:
    """Send hostile input to a live node."""

    inputs: Count = 50_000
    """how many"""
    connections: Count = 256
    """at once"""
    seed: Seed = 0
    """of the inputs"""
    guided: bool = False
    """in process, without sockets, and guided by what the inputs before have reached"""
    json: File = None
    """write what was counted to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if there was a fault, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    if args.guided:
        return _guided(args)
    seen = run(args.inputs, args.connections, args.seed)
    for kind, counts in seen.statuses.items():
        print(f"{kind:<28} {counts.total():>7}  " + "  ".join(f"{status} {n}" for status, n in sorted(counts.items())))
    total = sum(counts.total() for counts in seen.statuses.values())
    print(f"{total} inputs in {seen.seconds:.0f} s, {len(seen.faults)} faults; memory {seen.rss_mb[0]:.1f} MB after a "
          f"tenth of them, {seen.rss_mb[1]:.1f} MB at the end")  # fmt: skip
    for fault in seen.faults[:10]:
        print(fault, file=sys.stderr)
    if args.json:
        write_json(args.json, {"inputs": total, **seen._asdict()})
    return 1 if seen.faults else 0


def _guided(args: Args) -> int:
    seen = hostile_guided.run(args.inputs, args.seed)
    for where, counts in sorted(seen.statuses.items()):
        print(f"{where:<32} {counts.total():>7}  " + "  ".join(f"{came} {n}" for came, n in sorted(counts.items())))
    print(f"{seen.inputs} inputs in {seen.seconds:.0f} s, {len(seen.faults)} faults; {seen.lines} lines reached, "
          f"{seen.kept} inputs kept; at most {1e3 * seen.longest_s:.1f} ms of CPU for one, traced: {seen.longest}; "
          f"at most {seen.calls} calls in a turn of the event loop: {seen.busiest}; memory "
          f"{seen.rss_mb[0]:.1f} MB after a tenth of them, {seen.rss_mb[1]:.1f} MB at the end")  # fmt: skip
    for fault in seen.faults[:10]:
        print(fault, file=sys.stderr)
    if args.json:
        write_json(args.json, seen._asdict())
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main())
