"""What an operator says of a node, in `node.yaml`: validated, every key with its default here.

It is long, as all keys and what is expected of each stand together.
"""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
import numpy as np
import yaml

from wwwserve.agents import strict_yaml
from wwwserve.agents.classes import MAX_CLASSES, class_row
from wwwserve.agents.hardware import Profile, profile
from wwwserve.agents.kernel import Floats
from wwwserve.agents.lengths import Lognormal
from wwwserve.agents.policy.bundle import SHIPPED
from wwwserve.agents.protocol import PAYMENTS
from wwwserve.agents.rules import RULES
from wwwserve.agents.tariff import MAX_TARIFF
from wwwserve.serving.boundary import BoundaryError, check_url
from wwwserve.serving.http.addresses import engine_base, host_of, is_loopback, is_unspecified, netloc, same_place
from wwwserve.serving.http.keys import SignatureError, public_key
from wwwserve.serving.ledger.verdicts import MOST_JUDGES
from wwwserve.serving.market import MOST_INT, Market
from wwwserve.serving.membership.heartbeat import MOST_LABEL
from wwwserve.serving.plain import in_words

MOST_AT_ONCE = 1 << 16  # requests in an engine
MOST_ENGINES = 64  # of one node
SPEED = (0.01, 100.0)  # emulated seconds in a second: lowest, highest
SPARE_FILES = 64  # file descriptors, beside connections of users and peers
ADMIN_CONNECTIONS = 64  # at once, to `admin`
MOST_CREDITS = 10**9  # of one key, so that sums of micro-credits stay in 64 bits


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file, field and what was expected."""


class Struct(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A mapping of the file; a key that it does not have is an error."""


class CatalogueProfile(Struct, tag_field="kind", tag="catalogue"):
    """An engine's profile by names of the catalogue, which `wwwserve hardware` prints."""

    gpu: str  # as `wwwserve hardware` lists it
    model: str  # as `wwwserve hardware` lists it
    max_num_seqs: int = 256  # requests that the engine runs at once


class MeasuredProfile(Struct, tag_field="kind", tag="measured"):
    """An engine's profile as it was measured."""

    weight_s: float  # s of an iteration: reading the weights
    per_seq_s: float  # s more for each sequence in it
    per_kv_token_s: float  # s more for each token of their context
    prefill_base_s: float  # s of a prompt
    per_token_s: float  # s more for each of its tokens
    kv_blocks: int  # blocks of 16 tokens in the KV cache
    max_num_seqs: int  # requests that the engine runs at once
    max_batched_tokens: int  # tokens that it computes in one iteration at most
    max_model_len: int  # tokens of a prompt and its answer at most
    source: str = "measured"  # where the numbers come from, for people
    seq_tokens: float = 1.0  # for the simulator: compute of a sequence that decodes beside a prefill, in prompt tokens
    per_pair_s: float = 0.0  # for the simulator: s for each prompt token with each before it
    batch_s: tuple[float, ...] = ()  # for the simulator: s beyond the line, at 1, 2, 4, ... sequences


