"""What a node knows of prefixes that it, or a peer, has computed."""

import random
from typing import Any

import pytest

from wwwserve.serving.delegation import remember
from wwwserve.serving.engine import prefix_index
from wwwserve.serving.engine.prefix_index import NO_PREFIX, NOTHING, PrefixIndex, prefix_of
from wwwserve.serving.http.sse import AnswerMeter, Usage
from wwwserve.serving.metrics import Metrics

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def index(kv_tokens: int = 1 << 20, **more: Any) -> tuple[PrefixIndex, Clock]:
    clock = Clock()
    return PrefixIndex(clock, kv_tokens, **more), clock


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """A conversation: the system's, the user's, the assistant's text, the user's, ..."""
    roles = ["system"] + ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "m", "messages": messages} | more


def test_a_turn_finds_the_turn_before_with_its_answer() -> None:
    found, clock = index()
    first, answer = chat("you are", "x" * 400), "y" * 300
    second = prefix_of(CHAT, chat("you are", "x" * 400, answer, "go on"))
    assert found.cached(second, 300) == NOTHING and second.turn == 2
    clock.now_s = 7.0
    found.remember("", prefix_of(CHAT, first), prompt=110, output=75, answer_bytes=300)
    clock.now_s = 20.0
    assert found.cached(second, 300) == (176, 7.0)  # 185 tokens, in whole blocks
    other = prefix_of(CHAT, chat("you are", "x" * 400, "y" * 299, "go on"))
    assert found.cached(other, 300) == (96, 7.0)  # another answer than was given
    assert found.cached(prefix_of(CHAT, first), 110) == (96, 7.0)  # of a whole prompt the last token is computed
    assert found.cached(prefix_of(CHAT, first), 113) == (96, 7.0)
    assert found.cached(second, 300, "peer") == NOTHING


def test_what_two_requests_have_in_common_is_found_by_the_bytes_of_its_text() -> None:
    found, _ = index()
    system = "s" * 8000
    found.remember("p", prefix_of(CHAT, chat(system, "a" * 2000)), prompt=2500)
    tokens = found.cached(prefix_of(CHAT, chat(system, "b" * 400)), 2100, "p").tokens
    assert tokens == pytest.approx(2000, rel=0.02) and tokens % 16 == 0
    halfway = found.cached(prefix_of(CHAT, chat(system[:4096] + "t" * 4000, "b")), 2100, "p").tokens
    assert halfway == pytest.approx(1024, rel=0.05)
    found.remember("p", prefix_of(CHAT, chat(system)), prompt=2200)  # now it is known
    assert found.cached(prefix_of(CHAT, chat(system, "b" * 400)), 3000, "p").tokens == 2192


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"}, {"tools": [{"type": "function"}]}, {"cache_salt": "s"}, {"chat_template": "t"},
        {"messages": [{"role": "user", "content": "you are"}]},
        {"messages": [{"role": "system", "content": "You are"}]},
        {"messages": [{"role": "system", "content": "you are", "name": "n"}]}, {"messages": []}, {"messages": 3},
        {"messages": [3]},
    ],
)  # fmt: skip
def test_what_is_rendered_otherwise_has_nothing_in_common(change: dict[str, Any]) -> None:
    found, _ = index()
    asked = chat("you are", "x" * 200)
    found.remember("", prefix_of(CHAT, asked), prompt=100)
    assert found.cached(prefix_of(CHAT, asked | {"temperature": 0.5, "stream": True}), 100).tokens == 96
    assert found.cached(prefix_of(CHAT, asked | change), 100) == NOTHING
    assert found.cached(prefix_of(CHAT, asked, "another's salt"), 100) == NOTHING


@pytest.mark.parametrize("prompt", ["w " * 4000, [7, 12345] * 1000])
def test_a_plain_prompt_is_a_chain_of_pieces(prompt: str | list[int]) -> None:
    found, _ = index()
    found.remember("", prefix_of(COMPLETION, {"model": "m", "prompt": prompt}), prompt=2000)
    longer = prompt + prompt[:300]  # type: ignore[operator]
    assert found.cached(prefix_of(COMPLETION, {"model": "m", "prompt": longer}), 2300).tokens >= 1900
    half = prompt[: len(prompt) // 2]
    other = half + ("z" * 4000 if isinstance(prompt, str) else [9] * 1000)  # type: ignore[operator]
    tokens = found.cached(prefix_of(COMPLETION, {"model": "m", "prompt": other}), 2000).tokens
    assert tokens == pytest.approx(1000, abs=80)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2]], [], None, 3, [True]])
def test_what_is_no_single_prompt_has_no_prefix(prompt: Any) -> None:
    assert prefix_of(COMPLETION, {"model": "m", "prompt": prompt}) == NO_PREFIX
    found, _ = index()
    found.remember("", NO_PREFIX, prompt=100)
    assert len(found) == 0 and found.cached(NO_PREFIX, 100) == NOTHING


