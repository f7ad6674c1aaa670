"""Virtual time, the network and the disk in memory, and the engine on them: what later simulations rely on."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from inspect import signature
from typing import Any

import numpy as np
import orjson
import pytest

from wwwserve.agents.hardware import Profile
from wwwserve.agents.kernel import records
from wwwserve.envs.engine import ENGINE, JOB, MAX_SLOTS, advance, reset_engine, reset_jobs, submit
from wwwserve.envs.prefix_cache import NO_CACHE
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.bank import IdealAccounts
from wwwserve.eval.live.simulation.disk import MemoryDisk
from wwwserve.eval.live.simulation.engine import EngineServer, SimulatedEngine
from wwwserve.eval.live.simulation.loop import Deadlock, Process, Standstill, VirtualLoop
from wwwserve.eval.live.simulation.network import ABANDON_S, Host, MemoryNetwork
from wwwserve.eval.live.simulation.response import TooLarge
from wwwserve.serving.engine.adapter import EngineError
from wwwserve.serving.ledger.accounts import Accounts
from wwwserve.serving.ledger.journal import Balance, Full, JournalError

HOUR_S = 3600.0


def play(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    return virtual.run(main, **options)


# Time.


def test_an_hour_passes_without_waiting() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, float]:
        await asyncio.sleep(HOUR_S)
        return loop.time(), loop.wall_s()

    assert play(main, wall_start_s=1e9) == (HOUR_S, 1e9 + HOUR_S)


def test_timers_of_one_instant_go_off_in_the_order_in_which_they_were_set() -> None:
    async def main(loop: VirtualLoop) -> list[int]:
        order: list[int] = []
        for k in range(50):
            loop.call_at(1.0, order.append, k)
        loop.call_at(0.5, order.append, -1)
        await asyncio.sleep(2.0)
        return order

    assert play(main) == list(range(-1, 50))


def test_what_follows_from_a_timer_comes_before_the_next_one_of_that_instant() -> None:
    async def main(loop: VirtualLoop) -> list[str]:
        order: list[str] = []

        async def act(name: str) -> None:
            await asyncio.sleep(1.0)
            for step in range(3):
                order.append(f"{name}{step}")
                await asyncio.sleep(0)

        await asyncio.gather(act("a"), act("b"))
        return order

    assert play(main) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_timeouts_are_virtual() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        ends = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.sleep(60.0)
        ends.append(loop.time())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.create_future(), 7.0)
        ends.append(loop.time())
        async with asyncio.timeout(5.0):
            await asyncio.sleep(4.0)
        ends.append(loop.time())
        return ends

    assert play(main) == [5.0, 12.0, 16.0]


def test_cancelled_timers_do_not_move_time() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, int]:
        for _ in range(5000):
            loop.call_later(600.0, print).cancel()
        await asyncio.sleep(1.0)
        return loop.time(), len(loop._timers)

    now_s, kept = play(main)
    assert now_s == 1.0
    assert kept < 2500  # they do not pile up either


def test_sleep_until_ends_at_exactly_that_time() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        times = []
        for k in range(1, 200):
            await asyncio.sleep(0.0123)
            await loop.sleep_until(0.1 * k)
            times.append(loop.time())
        return times

    assert play(main) == [0.1 * k for k in range(1, 200)]


def test_a_deadlock_is_said_to_be_one() -> None:
    async def main(loop: VirtualLoop) -> None:
        await loop.create_future()

    with pytest.raises(Deadlock, match="main"):
        play(main)


def test_time_that_stands_still_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "MOST_ROUNDS", 1000)

    async def main(loop: VirtualLoop) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Standstill, match=r"0\.0 s"):
        play(main)


def test_calls_in_an_executor_run_here_and_take_their_virtual_time() -> None:
    async def main(loop: VirtualLoop) -> None:
        assert await asyncio.to_thread(threading.get_ident) == threading.get_ident()
        assert loop.time() == 0.25
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)

    play(main, executor_s=0.25)


def test_sets_of_tasks_have_the_same_order_in_every_run() -> None:
    async def main(loop: VirtualLoop) -> list[str]:
        tasks = [asyncio.create_task(asyncio.sleep(1.0), name=f"t{k}") for k in range(40)]
        done, _ = await asyncio.wait(tasks)
        return [task.get_name() for task in done]

    first = play(main)
    ballast = [object() for _ in range(1000)]  # other addresses the next time
    assert play(main) == first
    assert len(ballast) == 1000


def test_a_killed_process_takes_all_of_its_tasks_with_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        process, ended = Process(loop, "p"), []

        async def child() -> None:
            try:
                await asyncio.sleep(HOUR_S)
            finally:
                ended.append(loop.time())
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.create_task(asyncio.sleep(1.0))  # a dead process starts nothing

        async def parent() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                asyncio.create_task(child()).add_done_callback(lambda _: None)
                await asyncio.sleep(HOUR_S)

        process.spawn(parent())
        other = asyncio.create_task(asyncio.sleep(3.0))
        await asyncio.sleep(2.0)
        process.kill()
        await other
        assert ended == [2.0, 2.0]
        assert process.tasks == 0
        with pytest.raises(RuntimeError, match="dead"):
            process.spawn(parent())

    play(main)


def test_a_frozen_process_does_nothing_and_then_goes_on() -> None:
    async def main(loop: VirtualLoop) -> None:
        process, ticks, heard = Process(loop, "p"), list[float](), list[tuple[float, bool]]()

        async def tick() -> None:
            while True:
                await asyncio.sleep(1.0)
                ticks.append(loop.time())

        process.spawn(tick())
        await asyncio.sleep(2.5)
        process.freeze()
        process.hear(lambda: heard.append((loop.time(), virtual.current() is process)))
        await asyncio.sleep(5.0)
        assert ticks == [1.0, 2.0] and not heard
        process.thaw()
        process.hear(lambda: heard.append((loop.time(), virtual.current() is process)))
        await asyncio.sleep(1.1)
        assert ticks == [1.0, 2.0, 7.5, 8.5]
        assert heard == [(7.5, True), (7.5, True)]
        process.freeze()
        process.kill()  # which a frozen one is not spared
        await asyncio.sleep(0.1)
        assert process.tasks == 0 and loop.frozen == 0

    play(main)


# Network.


class Echo:
    """An application that answers with pieces of what it was sent, one a second, and notes what happens to it."""

    def __init__(self, pieces: int = 3) -> None:
        self.pieces = pieces
        self.calls: list[tuple[float, dict[str, Any], bytes]] = []
        self.gone_s: list[float] = []
        self.cancelled_s: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        body = (await receive())["body"]
        self.calls.append((loop.time(), dict(scope), body))
        if scope["path"] == "/fails":
            raise ValueError("a bug")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Kind", b"echo")]})

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone_s.append(loop.time())

        watching = asyncio.create_task(watch())
        try:
            for k in range(self.pieces):
                await send({"type": "http.response.body", "body": b"%d:%b\n" % (k, body), "more_body": True})
                await asyncio.sleep(1.0)
            if scope["path"] == "/breaks":
                return
            await send({"type": "http.response.body", "body": b"end"})
        except asyncio.CancelledError:
            self.cancelled_s.append(loop.time())
            raise
        finally:
            watching.cancel()


class World:
    """A network with a server `b` that runs an `Echo`, and what a client needs."""

    def __init__(self, loop: VirtualLoop, **options: Any) -> None:
        self.loop = loop
        self.network = MemoryNetwork(loop, **({"delay_s": 0.1} | options))
        self.a = self.network.host("a", "http://a:1")
        self.b = self.network.host("b", "http://b:1")
        self.app = Echo()
        self.start(self.b)

    def start(self, host: Host) -> None:
        host.boot()
        host.serve(self.app)

    def ask(self, path: str = "/x", name: str = "user", **options: Any) -> Any:
        given: dict[str, Any] = {"body": b"hi", "headers": {"X-Name": "v"}, "timeout_s": None, "read_timeout_s": 30.0}
        return self.network.transport(name).request("POST", f"http://b:1{path}", **(given | options))

    async def pieces(self, **options: Any) -> list[tuple[float, bytes]]:
        async with self.ask(**options) as response:
            return [(round(self.loop.time(), 6), piece) async for piece in response.iter_any()]


def on_network(act: Callable[[World], Awaitable[Any]], **options: Any) -> Any:
    async def main(loop: VirtualLoop) -> Any:
        return await act(World(loop, **options))

    return play(main)


def test_a_request_and_each_piece_of_its_answer_take_the_delay() -> None:
    async def act(world: World) -> None:
        async with world.ask("/x%20y?q=1") as response:
            assert world.loop.time() == pytest.approx(0.2)
            assert response.status == 200 and response.headers == {"x-kind": "echo"}
            assert response.raw_headers == [(b"x-kind", b"echo")]
            pieces = [(round(world.loop.time(), 6), piece) async for piece in response.iter_any()]
        assert pieces == [(0.2, b"0:hi\n"), (1.2, b"1:hi\n"), (2.2, b"2:hi\n"), (3.2, b"end")]
        ((at_s, scope, body),) = world.app.calls
        assert at_s == pytest.approx(0.1) and body == b"hi"
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/x y", b"q=1")
        assert scope["headers"] == [(b"host", b"b:1"), (b"content-length", b"2"), (b"x-name", b"v")]

    on_network(act)


def test_an_answer_can_be_read_by_lines_and_to_its_end_with_a_bound() -> None:
    async def act(world: World) -> None:
        async with world.ask() as response:
            assert await response.readline(100) == b"0:hi\n"
            assert await response.read(100) == b"1:hi\n2:hi\nend"
            assert await response.readline(100) == b""
        for read in ("read", "readline"):
            async with world.ask() as response:
                with pytest.raises(TooLarge):
                    await getattr(response, read)(4)

    on_network(act)


def test_a_client_that_leaves_early_is_noticed_a_delay_later() -> None:
    async def act(world: World) -> None:
        async with world.ask() as response:
            async for _ in response.iter_any():
                break
        await asyncio.sleep(5.0)
        assert world.app.gone_s == [pytest.approx(0.3)]

    on_network(act)


def test_a_response_that_is_closed_breaks_off_for_who_reads_it() -> None:
    async def act(world: World) -> None:
        async with world.ask() as response:
            world.loop.call_at(1.5, response.close)
            with pytest.raises(ConnectionAbortedError):
                await response.read(1000)
            assert world.loop.time() == 1.5
        await asyncio.sleep(5.0)
        assert world.app.gone_s == [pytest.approx(1.6)]

    on_network(act)


def test_both_timeouts() -> None:
    async def act(world: World) -> None:
        with pytest.raises(TimeoutError):  # of the whole
            await world.pieces(timeout_s=2.0)
        assert world.loop.time() == 2.0
        with pytest.raises(TimeoutError):  # between two pieces
            await world.pieces(read_timeout_s=0.9)
        assert world.loop.time() == pytest.approx(2.0 + 0.2 + 0.9)
        assert len(await world.pieces(read_timeout_s=1.1, timeout_s=3.3)) == 4

    on_network(act)


def test_a_slow_reader_is_no_silent_server() -> None:
    async def act(world: World) -> None:
        async with world.ask(read_timeout_s=1.5) as response:
            await asyncio.sleep(60.0)
            assert await response.read(100) == b"0:hi\n1:hi\n2:hi\nend"

    on_network(act)


def test_an_application_that_fails_or_ends_early() -> None:
    async def act(world: World) -> None:
        async with world.ask("/fails") as response:
            assert response.status == 500
        assert [type(error) for error in world.network.errors] == [ValueError]
        with pytest.raises(ConnectionResetError):
            await world.pieces(path="/breaks")

    on_network(act)


def test_nobody_there_is_refused() -> None:
    async def act(world: World) -> None:
        world.b.crash()
        with pytest.raises(ConnectionRefusedError):
            await world.pieces()
        assert world.loop.time() == pytest.approx(0.2)
        transport = world.network.transport("user")
        with pytest.raises(ConnectionRefusedError):
            async with transport.request("GET", "http://c", headers={}, timeout_s=None, read_timeout_s=9.0):
                pass

    on_network(act)


def test_a_server_that_crashes_resets_its_connections_and_can_start_again() -> None:
    async def act(world: World) -> None:
        world.loop.call_at(1.5, world.b.crash)
        got = []
        with pytest.raises(ConnectionResetError):
            async with world.ask() as response:
                async for piece in response.iter_any():
                    got.append(piece)
        assert got == [b"0:hi\n", b"1:hi\n"]
        assert world.loop.time() == pytest.approx(1.6)
        assert world.app.cancelled_s == [1.5]
        assert not world.b.up
        world.start(world.b)
        assert len(await world.pieces()) == 4

    on_network(act)


def test_a_server_whose_plug_is_pulled_says_nothing() -> None:
    async def act(world: World) -> None:
        world.loop.call_at(1.5, lambda: world.b.crash(silent=True))
        with pytest.raises(TimeoutError):
            await world.pieces(read_timeout_s=30.0)
        assert world.loop.time() == pytest.approx(1.2 + 30.0)

    on_network(act)


def test_a_server_that_is_frozen_keeps_its_connections_and_what_was_sent_arrives() -> None:
    async def act(world: World) -> None:
        async with world.ask() as early:
            await asyncio.sleep(0.05)  # more of the answer is on its way
            assert world.b.process is not None
            world.b.process.freeze()
            late = asyncio.ensure_future(world.pieces())
            await asyncio.sleep(10.0)
            assert early.unread and early.error is None and len(world.app.calls) == 1 and not late.done()
            world.b.process.thaw()
            assert len((await early.read(1000)).splitlines()) == 4
            assert len(await late) == 4 and world.app.calls[1][0] == 10.25

    on_network(act)


def test_a_clock_drifts_from_where_it_is() -> None:
    async def act(world: World) -> None:
        start_s, host = world.b.wall_s(), world.b
        host.let_drift(0.5)
        await asyncio.sleep(4.0)
        host.let_drift(-1.0)
        await asyncio.sleep(4.0)
        assert host.wall_s() - start_s == pytest.approx(6.0)
        host.let_drift(0.0)
        host.skew_s = 0.0
        assert host.wall_s() - start_s == pytest.approx(8.0)

    on_network(act)


def test_a_client_that_crashes_is_a_client_that_leaves() -> None:
    async def act(world: World) -> None:
        process = world.a.boot()
        errors = []

        async def client() -> None:
            transport = world.network.transport("a")
            try:
                await world.pieces(name="a")
            finally:  # what a dead process still does reaches nobody
                try:
                    async with transport.request(
                        "POST", "http://b:1/late", headers={}, timeout_s=None, read_timeout_s=1.0
                    ):
                        pass
                except ConnectionError as error:
                    errors.append(error)

        process.spawn(client())
        await asyncio.sleep(1.5)
        world.a.crash()
        await asyncio.sleep(5.0)
        assert world.app.gone_s == [pytest.approx(1.6)]
        assert len(errors) == 1 and len(world.app.calls) == 1

    on_network(act)


def test_a_partition_is_silent_and_heals_for_new_requests() -> None:
    async def act(world: World) -> None:
        world.loop.call_at(1.05, world.network.part, ["user"], ["b"])
        world.loop.call_at(2.0, world.network.heal)
        with pytest.raises(TimeoutError):
            await world.pieces(read_timeout_s=10.0)
        assert world.loop.time() == pytest.approx(10.2)  # the piece of 1.1 was lost, and with it the connection
        assert len(await world.pieces()) == 4

    on_network(act)


def test_a_partition_can_be_one_way() -> None:
    async def act(world: World) -> None:
        world.network.cut(["b"], ["user"])
        with pytest.raises(TimeoutError):
            await world.pieces(read_timeout_s=10.0)
        assert len(world.app.calls) == 1  # the request came through

    on_network(act)


def test_a_server_gives_up_a_connection_that_is_silently_gone() -> None:
    async def act(world: World) -> None:
        world.app.pieces = 1000
        world.loop.call_at(1.05, world.network.part, ["user"], ["b"])
        with pytest.raises(TimeoutError):
            await world.pieces(read_timeout_s=5.0)
        assert world.app.gone_s == []
        await asyncio.sleep(100.0)
        assert world.app.gone_s == [pytest.approx(1.1 + ABANDON_S)]

    on_network(act)


async def traffic(world: World) -> tuple[str, list[str]]:
    """200 requests through whatever the network does to them."""

    async def one(k: int) -> str:
        await asyncio.sleep(0.05 * k)
        try:
            return str(len(await world.pieces(body=b"%d" % k, read_timeout_s=5.0)))
        except OSError as error:
            return type(error).__name__

    outcomes = await asyncio.gather(*(one(k) for k in range(200)))
    return world.network.history.digest(), outcomes


def faulty(seed: int) -> tuple[str, list[str]]:
    found: tuple[str, list[str]] = on_network(
        traffic, seed=seed, loss=0.02, duplication=0.1, delay_s=lambda a, b, uniforms: uniforms.expovariate(10.0)
    )
    return found


def test_a_seed_is_a_history() -> None:
    first, outcomes = faulty(1)
    assert faulty(1) == (first, outcomes)
    assert faulty(2)[0] != first
    assert 10 < outcomes.count("TimeoutError") < 60  # five or six messages each, of which 2 % are lost
    assert outcomes.count("TimeoutError") + outcomes.count("4") + outcomes.count("3") > 195


def test_delays_reorder_requests_and_duplicates_reach_the_application() -> None:
    async def act(world: World) -> list[int]:
        await traffic(world)
        return [int(body) for _, _, body in world.app.calls]

    came = on_network(act, duplication=0.2, delay_s=lambda a, b, uniforms: uniforms.uniform(0.0, 0.5))
    assert sorted(set(came)) == list(range(200))
    assert 20 < len(came) - 200 < 60
    assert came != sorted(came)


def test_pieces_of_one_answer_stay_in_order_whatever_the_delays() -> None:
    async def act(world: World) -> bytes:
        world.app.pieces = 40
        return b"".join(piece for _, piece in await world.pieces())

    body = on_network(act, delay_s=lambda a, b, uniforms: uniforms.uniform(0.0, 10.0))
    assert body == b"".join(b"%d:hi\n" % k for k in range(40)) + b"end"


# Disk.

ONE = Balance("p", 10, 4, 1, 5, 0)


def test_a_journal_is_there_after_a_crash() -> None:
    disk = MemoryDisk()
    journal = disk.journal("me")
    journal.write([b"a", b"b"], [ONE])
    journal.write([b"c"], [ONE._replace(free=3, escrow=2)], b"all")
    disk.crash()
    with pytest.raises(Full):
        journal.write([b"d"], [])  # by what is left of the dead node
    again = disk.journal("me")
    assert [(entry.number, entry.body) for entry in again.entries()] == [(1, b"a"), (2, b"b"), (3, b"c")]
    assert (again.last, again.digest) == (journal.last, journal.digest)
    assert again.balances() == [ONE._replace(free=3, escrow=2)]
    assert again.snapshot() == (3, b"all")
    again.write([b"d"], [])
    assert again.last == 4
    with pytest.raises(JournalError, match="me"):
        disk.journal("other")


@pytest.mark.parametrize(
    ("keep", "torn", "left"),
    [(0, False, [b"a"]), (1, False, [b"a", b"b", b"c"]), (0, True, []), (9, True, [b"a", b"b", b"c"])],
)
def test_a_disk_that_lies_loses_writes(keep: int, torn: bool, left: list[bytes]) -> None:
    disk = MemoryDisk()
    journal = disk.journal("me")
    journal.write([b"a"], [ONE])
    disk.lies = True
    journal.write([b"b", b"c"], [ONE._replace(free=3, escrow=2)])
    journal.write([b"d"], [])
    disk.crash(keep=keep, torn=torn)
    again = disk.journal("me")
    assert [entry.body for entry in again.entries()] == left
    assert again.balances() == [ONE._replace(free=3, escrow=2) if b"c" in left else ONE][: len(left)]


def test_a_full_disk_takes_nothing_of_a_write() -> None:
    disk = MemoryDisk()
    journal = disk.journal("me")
    disk.free_bytes = 3
    journal.write([b"ab"], [])
    with pytest.raises(Full):
        journal.write([b"c", b"d"], [])
    assert disk.journal("me").last == journal.last == 1
    disk.free_bytes = 100
    journal.write([b"c", b"d"], [])
    assert disk.journal("me").last == 3


# Engine.

PROFILE = Profile(0.01, 0.001, 1e-6, 0.005, 2e-5, 300, 16, 512, 4096, "test")


def ask(prompt: int, output: int, *, stream: bool = False) -> bytes:
    return orjson.dumps({"prompt": "x" * 4 * prompt, "max_tokens": output, "ignore_eos": True, "stream": stream})


def random_requests(count: int, seed: int) -> list[tuple[float, int, int]]:
    """Arrival, prompt and output of requests that fill the engine, with bursts and lulls."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(0.4, count) * rng.choice([0.01, 1.0, 20.0], count, p=[0.5, 0.48, 0.02]))
    prompts, outputs = rng.integers(1, 1200, count), rng.integers(1, 900, count)
    return list(zip(at_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True))


