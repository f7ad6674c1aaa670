"""What comes from outside is read by one module, which takes what is as it should be and nothing else."""

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from duel_cases import staked

from wwwserve.serving import boundary, config
from wwwserve.serving.boundary import MOST_WEIGHT, SCANNED_BYTES, BoundaryError
from wwwserve.serving.http.keys import Identity, SignatureError, signature_of
from wwwserve.serving.http.quotas import BURST, FORGED_PER_S, MOST_NAMES, Quota, Quotas, Turns
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import StatementError
from wwwserve.serving.ledger.verdicts import Answer, verify

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


# JSON.

HEAVY = {
    "lists": b"[" + b"[]," * 70_000 + b"[]]", "objects": b"[" + b"{}," * 70_000 + b"{}]",
    "numbers": b"[" + b"1," * 400_000 + b"1]", "keys": b"{" + b'"a":1,' * 70_000 + b'"a":1}',
}  # fmt: skip


@pytest.mark.parametrize("kind", HEAVY)
def test_a_body_of_so_many_values_that_a_node_would_stand_still_is_not_read(kind: str) -> None:
    with pytest.raises(BoundaryError, match="too many values"):
        boundary.object_of(b'{"messages":' + HEAVY[kind] + b"}")
    text = json.dumps({"messages": HEAVY[kind].decode()})
    assert boundary.object_of(text.encode())["messages"] == HEAVY[kind].decode()  # as text it is one


def test_values_are_counted_whatever_is_in_strings() -> None:
    dice = random.Random(4)

    def weight_of(value: Any) -> int:
        if isinstance(value, list):
            return 8 + sum(map(weight_of, value)) + max(0, len(value) - 1)
        if isinstance(value, dict):
            return 8 + sum(8 + weight_of(each) for each in value.values()) + max(0, len(value) - 1)
        return 0

    def made(depth: int) -> Any:
        kind = dice.randrange(4 if depth < 4 else 2)
        if kind < 2:
            return [dice.random(), "".join(dice.choices('a"\\[]{},:é\n', k=dice.randrange(8)))][kind]
        if kind == 2:
            return [made(depth + 1) for _ in range(dice.randrange(5))]
        return {"".join(dice.choices('k"\\,{', k=4)): made(depth + 1) for _ in range(dice.randrange(5))}

    for _ in range(500):
        value = made(0)
        assert boundary._weight(np.frombuffer(orjson.dumps(value), np.uint8)) == weight_of(value)


def test_prompts_of_tokens_as_long_as_models_take_are_read() -> None:
    prompt = list(range(262_144))
    body = orjson.dumps({"model": "m", "prompt": prompt})
    assert len(body) > SCANNED_BYTES and boundary.object_of(body)["prompt"] == prompt
    assert boundary.prompt_size({"prompt": prompt}) == (0, 262_144)


def test_an_answer_that_is_heavy_with_probabilities_is_metered_and_another_heavy_one_is_none() -> None:
    choice = {"message": {"role": "assistant", "content": "word " * 9}, "logprobs": {"content": [{}] * 100_000}}
    body = orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 9}})
    meter = AnswerMeter()
    meter.whole(body)
    assert meter.tokens == 9 and meter.usage is not None and meter.usage.prompt == 7 and meter.text_bytes == 45
    for heavy in ({"choices": [{"message": {"content": [[]] * 100_000}}]}, {"choices": [{}] * 100_000}):
        with pytest.raises(StreamError):
            AnswerMeter().whole(orjson.dumps(heavy))
    with pytest.raises(BoundaryError):
        boundary.loads(b"[" + b"[]," * (MOST_WEIGHT // 8) + b"[]]")


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b'{"a":NaN}', b"\xff", b"[" * 5000, b'{"a":1}x'])
def test_what_is_no_object_is_none(body: bytes) -> None:
    with pytest.raises(BoundaryError):
        boundary.object_of(body)


# What one node may ask another one's engine for.


