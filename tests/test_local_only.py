"""Where prompts go is for their users and the operator to say."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from stub_nodes import GOOD, Stub, busy, net, play

from wwwserve.agents.knowledge import ADVERT_SIZE
from wwwserve.envs.scenario import load
from wwwserve.envs.state import plan
from wwwserve.eval.live.networks import Live
from wwwserve.eval.live.users import Tokens
from wwwserve.serving.boundary import check_shareable
from wwwserve.serving.config import parse
from wwwserve.serving.delegation import _DuelPeers

OUTPUT = {"median": 5.0, "sigma": 0.1, "max": 20}
CLASSES = {
    "chat": {"deadline_s": 30.0, "output": OUTPUT},
    "secret": {"deadline_s": 30.0, "output": OUTPUT, "local_only": True},
}


def test_a_request_stays_at_home_by_its_header_or_its_class() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(), classes=CLASSES) as n:
            for headers, at in (
                ({}, 1), ({"x-wwwserve-local-only": "1"}, 0), ({"x-wwwserve-local-only": "true"}, 0),
                ({"x-slo-class": "secret"}, 0), ({"x-slo-class": "chat", "x-wwwserve-local-only": "0"}, 1),
            ):  # fmt: skip
                status, body, _ = await n.ask(headers=headers)
                assert status == 200 and json.loads(body)["from"] == n.stubs[at].url, headers
            status, body, _ = await n.ask(headers={"x-wwwserve-local-only": "please"})
            assert status == 400 and b"x-wwwserve-local-only" in body
            n.stubs[0].mode = "full"
            assert (await n.ask(headers={"x-slo-class": "secret"}, max_tokens=1))[0] == 503
            assert len(n.stubs[1].bodies) == 2
            async with n.session.get(n.urls[0] + "/metrics") as response:
                assert "wwwserve_requests_kept_total 4.0" in await response.text()

    play(scene)


def test_users_of_a_trial_send_nothing_that_keeps_their_requests_at_home() -> None:
    """Once they asked for the tokens of answers, and no session on real vLLM was handed over."""
    planned = plan(load("live/sessions"), 0)
    users = Tokens(Live([], {}, emulated=False), planned, cast(Any, None), stream=True, turn=0, told=False)
    assert users.options["return_token_ids"]
    check_shareable({"model": "m", "prompt": [1], "stream": True} | users.lengths.of(0) | users.options)


@pytest.mark.parametrize(
    ("trust", "judges"), [({}, {"p", "q"}), ({"trust": ["q"]}, {"q"}), ({"trust": []}, set[str]())]
)  # fmt: skip
def test_trusted_peers_alone_are_asked_to_judge(trust: dict[str, Any], judges: set[str]) -> None:
    adverts = {name: SimpleNamespace(serves=("m",), load=np.full(ADVERT_SIZE, 2.0)) for name in ("p", "q")}
    settings = msgspec.structs.replace(parse(GOOD, "node.yaml"), **{k: tuple(v) for k, v in trust.items()})
    delegation: Any = SimpleNamespace(accounts=None, config=settings, client=SimpleNamespace(adverts=adverts))
    peers = _DuelPeers(delegation)
    assert set(peers.electors("m")) == judges and not peers.electors("another model")


@pytest.mark.parametrize("trusted", [0, 1, 2])
def test_prompts_go_to_trusted_peers_alone_and_others_are_served_all_the_same(trusted: int) -> None:
    """Node 0 trusts node 1, node 2 or nobody; both would answer sooner than it."""

    async def scene() -> None:
        async with net(busy(), Stub(), Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            n.configs[0] |= {"trust": [n.keys[trusted].name] if trusted else []}
            await n.start(0)

            async def there() -> bool:
                return sum(peer["there"] for peer in (await n.see())["peers"]) == 2

            await n.until(there)
            for _ in range(4):
                assert json.loads((await n.ask())[1])["from"] == n.stubs[trusted].url
            n.stubs[0].waiting, n.stubs[1].waiting, n.stubs[2].waiting = 0, 200, 200

            async def comes_here() -> bool:
                return bool(json.loads((await n.ask(1))[1])["from"] == n.stubs[0].url)

            await n.until(comes_here)  # from a peer that is not trusted

    play(scene)
