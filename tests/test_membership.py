"""One contract for every membership, on loopback in one process; then what only Zenoh has."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trustme
from aiohttp import web

from wwwserve.agents.knowledge import AD_TARIFF, AD_UNSHARED, ADVERT_SIZE
from wwwserve.agents.protocol import CACHED_INPUT, TARIFF_SIZE
from wwwserve.serving.config import TlsConfig, ZenohConfig
from wwwserve.serving.http.keys import Identity, tagged
from wwwserve.serving.http.messages import SKEW_S, Refused
from wwwserve.serving.http.transport import AiohttpTransport, Transport
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.membership import heartbeat as membership_module
from wwwserve.serving.membership import zenoh as zenoh_membership
from wwwserve.serving.membership.heartbeat import (
    BEAT_PATH,
    BEAT_S,
    HEAD_BYTES,
    MOST_BYTES,
    SILENT_S,
    Advert,
    Heartbeat,
    StaticMembership,
    signed,
)
from wwwserve.serving.membership.zenoh import ZenohMembership, open_session

KINDS = ("static", "zenoh")
NAMES = ("a", "b", "an odd/name*$?#é%2F")  # what members call themselves; their keys are
KEYS = {name: Identity.generate() for name in NAMES}
LABELS = {identity.name: name for name, identity in KEYS.items()}
SOON_S = 60.0  # at most, for a newcomer to know all, and for a departure to be noticed


def advert(label: str, number: int = 1, url: str = "http://127.0.0.1:1", load: float | tuple[float, ...] = 1.0,
           **more: Any) -> Advert:  # fmt: skip
    values: dict[str, Any] = {
        "name": KEYS[label].name, "label": label, "url": url, "serves": ("m",), "run": 1, "number": number,
        "load": load if isinstance(load, tuple) else (load,) * ADVERT_SIZE, "age_s": 0.0,
    }  # fmt: skip
    return Advert(**values | more)


def now_us(off_s: float = 0.0) -> int:
    return round((time.time() + off_s) * 1e6)


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
        self.there.add(advert.label)

    def lose(self, key: str) -> None:
        self.there.discard(LABELS[key])

    def numbers(self, name: str) -> list[int]:
        return [each.number for each in self.heard if each.label == name]

    def last_s(self, name: str) -> float:
        return self.membership.beaten_s[KEYS[name].name]

    def fall_silent(self) -> None:
        """Send nothing more, but keep every connection."""
        self.membership.advert = None


class Network:
    """Members of one kind, who join and leave. In Zenoh's all know the first of `NAMES` alone."""

    def __init__(self, kind: str, tls: dict[str, TlsConfig] | None = None) -> None:
        self.kind, self.tls = kind, tls or {}
        self.refusals: list[Refused] = []
        self.wall_clock: Callable[[], float] = time.time  # of who joins next
        free = free_ports(2 * len(NAMES))
        self.ports, self.url_ports = (dict(zip(NAMES, half, strict=True)) for half in (free[::2], free[1::2]))
        if kind == "static":
            self.url_ports = self.ports  # where beats come
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self.url_ports.items()}
        self.stacks: dict[str, contextlib.AsyncExitStack] = {}

    async def join(self, name: str, number: int = 1) -> Member:
        stack = self.stacks[name] = contextlib.AsyncExitStack()
        open_one = self._static if self.kind == "static" else self._zenoh
        member = Member(await open_one(name, stack))
        member.membership.publish(advert(name, number, self.urls[name]), time.monotonic())
        running = asyncio.create_task(member.membership.run(member.hear, member.lose))  # type: ignore[attr-defined]
        stack.push_async_callback(asyncio.wait, {running})
        stack.callback(running.cancel)
        return member

    async def leave(self, name: str) -> None:
        await self.stacks.pop(name).aclose()

    async def _static(self, name: str, stack: contextlib.AsyncExitStack) -> Heartbeat:
        transport = AiohttpTransport()
        stack.push_async_callback(transport.close)
        peers = {KEYS[each].name: url for each, url in self.urls.items() if each != name}
        membership = StaticMembership(peers, KEYS[name], transport, time.monotonic, self.wall_clock)

        async def beat(request: web.Request) -> web.Response:
            try:
                membership.received(await request.read())
            except Refused as refused:
                self.refusals.append(refused)
                return web.Response(status=403, text=str(refused))
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
        refused = self.refusals.append
        return ZenohMembership(KEYS[name], "test", session, time.monotonic, refused, self.wall_clock)

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
    asyncio.run(asyncio.wait_for(scene(), 600.0))


# The contract.


