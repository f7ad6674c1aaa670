"""What a console is made of: who may see it, one stream of snapshots for all, reasons for decisions, a past."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest
from stub_nodes import Stub, busy, net, play

from wwwserve.agents.decision import HOLD, LOCAL, make_actions
from wwwserve.agents.view import CHANCE, NODE_FEATURES, make_views
from wwwserve.serving import node as node_module
from wwwserve.serving.console import broadcast, network
from wwwserve.serving.console.app import EVENTS, STATIC
from wwwserve.serving.console.broadcast import Broadcast
from wwwserve.serving.console.history import COLUMNS, History
from wwwserve.serving.console.node import MOST_PEERS, NodeSource
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.http import routes
from wwwserve.serving.http.asgi import check_host
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.reply import Failed
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.reasons import KEPT, PER_S, Reason, explain, probabilities
from wwwserve.serving.versions import SPEAKS

POLICY = node_module.policy_of(None)


async def events(response: aiohttp.ClientResponse, count: int) -> list[tuple[str, Any]]:
    """The first events of a stream: their names and what they say."""
    found = []
    while len(found) < count:
        name = (await response.content.readline()).decode()
        data = await response.content.readline()
        assert name.startswith("event: ") and data.startswith(b"data: ")
        assert await response.content.readline() == b"\n"
        found.append((name[7:].strip(), orjson.loads(data[6:])))
    return found


# Who may see it.


def test_who_may_see_the_network_may_see_the_console_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            for path in ("/", "/console/node.js", "/console/vendor/uPlot.js", EVENTS):
                async with n.session.get(n.urls[0] + path) as response:
                    assert response.status == 200
                    rules = response.headers["content-security-policy"]
                    assert "default-src 'none'" in rules and "unsafe" not in rules and "http" not in rules
                async with n.session.post(n.urls[0] + path) as response:
                    assert response.status == 405
            for path in ("/console/", "/console/../app.py", "/console/none.js", "/console/vendor/LICENSE"):
                async with n.session.get(n.urls[0] + path) as response:
                    assert response.status == 404
            monkeypatch.setattr(routes, "_is_here", lambda scope: False)
            for path in ("/", "/console/node.js", EVENTS):
                async with n.session.get(n.urls[0] + path) as response:
                    assert response.status == 403

    play(scene)


def test_on_a_listener_with_a_key_the_page_is_there_for_all_and_what_it_shows_is_not() -> None:
    port = free_ports(1)[0]

    async def scene() -> None:
        async with net(Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            n.configs[0]["admin"] = {"port": port, "key": "secret"}
            await n.start(0)
            url, key = f"http://127.0.0.1:{port}", {"authorization": "Bearer secret"}
            for path, headers, status in (
                ("/", {}, 200), ("/console/node.js", {}, 200), (EVENTS, {}, 401), (EVENTS, key, 200),
                ("/", key | {"host": "node.example"}, 200), (EVENTS, key | {"host": "node.example"}, 200),
            ):  # fmt: skip
                async with n.session.get(url + path, headers=headers) as response:
                    assert response.status == status
            async with n.session.get(n.urls[0]) as response:
                assert response.status == 404

    play(scene)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9000", "[::1]:9000", "localhost:9000", "10.0.0.1:1", ""])
def test_a_page_is_shown_at_an_address(host: str) -> None:
    check_host(host.encode())


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:9000", "127.0.0.1.attacker.example", "a:b:c"])
def test_a_page_without_a_key_is_not_shown_at_the_name_of_another_site(host: str) -> None:
    with pytest.raises(Failed, match="is shown at an address") as failed:
        check_host(host.encode())
    assert failed.value.status == 421


def test_a_browser_that_takes_a_name_for_this_machine_sees_nothing() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            for path, status in (("/", 421), (EVENTS, 421), ("/network", 421), ("/metrics", 421), ("/health", 200)):
                async with n.session.get(n.urls[0] + path, headers={"host": "attacker.example"}) as response:
                    assert response.status == status

    play(scene)


def test_all_that_the_pages_load_is_in_the_package() -> None:
    for page in ("node.html", "network.html"):
        text = (STATIC / page).read_text()
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "<style" not in text and "style=" not in text
    assert (STATIC / "vendor/LICENSE").read_text().startswith("The MIT License")
    scripts = [path.read_text() for path in STATIC.glob("*.js")]
    assert scripts and not [each for each in scripts if "innerHTML" in each or "insertAdjacentHTML" in each]


# Its events.


def test_events_are_a_past_then_a_snapshot_each_second() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            for _ in range(3):
                assert (await n.ask(stream=True))[0] == 200
            async with n.session.get(n.urls[0] + EVENTS) as response:
                assert response.headers["content-type"] == "text/event-stream"
                begun_s = time.monotonic()
                told = await events(response, 3)
                assert 0.7 < time.monotonic() - begun_s < 5.0
            assert [name for name, _ in told] == ["hello", "snapshot", "snapshot"]
            hello, first, _ = (each for _, each in told)
            assert list(hello["history"]) == list(COLUMNS) and hello["history"]["running"]
            assert [each["to"] for each in hello["reasons"]] == [n.keys[1].name] * 3
            assert len(first["now"]) == len(COLUMNS) and first["requests"]["answered"] == 3
            [peer] = first["peers"]
            assert (peer["handed"], peer["answered"], peer["served"], peer["out"]) == (3, 3, 0, 0)
            async with n.session.get(n.urls[1] + EVENTS) as response:
                [_, (_, there)] = await events(response, 2)
            [peer] = there["peers"]
            assert (peer["handed"], peer["served"], peer["here"]) == (0, 3, 0) and there["now"][
                COLUMNS.index("served")
            ] == 3
            assert there["requests"]["accepted"] == 0 and there["reasons"] == []

    play(scene)


def test_what_is_urgent_is_told_before_a_second_is_over() -> None:
    state = "there"

    async def make() -> bytes:
        return state.encode()

    async def scene() -> None:
        nonlocal state
        stream = Broadcast(make, lambda: state).listen()
        assert await anext(stream) == b"there"
        begun_s = time.monotonic()
        state = "gone"
        assert await anext(stream) == b"gone" and time.monotonic() - begun_s < 0.8

    asyncio.run(scene())


def test_snapshots_are_made_once_for_all_and_only_while_somebody_listens() -> None:
    made = 0

    async def make() -> bytes:
        nonlocal made
        made += 1
        return b"%d" % made

    async def scene() -> None:
        stream = Broadcast(make, lambda: None)
        await asyncio.sleep(0.2)
        assert made == 0
        one, other = stream.listen(), stream.listen()
        assert await asyncio.gather(anext(one), anext(other)) == [b"1", b"1"]
        assert stream.listeners == 2
        assert await asyncio.gather(anext(one), anext(other)) == [b"2", b"2"]
        await one.aclose()
        await other.aclose()
        assert stream.listeners == 0
        before = made
        await asyncio.sleep(1.2)
        assert made == before
        again = stream.listen()
        assert await anext(again) == b"%d" % (before + 1)
        waiting = asyncio.create_task(anext(again, b"end"))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        stream.close()
        assert await waiting == b"end" and [each async for each in stream.listen()] == []

    asyncio.run(scene())


def test_who_reads_slowly_misses_snapshots_and_holds_nobody_up() -> None:
    numbers = iter(range(100))

    async def make() -> bytes:
        return b"%d" % next(numbers)

    async def scene() -> None:
        stream = Broadcast(make, lambda: object())  # as if something changed at each look
        slow, fast = stream.listen(), stream.listen()
        await asyncio.gather(anext(slow), anext(fast))
        seen = [await anext(fast) for _ in range(4)]
        assert seen == [b"1", b"2", b"3", b"4"]
        assert await anext(slow) == b"5"  # the next one that is made

    asyncio.run(scene())


def test_one_that_cannot_be_made_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    tries = 0

    async def make() -> bytes:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("no")
        return b"yes"

    async def scene() -> None:
        assert await anext(Broadcast(make, lambda: object()).listen()) == b"yes"

    asyncio.run(scene())
    assert "a console's snapshot met an error" in caplog.text


def test_only_so_many_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MOST_LISTENERS", 2)

    async def scene() -> None:
        async with net(Stub()) as n:
            first = await n.session.get(n.urls[0] + EVENTS)
            async with n.session.get(n.urls[0] + EVENTS) as second:
                await asyncio.gather(events(first, 2), events(second, 2))
                async with n.session.get(n.urls[0] + EVENTS) as third:
                    assert (third.status, third.headers["Retry-After"]) == (503, "5")

            async def free() -> bool:
                async with n.session.get(n.urls[0] + EVENTS) as another:
                    return another.status == 200

            await n.until(free)
            first.close()

    play(scene)


# Why a node decided as it did.


def reason(route: int, peers: list[str], seed: int = 0) -> Reason:
    """A decision on a view of noise."""
    view, random = make_views(1), np.random.default_rng(seed)
    view.nodes[0, : 1 + len(peers)] = random.uniform(0.0, 1.0, (1 + len(peers), len(NODE_FEATURES)))
    view.request[:], view.me[:] = random.uniform(0.0, 1.0, view.request.shape), random.uniform(0.0, 1.0, view.me.shape)
    view.routes[0, : 2 + len(peers)] = 1
    return Reason(7, 100.0, "chat", route, view, peers)


@pytest.mark.parametrize("seed", range(5))
def test_the_most_probable_place_is_the_one_that_the_policy_takes(seed: int) -> None:
    made = reason(LOCAL, ["a", "b", "c"], seed)
    probable = probabilities(POLICY, made.view)
    assert probable is not None and sum(probable) == pytest.approx(1.0, abs=1e-3)
    actions = make_actions(1)
    POLICY.decide(made.view, np.ones(1, np.bool_), np.full((1, 4), 0.5), actions)
    assert int(np.argmax(probable)) == int(actions.route[0])
    assert all(share == 0.0 for share in probable[5:])  # where there is no candidate


def test_a_decision_is_explained_by_what_was_seen() -> None:
    told = explain(reason(LOCAL + 2, ["a", "b"]), POLICY, 103.5)
    assert (told["number"], told["ago_s"], told["class"], told["to"]) == (7, 3.5, "chat", "b")
    assert [each["place"] for each in told["places"]] == ["local", "a", "b"]
    assert all(each["legal"] for each in told["places"]) and told["hold"]["legal"]
    assert told["places"][1]["seen"][CHANCE] == reason(0, ["a", "b"]).view.nodes[0, 1, CHANCE]
    assert explain(reason(HOLD, []), POLICY, 100.0)["to"] == "hold"
    by_rule = explain(reason(LOCAL, ["a"]), node_module.policy_of("single"), 100.0)
    assert by_rule["to"] == "local" and by_rule["places"][0]["probability"] is None


def test_of_a_busy_second_a_few_decisions_are_kept_and_of_all_the_last() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            await asyncio.gather(*(n.ask() for _ in range(5 * PER_S)))
            async with n.session.get(n.urls[0] + EVENTS) as response:
                [(_, hello), _] = await events(response, 2)
            numbers = [each["number"] for each in hello["reasons"]]
            assert PER_S <= len(numbers) <= 3 * PER_S and numbers == sorted(numbers)
            assert (await n.see())["requests"]["answered"] == 5 * PER_S < KEPT

    play(scene)


# What it costs.


def test_a_snapshot_is_bounded_and_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node that knows a thousand peers: less than a hundredth of the second in which one is made."""
    held: list[Dispatcher] = []
    made = Dispatcher.__init__

    def keep(self: Dispatcher, *parts: Any, **more: Any) -> None:
        held.append(self)
        made(self, *parts, **more)

    monkeypatch.setattr(Dispatcher, "__init__", keep)

    async def scene() -> None:
        async with net(Stub()) as n:
            await n.ask()
            [node] = held
            advert = np.zeros_like(node.provider.record["own"])
            for k in range(1000):
                node.provider.heard(f"{k:043}", advert, 0.0, frozenset({"stub"}))
                node.metrics.handed(f"{k:043}")
            node.peers["0" * 40 + "500"] = SimpleNamespace(  # type: ignore[assignment]
                url="http://h:1", serves=["m"] * 100, speaks=SPEAKS
            )
            for k in range(PER_S):
                node.reasons.kept.append(reason(LOCAL, [f"{i:043}" for i in range(8)], k)._replace(number=100 + k))
            source, took_s = NodeSource(node, History(node), Drain()), []
            for _ in range(20):
                source._told = 99
                begun_s = time.process_time()
                snapshot = orjson.dumps(await source.snapshot(), option=orjson.OPT_SERIALIZE_NUMPY)
                took_s.append(time.process_time() - begun_s)
            seen = orjson.loads(snapshot)
            assert len(seen["peers"]) == MOST_PEERS and seen["peers_known"] == 1000
            assert seen["peers"][[each["there"] for each in seen["peers"]].index(True)]["key"].endswith("500")
            assert len(seen["reasons"]) == PER_S
            assert len(snapshot) < 120_000
            assert sorted(took_s)[3] < 0.010, took_s

    play(scene)


