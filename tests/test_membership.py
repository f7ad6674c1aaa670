"""One contract for every membership, on loopback in one process; then what only Zenoh has."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import trustme
from aiohttp import web

from agents.knowledge import ADVERT_SIZE
from serving import zenoh_membership
from serving.config import TlsConfig, ZenohConfig
from serving.membership import BEAT_PATH, BEAT_S, MOST_BYTES, Advert, AdvertError, Heartbeat, StaticMembership
from serving.network import free_ports
from serving.zenoh_membership import ZenohMembership, open_session

KINDS = ("static", "zenoh")
NAMES = ("a", "b", "an odd/name*$?#é%2F")
SOON_S = 2.0  # for a newcomer to know all, and for a departure to be noticed


def advert(name: str, number: int = 1, url: str = "http://h:1", load: float = 1.0) -> Advert:
    return Advert(name=name, url=url, serves=("m",), number=number, load=(load,) * ADVERT_SIZE, age_s=0.0, valid_s=3.0)


async def until(what: Callable[[], bool], for_s: float = SOON_S) -> None:
    until_s = time.monotonic() + for_s
    while not what():
        assert time.monotonic() < until_s, f"not within {for_s} s"
        await asyncio.sleep(0.005)


class Member:
    """A node's membership and what it was told."""

    def __init__(self, membership: Heartbeat) -> None:
        self.membership = membership
        self.heard: list[Advert] = []
        self.there: set[str] = set()

    def hear(self, advert: Advert) -> None:
        self.heard.append(advert)
        self.there.add(advert.name)

    def numbers(self, name: str) -> list[int]:
        return [each.number for each in self.heard if each.name == name]

    def fall_silent(self) -> None:
        """Send nothing more, but keep every connection."""
        self.membership.advert = None


class Network:
    """Members of one kind, who join and leave. In Zenoh's all know the first of `NAMES` alone."""

    def __init__(self, kind: str, tls: dict[str, TlsConfig] | None = None) -> None:
        self.kind, self.tls = kind, tls or {}
        self.ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.stacks: dict[str, contextlib.AsyncExitStack] = {}

    async def join(self, name: str, number: int = 1) -> Member:
        stack = self.stacks[name] = contextlib.AsyncExitStack()
        open_one = self._static if self.kind == "static" else self._zenoh
        member = Member(await open_one(name, stack))
        member.membership.publish(advert(name, number, self.urls[name]), time.monotonic())
        running = asyncio.create_task(member.membership.run(member.hear, member.there.discard))  # type: ignore[attr-defined]
        stack.push_async_callback(asyncio.wait, {running})
        stack.callback(running.cancel)
        return member

    async def leave(self, name: str) -> None:
        await self.stacks.pop(name).aclose()

    async def _static(self, name: str, stack: contextlib.AsyncExitStack) -> Heartbeat:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        peers = [(each, url) for each, url in self.urls.items() if each != name]
        membership = StaticMembership(peers, session, time.monotonic)

        async def beat(request: web.Request) -> web.Response:
            membership.received(await request.read())
            return web.Response(status=204)

        app = web.Application()
        app.router.add_post(BEAT_PATH, beat)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", self.ports[name]).start()
        return membership

    async def _zenoh(self, name: str, stack: contextlib.AsyncExitStack) -> Heartbeat:
        session = stack.enter_context(open_session(self.endpoints(name)))
        return ZenohMembership(name, "test", session, time.monotonic)

    def endpoints(self, name: str) -> ZenohConfig:
        tls = self.tls.get(name)
        listen, first = (f"{'tls' if tls else 'tcp'}/127.0.0.1:{self.ports[each]}" for each in (name, NAMES[0]))
        return ZenohConfig(network="test", listen=(listen,), connect=() if first == listen else (first,), tls=tls)


@contextlib.asynccontextmanager
async def network(kind: str, **more: Any) -> AsyncIterator[Network]:
    made = Network(kind, **more)
    try:
        yield made
    finally:
        for name in list(made.stacks):
            await made.leave(name)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 30.0))


# The contract.