def kernel_finish_s(requests: list[tuple[float, int, int]]) -> list[float]:
    """When the market's engine finishes them."""
    engine, jobs = records(1, ENGINE), records(len(requests), JOB)
    reset_engine(engine[0], PROFILE.row())
    reset_jobs(jobs)
    done = np.zeros(len(requests) + MAX_SLOTS, np.int64)
    for r, (at_s, prompt, output) in enumerate(requests):
        jobs[r]["prompt"], jobs[r]["output"] = prompt, output
        submit(engine[0], NO_CACHE, jobs, r, at_s)
    assert advance(engine[0], NO_CACHE, jobs, 1e6, done, 0) == len(requests)
    finish_s: list[float] = jobs["finish_s"].tolist()
    return finish_s


@pytest.mark.parametrize("stream", [False, True])
def test_requests_finish_when_the_market_says(stream: bool) -> None:
    requests = random_requests(200, 5)

    async def main(loop: VirtualLoop) -> list[float]:
        server = EngineServer(loop, PROFILE, ["m"], look_s=0.7)

        async def one(at_s: float, prompt: int, output: int) -> float:
            await loop.sleep_until(at_s)
            async with server.post("/v1/completions", ask(prompt, output, stream=stream)) as answer:
                text = await answer.read(1 << 20)
            assert text.count(b"tok ") == output
            server.load()  # to look changes nothing
            return loop.time()

        ends = await asyncio.gather(*(one(*request) for request in requests))
        assert server.finished == len(requests)
        assert server.load()[:3] == (0.0, 0.0, 0.0)
        return ends

    assert play(main) == kernel_finish_s(requests)


