"""What is right and wrong with a node, and what to do about it: `wwwserve doctor`."""

import asyncio
import os
import re
import resource
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import SOCK_STREAM
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cryptography import x509

from wwwserve.agents.kernel import compiled_before
from wwwserve.agents.policy.bundle import BundleError, folder_of, read
from wwwserve.agents.rules import RULES
from wwwserve.serving import config
from wwwserve.serving.config import (
    CatalogueProfile,
    ConfigError,
    NodeConfig,
    StaticConfig,
    ZenohConfig,
    absent_aliases,
)
from wwwserve.serving.engine.adapter import EngineError
from wwwserve.serving.http.addresses import host_of, is_free, is_loopback, netloc
from wwwserve.serving.http.certificates import server_context
from wwwserve.serving.http.keys import Identity, IdentityError
from wwwserve.serving.http.messages import SKEW_S
from wwwserve.serving.ledger.audit import audit
from wwwserve.serving.ledger.genesis import agreed
from wwwserve.serving.ledger.journal import JournalError
from wwwserve.serving.local_nodes import NetworkError
from wwwserve.serving.setup.look import MOST_OFF, EngineSeen, catalogue_model, differing, look_at_engine, own_network
from wwwserve.serving.setup.peer_view import Answer, View, ask
from wwwserve.serving.tracing import INSTALL, check_installed

OK, WARNING, FAILED = "ok", "warning", "failed"
SOON = timedelta(days=14)  # in which a certificate ends
MOST_AHEAD_S = 5.0  # of a peer's clock, before it is worth a word
SET_CLOCK = "set the clock that is wrong, and keep it so by NTP"
_AMOUNT = r"(\d{1,9}(?:\.\d{1,9})?(?:e[+-]\d\d)?)"
_TERMS = re.compile(f"{_AMOUNT} credits for you and {_AMOUNT} for this node")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: str  # OK, WARNING or FAILED
    found: str
    do: str = ""  # what to do, where it is not OK


def examine(file: Path) -> list[Finding]:
    """Everything that can be seen of the node of a configuration, whether it runs or not."""
    try:
        node = config.load(file)
    except ConfigError as error:
        do = (
            f"correct {file}; docs/reference/node-yaml.md has every key" if file.exists() else "wwwserve init makes one"
        )
        return [Finding("configuration", FAILED, str(error), do)]
    found = [Finding("configuration", OK, f"{file} is {node.name}")]
    try:
        identity = Identity.load(Path(node.key))
    except IdentityError as error:
        exists = Path(node.key).exists()
        do = f"chmod 600 {node.key}" if "others may read" in str(error) else f"wwwserve key new {node.key}"
        return [*found, Finding("key", FAILED, str(error), do if "mode" in str(error) or not exists else "")]
    found.append(Finding("key", OK, f"{node.key}, mode 0600, {identity.name}"))
    running, why = _running(node, identity)
    found += _ports(node, identity, running, why)
    found += asyncio.run(_engines(node))
    found += [
        _files(node),
        *_policy(node),
        *_tracing(node),
        *_certificates(node, identity),
        _proxies(),
        *_address(node),
    ]
    found += _ledger(node, identity)
    found += asyncio.run(_peers(node, identity, running))
    return found


def _running(node: NodeConfig, identity: Identity) -> tuple[dict[str, Any] | None, str]:
    """What the node says, if it runs, and else why nothing is heard of it."""
    try:
        seen = own_network(node)
    except NetworkError as error:
        return None, str(error)
    return (seen, "") if seen.get("key") == identity.name else (None, f"the node there has the key {seen.get('key')}")


