"""Which prefixes of requests were computed where, as far as a node can tell: on its own engine, and at each peer.

A request is a chain of pieces: what its model, tools and salt are, then each message, long texts in several pieces.
Each piece is hashed onto the chain before it, so that two requests have a hash in common just where all before it is
the same. When an answer has come, the index remembers the hashes of its request for whoever computed it; a later
request finds the last of its own among them. How many tokens lie before a hash is learned: the engine says it of whole
prompts, and in between it is taken to grow with the bytes of text.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from wwwserve.agents.hardware import BLOCK_TOKENS

MESSAGE_BYTES, PROMPT_BYTES = 1024, 256  # of a piece of a message, and of a plain prompt, which may go on anywhere
MOST_PIECES = 4096  # of a request; what follows is not looked at
MOST_ENTRIES = 1 << 16  # over all places, about 0.3 kB each
MOST_TURNS = 1 << 14  # of which it is known when they were answered
KEPT_S = 3600.0  # without use
DRIFT_WEIGHT = 0.02  # of one answer in the mean
REPORTS, MOST_DRIFT = 20, 0.2  # answers before there is an alarm, and the mean share of a prompt from which on
HERE = ""  # the own engine among places, the first of several; peers are there by their names

_TOOLS = ("tools", "functions", "documents", "chat_template", "chat_template_kwargs", "cache_salt", "lora", "suffix")


class Prefix(NamedTuple):
    """The chain of one request."""

    hashes: tuple[bytes, ...]
    sizes: tuple[int, ...]  # bytes of text up to the end of each piece
    answers: Mapping[int, int]  # how many pieces are before each message of the assistant, and the bytes of its text

    @property
    def turn(self) -> int:
        """Its place in its session, from 1."""
        return 1 + len(self.answers)


class Cached(NamedTuple):
    """What is cached of a prompt at a place."""

    tokens: int
    used_s: float  # when it was last used, by the index's clock; -inf for nothing


class Added(NamedTuple):
    """What was not known before a request was remembered."""

    names: tuple[bytes, ...]
    at_s: float


class _Entry:
    """What is known of the chain up to a hash, at one place."""

    __slots__ = ("answer_bytes", "exact", "output", "own", "tokens", "used_s")

    def __init__(self) -> None:
        self.tokens = 0  # up to here
        self.exact = False  # as an engine said
        self.own = 0  # of them and of the answer, those that no other hash has
        self.output = self.answer_bytes = 0  # of the answer that followed, where a prompt ends here
        self.used_s = 0.0


class _OwnCache:
    """What one own engine is taken to have."""

    __slots__ = ("full", "named", "tokens")

    def __init__(self) -> None:
        self.named: OrderedDict[bytes, int] = OrderedDict()  # tokens of each hash, the one used least lately first
        self.tokens = 0
        self.full = False  # something had to go


NO_PREFIX = Prefix((), (), {})
NOTHING = Cached(0, -math.inf)


def prefix_of(path: str, request: Mapping[str, Any], salt: str = "") -> Prefix:
    """The chain of a request at `path`; of none that has several prompts, or no text. `salt` is that of its origin."""
    named = {name: request[name] for name in ("model", *_TOOLS) if request.get(name) is not None}
    chain = _Chain(_json([path, salt, named]))
    if path.endswith("/chat/completions"):
        messages = request.get("messages")
        if not isinstance(messages, list):
            return NO_PREFIX
        for message in messages:
            if not isinstance(message, dict):
                return NO_PREFIX
            if chain.full:
                break
            content = message.get("content")
            text = content if isinstance(content, str) else ""
            role = message.get("role")
            if role == "assistant" and text and chain.hashes:
                chain.answers[len(chain.hashes)] = len(text.encode(errors="replace"))
            chain.message(_json({k: v for k, v in message.items() if v is not None and not (k == "content" and text)}))
            chain.text(text.encode(errors="replace"), MESSAGE_BYTES)
    else:
        prompt = request.get("prompt")
        if isinstance(prompt, list) and prompt and set(map(type, prompt)) == {int}:
            chain.text(str(prompt)[1:-1].encode(), PROMPT_BYTES)  # as quickly as there is, for a long one
        elif isinstance(prompt, str):
            chain.text(prompt.encode(errors="replace"), PROMPT_BYTES)
    return Prefix(tuple(chain.hashes), tuple(chain.sizes), chain.answers)


class _Chain:
    """Hashes pieces onto each other."""

    def __init__(self, begins: bytes) -> None:
        self.hashes: list[bytes] = []
        self.sizes: list[int] = []
        self.answers: dict[int, int] = {}
        self._head, self._size, self._about = blake2b(begins, digest_size=16).digest(), 0, b""

    def message(self, about: bytes) -> None:
        """A message begins, of which all but the text is `about`."""
        if self.full:
            return
        self._about += about
        self._size += len(about)

    @property
    def full(self) -> bool:
        """Whether it has as many pieces as are looked at."""
        return len(self.hashes) == MOST_PIECES

    def text(self, text: bytes, piece_bytes: int) -> None:
        """The text of the message, or the whole prompt; a piece for each `piece_bytes`, and one for the rest."""
        for start in range(0, len(text) or 1, piece_bytes):
            if self.full:
                return
            piece = text[start : start + piece_bytes]
            self._head = blake2b(
                b"%d %b%b" % (len(self._about), self._about, piece), key=self._head, digest_size=16
            ).digest()
            self._about = b""
            self._size += len(piece)
            self.hashes.append(self._head)
            self.sizes.append(self._size)


class PrefixIndex:
    """The prefixes that were computed here and at peers.

    At most `entries` hashes are remembered, for `kept_s` after their last use. Of each own engine no more than
    `kv_tokens` tokens are: as in its cache, what was used least lately goes first, the end of a request before its
    beginning.
    """

    def __init__(
        self, clock: Callable[[], float], kv_tokens: int, *, own: Iterable[str] = (HERE,),
        block_tokens: int = BLOCK_TOKENS, entries: int = MOST_ENTRIES, kept_s: float = KEPT_S,
    ) -> None:  # fmt: skip
        """`clock` says seconds, `own` are the places of own engines. An engine caches whole blocks of `block_tokens`.
        Without `entries` nothing is known."""
        self.clock, self.kv_tokens, self.block_tokens, self.kept_s = clock, kv_tokens, block_tokens, kept_s
        self._most = entries
        self._entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()  # the one used least lately first
        self._own = {place: _OwnCache() for place in own}
        self._turns: OrderedDict[bytes, float] = OrderedDict()  # when own users' requests were answered, the last last
        self.shared = False  # whether anybody asked for what was kept, here or at a peer

    def __len__(self) -> int:
        return len(self._entries)

    def cached(self, prefix: Prefix, prompt: int, peer: str = HERE, since_s: float = -math.inf) -> Cached:
        """How many of a request's `prompt` tokens are cached at a place that has what it used since a time, in whole
        blocks and without the last token, which is computed in any case; and when they were last used."""
        found = self._deepest(prefix, peer, since_s)
        if found is None:
            return NOTHING
        k, entry = found
        answered = _answered(entry, prefix, k)
        tokens = entry.tokens + answered - (answered > 0)  # the last token of an answer is not computed
        whole = max(0, min(tokens, prompt - 1)) // self.block_tokens * self.block_tokens
        if not whole:
            return NOTHING
        self.shared = True
        return Cached(whole, entry.used_s)

    def answered(self, prefix: Prefix) -> None:
        """An own user has the answer to a request."""
        if prefix.hashes:
            self._turns[prefix.hashes[-1]] = self.clock()
            self._turns.move_to_end(prefix.hashes[-1])
            if len(self._turns) > MOST_TURNS:
                self._turns.popitem(last=False)

    def answered_s(self, prefix: Prefix, otherwise_s: float) -> float:
        """When the user had the answer before this turn, wherever it came from; `otherwise_s` if that is not known."""
        before = max(prefix.answers, default=0)
        return self._turns.get(prefix.hashes[before - 1], otherwise_s) if before else otherwise_s

    def remember(
        self, peer: str, prefix: Prefix, prompt: int, output: int = 0, answer_bytes: int = 0, told: bool = True
    ) -> Added:
        """A place has computed a request of `prompt` tokens, and answered with `output` of them that are `answer_bytes`
        of text. The engine `told` how many they are, or else they are an estimate. Returns what was not known before,
        for `retract`."""
        now_s, count = self.clock(), len(prefix.hashes)
        if not count or prompt <= 0 or not self._most:
            return Added((), now_s)
        here = self._own.get(peer)
        if here is not None and prompt > self.kv_tokens:  # no engine computes that
            return Added((), now_s)
        known, size = 0, 0  # tokens and bytes up to the last hash whose tokens are known
        before = 0
        touched, new = [], []
        for k, (name, end) in enumerate(zip(prefix.hashes, prefix.sizes, strict=True)):
            entry = self._entries.get((peer, name))
            if entry is None:
                entry = self._entries[peer, name] = _Entry()
                new.append(name)
            if k == count - 1 and count < MOST_PIECES and (told or not entry.exact):
                entry.tokens, entry.exact, entry.output, entry.answer_bytes = prompt, told, output, answer_bytes
            elif not entry.exact or entry.tokens > prompt:
                share = (end - size) / max(1, prefix.sizes[-1] - size)
                entry.tokens, entry.exact = known + round(share * (prompt - known)), False
            if entry.exact:
                known, size = entry.tokens, end
            entry.own, entry.used_s = max(0, entry.tokens - before) + entry.output, now_s
            before = max(before, entry.tokens + _answered(entry, prefix, k))
            touched.append((name, entry))
        for name, entry in reversed(touched):
            self._entries.move_to_end((peer, name))
            if here is not None:
                here.tokens += entry.own - here.named.get(name, 0)
                here.named[name] = entry.own
                here.named.move_to_end(name)
        while here is not None and here.named and here.tokens > self.kv_tokens:
            here.full = True
            self._drop(peer, next(iter(here.named)))
        while len(self._entries) > self._most or self._is_old(now_s):
            self._drop(*next(iter(self._entries)))
        return Added(tuple(new), now_s)

    def retract(self, peer: str, added: Added) -> None:
        """A place did not compute a request that was remembered, as was thought; what another has used since stays."""
        for name in added.names:
            entry = self._entries.get((peer, name))
            if entry is not None and entry.used_s == added.at_s:
                self._drop(peer, name)

    def is_own(self, place: str) -> bool:
        """Whether it is that of an own engine."""
        return place in self._own

    def reuse_s(self) -> float:
        """How long the own engine keeps what is not used, s, of several the one that keeps it least long: the age of
        what goes next; infinity if nothing has had to go, or nobody asked for what was kept: of such a network a market
        has no caches either."""
        kept_s = math.inf
        if not self.shared:
            return kept_s
        for place, here in self._own.items():
            if here.full:
                first = next(iter(here.named), None)
                kept_s = min(kept_s, 0.0 if first is None else self.clock() - self._entries[place, first].used_s)
        return kept_s

    def forget(self, peer: str) -> None:
        """A place has nothing more: it left, or began anew."""
        for key in [key for key in self._entries if key[0] == peer]:
            self._drop(*key)

    def _is_old(self, now_s: float) -> bool:
        first = next(iter(self._entries.values()), None)
        return first is not None and now_s - first.used_s > self.kept_s

    def _drop(self, peer: str, name: bytes) -> None:
        del self._entries[peer, name]
        here = self._own.get(peer)
        if here is not None:
            here.tokens -= here.named.pop(name)

    def _deepest(self, prefix: Prefix, peer: str, since_s: float) -> tuple[int, _Entry] | None:
        """The last hash of a request that a place has used since a time, and what is known of it. It has all before it
        as well, as those are used whenever it is, and go later."""
        since_s = max(since_s, self.clock() - self.kept_s)
        found = None
        low, high = 0, len(prefix.hashes)  # it has those before `low`, and none from `high` on
        while low < high:
            middle = (low + high) // 2
            entry = self._entries.get((peer, prefix.hashes[middle]))
            if entry is not None and entry.used_s >= since_s:
                low, found = middle + 1, (middle, entry)
            else:
                high = middle
        return found


class Drift:
    """How far what was predicted to be cached is from what engines report, as a share of the prompts."""

    def __init__(self) -> None:
        self.share = 0.0  # mean, the last ones most
        self.reports = 0

    @property
    def alarm(self) -> bool:
        """Whether the two part, so that prefixes are rendered, kept or evicted otherwise than is thought here."""
        return self.reports >= REPORTS and self.share > MOST_DRIFT

    def observe(self, predicted: int, reported: int, prompt: int) -> None:
        """A request of `prompt` tokens was answered."""
        self.reports += 1
        weight = max(DRIFT_WEIGHT, 1 / self.reports)
        self.share += weight * (abs(predicted - reported) / max(1, prompt) - self.share)


def _answered(entry: _Entry, prefix: Prefix, k: int) -> int:
    """Tokens of the answer that was given after the kth piece of a request, if it is the message that follows."""
    return entry.output if entry.output and prefix.answers.get(k + 1) == entry.answer_bytes else 0


def _json(value: object) -> bytes:
    """It in one spelling; all that is nested deeper than JSON is written here is taken to be alike."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return b"deep"