def test_a_stream_shows_at_each_look_what_is_out() -> None:
    async def main(loop: VirtualLoop) -> list[tuple[float, int, int]]:
        server = EngineServer(loop, PROFILE, ["m"], look_s=1.0, lag_s=0.25, ahead_s=0.05)
        seen = []
        async with server.post("/v1/chat/completions", orjson.dumps(
            {"messages": [{"role": "user", "content": "x" * 400}], "max_completion_tokens": 200, "ignore_eos": True,
             "stream": True}
        )) as answer:  # fmt: skip
            assert (loop.time(), answer.status) == (0.0, 200)
            async for piece in answer.iter_any():
                *events, rest = piece.split(b"\n\n")
                assert rest == b""
                chunk = orjson.loads(events[0].removeprefix(b"data: "))
                text = chunk["choices"][0]["delta"]["content"]
                seen.append((loop.time(), text.count("tok "), chunk["usage"]["completion_tokens"]))
        assert events[-1] == b"data: [DONE]" and chunk["choices"][0]["finish_reason"] == "length"
        return seen

    seen = play(main)
    assert [at_s for at_s, _, _ in seen[:-1]] == pytest.approx([0.7, 1.7])
    assert sum(new for _, new, _ in seen) == seen[-1][2] == 200
    assert np.cumsum([new for _, new, _ in seen]).tolist() == [count for _, _, count in seen]
    # As many tokens as iterations that end by then: 0.01 + 0.001 s and a little for the context, which is 100 to 300.
    for (_, _, count), at_s in zip(seen, [0.75, 1.75], strict=False):
        assert count == pytest.approx(at_s / 0.01115, rel=0.02)