def _ports(node: NodeConfig, identity: Identity, running: dict[str, Any] | None, why: str) -> Iterator[Finding]:
    places = [("port", node.host, node.port)]
    places += [("admin.port", node.admin.host, node.admin.port)] if node.admin is not None else []
    for setting, host, port in places:
        at = netloc(host, port)
        if running is not None:
            yield Finding(setting, OK, f"{at} is this node's, which runs")
        elif port == 0 or is_free(host, port):
            yield Finding(setting, OK, f"{at} is free; the node does not run")
        else:
            yield Finding(
                setting, FAILED, f"{at} is in use, and not by this node as far as is seen: {why}",
                f"end what uses it, or choose another `{setting}`",
            )  # fmt: skip
    if running is None and not compiled_before("node"):
        yield Finding("kernels", OK, "not compiled yet: the first start takes about a minute more")


async def _engines(node: NodeConfig) -> list[Finding]:
    found, seen = [], {}
    for url in node.engine.urls:
        try:
            seen[url] = await look_at_engine(url, node.engine.kind, node.engine.key)
        except EngineError as error:
            found.append(Finding("engine", FAILED, str(error), "start it, or correct `engine.url` and `engine.key`"))
            continue
        each = _engine(node, url, seen[url])
        if len(node.engine.urls) > 1:
            each = [one._replace(found=one.found if url in one.found else f"{url}: {one.found}") for one in each]
        found += each
    odd = differing(seen)
    if odd:
        do = "engines of one node have to be different ones that are alike: correct `engine.url`, or give others a node"
        found.append(Finding("engines", FAILED, odd, do))
    for one, other in await _one_address(node.engine.urls):
        if odd or (seen.get(one) and seen.get(other) and seen[one].made_at != seen[other].made_at):
            continue  # which is said, or they are not the same
        said = f"{one} and {other} lead to the same address, and the engine there does not say which one it is"
        found.append(Finding("engines", WARNING, said, "if it is one engine, take one of the two out of `engine.url`"))
    return found


async def _one_address(urls: Sequence[str]) -> list[tuple[str, str]]:
    """Those of which the names are of the same address and port."""
    loop, first, found = asyncio.get_running_loop(), dict[tuple[Any, ...], str](), []
    for url in urls:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            addresses = {each[4][:2] for each in await loop.getaddrinfo(parts.hostname, port, type=SOCK_STREAM)}
        except OSError:  # which the engine's finding says
            continue
        same = next((first[each] for each in sorted(addresses) if each in first), None)
        if same is not None:
            found.append((same, url))
        first = dict.fromkeys(addresses, url) | first
    return found


def _engine(node: NodeConfig, url: str, seen: EngineSeen) -> list[Finding]:
    settings = node.engine
    found = [Finding("engine", OK, f"{url} serves {', '.join(seen.models)}")]
    if seen.unloaded:
        said, do = f"its load is not known: {seen.unloaded}", "is `engine.kind` right? SGLang needs --enable-metrics"
        found.append(Finding("metrics", WARNING, said, do))
    else:
        found.append(Finding("metrics", OK, f"it says its load as {settings.kind} does"))
    missing = [name for name in node.serves if name not in seen.models]
    if missing:
        said = f"`serves` has {', '.join(missing)}, which the engine has not"
        found.append(Finding("models", FAILED, said, "correct `serves`"))
    absent = absent_aliases(node.aliases, node.serves or seen.models)
    if absent:
        said = ", ".join(f"{alias} for {model}" for alias, model in absent.items())
        do = "correct `aliases`, or load the models; until then users are told that there are none"
        found.append(Finding("aliases", WARNING, f"{said}, which the engine does not serve", do))
    return [*found, *_profile(node, seen)]


