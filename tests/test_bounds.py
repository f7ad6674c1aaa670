"""Numbers from outside are bounded where they come in, and what is told of stake arrives whatever its size."""

import asyncio
from typing import Any

import msgspec
import pytest
from stub_nodes import GOOD

from wwwserve.agents.knowledge import ADVERT_SIZE
from wwwserve.serving import config
from wwwserve.serving.duel.messages import Attest, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.ledger import accounts as accounts_module
from wwwserve.serving.ledger import channel, channel_ledger, statements, verdicts
from wwwserve.serving.ledger.accounts import Accounts, NotNow, NotTaken
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.exchange import Telling
from wwwserve.serving.ledger.journal import MemoryJournal
from wwwserve.serving.ledger.statements import Receipt, Served, Signed, State, StatementError, Terms, Vouch, decode
from wwwserve.serving.market import MOST_INT, Promise
from wwwserve.serving.membership import heartbeat
from wwwserve.serving.membership.heartbeat import Advert

BEYOND = 2**63, 2**64 - 1, 2**64, 2**70
STATED = Vouch(
    Signed(State("c", "p", "q", 1, 5, "h"), "s"), 1,
    (Receipt(1, "r", Terms((1, 1, 1), 10, 5), Promise(1.0, 0.1), Served("a", 1, 0, 1, 1, "whole"), 5),),
)  # fmt: skip


def changed(tree: Any, at: tuple[str | int, ...], value: int) -> Any:
    tree = msgspec.to_builtins(tree)
    inner = tree = list(tree) if isinstance(tree, tuple) else tree
    for key in at[:-1]:
        if isinstance(inner[key], tuple):
            inner[key] = list(inner[key])
        inner = inner[key]
    inner[at[-1]] = value
    return tree


@pytest.mark.parametrize("value", [*BEYOND, -1])
@pytest.mark.parametrize(
    "at",
    [
        ("first",), ("voucher", "state", "number"), ("voucher", "state", "total"), ("receipts", 0, "id"),
        ("receipts", 0, "due"), ("receipts", 0, "terms", "prompt"), ("receipts", 0, "terms", "amount"),
        ("receipts", 0, "terms", "tariff", 2), ("receipts", 0, "served", "tokens"),
        ("receipts", 0, "served", "took_ms"),
    ],
)  # fmt: skip
def test_a_number_beyond_63_bits_in_what_is_stated_is_refused_with_its_place(
    at: tuple[str | int, ...], value: int
) -> None:
    content = msgspec.json.encode(changed(STATED, at, value))
    place = "".join(r"\[\S+\]" if isinstance(each, int) else rf"\.{each}" for each in at)
    bound = ">= 0" if value < 0 else f"<= {MOST_INT}"
    with pytest.raises(StatementError, match=rf"{bound} - at `\${place}`"):
        decode(content, Vouch)
    assert decode(msgspec.json.encode(STATED), Vouch) == STATED


def structs(module: Any) -> list[type[msgspec.Struct]]:
    found = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, msgspec.Struct))
    return [each for each in found if each.__module__ == module.__name__ and each is not channel.Channel]


@pytest.mark.parametrize(
    "struct",
    [each for module in (statements, verdicts, channel, channel_ledger, heartbeat) for each in structs(module)]
    + [Attest, Pair],
)
def test_no_whole_number_of_what_comes_from_outside_is_without_a_bound(struct: type[msgspec.Struct]) -> None:
    """Where the type of a field has an integer, its schema has a bound."""
    schema = msgspec.json.schema(struct)

    def unbounded(tree: Any) -> bool:
        if isinstance(tree, dict):
            if tree.get("type") == "integer" and not ("maximum" in tree and "minimum" in tree):
                return True
            return any(map(unbounded, tree.values()))
        return isinstance(tree, list) and any(map(unbounded, tree))

    assert not unbounded(schema)


@pytest.mark.parametrize("field", ["run", "number", "sent_us"])
@pytest.mark.parametrize("value", BEYOND)
def test_an_advert_with_too_large_a_number_is_refused(field: str, value: int) -> None:
    advert = Advert("n", "n", "http://h:1", ("m",), 1, 1, (1.0,) * ADVERT_SIZE, 0.0)
    with pytest.raises(Refused, match=rf"<= {MOST_INT} - at `\$\.{field}`"):
        heartbeat.decode(msgspec.json.encode(msgspec.to_builtins(advert) | {field: value}))


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("value", [2**31, *BEYOND])
def test_a_usage_that_no_request_can_have_is_none(name: str, value: int) -> None:
    told = {"prompt_tokens": 7, "completion_tokens": 3} | {name: value}
    meter = AnswerMeter()
    meter.whole(msgspec.json.encode({"choices": [{"text": "word"}], "usage": told}))
    assert meter.usage is None and meter.tokens == 1