def test_the_load_is_that_of_the_present_instant() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = EngineServer(loop, PROFILE, ["m"])
        engine = SimulatedEngine(server)
        assert not engine.healthy and engine.load().waiting > 100
        await engine.scrape()
        assert engine.load()[:3] == (0, 0, 0)

        async def one() -> None:
            async with engine.post("/v1/completions", ask(20, 100)) as answer:
                await answer.read(10_000)

        tasks = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(0)
        assert engine.load()[:3] == (0, 20, 0)  # the first iteration has begun and not ended
        await asyncio.sleep(0.5)
        assert engine.load()[:3] == (16, 4, 16 * 48)  # 20 tokens and those of 0.5 s, in blocks
        running = server.progress()
        assert len({id(answer) for answer, _ in running}) == 16
        assert {tokens for _, tokens in running} == {(running[0][1])} and 20 + running[0][1] in range(33, 49)
        await asyncio.gather(*tasks)
        assert engine.load()[:3] == (0, 0, 0) and server.progress() == []

    play(main)


def test_to_leave_early_frees_the_blocks_and_the_place() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = EngineServer(loop, PROFILE, ["m"])
        requests = [asyncio.create_task(post(server, 100, 400)) for _ in range(40)]
        await asyncio.sleep(1.0)
        running, waiting, kv_tokens, _ = server.load()
        assert (running, waiting) == (16, 24)
        for task in requests[::2]:
            task.cancel()
        await asyncio.sleep(0)
        assert server.aborted == 20
        assert server.load()[:2] == (8, 12) and server.load().kv_tokens == kv_tokens / 2
        await asyncio.gather(*requests, return_exceptions=True)
        assert (server.finished, server.load()[:3]) == (20, (0, 0, 0))

    play(main)