class EngineConfig(Struct):
    """The engine that the node stands before, or several that are alike."""

    url: str | tuple[str, ...]  # with or without `/v1`; a list of up to 64 engines that are alike
    profile: CatalogueProfile | MeasuredProfile  # how fast one is: `wwwserve init` or `wwwserve calibrate` measures it
    kind: Literal["vllm", "sglang"] = "vllm"  # names of its metrics; an emulated engine has vLLM's
    key: str | None = None  # API key that it wants
    timeout_s: float = 600.0  # s without a byte, after which an answer is given up

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the engines are."""
        return (self.url,) if isinstance(self.url, str) else self.url


class PeerConfig(Struct):
    """A peer of a static list."""

    key: str  # its public key
    url: str  # where it is reached
    name: str | None = None  # for people; `wwwserve join` takes no other key under a name that is known


class StaticConfig(Struct, tag_field="kind", tag="static"):
    """Membership by the list `peers`."""


class TlsConfig(Struct):
    """Files, PEM, by which the nodes of a network know each other."""

    ca: str  # certificate of the CA that made all of them
    certificate: str  # the node's own
    key: str  # its private key


class ServerTlsConfig(Struct):
    """TLS of the data plane: between nodes by their keys, with users by an ordinary certificate, if there is one."""

    certificate: str | None = None  # file, PEM, with those above it
    key: str | None = None  # its private key


class AdminConfig(Struct):
    """Where the operator looks at the node, apart from users and peers."""

    port: int = 9100  # 0: any that is free
    host: str = "127.0.0.1"  # where the listener is
    key: str | None = None  # to be sent as an API key is; needed where `host` is not a loopback address


class ZenohConfig(Struct, tag_field="kind", tag="zenoh"):
    """Membership on Eclipse Zenoh; endpoints are `tcp/HOST:PORT`, with TLS `tls/HOST:PORT`."""

    network: str  # the network's name; nodes of different ones do not hear of each other
    listen: tuple[str, ...]  # where its Zenoh session listens
    connect: tuple[str, ...] = ()  # some nodes of the network, from which it learns of the others
    tls: TlsConfig | None = None  # none: whoever reaches an endpoint is a member


class LengthsConfig(Struct):
    """Lognormal lengths, tokens."""

    median: float  # before it is cut
    sigma: float  # standard deviation of the logarithm
    max: int  # the longest


class KeyConfig(Struct):
    """An API key of users, which is written here, in a file or in a variable of the environment."""

    name: str  # in metrics and logs, where the key itself is not
    key: str | None = None  # the key itself
    file: str | None = None  # a file that holds it
    env: str | None = None  # a variable of the environment that holds it
    requests_per_minute: float | None = None  # a minute's worth may be used at once
    tokens_per_minute: float | None = None  # of prompts and answers; a minute's worth may be used at once
    concurrent: int | None = None  # requests at once

    def secret(self) -> str:
        """The key. Raises ConfigError."""
        if self.key is not None:
            found = self.key
        elif self.file is not None:
            try:
                found = Path(self.file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the file of key {self.name} cannot be read: {in_words(error)}") from None
        else:
            if self.env is None or self.env not in os.environ:
                raise ConfigError(f"key {self.name} is not there: the environment has no {self.env}")
            found = os.environ[self.env]
        found = found.strip()
        if not re.fullmatch(r"[!-~]{1,512}", found):
            raise ConfigError(f"key {self.name} must be 1 to 512 printable ASCII characters without spaces")
        return found


class TracingConfig(Struct):
    """Where spans of requests go, for OpenTelemetry."""

    endpoint: str  # OTLP/HTTP collector to which spans of requests go
    sample: float = 1.0  # share of requests that are traced, by their trace id


class CorsConfig(Struct):
    """Pages in browsers that may ask the users' API."""

    origins: tuple[str, ...]  # `https://HOST[:PORT]`, `http://HOST[:PORT]`, or `*` for all


class ClassConfig(Struct):
    """An SLO class of the users' requests, which they name in the header `x-slo-class`."""

    deadline_s: float  # within which an answer is wanted
    value: float = 1.0  # what 1000 tokens in time are worth, credits
    output: LengthsConfig | None = None  # tokens of its answers; default: the node's
    local_only: bool = False  # its requests stay on the own engine


class MarketConfig(Struct):
    """What all providers of a network agree on."""

    payment: Literal["lateness", "quoted", "per_request"] = "lateness"
    """what an answer costs: its price as `quoted`, less the later it is (`lateness`), or a credit (`per_request`)"""
    rtt_s: float = 0.05  # round trip between two providers, s
    gossip_s: float = 3.0  # between two adverts, s
    tick_s: float = 1.0  # between two looks at the engine and at what is held, s
    stake_rule: Literal["load", "fixed"] = "load"  # `load`: the stake follows the free capacity; `fixed`: it stays
    duel_probability: float = 0.0
    """of a request that is handed to a peer: chance that it goes to two, whose answers are judged"""
    judges: int = 3  # of a duel
    prefix_cache: bool = True  # false: engines are taken to keep nothing of a prompt
    speed: float = 1.0  # of the market's clock; not 1 only in trials, on engines emulated at the same speed


