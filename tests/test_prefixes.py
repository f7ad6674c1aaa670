"""A node knows which prefixes its engine and its peers have, checks that by what they report, and keeps its guests'
apart."""

import asyncio
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from stub_nodes import MODEL, Net, Stub, net, play

from wwwserve.serving.engine.prefix_index import MOST_DRIFT, REPORTS, Drift, prefix_of
from wwwserve.serving.local_nodes import Plan, look, running
from wwwserve.serving.node_provider import Lookup, NodeProvider

CHAT = "/v1/chat/completions"
WORD = "word "


@dataclass
class Caching(Stub):
    """An engine whose token is five bytes of text, and that has in its cache all that it ever computed."""

    reports: bool = True
    forgets: bool = False
    seen: set[tuple[str, ...]] = field(default_factory=set)
    salts: list[str | None] = field(default_factory=list)
    sglang: bool = False

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.sglang:
            return await super().metrics(request)
        page = Path(__file__).with_name("sglang").joinpath("0.5.23-priority.txt")
        return web.Response(text=re.sub(r"} [0-9.]+$", "} 0.0", page.read_text(encoding="utf-8"), flags=re.MULTILINE))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        self.begun += 1
        self.salts.append(asked.get("cache_salt"))
        texts = (str(asked.get("cache_salt")), *(message["content"] for message in asked["messages"]))
        sizes = [len(text) // 5 for text in texts[1:]]
        known = [k for k in range(1, len(texts)) if texts[: k + 1] in self.seen and not self.forgets]
        prompt = sum(sizes)
        last = max(known, default=0)  # of an answer, the last token was not computed
        kept = sum(sizes[:last]) - (last > 0 and asked["messages"][last - 1]["role"] == "assistant")
        cached = min(kept, prompt - 1) // 16 * 16
        answer = WORD * 20
        for k in range(1, len(texts)):
            self.seen.add(texts[: k + 1])
        self.seen.add((*texts, answer))
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": 20}
        if self.reports:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})


async def converse(n: Net, turns: int, system: str = "s") -> None:
    """A session with the first node."""
    messages = [{"role": "system", "content": f"{system} " * 250}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"turn {turn} " * 30})
        status, body, _ = await n.ask(messages=messages)
        assert status == 200
        messages.append({"role": "assistant", "content": json.loads(body)["choices"][0]["message"]["content"]})


async def counted(n: Net, where: str, by: str) -> float:
    async with n.session.get(n.urls[0] + "/metrics") as response:
        page = await response.text()
    name = f'wwwserve_prefix_tokens_total{{by="{by}",where="{where}"}} '
    return sum(float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))


@pytest.mark.parametrize("where", ["local", "peer"])
def test_what_is_predicted_is_what_is_reported_here_and_at_a_peer(where: str) -> None:
    async def scene() -> None:
        stubs = [Caching()] if where == "local" else [Caching(waiting=200), Caching()]
        async with net(*stubs) as n:
            for k in range(3):
                await converse(n, 4, f"{k}")
            assert stubs[-1].begun == 12
            predicted, reported = await counted(n, where, "prediction"), await counted(n, where, "report")
            assert predicted == pytest.approx(reported, rel=0.02) and reported > 1000
            seen = (await n.see())["prefix"]
            assert seen[where]["reports"] == 12 and seen[where]["drift"] < 0.05 and not seen[where]["alarm"]
            assert seen["entries"] > 9

    play(scene)


@pytest.mark.parametrize("where", ["local", "peer"])
def test_the_policy_sees_what_is_cached_where(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, list[int], float]] = []  # turn, prompt, cached here and at the candidate, time since
    look = NodeProvider._look_for_prefixes

    def looked(provider: NodeProvider, r: int, lookup: Lookup, now_s: float) -> None:
        look(provider, r, lookup, now_s)
        q = provider.requests[r]
        since_s = float(q["arrival_s"] - q["last_s"])
        seen.append((int(q["turn"]), int(q["prompt"]), q["prefix"][: 1 + q["n_candidates"]].tolist(), since_s))

    monkeypatch.setattr(NodeProvider, "_look_for_prefixes", looked)

    async def scene() -> None:
        stubs = [Caching()] if where == "local" else [Caching(waiting=200), Caching()]
        async with net(*stubs) as n:
            await converse(n, 4)

    play(scene)
    assert {turn for turn, *_ in seen} == {1, 2, 3, 4}
    for turn, prompt, cached, since_s in seen:
        at = 0 if where == "local" else 1
        assert all(cached[k] == 0 for k in range(len(cached)) if k != at or turn == 1)
        assert turn == 1 or (0.5 * prompt < cached[at] < prompt and cached[at] % 16 == 0)
        assert (since_s == 0) == (turn == 1)