async def post(server: EngineServer, prompt: int, output: int) -> bytes:
    async with server.post("/v1/completions", ask(prompt, output)) as answer:
        body: bytes = await answer.read(1 << 20)
        return body


def test_an_engine_that_dies() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = EngineServer(loop, PROFILE, ["m"])
        engine = SimulatedEngine(server)
        await engine.scrape()
        request = asyncio.create_task(post(server, 100, 400))
        await asyncio.sleep(1.0)
        server.crash()
        with pytest.raises(ConnectionResetError):
            await request
        with pytest.raises(ConnectionRefusedError):
            await post(server, 1, 1)
        for _ in range(2):
            with pytest.raises(EngineError):
                await engine.scrape()
        assert not engine.healthy
        server.restart()
        await engine.scrape()
        assert await engine.models() == ["m"]
        assert engine.healthy and engine.load()[:3] == (0, 0, 0)
        await post(server, 1, 1)

    play(main)


def test_what_an_engine_answers_instead() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = EngineServer(loop, PROFILE, ["m"], max_queued=1)
        statuses = []

        async def one(body: bytes) -> None:
            async with server.post("/v1/completions", body) as answer:
                statuses.append(answer.status)

        await one(b"{}")
        await one(orjson.dumps({"prompt": "x", "max_tokens": 5}))  # its length would be up to the model
        server.answers = 429
        await one(ask(10, 10))
        server.answers = 200
        running = [asyncio.create_task(one(ask(1000, 100))) for _ in range(3)]
        await asyncio.gather(*running)
        assert statuses[:5] == [400, 400, 429, 503, 503]
        assert statuses[5:] == [200]

    play(main)