@pytest.mark.parametrize("change", [{"seed": 2**70}, {"limits": {"held": 2**63}}])
def test_a_number_that_is_too_large_in_a_configuration_is_refused_with_its_field(change: dict[str, Any]) -> None:
    with pytest.raises(config.ConfigError, match=f"must be at most {MOST_INT}"):
        config.parse(GOOD | change, "node.yaml")


# What is told of stake.


class Hearer:
    """A peer that takes messages up to a size, and no statement that has an `x`."""

    def __init__(self, most: int) -> None:
        self.most, self.heard, self.sizes = most, [], []
        self.error: Exception | None = None

    async def send(self, peer: str, body: bytes) -> bytes:
        self.sizes.append(len(body))
        if self.error is not None:
            raise self.error
        told = msgspec.json.decode(body, type=Telling).statements
        if len(body) > self.most or any("x" in each for each in told):
            raise NotTaken("it answers 413 or 409")
        self.heard += told
        return b""


def telling(hearer: Hearer) -> Accounts:
    identity = Identity.generate()
    ledger = ChannelLedger(identity, MemoryJournal(), {}, {}, exposure=1, payment=0)
    made = Accounts(ledger, hearer.send)
    made.heard("newcomer")
    return made


def told(made: Accounts) -> None:
    made._busy.add("newcomer")
    asyncio.run(made._exchange("newcomer"))


def test_what_is_told_goes_in_messages_of_a_size_and_none_of_it_is_forgotten() -> None:
    hearer = Hearer(most=1 << 23)
    made = telling(hearer)
    statements = [f"{k:05d}" + "s" * 3000 for k in range(300)]
    for each in statements:
        made.tell_all(each.encode())
    told(made)
    assert hearer.heard == statements and max(hearer.sizes) < 2 * accounts_module.MOST_TOLD
    told(made)
    assert len(hearer.heard) == 300


def test_a_peer_that_takes_less_is_told_one_by_one_and_not_again_what_it_never_takes() -> None:
    hearer = Hearer(most=4000)
    made = telling(hearer)
    statements = [f"{k}" + "s" * 3000 for k in range(5)]
    for each in [*statements, "x", "s" * 5000, "last"]:
        made.tell_all(each.encode())
    told(made)
    assert hearer.heard == [*statements, "last"] and made.rejected == 2
    told(made)
    assert hearer.heard == [*statements, "last"] and made.rejected == 2


def test_a_peer_that_starts_anew_while_it_is_told_is_told_again() -> None:
    class Restarted(Hearer):
        async def send(self, peer: str, body: bytes) -> bytes:
            answer = await super().send(peer, body)
            if len(self.sizes) == 1:
                made.gone(peer)
                made.heard(peer)
                made.tell_all(b"stated")
            return answer

    hearer = Restarted(most=1 << 20)
    made = telling(hearer)
    made.tell_all(b"stated")
    told(made)
    assert hearer.heard == ["stated", "stated"]


@pytest.mark.parametrize(
    "error", [NotNow("it answers 507"), LedgerError("it answers 404"), OSError("gone"), TimeoutError()]
)
def test_what_a_peer_does_not_take_now_is_told_again(error: Exception) -> None:
    hearer = Hearer(most=1 << 20)
    made = telling(hearer)
    made.tell_all(b"slashed")
    hearer.error = error
    told(made)
    assert hearer.heard == []
    hearer.error = None
    told(made)
    assert hearer.heard == ["slashed"]


def test_a_peer_that_takes_no_message_once_as_it_starts_does_not_disagree(caplog: pytest.LogCaptureFixture) -> None:
    hearer = Hearer(most=1 << 20)
    made = telling(hearer)
    made.tell_all(b"slashed")
    earlier = NotNow("it answers 403: it is addressed to an earlier run of this node")
    for error in (earlier, None, earlier):
        hearer.error = error
        told(made)
        made.tell_all(b"slashed")
    assert caplog.messages == [] and made.rejected == 0
    told(made)
    assert caplog.messages == ["a peer's ledger and ours do not agree"] and made.rejected == 1
    assert made._again_s["newcomer"] > 0
    made.gone("newcomer")
    made.heard("newcomer")
    assert made._again_s == {}  # its new run is told at once