@pytest.mark.parametrize("change", [
    {"priority": -100}, {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, {"prompt_embeds": "gASV"},
    {"lora_path": "/"}, {"chat_template": "{{x}}"}, {"documents": [{}]}, {"guided_regex": "(a+)+"}, {"n_": 1},
    {"mm_processor_kwargs": {}}, {"logits_processors": ["os.system"]}, {"vllm_xargs": {}}, {"request_id": "x"},
    {"best_of": 9}, {"use_beam_search": True}, {"truncate_prompt_tokens": 1},
    {"chat_template_kwargs": {"tokenize": "x" * 9}}, {"chat_template_kwargs": "x"},
    {"response_format": {"type": "structural_tag"}}, {"response_format": "json"},
    {"prompt_logprobs": -1}, {"top_logprobs": 10**6}, {"logprobs": "all"}, {"prompt": ["x"] * 129},
    *[{"messages": [{"role": "user", "content": [part]}]} for part in (
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": "http://x"}, {"image_url": "http://x"},
        {"type": "text", "text": "x", "image_url": "http://x"}, {"type": "video_url", "video_url": {"url": "http://x"}},
        {"type": "file", "file": {"file_id": "x"}}, {"type": "text", "text": {"image_url": "http://x"}}, 3,
        {"type": ["text"], "text": "x"},
    )],
])  # fmt: skip
def test_what_is_more_than_a_prompt_and_how_to_answer_it_stays_at_home(change: dict[str, Any]) -> None:
    with pytest.raises(BoundaryError):
        boundary.check_shareable(CHAT | change)


@pytest.mark.parametrize("change", [
    {}, {"temperature": 0.7, "top_p": 1, "seed": 3, "stop": ["a"], "max_tokens": 9, "stream": True},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"return_token_ids": True}, {"priority": None},
    {"prompt_cache_key": "x", "safety_identifier": "x", "service_tier": "auto", "verbosity": "low"},
    {"logprobs": True, "top_logprobs": 20}, {"prompt": [7] * 1000}, {"prompt": [[7]] * 128},
    *[{"messages": [{"role": "user", "content": [part]}]} for part in (
        "x", {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    )],
])  # fmt: skip
def test_what_users_ask_for_goes_to_peers(change: dict[str, Any]) -> None:
    boundary.check_shareable(CHAT | change)


# Headers and lines.


@pytest.mark.parametrize("said", [
    (b"", 1), (b"0", 0), (b"9", 10), (b"1e3", 1), (b"-1", 0), (b"1_0", 1), ("٣".encode(), 1), (b"9" * 30, 1),
])  # fmt: skip
def test_prompt_tokens_that_cannot_be(said: tuple[bytes, int]) -> None:
    with pytest.raises(BoundaryError):
        boundary.prompt_tokens(*said)


@pytest.mark.parametrize("said", ["nan", "inf", "-1", "1_0", "1e9", "1e400", " 1", "", "0x1", "١"])
def test_promises_that_are_none(said: str) -> None:
    with pytest.raises(BoundaryError):
        boundary.promise_of(said, "0.1")
    with pytest.raises(BoundaryError):
        boundary.promise_of("0.1", said)


def test_promises_as_nodes_write_them_are_read() -> None:
    for seconds in (0.0, 1e-9, 0.123456789, 12.0, 1e5):
        promise = boundary.Promise(seconds, seconds)
        assert boundary.promise_of(*promise.text()) == pytest.approx(promise, rel=1e-8)


@pytest.mark.parametrize("line", [
    {"status": 204, "type": "text/plain"}, {"status": 304, "type": "application/json"}, {"status": 101, "type": "a/b"},
    {"status": 307, "type": "text/plain"}, {"status": 200, "type": "text/html"}, {"status": 200, "type": "image/svg"},
    {"status": 200, "type": "text/plain\r\nset-cookie: a=b"}, {"status": 200.0, "type": "text/plain"},
])  # fmt: skip
def test_an_answers_head_that_a_client_would_take_for_something_else_is_none(line: dict[str, Any]) -> None:
    with pytest.raises(BoundaryError):
        boundary.head_line(orjson.dumps(line))
    for kind in ("application/json", "text/event-stream; charset=utf-8", "text/plain;charset=utf-8"):
        assert boundary.head_line(orjson.dumps({"status": 400, "type": kind})) == (400, kind)


@pytest.mark.parametrize(
    ("said", "is_on"), [(b"1", True), (b"TRUE", True), (b"0", False), (b"", False), (b"yes", None)]
)
def test_flags(said: bytes, is_on: bool | None) -> None:
    if is_on is None:
        with pytest.raises(BoundaryError):
            boundary.flag_of(said)
    else:
        assert boundary.flag_of(said) is is_on


# Addresses.


@pytest.mark.parametrize("url", [
    "http://inner/admin?x=", "http://inner/admin#", "http://user:pw@inner", "http://a/../b", "http://a//b",
    "http://a/%2e%2e", "http://a\\b", "ftp://a", "http://", "http://a:999999", "http://a b", "http://[::1", "//a",
    "http://" + "a" * 600,
])  # fmt: skip
def test_an_address_with_more_than_a_host_a_port_and_a_path_is_none(url: str) -> None:
    with pytest.raises(BoundaryError):
        boundary.check_url(url)
    with pytest.raises(config.ConfigError, match="url must be"):
        config.parse(
            {"name": "n", "key": "k", "engine": {"url": "http://h", "profile": {"kind": "catalogue", "gpu": "rtx-4090",
             "model": "qwen3-8b"}}, "peers": [{"key": Identity.generate().name, "url": url}]}, "t",
        )  # fmt: skip


@pytest.mark.parametrize("host", [
    "localhost", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "[fe80::1]", "0.0.0.0",
    "2130706433", "0x7f000001", "127.1", "a.localhost", "localhost.",
])  # fmt: skip
def test_a_node_elsewhere_is_at_no_address_that_is_every_machines_own(host: str) -> None:
    for url in (f"http://{host}", f"https://{host}:8000/x"):
        with pytest.raises(BoundaryError):
            boundary.check_url(url, "http://10.0.0.1:9000")
        boundary.check_url(url, "http://127.0.0.1:9000")
    for good in ("http://10.0.0.2:9000", "https://n.example.org/node", "http://[2001:db8::1]:9000/"):
        boundary.check_url(good, "http://10.0.0.1:9000")


# One spelling.


def spellings(signature: str) -> list[str]:
    """Other texts that lenient decoders take for the same bytes."""
    last = signature[85]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = alphabet[alphabet.index(last) ^ 1]
    return [
        signature[:85] + other + "==", signature + "=", signature + "\n", signature[:40] + "!" + signature[40:],
        signature[:-2] + "===", signature[:-2],
    ]  # fmt: skip


def test_a_signature_has_one_spelling() -> None:
    identity = Identity.generate()
    stated = staked(identity, 5)
    verify(stated)
    for other in spellings(stated.signature):
        with pytest.raises(SignatureError):
            signature_of(other)
        with pytest.raises(StatementError):
            verify(msgspec.structs.replace(stated, signature=other))
    answer = Answer(identity.name, "d", "a", "s", None).signed(identity)
    assert signature_of(answer.signature) == signature_of(answer.signature.encode())


def test_what_was_heard_is_known_before_its_signatures_are_checked() -> None:
    identity = Identity.generate()
    known = Stakes({identity.name: 100})
    said = [staked(identity, number, number) for number in (1, 2)]
    assert all(known.is_news(each) and known.heard(each) for each in said)
    assert not any(map(known.is_news, said))
    assert known.is_news(staked(identity, 3, 2))  # another one of the same number


# Quotas.


def test_a_peer_has_so_much_in_a_second_and_what_is_forged_in_its_name_takes_none_of_it() -> None:
    now = [0.0]
    quotas = Quotas(1000.0, 1 << 20, lambda: now[0])
    for _ in range(BURST):
        quotas.admit("p", "1.1.1.1")
        quotas.signed.spend("p")
    with pytest.raises(ValueError, match="more than this node looks at") as refused:
        quotas.admit("p", "1.1.1.1")
    assert getattr(refused.value, "kind") == "crowded"  # noqa: B009
    quotas.admit("q", "1.1.1.1")
    now[0] += 0.01
    for _ in range(10):
        quotas.admit("p", "1.1.1.1")
        quotas.signed.spend("p")
    with pytest.raises(ValueError):
        quotas.admit("p", "1.1.1.1")
    for _ in range(int(FORGED_PER_S)):
        quotas.forged.spend("6.6.6.6")
    with pytest.raises(ValueError, match="forged"):
        quotas.admit("q", "6.6.6.6")
    quotas.admit("q", "1.1.1.1")


def test_quotas_remember_a_bounded_number_of_names() -> None:
    quota = Quota(1.0, 2.0, time.monotonic)
    for k in range(3 * MOST_NAMES):
        quota.spend(str(k))
    assert len(quota._left) == MOST_NAMES and quota.left("new") == 2.0


def test_bytes_that_are_coming_are_bounded_in_all_and_for_each() -> None:
    quotas = Quotas(1.0, 400, time.monotonic).coming
    assert quotas.came("a", 100) and not quotas.came("a", 1)
    assert all(quotas.came(who, 100) for who in "bcd") and not quotas.came("e", 1)
    quotas.gone("a", 60)
    assert quotas.came("e", 60) and not quotas.came("b", 1)
    for who, size in (("a", 40), ("b", 100), ("c", 100), ("d", 100), ("e", 60)):
        quotas.gone(who, size)
    assert quotas.used == 0 and not quotas._used


def test_one_turn_of_the_loop_takes_so_many_in_the_order_in_which_they_came() -> None:
    async def scene() -> None:
        turns, taken, loop = Turns(3), list[tuple[int, int]](), asyncio.get_running_loop()
        number = 0

        def count() -> None:
            nonlocal number
            number += 1
            loop.call_soon(count)

        async def one(k: int) -> None:
            await turns.take()
            taken.append((k, number))

        loop.call_soon(count)
        tasks = [asyncio.create_task(one(k)) for k in range(20)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [k for k, _ in taken] == [k for k in range(20) if k != 5]
        assert max(Counter(turn for _, turn in taken).values()) == 3
        await asyncio.sleep(0)
        await asyncio.wait_for(turns.take(), 1.0)

    asyncio.run(scene())