class LimitsConfig(Struct):
    """What a node takes at most."""

    body_bytes: int = 32 * 2**20  # largest body, zipped or not; beyond, 413
    header_bytes: int = 64 * 2**10  # largest header; beyond, 431
    held: int = 512  # users' requests that are not decided, and as many that are passed through; beyond, 503
    connections: int = 4096
    """open at once, fewer where files are short; beyond, one on which nothing is under way makes room, else 503"""
    connections_per_address: int = 1024  # the same, from one IPv4 address or one /64 of IPv6
    peer_connections: int = 256  # of `connections`, at most a quarter, that only peers may have
    peer_messages_per_s: float = 2500.0  # signed messages of one peer that are looked at; beyond, 429
    receiving_bytes: int = 256 * 2**20
    """of bodies that are coming, a quarter of it from one address or peer; beyond, 503"""
    held_bytes: int = 2**30
    """of users' bodies above 64 KiB whose answers are open, a quarter of it from one address; beyond, 503"""
    receive_s: float = 30.0  # s in which a request has to come, from its first byte to its last; beyond, 408
    drain_s: float = 20.0  # s that open answers have to end, once the node is told to end by SIGTERM or SIGINT; 0: none

    @property
    def files(self) -> int:
        """File descriptors that it may need: a connection may have another one behind it, to the engine or a peer."""
        return 2 * self.connections + SPARE_FILES


class LimitConfig(Struct):
    """What two set for each other, credits; the peer has the same two the other way round."""

    ours: float  # that we may come to owe it
    theirs: float  # that it may come to owe us


class LedgerConfig(Struct):
    """Where accounts are kept, and what credit begins with."""

    file: str  # SQLite file of its accounts, made if it is not there
    genesis: str | None = None  # file of what each key begins with, the same on all nodes
    limits: dict[str, LimitConfig] = {}  # by a peer's key, where there is no genesis
    closed: tuple[str, ...] = ()
    """keys of peers with whom the channel is closed, or stays so; without one of them, it is opened again"""
    close_after_s: float = 7 * 86400.0  # s after which it is closed without a peer that does not agree
    exposure: float = 100.0  # credits that a peer may have of ours in escrow, and we of a peer's