def test_the_own_engine_holds_as_many_tokens_as_its_cache_and_the_end_of_the_oldest_goes_first() -> None:
    found, clock = index(kv_tokens=1000)
    texts = [f"{k}" * 2000 for k in range(3)]
    prompts = [prefix_of(COMPLETION, {"model": "m", "prompt": text}) for text in texts]
    for k, prompt in enumerate(prompts):
        clock.now_s = float(k)
        found.remember("", prompt, prompt=400, output=50)
    assert [found.cached(each, 400).tokens for each in prompts[1:]] == [384, 384]
    left = found.cached(prompts[0], 400).tokens
    assert 0 < left <= 112  # what the others leave of it
    clock.now_s = 9.0
    found.remember("", prompts[0], prompt=400)
    assert found.cached(prompts[0], 400) == (384, 9.0) and found.cached(prompts[1], 400).tokens < 200
    for each in prompts:
        found.remember("peer", each, prompt=400)  # whose cache is not known
    assert [found.cached(each, 400, "peer").tokens for each in prompts] == [384] * 3


def test_entries_are_bounded_and_age() -> None:
    found, clock = index(entries=100, kept_s=60.0)
    prompts = [prefix_of(COMPLETION, {"model": "m", "prompt": f"{k} " * 500}) for k in range(1000, 1200)]
    for k, prompt in enumerate(prompts):
        clock.now_s = float(k % 3)
        found.remember(f"p{k % 7}", prompt, prompt=100)
        assert len(found) <= 100
    assert found.cached(prompts[-1], 100, "p3").tokens == 96
    clock.now_s = 63.0
    assert found.cached(prompts[-1], 100, "p3") == NOTHING
    found.remember("p0", prompts[0], prompt=100)
    assert len(found) == len(prompts[0].hashes)
    found.remember("p1", prompts[0], prompt=100)
    found.forget("p0")
    assert found.cached(prompts[0], 100, "p0") == NOTHING and found.cached(prompts[0], 100, "p1").tokens == 96


def test_a_request_of_very_many_pieces_is_looked_at_as_far_as_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "MOST_PIECES", 50)
    found, _ = index()
    prefix = prefix_of(COMPLETION, {"model": "m", "prompt": "w" * 100_000})
    assert len(prefix.hashes) == 50
    found.remember("", prefix, prompt=25_000)
    assert 0 < found.cached(prefix, 25_000).tokens < 25_000


@pytest.mark.parametrize("seed", range(5))
def test_sessions_that_come_in_turns_are_found_as_a_cache_of_that_size_has_them(seed: int) -> None:
    """Against a cache of single tokens: the last recently used go, the end of a request first."""
    rng = random.Random(seed)
    found, clock = index(kv_tokens=2000, block_tokens=1)
    sessions: list[list[str]] = [["s" * 40] for _ in range(6)]
    kept: dict[tuple[str, ...], int] = {}  # by the texts up to a message, when it was used; a token for each byte
    hits = prompts = off = 0  # tokens
    for step in range(300):
        clock.now_s = float(step)
        session = rng.choice(sessions)
        session.append("".join(rng.choices("abc", k=rng.randint(20, 90))))
        asked = chat(*session)
        prompt = sum(map(len, session))
        prefix = prefix_of(CHAT, asked)
        expected = 0
        for k in range(1, len(session) + 1):
            if tuple(session[:k]) in kept:
                expected = min(sum(map(len, session[:k])), prompt - 1)
        got = found.cached(prefix, prompt).tokens
        hits += expected
        prompts += prompt
        off += abs(got - expected)
        answer = "".join(rng.choices("xyz", k=rng.randint(20, 90)))
        found.remember("", prefix, prompt, len(answer), len(answer))
        session.append(answer)
        for k in range(len(session), 0, -1):
            kept.pop(tuple(session[:k]), None)
            kept[tuple(session[:k])] = step
        while sum(len(texts[-1]) for texts in kept) > 2000:
            del kept[next(iter(kept))]
        if len(session) > 12:
            session[1:] = []
    assert 0.2 * prompts < hits < 0.8 * prompts and off < 0.05 * prompts


def test_a_request_is_looked_at_as_far_as_its_pieces_go_and_no_further() -> None:
    empty: list[dict[str, Any]] = [{}] * 300_000  # of which each would make what is hashed next longer
    assert len(prefix_of(CHAT, {"model": "m", "messages": empty}).hashes) == prefix_index.MOST_PIECES
    nested: Any = []
    for _ in range(2000):
        nested = [nested]
    assert prefix_of(CHAT, {"model": "m", "messages": [{"role": "user", "content": nested}]}).hashes


