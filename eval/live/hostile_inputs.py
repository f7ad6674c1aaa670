"""Inputs of seven kinds that a node should stand; a seed gives the same ones, but for keys and times."""

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import orjson

from wwwserve.agents.knowledge import AD_TARIFF, ADVERT_SIZE
from wwwserve.agents.protocol import MICRO, TARIFF_SIZE
from wwwserve.serving.delegation import PEER_PREFIX, PROMPT, TARIFF
from wwwserve.serving.duel.messages import ATTEST_PATH, JUDGE_PATH, Attest, Pair
from wwwserve.serving.http.keys import Identity, tagged
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH
from wwwserve.serving.ledger.exchange import Close, Open, Refilling, Telling, Vouching
from wwwserve.serving.ledger.statements import (
    Closing,
    Ended,
    Opening,
    Receipt,
    Refill,
    Served,
    Signed,
    State,
    Terms,
    Vouch,
    digest,
    link,
    sign,
)
from wwwserve.serving.ledger.verdicts import Answer, Case, DuelOpening, Party, Stake, Staked, committed
from wwwserve.serving.market import Promise
from wwwserve.serving.membership.heartbeat import BEAT_PATH, Advert, signed

MODEL = "qwen3-8b"
LIMIT = 10.0  # credits that the node and its peer give each other
CHAT = "/v1/chat/completions"
DUELISTS = Identity.generate(), Identity.generate()  # executors of duels that never were


class Made(NamedTuple):
    """What inputs are made with."""

    random: random.Random
    messages: Messages  # of a peer that the node knows
    stranger: Messages
    node: str  # its key
    run: int  # of the node