class NodeConfig(Struct):
    """A node."""

    name: str  # for people; among peers its public key is its name
    key: str  # file of its private key, made by `wwwserve key new`
    engine: EngineConfig  # the engine that it stands before
    host: str = "127.0.0.1"  # where it listens, for users and peers; IPv6 as `::1`
    port: int = 9000  # 0: any that is free
    url: str | None = None  # where peers reach it; default: host and port; needed where `host` is `0.0.0.0` or `::`
    serves: tuple[str, ...] = ()  # model names that users may ask for; default: those of the engine
    policy: str | None = None  # competitive (the default), cooperative, the name of a rule, or the folder of a bundle
    seed: int = 0  # of its random generator
    stake: float = 1.0  # credits; with a ledger only where `market.stake_rule` is `fixed`
    credit: float = 1000.0  # credits; with a ledger, it says
    compute_cost_per_ktok: float = 0.09  # what computing 1000 output tokens costs, credits
    aliases: dict[str, str] = {}  # other names by which users may call models, `gpt-4: qwen3-8b`
    keys: tuple[str | KeyConfig, ...] = ()  # API keys of users, each as text or a mapping; none: everyone is a user
    cors: CorsConfig | None = None  # none: no page of another origin
    access_log: bool = False  # a line of the log for each request of a user
    tracing: TracingConfig | None = None  # none: no spans
    membership: StaticConfig | ZenohConfig = msgspec.field(default_factory=StaticConfig)  # how nodes find each other
    peers: tuple[PeerConfig, ...] = ()  # only with static membership
    tls: ServerTlsConfig | None = None  # none: HTTP; `{}`: TLS between nodes
    admin: AdminConfig | None = None  # none: on the data plane, for clients of the same machine
    trust: tuple[str, ...] | None = None  # public keys of the peers that may see prompts; default: all; `[]`: none
    prompt_tokens: float = 256.0  # mean prompt of its users, until answers tell better
    uncached_tokens: float | None = None  # tokens of it that are not of the session's turn before; default: all
    output: LengthsConfig = msgspec.field(default_factory=lambda: LengthsConfig(median=200.0, sigma=0.8, max=4096))
    """tokens of answers to its users"""
    deadlines_s: tuple[float, ...] = (10.0, 20.0, 30.0, 60.0, 120.0)
    """within which answers are wanted, s, where there are no classes"""
    classes: dict[str, ClassConfig] = {}  # SLO classes by name; a request that names none is of the first
    resume: bool = False  # a stream that breaks off goes on elsewhere
    market: MarketConfig = msgspec.field(default_factory=MarketConfig)  # what all providers of the network agree on
    ledger: LedgerConfig | None = None  # none: nothing is paid
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)  # what it takes at most
    log: Literal["debug", "info", "warning", "error"] = "info"
    """level of the log: JSON lines on standard error, without prompts and keys"""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of its users' requests; the first is what a request belongs to that names none."""
        return tuple(self.classes) or ("default",)

    @property
    def files(self) -> int:
        """File descriptors that it may need, with those for signs of life to peers and for the operator."""
        return self.limits.files + len(self.peers) + (ADMIN_CONNECTIONS if self.admin is not None else 0)

    @property
    def user_keys(self) -> tuple[KeyConfig, ...]:
        """The API keys of users; those without a name are called by their place in the list."""
        return tuple(
            KeyConfig(name=f"key-{k}", key=each) if isinstance(each, str) else each
            for k, each in enumerate(self.keys, 1)
        )

    def trusts(self, peer: str) -> bool:
        """Whether a peer may see prompts of own users."""
        return self.trust is None or peer in self.trust

    def url_at(self, port: int) -> str:
        """Where peers reach it, which listens at `port`."""
        scheme = "http" if self.tls is None else "https"
        return self.url or f"{scheme}://{netloc(self.host, port)}"

    def agreed(self) -> Market:
        """The market as a provider takes it. Raises ValueError for more classes than a view shows."""
        rows = [self._row(self.classes.get(name)) for name in self.class_names]
        if self.classes:
            deadlines = [[each.deadline_s] for each in self.classes.values()]
        else:
            deadlines = [list(self.deadlines_s)]
        market = self.market
        return Market(
            known=np.array(rows), deadlines=np.array(deadlines), payment=PAYMENTS.index(market.payment),
            rtt_s=market.rtt_s, gossip_s=market.gossip_s, tick_s=market.tick_s,
        )  # fmt: skip

    @property
    def mean_output(self) -> float:
        """Mean tokens of its users' answers."""
        return Lognormal(self.output.median, self.output.sigma, self.output.max).mean

    def _row(self, klass: ClassConfig | None) -> Floats:
        output = klass.output if klass is not None and klass.output is not None else self.output
        lengths = Lognormal(output.median, output.sigma, output.max)
        if klass is None:
            return class_row(lengths, 1.0, self.deadlines_s[-1], self.prompt_tokens, self.uncached_tokens)
        return class_row(lengths, klass.value, klass.deadline_s, self.prompt_tokens, self.uncached_tokens)

    def engine_profile(self) -> Profile:
        """The engine's profile. Raises ValueError for one that cannot be."""
        settings = self.engine.profile
        if isinstance(settings, CatalogueProfile):
            return profile(settings.gpu, settings.model, settings.max_num_seqs)
        return Profile(**msgspec.structs.asdict(settings))


def absent_aliases(aliases: Mapping[str, str], serves: Collection[str]) -> dict[str, str]:
    """The aliases that name nothing, as their models are not served."""
    return {alias: model for alias, model in aliases.items() if model not in serves}