@pytest.mark.parametrize("kind", KINDS)
def test_members_and_late_joiners_hear_of_all_others_and_not_of_themselves(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            members = {name: await n.join(name, number=7) for name in NAMES[:2]}
            await until(lambda: all(len(each.there) == 1 for each in members.values()))
            late = members[NAMES[2]] = await n.join(NAMES[2])
            await until(lambda: late.there == set(NAMES[:2]))
            assert {each.label: (each.number, each.url) for each in late.heard} == {
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
def test_who_had_no_time_to_hear_its_peers_does_not_take_them_for_silent(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"} and b.there == {"a"})
            for _ in range(3):
                time.sleep(1.5 * SILENT_S)
                await asyncio.sleep(BEAT_S)
            assert a.numbers("b") == b.numbers("a") == [1], "one who was gone is told anew"
            b.fall_silent()
            began_s = time.monotonic()
            await until(lambda: not a.there)
            assert time.monotonic() - began_s < SILENT_S + 5 * BEAT_S

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_each_advert_is_told_once_though_it_is_sent_again_and_again(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: b.numbers("a") == [1])
            first_s = b.last_s("a")
            await until(lambda: b.last_s("a") > first_s + BEAT_S * 1.5)
            load = (5.0,) * AD_UNSHARED + (1.0,) * (ADVERT_SIZE - AD_UNSHARED)
            a.membership.publish(advert("a", 2, n.urls["a"], load=load), time.monotonic())
            await until(lambda: b.numbers("a") == [1, 2])
            assert b.heard[-1].load == load

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
            await until(lambda: a.there == {"b"} and b.there == {"a"})
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


# What is refused.


def sealed(label: str, by: str | None = None, **more: Any) -> bytes:
    """An advert of `label` as `by` sends it."""
    return signed(KEYS[by or label], advert(label, **{"sent_us": now_us()} | more))


def priced(k: int, price: float) -> bytes:
    """An advert with this price of one sort of tokens."""
    load = [1.0] * ADVERT_SIZE
    load[AD_TARIFF + k] = price
    return sealed("b", load=tuple(load))


def junk(content: bytes) -> bytes:
    """Anything, signed."""
    return KEYS["b"].name.encode() + KEYS["b"].sign(tagged("advert", content)) + content


STRANGER = Identity.generate()
CHEATS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "nothing": (lambda: b"", "malformed", "it has 0 bytes"),
    "not UTF-8": (lambda: b"\xff" * 300, "stranger", "is no peer"),
    "too large": (lambda: sealed("b", url="http://" + "x" * MOST_BYTES), "malformed", f"to {MOST_BYTES}"),
    "not JSON": (lambda: junk(b"\x00\xff"), "malformed", "it is no advert"),
    "deep": (lambda: junk(b"[" * 10_000), "malformed", "it is no advert"),
    "no fields": (lambda: junk(b"{}"), "malformed", "missing required field"),
    "URL": (lambda: sealed("b", url="file:///etc"), "malformed", "expected http"),
    "label": (lambda: signed(KEYS["b"], msgspec.structs.replace(advert("b"), label="\x1b[2J")), "malformed", "label"),
    "profile": (lambda: sealed("b", load=0.0), "malformed", "expected 0.1 to"),
    **{f"price {value} of tokens {k}": (lambda k=k, value=value: priced(k, value), "malformed", f"is {value}, expected")
       for k in range(TARIFF_SIZE) for value in (-0.001, 1000.1)},
    "dear cached input": (lambda: priced(CACHED_INPUT, 1.5), "malformed", "cached input is at 1.5, expected at most"),
    **{f"load {value}": (lambda value=value: sealed("b", load=value), "malformed", f"is {value}, expected")
       for value in (1e308, -1.0, 1e-308)},
    "URL in two lines": (lambda: sealed("b", url="http://a\r\nx: y"), "malformed", "a host, a port"),
    "own key": (lambda: sealed("a"), "stranger", "key of this node"),
    "wrong key": (lambda: sealed("b", by=NAMES[2]), "forged", "it speaks for"),
    "forged": (lambda: (lambda body: body[:HEAD_BYTES] + body[HEAD_BYTES:].replace(b"1.0", b"9.0"))(sealed("b")),
               "forged", "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_peers_advert_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one function that all adverts go through."""

    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"})
            membership = a.membership
            stranger = STRANGER.name.encode() + sealed("b")[len(STRANGER.name) :]
            for made, refusal, reason in [
                *CHEATS.values(),
                (lambda: stranger, "stranger", "no peer of this node"),
                (lambda: sealed("b", url=n.urls["b"], sent_us=now_us(-60)), "stale", " s before the time here"),
                (lambda: sealed("b", url=n.urls["b"], sent_us=now_us(60)), "stale", " s after the time here"),
            ]:
                if refusal == "stranger":
                    monkeypatch.setattr(zenoh_membership, "MOST_PEERS", 1)  # as many as there are
                else:
                    monkeypatch.undo()
                with pytest.raises(Refused, match=re.escape(reason)) as found:
                    membership.take(made())
                assert found.value.kind == refusal, reason
            b.membership.publish(advert("b", 2, n.urls["b"]), time.monotonic())
            await until(lambda: a.numbers("b") == [1, 2])
            assert a.there == {"b"} and not n.refusals

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_an_advert_is_taken_once_and_an_old_one_not_even_after_a_departure(kind: str) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"})
            old = sealed("b", sent_us=now_us(-5), number=9, url=n.urls["b"])  # signed, but never sent
            b.membership._beat = None
            last = b.membership.beat()
            assert last is not None
            a.membership.alive(a.membership.take(last))
            await n.leave("b")
            await until(lambda: not a.there)
            for again in (last, old):
                with pytest.raises(Refused, match="heard already") as found:
                    a.membership.take(again)
                assert found.value.kind == "replayed"
            await n.join("b")
            await until(lambda: a.there == {"b"})

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off_s", [60.0, -60.0])
def test_who_has_a_clock_that_is_off_is_not_heard_and_it_is_told_why(kind: str, off_s: float) -> None:
    async def scene() -> None:
        async with network(kind) as n:
            a, _ = await n.join("a"), await n.join("b")
            n.wall_clock = lambda: time.time() + off_s
            c = await n.join(NAMES[2])
            both = {"before", "after"}
            await until(lambda: {str(each).split(" s ")[1].split()[0] for each in n.refusals} == both)
            assert {each.kind for each in n.refusals} == {"stale"}
            assert all("one of the two clocks is off" in str(each) for each in n.refusals)
            await until(lambda: a.there == {"b"})  # late beats of a busy machine may have made it forget
            assert not c.there
            c.membership.wall_clock = lambda: time.time() + off_s / 60 * (SKEW_S - 1)
            c.membership._sent_us = 0  # it was never heard
            await until(lambda: c.there == {"a", "b"} and NAMES[2] in a.there)

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_adverts_are_signed_once_for_all_and_verified_once_each(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[bytes] = []
    real = membership_module.verify
    monkeypatch.setattr(membership_module, "verify", lambda *given: (verified.append(given[2]), real(*given))[1])

    async def scene() -> None:
        async with network(kind) as n:
            members = [await n.join(name) for name in NAMES]
            await until(lambda: all(len(each.there) == 2 for each in members))
            body = members[1].membership.beat()
            assert body is not None and members[1].membership.beat() == body
            with contextlib.suppress(Refused):
                members[0].membership.take(body)
            before = len(verified)
            for _ in range(1000):
                with pytest.raises(Refused, match="heard already"):
                    members[0].membership.take(body)
            assert len(verified) == before

    play(scene)


def test_a_peer_that_starts_anew_all_the_time_is_believed_now_and_then() -> None:
    """Each start costs its peers what it makes them forget and tell again."""
    now_s, heard, nowhere = 1000.0, list[int](), cast(Transport, None)
    peers = {KEYS["b"].name: "http://127.0.0.1:1"}
    membership = StaticMembership(peers, KEYS["a"], nowhere, lambda: now_s, lambda: now_s)
    membership._heard = lambda advert: heard.append(advert.run)

    def says(run: int) -> bool:
        nonlocal now_s
        now_s += 0.1
        try:
            membership.received(signed(KEYS["b"], advert("b", run=run, sent_us=round(now_s * 1e6))))
        except Refused as refused:
            assert refused.kind == "crowded"
            return False
        return True

    assert [says(run) for run in range(12)] == [True] * 5 + [False] * 7
    assert heard == [0, 1, 2, 3, 4] and says(4), "what it said before is still believed"
    later_s = now_s + 60.0
    taken = 0
    while now_s < later_s:
        taken += says(len(heard) + 1000)
    assert 12 <= taken <= 14, "one in 5 s"
    now_s += 60.0
    assert says(1) and says(2) and says(3) and says(4)


# Zenoh.


def test_over_zenoh_too_what_is_refused_changes_nothing() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a, b = await n.join("a"), await n.join("b")
            await until(lambda: a.there == {"b"} and b.there == {"a"})
            with open_session(n.endpoints(NAMES[2])) as stranger:
                await until(lambda: len(stranger.info.peers_zid()) == 2)
                key = f"wwwserve/test/advert/{KEYS['b'].name}"
                sent = [(key, made()) for name, (made, _, _) in CHEATS.items() if name != "own key"]
                sent.append((f"wwwserve/test/advert/{NAMES[0]}", sealed(NAMES[2])))
                for count, (where, body) in enumerate(sent, 1):
                    stranger.put(where, body)
                    await until(lambda count=count: len(n.refusals) >= 2 * count)  # type: ignore[misc]
                assert "another's" in " ".join(map(str, n.refusals))
            b.membership.publish(advert("b", 2, n.urls["b"]), time.monotonic())
            await until(lambda: a.numbers("b") == [1, 2])
            assert a.there == {"b"}

    play(scene)


def test_a_departure_in_the_name_of_another_does_not_make_it_gone() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            taken = asyncio.Event()

            async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                taken.set()
                writer.close()

            lost: list[str] = []
            async with await asyncio.start_server(take, "127.0.0.1", n.url_ports["b"]):
                a, _ = await n.join("a"), await n.join("b")
                await until(lambda: a.there == {"b"})
                a.membership._gone = lost.append
                with open_session(n.endpoints(NAMES[2])) as stranger:
                    await until(lambda: len(stranger.info.peers_zid()) == 2)
                    stranger.liveliness().declare_token(f"wwwserve/test/alive/{KEYS['b'].name}").undeclare()
                    a.membership._doubt(KEYS["b"].name)  # in case Zenoh itself sees the other token
                    await asyncio.wait_for(taken.wait(), SOON_S)
                    last_s = a.last_s("b")
                    await until(lambda: a.last_s("b") > last_s + 2 * BEAT_S)
                assert not lost

    play(scene)


PEER = """
import asyncio, pathlib, sys, time
import msgspec
from wwwserve.serving import config
from wwwserve.serving.http import keys as identity
from wwwserve.serving.membership import heartbeat as membership, zenoh as zenoh_membership

settings = msgspec.json.decode(sys.argv[1], type=config.ZenohConfig)
with zenoh_membership.open_session(settings) as session:
    key = identity.Identity.load(pathlib.Path(sys.argv[3]))
    member = zenoh_membership.ZenohMembership(key, settings.network, session, time.monotonic, print)
    member.publish(membership.decode(sys.argv[2].encode()), time.monotonic())
    asyncio.run(member.run(print, print))
"""


def test_who_is_killed_is_gone_at_once_and_who_is_stopped_after_its_silence(tmp_path: Path) -> None:
    KEYS["b"].save(tmp_path / "b.pem")

    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            given = [msgspec.json.encode(each).decode() for each in (n.endpoints("b"), advert("b"))]
            given.append(str(tmp_path / "b.pem"))
            peer = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, *given, stdout=subprocess.DEVNULL)
            try:
                await until(lambda: a.there == {"b"}, 20.0)
                peer.send_signal(signal.SIGSTOP)
                await until(lambda: not a.there)
                peer.send_signal(signal.SIGCONT)
                await until(lambda: a.there == {"b"})
            finally:
                peer.kill()
                await peer.wait()
            await until(lambda: not a.there, 0.8 * SILENT_S)

    play(scene)


def test_networks_of_different_names_do_not_hear_of_each_other() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            with open_session(n.endpoints("b")) as session:
                other = ZenohMembership(KEYS["b"], "other", session, time.monotonic, n.refusals.append)
                other.publish(advert("b"), time.monotonic())
                running = asyncio.create_task(other.run(a.hear, a.lose))
                c = await n.join(NAMES[2])
                await until(lambda: len(session.info.peers_zid()) == 2 and a.there == {NAMES[2]})
                first_s = a.last_s(NAMES[2])
                await until(lambda: a.last_s(NAMES[2]) > first_s + 2 * BEAT_S)
                running.cancel()
                await asyncio.wait({running})
            assert a.there == {NAMES[2]} and c.there == {"a"} and not other.beaten_s

    play(scene)


def test_no_beat_is_taken_and_an_address_in_use_is_an_error() -> None:
    async def scene() -> None:
        async with network("zenoh") as n:
            a = await n.join("a")
            with pytest.raises(Refused, match="is zenoh"):
                a.membership.received(sealed("b"))  # type: ignore[attr-defined]
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
                    settings = ZenohConfig(network="test", listen=(listen,), connect=(connect,), tls=files)
                    sessions.append(stack.enter_context(open_session(settings)))
                members = [await n.join(name) for name in NAMES]
                await until(lambda: all(len(each.there) == 2 for each in members))
                first_s = members[0].last_s("b")  # so long that strangers try again and again
                await until(lambda: members[0].last_s("b") > first_s + 3 * BEAT_S)
                assert [session.info.peers_zid() for session in sessions] == [[], [], []]
                assert len(members[0].membership.session.info.peers_zid()) == 2  # type: ignore[attr-defined]

    play(scene)