def test_the_engine_dies_with_nothing_of_a_node_that_crashes() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = EngineServer(loop, PROFILE, ["m"])
        process = Process(loop, "node")
        process.spawn(post(server, 100, 400))
        await asyncio.sleep(1.0)
        assert server.load().running == 1
        process.kill()
        await asyncio.sleep(0)
        assert server.load()[:3] == (0, 0, 0) and server.aborted == 1 and server.up

    play(main)


def test_an_engine_keeps_what_it_computed_until_it_dies() -> None:
    async def main(loop: VirtualLoop) -> list[int]:
        server = EngineServer(loop, PROFILE, ["m"], block_tokens=32)
        said: list[dict[str, str]] = []
        found = []

        async def say(text: str, salt: str = "") -> None:
            said.append({"role": "user", "content": text})
            body = {"messages": said, "max_tokens": 20, "ignore_eos": True} | ({"cache_salt": salt} if salt else {})
            async with server.post("/v1/chat/completions", orjson.dumps(body)) as answer:
                whole = orjson.loads(await answer.read(1 << 20))
            found.append(whole["usage"]["prompt_tokens_details"]["cached_tokens"])
            said.append(whole["choices"][0]["message"])

        await say("one " * 100)
        await say("two " * 50)  # after 100 + 20 tokens, of which 119 were computed: three blocks of 32
        said[:] = said[:2]
        await say("six " * 50, salt="another's")
        assert server.reuse_s() == np.inf
        server.crash()
        server.restart()
        said[:] = said[:2]
        await say("two " * 50)
        assert server.cached_tokens == sum(found) and server.finished == 4
        return found

    assert play(main) == [0, 96, 0, 0]


def test_accounts_of_a_simulation_are_called_as_those_of_a_node_are() -> None:
    shared = [
        name for name in vars(IdealAccounts) if not name.startswith("_") and callable(getattr(Accounts, name, None))
    ]
    assert {"escrow", "offered", "take", "heard"} <= set(shared)
    for name in shared:
        ideal, real = (list(signature(getattr(each, name)).parameters) for each in (IdealAccounts, Accounts))
        assert ideal == real, name