def value(r: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, most of it not what was expected."""
    kind = r.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return r.choice([None, True, False])
    if kind == 1:
        return r.choice([0, -1, 1, 2**31, 2**53, -(2**63), 2**64 - 1, r.randrange(10**6)])
    if kind == 2:
        return r.choice([0.0, -0.0, 1e-300, 1e300, -1.5, r.random()])
    if kind in (3, 4):
        return text(r)
    if kind == 5:
        return r.choice(["", "assistant", "user", MODEL, "stream", "\x00", "\u202e", "💥" * 5])
    if kind == 6:
        return [] if r.random() < 0.5 else {}
    if kind == 7:
        return [value(r, depth + 1) for _ in range(r.randrange(4))]
    return {text(r): value(r, depth + 1) for _ in range(r.randrange(4))}


def text(r: random.Random) -> str:
    """Some characters of any sort."""
    sorts = ((0, 32), (32, 127), (127, 0xD7FF))
    return "".join(chr(r.randrange(*r.choice(sorts))) for _ in range(r.randrange(12)))


def mutated(r: random.Random, content: bytes) -> bytes:
    """Some bytes with some mistakes."""
    parts = bytearray(content)
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(len(parts) + 1)
        match r.randrange(6):
            case 0:
                parts[at : at + 1] = bytes([r.randrange(256)])
            case 1:
                del parts[at : at + r.randrange(1, 40)]
            case 2:
                parts[at:at] = r.randbytes(r.randrange(1, 20))
            case 3:
                parts[at:at] = parts[at : at + r.randrange(1, 60)]
            case 4:
                parts[at:at] = r.choice([b"\r\n", b"\x00", b"\xff\xfe", b"%00", b"%s%n", b"{" * 50, b"-1", b"9" * 30])
            case _:
                parts = parts[: max(1, at)]
    return bytes(parts)


def asking() -> dict[str, Any]:
    """A request that is as it should be."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "stream": False}


def body(r: random.Random) -> bytes:
    """What a user may send."""
    asked = asking()
    match r.randrange(8):
        case 0:
            return mutated(r, orjson.dumps(asked))
        case 1:
            return r.randbytes(r.randrange(200))
        case 2:
            return r.choice([b"[", b'{"a":', b'{"messages":[']) * r.choice([10, 1000, 100_000])
        case 3:
            return b'{"model": "' + MODEL.encode() + b'", "max_tokens": 1, "prompt": "\xff\xfe\xed\xa0\x80"}'
        case 4:
            return orjson.dumps(value(r))
        case 5:
            return b"[" * 2000 + b"]" * 2000
        case _:
            for key in r.sample([*asked, "prompt", "n", "stop", "stream_options", "tools", text(r)], r.randrange(1, 4)):
                asked[key] = value(r)
            if asked.get("model") == MODEL and not isinstance(asked.get("max_tokens"), int):
                asked["max_tokens"] = 1  # else a good request would run for long
            asked["max_tokens"] = 1 if asked["max_tokens"] not in (0, -1) else asked["max_tokens"]
            return orjson.dumps(asked)


# Requests.


def http(path: str, content: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """A request that is one."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def bytes_that_are_no_http(m: Made) -> bytes:
    r = m.random
    if r.random() < 0.3:
        return r.randbytes(r.randrange(1, 300))
    return mutated(r, http(CHAT, body(r)))


def requests_that_nearly_are(m: Made) -> bytes:
    r = m.random
    path = r.choice([CHAT, "/v1/completions", "/health", "/metrics", "/network", "/v1/models", BEAT_PATH, "/peer", "*",
                     "/../../etc/passwd", "/%00", "/%ff", "/" + "a" * 5000, "http://x:99999/", "//",
                     "/v1/" + "é"])  # fmt: skip
    method = r.choice(["GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "TRACE", "PATCH"])
    content = body(r)[:2000]
    headers = [
        b"content-length: %d" % len(content),
        r.choice([b"content-length: -1", b"content-length: 5", b"content-length: 99999999999999999999", b"x: y",
                  b"transfer-encoding: chunked\r\nx: z",
                  b"transfer-encoding: chunked", b"transfer-encoding: x", b"content-length: 1e3",
                  b"expect: 100-continue",
                  b"connection: upgrade\r\nupgrade: websocket", b"upgrade: h2c\r\nconnection: upgrade"]),
        r.choice([b"x-slo-class: " + r.randbytes(8).replace(b"\n", b""), b"x: " + b"y" * r.choice([10, 70_000]),
                  b"\xff\xfe: 1", b"authorization: Bearer \xff", b"a:b\r\n" * 300 + b"c: d", b": empty"]),
    ]  # fmt: skip
    chosen = r.sample(headers, r.randrange(4))
    head = f"{method} {path} HTTP/{r.choice(['1.1', '1.1', '1.0', '2.0', '9'])}".encode()
    return b"\r\n".join([head, b"host: a", *chosen, b"", b""]) + content


def bodies_of_users(m: Made) -> bytes:
    return http(m.random.choice([CHAT, "/v1/completions"]), body(m.random))


def signatures_that_nearly_are(m: Made) -> bytes:
    r, path, content = m.random, PEER_PREFIX + CHAT, b'{"model": "%b", "max_tokens": 1}' % MODEL.encode()
    terms = {PROMPT: "12", TARIFF: "1 1 1"}
    signer = m.stranger if r.random() < 0.1 else m.messages
    parts = signer.sign(m.node, m.run, path, terms, content).split(" ")
    k = r.randrange(len(parts))
    match r.randrange(5):
        case 0:
            parts[k] = mutated(r, parts[k].encode()).decode("latin-1")
        case 1:
            parts[k] = str(r.choice([0, -1, 2**64, 10**15, "", "é", "A" * 43, "A" * 88]))
        case 2:
            del parts[k]
        case 3:
            terms[PROMPT] = "13"
        case _:
            content += b" "
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**terms, SIGNATURE: " ".join(parts)}.items())
    head = f"POST {path} HTTP/1.1\r\ncontent-length: {len(content)}\r\n{lines}\r\n"
    return head.encode("latin-1", "replace") + content


def signed_requests(m: Made) -> bytes:
    r = m.random
    path = PEER_PREFIX + r.choice([CHAT, "/v1/completions"])
    content = orjson.dumps(asking()) if r.random() < 0.5 else body(r)  # else few come to what is paid
    terms = {PROMPT: r.choice(["1", "0", "-1", "12", "1e3", "9" * 400, "x", "", str(2**24)])}
    terms[TARIFF] = r.choice(["1 1 1", "1 1 1", "1 1 1", "", "1", "-1 1 1", "1 1 " + "9" * 20, "x 1 1", "1 1 1 1"])
    if r.random() < 0.5:
        terms[ESCROW] = r.choice(["v3 1 1", "1 1 1", "v3 0 -1", "v9 1 1", "v3 " + "9" * 17 + " 1", "x"])
    if r.random() < 0.3:
        terms["x-wwwserve-" + "".join(r.choices("abc-", k=5))] = "".join(r.choices("abc =;", k=9)).strip()
    sealed = m.messages.sign(m.node, m.run, path, terms, content)
    return http(path, content, {**terms, SIGNATURE: sealed})


def payment_and_duels(m: Made) -> bytes:
    r = m.random
    path = r.choice([LEDGER_PATH, LEDGER_PATH, JUDGE_PATH, ATTEST_PATH])
    message = payment(m) if path == LEDGER_PATH else duel(m, path)
    for _ in range(r.choice([0, 1, 1, 2])):
        spoil(r, message)
    content = orjson.dumps(message)
    if r.random() < 0.2:
        content = r.choice([mutated(r, content), b"[" * 9000, b'{"voucher":' * 9000, orjson.dumps(value(r))])
    return http(path, content, {SIGNATURE: m.messages.sign(m.node, m.run, path, {}, content)})


def payment(m: Made) -> Any:
    """What a peer may tell of payment: signed as it should be, and with numbers of any sort."""
    r, me = m.random, m.messages.identity
    number = lambda: r.choice([0, 1, 1, 2, 5, -1, 2**40, 2**63 - 1])  # noqa: E731
    a, b = sorted((me.name, m.node))
    opening = Opening(a, b, round(LIMIT * MICRO), round(LIMIT * MICRO), "limits")
    head, receipts = opening.digest(), []
    for _ in range(r.randrange(1, 4)):
        came = r.choice(["whole", "part", "nothing"])
        terms = Terms((number(), number(), number()), number(), number())
        served = Served("", number(), number(), number(), number(), came)
        promise = r.choice([None, Promise(0.1, 0.01), Promise(-1.0, 1e308)])
        receipts.append(Receipt(number(), digest(b""), terms, promise, served, number()))
        head = link(head, receipts[-1])
    total = sum(each.due for each in receipts) % 2**63
    state = State(opening.digest(), me.name, m.node, len(receipts), r.choice([total, number()]), head)
    stake = Stake(me.name, number(), number())
    staked = msgspec.json.encode(Staked(stake, sign(me, "stake", stake))).decode()
    vouch = Vouch(Signed(state, sign(me, "voucher", state)), r.choice([1, 1, number()]), tuple(receipts))
    other = State(opening.digest(), m.node, me.name, 0, 0, opening.digest())
    chains = sorted((state, r.choice([other, state])), key=lambda each: each.payer)
    closing = Closing(opening.digest(), number(), r.random() < 0.3, chains[0], chains[1], number())
    ended = Ended(closing, *r.choice([(sign(me, "closing", closing), ""), ("", sign(me, "closing", closing))]))
    refill = Refill(opening.digest(), number(), number(), number(), "limits")
    messages = [
        Open(opening, sign(me, "opening", opening)), Vouching(vouch), Vouching(vouch), Close(ended),
        Refilling(refill, sign(me, "refill", refill)),
    ]  # fmt: skip
    return msgspec.to_builtins(r.choice([*messages, Telling((staked, text(r)))]))


def duel(m: Made, path: str) -> Any:
    """What a peer may ask an executor to sign, or a judge to judge."""
    r = m.random
    request = r.choice(["{}", "[" * 9000, '{"a":' * 9000, "\x00"])
    executors = sorted(DUELISTS, key=lambda each: each.name)
    a, b = (Party(each.name, committed(each.name)) for each in executors)
    secret, origin = text(r), m.messages.identity
    opening = DuelOpening(origin.name, "", digest(request.encode()), a, b, committed(secret), None).signed(origin)
    if path == ATTEST_PATH:
        return msgspec.to_builtins(Attest(opening, digest(b"{}")))
    answers = {each.name: body for each, body in zip(executors, ("{}", "[" * 9000), strict=True)}
    one, other = (
        Answer(each.name, opening.name(), digest(answers[each.name].encode()), each.name, None).signed(each)
        for each in executors
    )
    case = Case(opening, secret, r.choice([1, 0, 2**62]), one, other)
    return msgspec.to_builtins(Pair(case, CHAT, r.random() < 0.5, request, *answers.values()))


def spoil(r: random.Random, tree: Any) -> None:
    """Put something else in some place of a tree of mappings and lists."""
    while isinstance(tree, dict | list) and tree:
        at: Any = r.choice(list(tree)) if isinstance(tree, dict) else r.randrange(len(tree))
        if not isinstance(tree[at], dict | list) or not tree[at] or r.random() < 0.2:
            tree[at] = value(r)
            return
        tree = tree[at]


def adverts(m: Made) -> bytes:
    r, identity = m.random, m.messages.identity
    load = [r.choice([1.0, 5.0, 1e4]) for _ in range(ADVERT_SIZE)]  # as may be said of every column but prices
    load[AD_TARIFF : AD_TARIFF + TARIFF_SIZE] = [r.choice([0.5, 5.0]), 0.5, r.choice([0.0, 1e3])]
    if r.random() < 0.5:
        load[r.randrange(ADVERT_SIZE)] = r.choice([0.0, -1.0, 1e308, 1e-308])
    url = "http://127.0.0.1:9" if r.random() < 0.7 else r.choice(["file:///x", "http://[", text(r)])
    advert = Advert(
        name=identity.name, label=text(r) if r.random() < 0.3 else "n", url=url,
        serves=tuple(text(r) for _ in range(r.randrange(3))), run=r.choice([0, -1, 2**62]), number=r.randrange(9),
        load=tuple(load), age_s=r.choice([0.0, -1.0, 1e9]),
        sent_us=round((time.time() + r.choice([0, 0, 100, -100])) * 1e6),
    )  # fmt: skip
    match r.randrange(4):
        case 0:
            return http(BEAT_PATH, signed(identity, advert))
        case 1:
            return http(BEAT_PATH, mutated(r, signed(identity, advert)))
        case 2:
            content = mutated(r, msgspec.json.encode(advert))
        case _:
            content = r.choice([b"[" * 9000, orjson.dumps(value(r)), r.randbytes(300), b""])
    return http(BEAT_PATH, identity.name.encode() + identity.sign(tagged("advert", content)) + content)


KINDS: tuple[Callable[[Made], bytes], ...] = (
    bytes_that_are_no_http, requests_that_nearly_are, bodies_of_users, signatures_that_nearly_are, signed_requests,
    payment_and_duels, adverts,
)  # fmt: skip