@pytest.mark.parametrize("kind", KINDS)
def test_members_and_late_joiners_hear_of_all_others_and_not_of_themselves(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            members = {name: await n.join(name, number=7) for name in NAMES[:2]}
            await until(lambda: all(len(each.there) == 1 for each in members.values()))
            late = members[NAMES[2]] = await n.join(NAMES[2])
            await until(lambda: late.there == set(NAMES[:2]))
            assert {each.name: (each.number, each.url) for each in late.heard} == {
                name: (7, n.urls[name]) for name in NAMES[:2]
            }
            await until(lambda: all(each.there == set(NAMES) - {name} for name, each in members.items()))

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_can_leave_whatever_it_has_just_said(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            for turns in range(4):  # of the event loop, between what it says and the end
                a, b = await n.join("a"), await n.join("b")
                await until(lambda a=a, b=b: a.there == {"b"} and b.there == {"a"})  # type: ignore[misc]
                a.membership.publish(advert("a", 2, n.urls["a"]), time.monotonic())
                for _ in range(turns):
                    await asyncio.sleep(0)
                await asyncio.wait_for(n.leave("a"), SOON_S)
                await n.leave("b")

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_each_advert_is_told_once_though_it_is_sent_again_and_again(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: b.numbers("a") == [1])
            first_s = b.membership.beaten_s["a"]
            await until(lambda: b.membership.beaten_s["a"] > first_s + BEAT_S * 1.5)
            a.membership.publish(advert("a", 2, n.urls["a"], load=5.0), time.monotonic())
            await until(lambda: b.numbers("a") == [1, 2])
            assert b.heard[-1].load == (5.0,) * ADVERT_SIZE

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_is_as_old_as_it_is_when_it_is_sent(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            a.membership.publish(advert("a", 2, n.urls["a"]), time.monotonic() - 30.0)
            await until(lambda: 2 in b.numbers("a"))
            assert 30.0 <= b.heard[-1].age_s < 30.0 + SOON_S

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_is_gone_and_heard_again_when_it_comes_back(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b, _ = [await n.join(name) for name in NAMES]
            await until(lambda: len(a.there) == len(b.there) == 2)
            await n.leave(NAMES[2])
            await until(lambda: a.there == {"b"} and b.there == {"a"}, 0.5 if kind == "zenoh" else SOON_S)
            await n.join(NAMES[2])
            await until(lambda: len(a.there) == len(b.there) == 2)
            await n.leave("a")  # the one that all others knew
            await until(lambda: b.there == {NAMES[2]})
            await n.join("a")
            await until(lambda: len(b.there) == 2)

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_who_falls_silent_is_gone_though_its_connections_hold_and_heard_again_when_it_goes_on(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"} and b.there == {"a"})
            a.fall_silent()
            await until(lambda: not b.there)
            assert a.there == {"b"}
            a.membership.publish(advert("a", 1, n.urls["a"]), time.monotonic())  # no new number
            await until(lambda: b.numbers("a") == [1, 1] and b.there == {"a"})

    play(scene)


# Zenoh.


@pytest.mark.parametrize(
    ("key", "body", "told"),
    [
        ("x", b"\x00\xff", "invalid|malformed"),
        ("x", b"{}", "missing required field"),
        ("x", b"x" * (MOST_BYTES + 1), f"{MOST_BYTES + 1} bytes"),
        ("x", msgspec.json.encode(advert("b")), "whose key is another"),
        ("a", msgspec.json.encode(advert("a")), "has the name of this node"),
        ("x", msgspec.json.encode(advert("x", url="file:///etc")), "expected http"),
        ("x", msgspec.json.encode(advert("x")), "known already"),
    ],
)
def test_what_is_no_peers_advert_is_refused_and_logged(
    key: str, body: bytes, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zenoh_membership, "MOST_PEERS", 1)

    def reasons() -> str:
        return " ".join(record.reason for record in caplog.records)  # type: ignore[attr-defined]

    async def scene() -> None:
        async with network("zenoh") as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"})
            with open_session(n.endpoints(NAMES[2])) as stranger:
                await until(lambda: len(stranger.info.peers_zid()) == 2)
                stranger.put(f"wwwserve/test/advert/{key}", body)
                await until(lambda: bool(caplog.records))
            b.membership.publish(advert("b", 2, n.urls["b"]), time.monotonic())
            await until(lambda: a.numbers("b") == [1, 2])
            assert a.there == {"b"}

    with caplog.at_level(logging.WARNING, "wwwserve.membership"):
        play(scene)
    assert caplog.records[0].key == f"wwwserve/test/advert/{key}"  # type: ignore[attr-defined]
    assert any(each in reasons() for each in told.split("|")), reasons()


PEER = """
import asyncio, sys, time
import msgspec
from serving import config, membership, zenoh_membership

told = msgspec.json.decode(sys.argv[1], type=config.ZenohConfig)
with zenoh_membership.open_session(told) as session:
    member = zenoh_membership.ZenohMembership("b", told.network, session, time.monotonic)
    member.publish(membership.decode(sys.argv[2].encode()), time.monotonic())
    asyncio.run(member.run(print, print))
"""


def test_who_is_killed_is_gone_at_once_and_who_is_stopped_after_its_silence() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            told = [msgspec.json.encode(each).decode() for each in (n.endpoints("b"), advert("b"))]
            peer = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, *told, stdout=subprocess.DEVNULL)
            try:
                await until(lambda: a.there == {"b"}, 20.0)
                peer.send_signal(signal.SIGSTOP)
                await until(lambda: not a.there)
                peer.send_signal(signal.SIGCONT)
                await until(lambda: a.there == {"b"})
            finally:
                peer.kill()
                await peer.wait()
            await until(lambda: not a.there, 0.5)

    play(scene)


def test_networks_of_different_names_do_not_hear_of_each_other() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            with open_session(n.endpoints("b")) as session:
                other = ZenohMembership("b", "other", session, time.monotonic)
                other.publish(advert("b"), time.monotonic())
                running = asyncio.create_task(other.run(a.hear, a.there.discard))
                c = await n.join(NAMES[2])
                await until(lambda: len(session.info.peers_zid()) == 2 and a.there == {NAMES[2]})
                first_s = a.membership.beaten_s[NAMES[2]]
                await until(lambda: a.membership.beaten_s[NAMES[2]] > first_s + 2 * BEAT_S)
                running.cancel()
                await asyncio.wait({running})
            assert a.there == {NAMES[2]} and c.there == {"a"} and not other.beaten_s

    play(scene)


def test_no_beat_is_taken_and_an_address_in_use_is_an_error() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            with pytest.raises(AdvertError, match="is zenoh"):
                a.membership.received(msgspec.json.encode(advert("b")))  # type: ignore[attr-defined]
            with pytest.raises(OSError, match=r"membership: .* in use"):
                open_session(n.endpoints("a"))

    play(scene)


def certified(folder: Path, ca: trustme.CA, name: str) -> TlsConfig:
    """Files of a node with a certificate that `ca` made for 127.0.0.1."""
    made = ca.issue_cert("127.0.0.1")
    tls = TlsConfig(**{part: str(folder / f"{name}.{part}") for part in TlsConfig.__struct_fields__})
    ca.cert_pem.write_to_path(tls.ca)
    made.cert_chain_pems[0].write_to_path(tls.certificate)
    made.private_key_pem.write_to_path(tls.key)
    return tls


def test_with_certificates_only_nodes_of_the_ca_get_in(tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    tls = {name: certified(tmp_path, ours, f"node{k}") for k, name in enumerate(NAMES)}
    wrong = certified(tmp_path, theirs, "wrong")
    # Their own CA, our CA's certificate beside theirs, and none.
    strangers = [("tls", wrong), ("tls", msgspec.structs.replace(wrong, ca=tls["a"].ca)), ("tcp", None)]

    async def scene() -> None:
        async with network("zenoh", tls=tls) as n:
            with contextlib.ExitStack() as stack:
                sessions = []
                for kind, files in strangers:
                    listen, connect = (f"{kind}/127.0.0.1:{port}" for port in (free_ports(1)[0], n.ports["a"]))
                    told = ZenohConfig(network="test", listen=(listen,), connect=(connect,), tls=files)
                    sessions.append(stack.enter_context(open_session(told)))
                members = [await n.join(name) for name in NAMES]
                await until(lambda: all(len(each.there) == 2 for each in members))
                first_s = members[0].membership.beaten_s["b"]  # so long that strangers try again and again
                await until(lambda: members[0].membership.beaten_s["b"] > first_s + 3 * BEAT_S)
                assert [session.info.peers_zid() for session in sessions] == [[], [], []]
                assert len(members[0].membership.session.info.peers_zid()) == 2  # type: ignore[attr-defined]

    play(scene)