def _profile(node: NodeConfig, seen: EngineSeen) -> Iterator[Finding]:
    settings, profile = node.engine.profile, node.engine_profile()
    if isinstance(settings, CatalogueProfile):
        known = [each for each in map(catalogue_model, seen.models) if each is not None]
        fits, said = settings.model in known or not known, f"{settings.model} on {settings.gpu}, of the catalogue"
    else:
        fits = not settings.source.startswith("measured: ") or any(name in settings.source for name in seen.models)
        said = settings.source
    again = "measure the engine again: wwwserve calibrate"
    off = []
    if not fits:
        off.append(f"the engine serves {', '.join(seen.models)}")
    if seen.kv_tokens is not None and abs(seen.kv_tokens / profile.kv_tokens - 1) > MOST_OFF:
        off.append(f"its KV cache holds {seen.kv_tokens:,} tokens, the profile says {profile.kv_tokens:,}")
    lengths = [length for length in seen.models.values() if length is not None]
    if lengths and min(lengths) < profile.max_model_len:
        off.append(f"it takes requests of {min(lengths):,} tokens, the profile says {profile.max_model_len:,}")
    if off:
        yield Finding("profile", FAILED if not fits else WARNING, f"{said}; {'; '.join(off)}", again)
    else:
        yield Finding("profile", OK, said)


def _files(node: NodeConfig) -> Finding:
    needed = node.files
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"at most {most:,} here, {needed:,} for {node.limits.connections:,} connections"
    if most in (resource.RLIM_INFINITY, -1) or most >= needed:
        return Finding("file descriptors", OK, said)
    do = f"ulimit -Hn {needed} where the node is started (LimitNOFILE={needed}), or lower `limits.connections`"
    return Finding("file descriptors", WARNING, said, do)


def _policy(node: NodeConfig) -> Iterator[Finding]:
    if node.policy in RULES:
        yield Finding("policy", OK, f"the rule {node.policy}")
        return
    folder = folder_of(node.policy)
    try:
        read(folder)
    except BundleError as error:
        yield Finding("policy", FAILED, str(error), "take another `policy`, or get the bundle again")
        return
    yield Finding("policy", OK, f"{node.policy or folder.name}, whose files have the digests that they should")


def _tracing(node: NodeConfig) -> Iterator[Finding]:
    if node.tracing is None:
        return
    try:
        check_installed()
    except ConfigError:
        yield Finding("tracing", FAILED, "OpenTelemetry is not installed, so the node does not start", INSTALL)
    else:
        yield Finding("tracing", OK, f"{node.tracing.sample:.3g} of the requests, to {node.tracing.endpoint}")


def _certificates(node: NodeConfig, identity: Identity) -> Iterator[Finding]:
    files = []
    if node.tls is not None:
        certificate, key = (Path(each) if each else None for each in (node.tls.certificate, node.tls.key))
        try:
            server_context(identity, certificate, key)
        except OSError as error:  # ssl's errors are
            yield Finding(
                "certificate", FAILED, f"`tls` cannot be used: {error}", "correct `tls.certificate`, `tls.key`"
            )
            return
        if certificate is None:
            yield Finding("certificate", OK, "the node's own, of its key")
        else:
            files.append(certificate)
    if isinstance(node.membership, ZenohConfig) and node.membership.tls is not None:
        files += [Path(node.membership.tls.ca), Path(node.membership.tls.certificate)]
    for each in files:
        yield _certificate(each)


def _certificate(file: Path) -> Finding:
    try:
        made = x509.load_pem_x509_certificates(file.read_bytes())[0]
    except (OSError, ValueError) as error:
        return Finding("certificate", FAILED, f"{file}: {error}", "expected a certificate in PEM")
    left = made.not_valid_after_utc - datetime.now(UTC)
    said = f"{file} is valid until {made.not_valid_after_utc:%Y-%m-%d}"
    if left < timedelta(0) or made.not_valid_before_utc > datetime.now(UTC):
        return Finding("certificate", FAILED, f"{said}, from {made.not_valid_before_utc:%Y-%m-%d}", "renew it")
    return Finding("certificate", WARNING if left < SOON else OK, said, "renew it" if left < SOON else "")