def test_an_engine_that_does_not_report_is_no_cause_for_alarm() -> None:
    async def scene() -> None:
        async with net(Caching(reports=False)) as n:
            await converse(n, 3)
            seen = (await n.see())["prefix"]
            nothing = {"drift": 0.0, "reports": 0, "alarm": False, "prompt": 0, "predicted": 0, "reported": 0}
            assert seen["entries"] > 0 and seen["local"] == nothing

    play(scene)


def test_an_engine_that_caches_nothing_raises_an_alarm() -> None:
    async def scene() -> None:
        async with net(Caching(forgets=True)) as n:
            for k in range(6):
                await converse(n, 5, f"{k}")
            seen = (await n.see())["prefix"]["local"]
            assert seen["alarm"] and seen["drift"] > 0.4
            async with n.session.get(n.urls[0] + "/metrics") as response:
                assert 'wwwserve_prefix_alarm{where="local"} 1.0' in await response.text()

    play(scene)


def test_guests_are_salted_each_with_their_own_and_own_users_are_not() -> None:
    async def scene() -> None:
        host, busy_one, busy_two = Caching(), Caching(waiting=200), Caching(waiting=200)
        async with net(busy_one, host, busy_two) as n:
            n.stubs[2].waiting = 200

            async def asked(k: int, count: int) -> list[str | None]:
                before = len(host.salts)
                while len(host.salts) < before + count:
                    assert (await n.ask(k))[0] == 200
                return host.salts[before:]

            [own] = await asked(1, 1)
            first, again = await asked(0, 2)
            [other] = await asked(2, 1)
            assert own is None and first == again and first is not None and other is not None and first != other
            assert len(first) == 32 and first.isalnum()
            before = len(host.salts)
            while len(host.salts) == before:
                await n.ask(0, cache_salt="of a user")
            assert host.salts[-1] not in (first, other, None, "of a user")
            assert (await n.ask(1, cache_salt="of a user"))[0] == 200 and host.salts[-1] == "of a user"

    play(scene)


def test_an_engine_that_knows_no_salts_gets_none() -> None:
    async def scene() -> None:
        host = Caching()
        async with net(Caching(waiting=200), host) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            host.sglang = True
            n.configs[1]["engine"] = n.configs[1]["engine"] | {"kind": "sglang"}
            await n.start(1)

            async def handed() -> bool:
                assert (await n.ask(0))[0] == 200
                return host.begun > 0

            await n.until(handed)
            assert host.salts[0] is None

    play(scene)


def test_sessions_on_emulated_engines_are_cached_as_predicted() -> None:
    """Eight users at once, three turns each, streamed or not; on the own engine and, as it is full, at the peer's."""
    plan = Plan(
        nodes=2, base_port=0, policy="earliest_finish", gpu="rtx-3090", model="qwen3-8b", max_num_seqs=2, speed=20.0
    )

    def session(url: str, k: int) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        messages: list[Any] = [{"role": "system", "content": f"You are {k}. " * 100}]
        for turn in range(3):
            messages.append({"role": "user", "content": f"User {k} asks {turn}. " * 20})
            if k % 2:
                parts = client.chat.completions.create(model="qwen3-8b", messages=messages, max_tokens=60, stream=True)
                answer = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
            else:
                whole = client.chat.completions.create(model="qwen3-8b", messages=messages, max_tokens=60)
                answer = whole.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})

    with running(plan) as network:
        users = [threading.Thread(target=session, args=(network.urls[0], k)) for k in range(8)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        seen = look(network.urls[0])
    local, peer = seen["prefix"]["local"], seen["prefix"]["peer"]
    assert seen["requests"]["answered"] == 24 and local["reports"] > 0
    assert local["drift"] < 0.05 and peer["drift"] < 0.05 and not local["alarm"]


def test_drift_is_an_alarm_once_there_are_enough_reports() -> None:
    drift = Drift()
    for k in range(REPORTS):
        assert not drift.alarm, k
        drift.observe(100, 0, 200)
    assert drift.share == pytest.approx(0.5) and drift.alarm
    for _ in range(200):
        drift.observe(100, 100, 200)
    assert drift.share < MOST_DRIFT and not drift.alarm


def test_a_request_says_its_turn() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert prefix_of(CHAT, {"model": MODEL, "messages": said}).turn == 2
    assert prefix_of(CHAT, {"model": MODEL, "messages": said[:1]}).turn == 1