def parse(content: object, where: str, folder: Path | None = None) -> NodeConfig:
    """A node from a mapping, `where` for messages. Files that it names are looked up from `folder`, by default the
    working directory; URLs lose slashes at their ends. Raises ConfigError, with the field that is wrong."""
    try:
        config = _tidied(msgspec.convert(content, NodeConfig), folder or Path())
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    for field, good, expected in _checks(config):
        if not good:
            raise ConfigError(f"{where}: {field} must be {expected}")
    try:
        config.engine_profile()
        config.agreed()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def _tidied(c: NodeConfig, folder: Path) -> NodeConfig:
    """The configuration with paths that count from `folder`, and with URLs as they are compared and put together."""

    def at(file: str | None) -> str | None:
        return str(folder / file) if file else file

    settings, membership, replace = c.ledger, c.membership, msgspec.structs.replace
    if isinstance(membership, ZenohConfig) and membership.tls is not None:
        files = {name: at(file) for name, file in msgspec.structs.asdict(membership.tls).items()}
        membership = replace(membership, tls=replace(membership.tls, **files))
    return replace(
        c, key=at(c.key), membership=membership, policy=c.policy if c.policy in (*SHIPPED, *RULES) else at(c.policy),
        url=c.url.rstrip("/") if c.url else c.url, engine=replace(c.engine, url=_engine_urls(c.engine.url)),
        peers=tuple(replace(each, url=each.url.rstrip("/")) for each in c.peers),
        tls=c.tls and replace(c.tls, certificate=at(c.tls.certificate), key=at(c.tls.key)),
        ledger=settings and replace(settings, file=at(settings.file), genesis=at(settings.genesis)),
        keys=tuple(replace(each, file=at(each.file)) if isinstance(each, KeyConfig) else each for each in c.keys),
    )  # fmt: skip


