"""Nodes of different versions of the protocol: they trade where they have one in common, else each names the other."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from stub_nodes import GOOD, MODEL, PROFILE, Stub

from wwwserve.agents.knowledge import ADVERT_SIZE
from wwwserve.serving import cli
from wwwserve.serving.config import parse
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.local_nodes import (
    READY_S,
    Accounts,
    Command,
    NetworkError,
    NodeFiles,
    free_ports,
    look,
    programs,
    write_nodes,
)
from wwwserve.serving.membership.heartbeat import BEAT_PATH, SILENT_S, Advert, Head, StaticMembership, head_of
from wwwserve.serving.setup.peer_view import Answer, View
from wwwserve.serving.setup.peer_view import ask as view
from wwwserve.serving.versions import SPEAKS, UNSAID, Versions, advice, common

THIS = SPEAKS.newest

# A node of another version: what it speaks is changed, and its messages have more, or less, than those of this one.
OTHER = """
import sys
import orjson, msgspec
from wwwserve.serving import versions

oldest, newest, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
versions.PROTOCOL, versions.SPEAKS = newest, versions.Versions(oldest, newest)

from wwwserve.serving import cli
from wwwserve.serving.http.keys import tagged
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.membership import heartbeat

told = ChannelLedger.message

async def message(self, peer):
    body = await told(self, peer)
    return body and orjson.dumps(orjson.loads(body) | {"mood": "good"})

def signed(identity, advert):
    said = orjson.loads(msgspec.json.encode(advert)) | {"mood": "good"}
    if newest == 1:
        del said["speaks"], said["mood"]
    content = orjson.dumps(said)
    return identity.name.encode() + identity.sign(tagged("advert", content)) + content

heartbeat.signed = signed
ChannelLedger.message = message
sys.exit(cli.main(["node", file]))
"""


@pytest.mark.parametrize(
    ("theirs", "spoken", "says"),
    [
        (Versions(THIS, THIS + 3), THIS, None),
        (Versions(1, THIS), THIS, None),
        (SPEAKS, THIS, None),
        (UNSAID, None, f"speaks protocol 1, this node {SPEAKS}: upgrade it"),
        (Versions(THIS + 1, THIS + 2), None,
         f"speaks protocol {THIS + 1} to {THIS + 2}, this node {SPEAKS}: upgrade this node"),
    ],
)  # fmt: skip
def test_two_nodes_speak_the_highest_version_that_both_do(
    theirs: Versions, spoken: int | None, says: str | None
) -> None:
    assert common(theirs) == spoken
    assert says is None or advice(theirs) == says


def test_a_head_is_read_whatever_else_an_advert_says() -> None:
    said: dict[str, Any] = {"name": "k", "label": "n", "url": "http://localhost:1", "load": "full", "speaks": [9, 11]}
    assert head_of(msgspec.json.encode(said)).speaks == (9, 11)
    assert head_of(msgspec.json.encode(said | {"speaks": [3, 3, 7]} | {"speaks": [1, 1]})).speaks == UNSAID
    for wrong in ([3, 2], [1], "2", [-1, 2], [1.5, 2]):
        with pytest.raises(Refused):
            head_of(msgspec.json.encode(said | {"speaks": wrong}))


def test_a_peer_that_says_now_this_version_and_now_that_does_not_come_and_go() -> None:
    now_s, told = 0.0, list[str]()
    peer, own = Identity.generate(), Identity.generate()
    nowhere: Any = None
    peers = StaticMembership({peer.name: "http://127.0.0.1:1"}, own, nowhere, lambda: now_s)
    peers._heard, peers._gone = lambda advert: told.append("there"), told.append
    load = (1.0,) * ADVERT_SIZE
    advert = Advert(peer.name, "p", "http://127.0.0.1:1", (MODEL,), 1, 1, load, 0.0)
    other = Head(peer.name, "p", "http://127.0.0.1:1", speaks=Versions(THIS + 1, THIS + 1))
    peers.alive(advert)
    for _ in range(9):
        peers.heard_unspoken(other)
        peers.alive(advert)
        now_s += 0.1
    assert told == ["there", peer.name] and peer.name in peers.unspoken()
    now_s += SILENT_S
    peers.alive(advert)
    assert told[2:] == ["there"] and not peers.unspoken()


def test_a_node_of_before_versions_is_known_by_what_it_does_not_know() -> None:
    async def beat(request: web.Request) -> web.Response:
        said = "it is no advert: Object contains unknown field `speaks`"
        return web.json_response({"error": {"type": "malformed", "message": said}}, status=403)

    async def scene() -> Answer:
        app = web.Application()
        app.router.add_post(BEAT_PATH, beat)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port := free_ports(1)[0]).start()
            return await view(parse(GOOD, "test"), Identity.generate(), "k" * 43, f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    assert asyncio.run(scene()).view is View.OLDER


@contextlib.asynccontextmanager
async def mixed(
    folder: Path, spoken: list[tuple[int, int] | None]
) -> AsyncIterator[tuple[list[Stub], list[NodeFiles]]]:
    """Node processes with ledgers before stub engines; None is this version."""
    async with contextlib.AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(Stub().served()) for _ in spoken]
        ports = free_ports(len(spoken))
        configured = [
            {
                "name": f"n{k}", "port": ports[k], "policy": "earliest_finish",
                "engine": {"url": stub.url, "profile": PROFILE},
                "market": {"tick_s": 0.1, "gossip_s": 0.2, "payment": "quoted"},
            } for k, stub in enumerate(stubs)
        ]  # fmt: skip
        files = write_nodes(folder, configured, Accounts(100.0, 1.0, 10.0))
        made = stack.enter_context(programs(folder))
        try:
            for k, (each, versions) in enumerate(zip(files, spoken, strict=True)):
                if versions is None:
                    command = each.command()
                else:
                    command = Command([sys.executable, "-c", OTHER, *map(str, versions), str(each.config)])
                made.start(f"node {k}", command)
            yield stubs, files
        finally:
            await asyncio.to_thread(made.stop, *made.running.values())


async def until(what: Callable[[], bool], for_s: float = READY_S["emulated"]) -> None:
    async with asyncio.timeout(for_s):
        while True:
            with contextlib.suppress(NetworkError):
                if await asyncio.to_thread(what):
                    return
            await asyncio.sleep(0.1)


async def ask(session: aiohttp.ClientSession, url: str) -> str:
    """The engine that answered."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "stream": True}
    async with session.post(url + "/v1/chat/completions", json=body) as response:
        events = (await response.read()).split(b"\n\n")
        assert response.status == 200 and events[-2] == b"data: [DONE]", events
        return str(json.loads(events[0].removeprefix(b"data: "))["id"])