def _proxies() -> Finding:
    given = sorted({name for name in os.environ if name.lower() in PROXIES and os.environ[name]})
    if not given:
        return Finding("proxy", OK, "none in the environment")
    said = f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set, which a node does not use"
    if urllib.request.proxy_bypass("127.0.0.1"):
        return Finding("proxy", OK, said)
    return Finding(
        "proxy", WARNING, f"{said}; curl and other clients here would ask it for 127.0.0.1",
        "export no_proxy=127.0.0.1,localhost; engine and peers have to be reached without it",
    )  # fmt: skip


def _address(node: NodeConfig) -> Iterator[Finding]:
    url = node.url_at(node.port)
    far = [peer.url for peer in node.peers if not is_loopback(host_of(peer.url))]
    if is_loopback(host_of(url)) and far:
        yield Finding(
            "url", FAILED, f"peers are told {url}, at which {far[0]} finds itself",
            "set `url` to an address of this machine, and `host: 0.0.0.0`; then send your card anew",
        )  # fmt: skip
    elif is_loopback(node.host) and not is_loopback(host_of(url)):
        yield Finding(
            "url", WARNING, f"peers are told {url}, and the node listens at {node.host} alone",
            "set `host: 0.0.0.0`, unless a proxy on this machine passes on what comes",
        )  # fmt: skip
    else:
        yield Finding("url", OK, f"peers reach this node at {url}")
    if not node.keys and not is_loopback(node.host):
        yield Finding(
            "users", WARNING, f"without `keys`, whoever reaches {netloc(node.host, node.port)} is a user",
            "list API keys of your users in `keys`, unless the network lets nobody else in",
        )  # fmt: skip


def _ledger(node: NodeConfig, identity: Identity) -> Iterator[Finding]:
    if node.ledger is None:
        return
    file = Path(node.ledger.file)
    try:
        grants = agreed(node.ledger, identity.name).grants
        if not file.exists():
            if not os.access(file.parent, os.W_OK):
                yield Finding("ledger", FAILED, f"{file.parent} cannot be written", "choose another `ledger.file`")
                return
            yield Finding("ledger", OK, f"{file} is made at the first start")
        else:
            seen = audit(file)
            if seen.owner != identity.name:
                yield Finding("ledger", FAILED, f"{file} is of {seen.owner}", "each node has a file of its own")
                return
            if seen.problems:
                yield Finding("ledger", FAILED, f"{file}: {seen.problems[0]}", f"wwwserve ledger verify {file}")
                return
            yield Finding("ledger", OK, f"{file}: {seen.entries:,} entries, as they should be")
    except (ConfigError, JournalError, OSError) as error:
        yield Finding("ledger", FAILED, str(error), "correct `ledger`")
        return
    for peer in node.peers:
        if peer.key not in grants:
            yield Finding(
                "ledger", WARNING, f"{peer.name or peer.key} was granted nothing, so nothing is traded with it",
                "add it to `ledger.limits`, or to the genesis of all nodes",
            )  # fmt: skip


async def _peers(node: NodeConfig, identity: Identity, running: dict[str, Any] | None) -> list[Finding]:
    seen = {peer["key"]: peer for peer in running["peers"]} if running is not None else {}
    others = running.get("other_versions", []) if running is not None else []
    found = [
        Finding("version", FAILED, f"{each['label']} at {each['url']} {each['reason']}", "see docs/operations.md")
        for each in others
    ]
    if not isinstance(node.membership, StaticConfig):
        there = [each for each in seen.values() if each["there"]]
        if running is None:
            return [Finding("peers", OK, "are found by zenoh, once the node runs")]
        if not there:
            asked = "are `membership.connect` and `network` right?"
            return [*found, Finding("peers", WARNING, "no peer is there", asked)]
        return [*found, Finding("peers", OK, f"{len(there)} are there")]
    if not node.peers:
        return [Finding("peers", WARNING, "there are none", "wwwserve join FILE takes the card of one")]
    found += _credit(node, running)
    answers = await asyncio.gather(*(ask(node, identity, peer.key, peer.url) for peer in node.peers))
    for peer, answer in zip(node.peers, answers, strict=True):
        if peer.key in {each["key"] for each in others}:
            continue  # which is named above
        heard = seen[peer.key]["there"] if peer.key in seen else None
        found.append(_peer(f"{peer.name or peer.key} at {peer.url}", answer, heard, node))
    return found