def test_a_prompt_that_no_engine_holds_changes_nothing() -> None:
    found, _ = index(kv_tokens=1000)
    kept = prefix_of(CHAT, chat("s", "x" * 2000))
    found.remember("", kept, prompt=500, output=10, answer_bytes=40)
    found.remember("", prefix_of(CHAT, chat("s", "y" * 9000)), prompt=1 << 24, told=False)
    assert found.cached(kept, 500).tokens > 400 and found.reuse_s() == float("inf")


def test_a_peers_word_on_lengths_is_bounded_by_the_own_estimate() -> None:
    """Else it would seem to have all of another chat that begins alike."""
    found, _ = index()
    meter = AnswerMeter()
    meter.usage = Usage(1 << 30, 1 << 30)
    remember(found, Metrics(), "peer", prefix_of(CHAT, chat("system", "x" * 400)), 150, meter, 0)
    other = prefix_of(CHAT, chat("system", "y" * 8000))
    assert found.cached(other, 2000, "peer").tokens < 300
    again = prefix_of(CHAT, chat("system", "x" * 400))
    assert 100 < found.cached(again, 2000, "peer").tokens <= 300


def test_what_a_place_did_not_compute_is_taken_back() -> None:
    found, clock = index()
    system, first, other = "s" * 4000, prefix_of(CHAT, chat("s" * 4000, "x" * 400)), chat("s" * 4000, "y" * 400)
    clock.now_s = 1.0
    added = found.remember("", first, prompt=1100, told=False)
    assert found.cached(first, 1100).tokens == 1088
    found.retract("", added)
    assert found.cached(first, 1100) == NOTHING and len(found) == 0
    added = found.remember("", first, prompt=1100, told=False)
    clock.now_s = 2.0
    found.remember("", prefix_of(CHAT, other), prompt=1100)  # has the system prompt in common with it
    found.retract("", added)
    assert found.cached(first, 1100).tokens == pytest.approx(1000, rel=0.02)
    assert found.cached(prefix_of(CHAT, chat(system, "y" * 400)), 1100).tokens == 1088


def test_of_a_peer_counts_what_it_used_since_it_evicts() -> None:
    found, clock = index()
    long, system = prefix_of(CHAT, chat("s" * 4000, "x" * 400)), prefix_of(CHAT, chat("s" * 4000))
    found.remember("p", long, prompt=1100)
    clock.now_s = 5.0
    found.remember("p", system, prompt=1000)
    assert found.cached(long, 1200, "p") == (1088, 0.0)
    assert found.cached(long, 1200, "p", since_s=3.0) == (992, 5.0)
    assert found.cached(long, 1200, "p", since_s=6.0) == NOTHING


def test_when_the_turn_before_was_answered_is_known_wherever_that_was() -> None:
    found, clock = index()
    clock.now_s = 4.0
    found.answered(prefix_of(CHAT, chat("sys", "one")))
    assert found.answered_s(prefix_of(CHAT, chat("sys", "one", "said", "two")), 9.0) == 4.0
    assert found.answered_s(prefix_of(CHAT, chat("sys", "one")), 9.0) == 9.0  # a first turn
    assert found.answered_s(prefix_of(CHAT, chat("sys", "other", "said", "two")), 9.0) == 9.0


def test_a_node_says_how_long_it_keeps_things_once_somebody_asks_for_one() -> None:
    found, clock = index(kv_tokens=2000)
    for k in range(5):
        clock.now_s += 1.0
        found.remember("", prefix_of(CHAT, chat(f"{k}" * 3000)), prompt=750)
    assert found.reuse_s() == float("inf")
    assert found.cached(prefix_of(CHAT, chat("4" * 3000, "more")), 900).tokens > 0
    assert 1.0 <= found.reuse_s() <= 3.0


def test_each_of_several_own_engines_has_a_cache_of_its_size() -> None:
    found, clock = index(kv_tokens=2000, own=("", "1"))
    first, second = (prefix_of(CHAT, chat(text * 3000)) for text in "ab")
    found.remember("", first, prompt=750)
    assert (found.cached(first, 900).tokens, found.cached(first, 900, "1")) == (736, NOTHING)
    for text in "cde":  # fills the other engine, and nothing of the first has to go
        clock.now_s += 1.0
        found.remember("1", prefix_of(CHAT, chat(text * 3000)), prompt=750)
    clock.now_s += 1.0
    assert found.cached(first, 900).tokens == 736
    assert found.cached(prefix_of(CHAT, chat("c" * 3000)), 900, "1").tokens < 736
    assert found.reuse_s() == 3.0  # of the one that keeps things least long
    found.remember("", second, prompt=750)
    found.forget("")
    assert found.cached(second, 900) == NOTHING and found.cached(prefix_of(CHAT, chat("e" * 3000)), 900, "1").tokens > 0
