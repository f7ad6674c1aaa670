"""A request is known by one id and one trace on its way to an engine, to a peer and back; what an engine says of its
limits reaches the user."""

import re
from typing import Any

import pytest
from stub_nodes import Net, Stub, busy, net, play

from wwwserve.serving.http.trace import NO_TRACE, trace_of, trace_of_peer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def ask(n: Net, **more: Any) -> tuple[int, bytes, dict[str, str]]:
    """As `Net.ask`, with names of headers in lower case."""
    status, body, headers = await n.ask(**more)
    return status, body, {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize("streamed", [False, True])
def test_the_user_s_id_and_trace_go_to_the_engine_and_back(streamed: bool) -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            sent = {"x-request-id": "job-7/a", "traceparent": PARENT, "tracestate": "vendor=1"}
            status, _, headers = await ask(n, headers=sent, stream=streamed)
            assert status == 200 and (headers["x-request-id"], headers["traceparent"]) == ("job-7/a", PARENT)
            assert sent.items() <= n.stubs[0].heads[0].items()

    play(scene)


def test_a_request_without_an_id_gets_one_and_so_does_one_that_is_refused() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            ids = []
            for model in ("stub", "stub", "other"):
                status, _, headers = await ask(n, model=model)
                assert status == (404 if model == "other" else 200)
                found = re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-00", headers["traceparent"])
                assert found is not None and headers["x-request-id"] == found[1]
                ids.append(found[1])
            assert len(set(ids)) == 3
            assert [each["x-request-id"] for each in n.stubs[0].heads] == ids[:2]

    play(scene)


def test_a_peer_s_engine_gets_the_trace_and_no_id_that_the_user_chose() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            sent = {"x-request-id": "job-7", "traceparent": PARENT, "tracestate": "vendor=1"}
            status, _, headers = await ask(n, headers=sent)
            assert status == 200 and headers["x-request-id"] == "job-7" and n.stubs[0].begun == 0
            there = n.stubs[1].heads[0]
            assert there["traceparent"] == PARENT[:-2] + "00"  # it is not for the user to have others trace it
            assert not {"x-request-id", "tracestate", "x-wwwserve-trace"} & there.keys()

    play(scene)


@pytest.mark.parametrize(
    "parent",
    [
        b"", b"01" + PARENT[2:].encode(), PARENT.upper().encode(), PARENT.encode() + b"-1", b"00-" + b"0" * 32
        + b"-b7ad6b7169203331-01", b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01", b"x" * 60_000,
        PARENT.encode() + b"\r\nx: y",
    ],
)  # fmt: skip
def test_what_is_no_trace_is_left_out(parent: bytes) -> None:
    trace = trace_of({b"traceparent": parent, b"tracestate": b"a=1", b"x-request-id": b"two words"})
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", trace.parent) and trace.state == ""
    assert trace.request_id == trace.parent[3:35]
    assert trace_of_peer({b"x-wwwserve-trace": parent}) == NO_TRACE


@pytest.mark.parametrize("code", ["200", "429", "400"])
def test_what_the_own_engine_says_of_its_limits_reaches_the_user(code: str) -> None:
    async def scene() -> None:
        says = {"X-RateLimit-Remaining-Requests": "3", "x-secret": "no", "set-cookie": "a=1"}
        stub = Stub(mode="well" if code == "200" else code, says=says)
        async with net(stub, deadlines_s=[0.5]) as n:
            status, _, headers = await ask(n)
            assert status == int(code) and headers["x-ratelimit-remaining-requests"] == "3"
            assert not {"x-secret", "set-cookie"} & headers.keys()
            assert headers.get("retry-after") == (None if code == "200" else "7")

    play(scene)


def test_what_it_says_of_its_limits_is_not_told_of_a_peer_s_answer() -> None:
    async def scene() -> None:
        says = {"x-ratelimit-remaining-requests": "0"}
        async with net(Stub(mode="429", says=says), Stub(says=says)) as n:
            status, _, headers = await ask(n)
            assert status == 200 and n.stubs[1].begun == 1
            assert not {"x-ratelimit-remaining-requests", "retry-after"} & headers.keys()

    play(scene)