def test_this_version_and_the_next_trade_and_one_of_neither_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scene() -> None:
        spoken = [None, (THIS, THIS + 1), (THIS + 1, THIS + 1), (1, 1)]
        async with mixed(tmp_path, spoken) as (stubs, files), aiohttp.ClientSession() as session:
            this, later, last, first = files

            def sees() -> bool:
                peers = {each["key"]: each for each in look(this.url)["peers"]}
                there = {key for key, each in peers.items() if each["there"]}
                return there == {later.key} and len(look(this.url)["other_versions"]) == 2

            def speaks() -> bool:
                spoken = {each["key"]: each["protocol"] for each in look(later.url)["peers"]}
                return spoken == {this.key: THIS, last.key: THIS + 1}

            await until(sees)
            await until(speaks)

            seen = look(this.url)
            named = {each["key"]: each for each in seen["other_versions"]}
            assert seen["protocol"] == list(SPEAKS) and named.keys() == {last.key, first.key}
            assert named[first.key]["reason"] == f"speaks protocol 1, this node {SPEAKS}: upgrade it"
            assert named[last.key]["reason"] == f"speaks protocol {THIS + 1}, this node {SPEAKS}: upgrade this node"
            assert named[last.key]["url"] == last.url and named[last.key]["label"] == "n2"
            said = f"speaks protocol {SPEAKS}, this node {THIS + 1}: upgrade it"
            await until(lambda: said in [each["reason"] for each in look(last.url)["other_versions"]])

            async with session.get(this.url + "/metrics") as response:
                page = await response.text()
            assert "wwwserve_peers_other_version 2.0" in page and 'messages_refused_total{kind="version"}' in page
            assert await asyncio.to_thread(cli.main, ["status", this.url]) == 0
            assert f"n3 at {first.url} speaks protocol 1" in capsys.readouterr().out.replace("\n", " ")
            log = (tmp_path / "node 0.log").read_text()
            assert log.count(f"a peer speaks protocol 1, this node {SPEAKS}: upgrade it") == 1

            for full, free in ((0, 1), (1, 0)):  # each hands over to the other, and pays
                stubs[full].waiting, stubs[free].waiting = 200, 0
                await until(lambda full=full: look(files[full].url)["engine"]["waiting"] > 100)
                async with asyncio.timeout(60):
                    while await ask(session, files[full].url) != stubs[free].url:
                        await asyncio.sleep(0.1)

                def paid(full: int = full, free: int = free) -> bool:
                    accounts = look(files[free].url)["ledger"]["channels"]
                    return any(each["peer"] == files[full].key and each["earned"] > 0 for each in accounts)

                await until(paid)

    asyncio.run(scene())