# A whole network.


def test_the_page_of_a_network_shows_nodes_that_answer_and_such_as_do_not() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            urls = [*n.urls, f"http://127.0.0.1:{free_ports(1)[0]}"]
            assert (await n.ask(stream=True))[0] == 200
            with network.network_console(urls, 0) as url:
                async with n.session.get(url) as response:
                    assert response.status == 200 and "network.js" in await response.text()
                for path in ("", EVENTS):
                    async with n.session.head(url + path) as response:
                        assert response.status == 200 and await response.read() == b""
                async with n.session.get(url, headers={"host": "attacker.example"}) as response:
                    assert response.status == 421
                async with n.session.get(url + "/network") as response:
                    assert response.status == 404
                async with n.session.get(url + EVENTS) as response:
                    [(_, hello), (_, seen)] = await events(response, 2)
            assert hello["urls"] == urls
            assert [each["answers"] for each in seen["nodes"]] == [True, True, False]
            first = seen["nodes"][0]
            assert (first["name"], first["requests"]["handed_over"], first["peers"][0]["answered"]) == ("n0", 1, 1)
            assert first["other_versions"] == []

    play(scene)


def test_the_page_of_a_network_takes_another_port_where_its_own_is_taken() -> None:
    with network.network_console(["http://127.0.0.1:9"], 0) as first:
        port = int(first.rpartition(":")[2])
        with network.network_console(["http://127.0.0.1:9"], port) as second:
            assert second != first
    with network.network_console(["http://127.0.0.1:9"], port) as third:
        assert third == first