def _credit(node: NodeConfig, running: dict[str, Any] | None) -> Iterator[Finding]:
    """Of peers who do not agree on credit with this node, as its ledger heard from them."""
    ledger = (running or {}).get("ledger")
    if node.ledger is None or not ledger:
        return
    declined = {each["peer"]: each["reason"] for each in ledger.get("no_channel", [])}
    adding = {each["peer"]: each["refill_declined"] for each in ledger["channels"]}
    for peer in node.peers:
        who, limits = f"{peer.name or peer.key} at {peer.url}", node.ledger.limits.get(peer.key)
        said = declined.get(peer.key) or adding.get(peer.key)
        if not said:
            continue
        what = "no channel is open with" if peer.key in declined else "no credit is added to the channel with"
        if limits is None:
            do = "all nodes of a network need the same genesis: compare them by `wwwserve genesis show`"
            yield Finding("credit", WARNING, f"{what} {who}: {said}", do)
            continue
        told = _TERMS.search(said)
        if told is None and peer.key in declined:
            do = "does it have a ledger, this node in its limits or genesis, and not in its `ledger.closed`?"
            yield Finding("credit", WARNING, f"{what} {who}: {said}", do)
            continue
        said = f"it has ours {float(told[2]):g}, theirs {float(told[1]):g} for this node" if told else said
        yield Finding(
            "credit", WARNING, f"{what} {who}: {said}, and `ledger.limits` here ours {limits.ours:g}, theirs "
            f"{limits.theirs:g}", "what is `ours` on one side has to be `theirs` on the other: agree with its operator "
            "on two numbers, correct `ledger.limits` of the two, and restart",
        )  # fmt: skip


def _peer(who: str, answer: Answer, heard: bool | None, node: NodeConfig) -> Finding:
    """Of one peer; `heard` is whether the own node hears it, None where that does not run."""
    at = node.url_at(node.port)
    if answer.view is not View.LISTED:
        do = {
            View.STRANGER: "send it your card, `wwwserve card`; it has to join that, and start anew",
            View.MOVED: f"this node says {at}: correct `url`, or send it your card anew, `wwwserve card`",
            View.ITSELF: "correct the peer's `url`",
            View.OTHER_KEY: "ask its operator for its card, by a way that you trust",
            View.OLDER: "upgrade it, see docs/operations.md",
            View.UNREACHABLE: "does it run? Is its `url` right, its port open from here, and has it `tls` as this one?",
            View.ODD: "is its `url` that of a node?",
        }[answer.view]
        return Finding("peer", FAILED, f"{who}: {answer.view.value}: {answer.said}", do)
    if answer.ahead_s is not None and abs(answer.ahead_s) > SKEW_S:
        side = "ahead" if answer.ahead_s > 0 else "behind"
        return Finding(
            "peer", FAILED, f"{who}: its clock is {abs(answer.ahead_s):.0f} s {side}, at most {SKEW_S:g} are allowed",
            SET_CLOCK,
        )  # fmt: skip
    if heard is False:
        return Finding(
            "peer", FAILED, f"{who}: {answer.view.value}, and is not heard here",
            f"does it reach {at}? Has it the key that is listed here? The logs of both say what was refused",
        )  # fmt: skip
    clock = "" if answer.ahead_s is None else f"; clocks are {abs(answer.ahead_s):.1f} s apart"
    if answer.ahead_s is not None and abs(answer.ahead_s) > MOST_AHEAD_S:
        return Finding("peer", WARNING, f"{who}: {answer.view.value}{clock}", SET_CLOCK)
    return Finding("peer", OK, f"{who}: {answer.view.value}{clock}")