def _twice(urls: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Those of an engine that another one leads to as well, after that one."""
    seen: dict[str, str] = {}
    for url in filter(_is_reached, urls):
        first = seen.setdefault(same_place(url), url)
        if first is not url:
            yield first, url


def _engine_urls(url: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return engine_base(url) if isinstance(url, str) else tuple(map(engine_base, url))


def _membership_checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    settings = c.membership
    if isinstance(settings, StaticConfig):
        return []
    kind = "tls" if settings.tls else "tcp"
    files = msgspec.structs.asdict(settings.tls) if settings.tls else {}

    def good(endpoints: tuple[str, ...]) -> bool:
        return all(re.fullmatch(rf"{kind}/[^\s/?#]+:\d{{1,5}}", each) for each in endpoints)

    return [
        ("peers", not c.peers, "left out where membership is zenoh"),
        ("membership.network", bool(settings.network) and settings.network.isprintable(), "some printable characters"),
        ("membership.listen", bool(settings.listen) and good(settings.listen),
         f"at least one {kind}/HOST:PORT, got {settings.listen}"),
        ("membership.connect", good(settings.connect), f"of the form {kind}/HOST:PORT, got {settings.connect}"),
        *[(f"membership.tls.{key}", Path(file).is_file(), f"a file, got {file!r}") for key, file in files.items()],
    ]  # fmt: skip


def _wire_checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    checks = []
    if c.tls is not None:
        urls = [*(peer.url for peer in c.peers), *([c.url] if c.url else [])]
        files = [each for each in (c.tls.certificate, c.tls.key) if each is not None]
        checks = [
            ("every node's url", all(u.startswith("https://") for u in urls), f"https:// with tls, got {urls}"),
            ("tls", len(files) != 1, "with both or neither of certificate and key"),
            *[("tls", Path(file).is_file(), f"of files, got {file!r}") for file in files],
        ]  # fmt: skip
    if c.admin is not None:
        checks += [
            ("admin.port", 0 <= c.admin.port < 65536, f"0 to 65535, got {c.admin.port}"),
            ("admin.port", c.admin.port == 0 or c.admin.port != c.port, f"another one than port, got {c.port}"),
            ("admin.key", c.admin.key != "", "of one character at least"),
            ("admin.key", is_loopback(c.admin.host) or c.admin.key is not None,
             f"given where admin.host is {c.admin.host}, which others reach"),
        ]  # fmt: skip
    return checks


def _is_key(name: str) -> bool:
    try:
        public_key(name)
    except SignatureError:
        return False
    return True


def _is_url(url: str) -> bool:
    try:
        check_url(url)
    except BoundaryError:
        return False
    return True


def _is_reached(url: str) -> bool:
    """Whether it says a host, and no port that there is not."""
    try:
        parts = urlsplit(url)
        return bool(re.fullmatch(r"https?://[!-~]+", url) and parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _ledger_checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    ledger = c.ledger
    if ledger is None:
        return []
    amounts = [amount for each in ledger.limits.values() for amount in (each.ours, each.theirs)]
    return [
        ("ledger.file", bool(ledger.file), "a file"),
        ("ledger", (ledger.genesis is None) != (not ledger.limits), "with either a genesis or limits"),
        ("ledger.genesis", ledger.genesis is None or Path(ledger.genesis).is_file(), f"a file, got {ledger.genesis!r}"),
        *[("ledger.limits", _is_key(each), f"by public keys, got {each!r}") for each in ledger.limits],
        ("ledger.limits", all(0 <= each <= MOST_CREDITS for each in amounts), f"0 to {MOST_CREDITS:,} credits"),
        *[("ledger.closed", _is_key(each), f"public keys, got {each!r}") for each in ledger.closed],
        ("ledger.close_after_s", ledger.close_after_s >= 0, f"at least 0, got {ledger.close_after_s:g}"),
        ("ledger.exposure", 0 < ledger.exposure <= MOST_CREDITS, f"above 0, got {ledger.exposure:g}"),
    ]


def _impossible(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Numbers that are infinite, none, or too large, by their place, and what they should be."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, f"finite, got {value}"
    elif isinstance(value, int) and abs(value) > MOST_INT:
        yield path, f"at most {MOST_INT}, got {value}"
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _impossible(item, f"{path}.{key}" if path else str(key))


def _user_checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    names = [each.name for each in c.user_keys]
    bounds = ("requests_per_minute", "tokens_per_minute", "concurrent")
    given = [(f"{bound} of key {each.name}", getattr(each, bound)) for each in c.user_keys for bound in bounds]
    return [
        ("keys", len(set(names)) == len(names), f"of different names, got {names}"),
        *[("every key's name", re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) is not None,
           f"1 to 64 letters, digits, dots, dashes and underscores, got {name!r}") for name in names],
        *[(f"key {each.name}", [each.key, each.file, each.env].count(None) == 2, "given by one of key, file and env")
          for each in c.user_keys],
        *[(field, limit is None or limit > 0, f"above 0, got {limit}") for field, limit in given],
        ("aliases", all(0 < len(each) <= 256 and each.isprintable() for each in c.aliases), "printable"),
        *[("cors.origins", each == "*" or re.fullmatch(r"https?://[!-.0-~]+", each) is not None,
           f"* or http:// or https:// with a host and a port at most, got {each!r}")
          for each in (c.cors.origins if c.cors is not None else ())],
    ]  # fmt: skip


def _tracing_checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    if c.tracing is None:
        return []
    endpoint, sample = c.tracing.endpoint, c.tracing.sample
    return [
        ("tracing.endpoint", _is_reached(endpoint),
         f"http:// or https:// and where a collector is, got {endpoint!r}"),
        ("tracing.sample", 0 <= sample <= 1, f"0 to 1, got {sample:g}"),
    ]  # fmt: skip


def _checks(c: NodeConfig) -> list[tuple[str, bool, str]]:
    nodes = [*(peer.url for peer in c.peers), *([c.url] if c.url else [])]
    urls, keys = [*c.engine.urls, *nodes], [peer.key for peer in c.peers]
    return [
        *[(field, False, expected) for field, expected in _impossible(msgspec.to_builtins(c))],
        ("name", 0 < len(c.name) <= MOST_LABEL and c.name.isprintable(), f"1 to {MOST_LABEL} printable characters"),
        ("key", bool(c.key), "a file"),
        ("port", 0 <= c.port < 65536, f"0 to 65535, got {c.port}"),
        ("policy", c.policy is None or c.policy in (*SHIPPED, *RULES) or Path(c.policy).is_dir(),
         f"{', '.join(SHIPPED)}, a rule ({', '.join(RULES)}) or the folder of a bundle, got {c.policy!r}"),
        ("every url", all(u.startswith(("http://", "https://")) for u in urls), f"http:// or https://, got {urls}"),
        *[("engine.url", _is_reached(u), f"http:// or https://, a host and a port from 1 to 65535, got {u!r}")
          for u in c.engine.urls],
        *[("every node's url", _is_url(u), f"a host, a port and a path at most, got {u!r}") for u in nodes],
        *[("every node's url", not is_unspecified(host_of(u)), f"an address at which others reach it, got {u!r}")
          for u in nodes],
        ("url", c.url is not None or not is_unspecified(c.host) or not (c.peers or c.membership != StaticConfig()),
         f"given where there are peers and host is {c.host}: the address of this machine at which they reach it"),
        *[("trust", _is_key(each), f"public keys, got {each!r}") for each in c.trust or ()],
        ("peers", len(set(keys)) == len(keys), f"of different keys, got {keys}"),
        *[("every peer's key", _is_key(each), f"a public key, got {each!r}") for each in keys],
        *_user_checks(c),
        *_tracing_checks(c),
        *_wire_checks(c),
        *_membership_checks(c),
        *_ledger_checks(c),
        ("deadlines_s", list(c.deadlines_s) == sorted(c.deadlines_s) and min(c.deadlines_s, default=0) > 0,
         f"at least one, above 0 and ascending, got {c.deadlines_s}"),
        ("classes", len(c.classes) <= MAX_CLASSES, f"at most {MAX_CLASSES}, got {len(c.classes)}"),
        ("every class's deadline_s", all(k.deadline_s > 0 for k in c.classes.values()), "above 0"),
        ("market.tick_s", 0.01 <= c.market.tick_s <= 10, f"0.01 to 10, got {c.market.tick_s:g}"),
        ("market.gossip_s", 0.05 <= c.market.gossip_s <= 60, f"0.05 to 60, got {c.market.gossip_s:g}"),
        ("market.rtt_s", 0 <= c.market.rtt_s <= 10, f"0 to 10, got {c.market.rtt_s:g}"),
        ("market.duel_probability", 0 <= c.market.duel_probability <= 1,
         f"0 to 1, got {c.market.duel_probability:g}"),
        ("market.judges", 1 <= c.market.judges <= MOST_JUDGES, f"1 to {MOST_JUDGES}, got {c.market.judges}"),
        ("market.speed", SPEED[0] <= c.market.speed <= SPEED[1],
         f"{SPEED[0]:g} to {SPEED[1]:g}, got {c.market.speed:g}"),
        ("engine.url", 1 <= len(c.engine.urls) <= MOST_ENGINES,
         f"of one engine or a list of up to {MOST_ENGINES} different ones, got {len(c.engine.urls)}"),
        *[("engine.url", False, f"a list of different engines, got {one} and {other}, which are the same")
          for one, other in _twice(c.engine.urls)],
        ("engine.timeout_s", c.engine.timeout_s > 0, f"above 0, got {c.engine.timeout_s:g}"),
        *[(field, 0 <= amount <= MOST_CREDITS, f"0 to {MOST_CREDITS:,} credits, got {amount:g}")
          for field, amount in (("stake", c.stake), ("credit", c.credit))],
        ("compute_cost_per_ktok", 0 <= c.compute_cost_per_ktok <= MAX_TARIFF,
         f"0 to {MAX_TARIFF:,.0f} credits, got {c.compute_cost_per_ktok:g}"),
        *[(f"limits.{field}", limit > 0, f"above 0, got {limit:g}")
          for field, limit in msgspec.structs.asdict(c.limits).items() if field != "drain_s"],
        ("limits.drain_s", c.limits.drain_s >= 0, f"at least 0, got {c.limits.drain_s:g}"),
        ("engine.profile.max_num_seqs", 1 <= c.engine.profile.max_num_seqs <= MOST_AT_ONCE,
         f"1 to {MOST_AT_ONCE}, got {c.engine.profile.max_num_seqs}"),
        ("output", c.output.median > 0 and c.output.sigma >= 0 and c.output.max > 0, "of positive length"),
    ]  # fmt: skip


def load(path: Path) -> NodeConfig:
    """Read `node.yaml`. Raises ConfigError, naming the file and what is wrong."""
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return parse(content, str(path), path.parent)
