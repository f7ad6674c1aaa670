"""A node as it is, for people and programs: `GET /network`, and what its console shows of it."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from wwwserve.agents.knowledge import (
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_RUNNING,
    AD_STAKE,
    AD_TARIFF,
    AD_TIME_S,
    AD_WAITING,
    DUELS_LOST,
    DUELS_WON,
    OVERDUE_S,
    make_peer_stats,
    pace,
    record,
)
from wwwserve.agents.protocol import CACHED_INPUT, INPUT, OUTPUT, PAYMENTS, TARIFF_SIZE, VOTE_A, VOTE_B, VOTE_SILENT
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.adapter import Engine
from wwwserve.serving.metrics import Traffic
from wwwserve.serving.versions import SPEAKS, advice, common

VOTES = {VOTE_A: "a", VOTE_B: "b", VOTE_SILENT: "silent"}
NO_TRAFFIC = Traffic()


def warm_up() -> None:
    """Have all compiled that `overview` calls, which would else be done while a node serves."""
    stats = make_peer_stats(1)[0]
    pace(stats)
    record(stats)


def overview(node: Dispatcher, most_peers: int | None = None) -> dict[str, Any]:
    """The node as it is; of more peers than `most_peers` those that are there and with which it has most to do."""
    provider, load, each = node.provider, node.engine.load(), node.engine.each()
    rows = _rows(node, most_peers)
    out = Counter(each.peer for each in node.delegation.handed.values())
    return {
        "name": node.config.name, "key": node.messages.name, "run": node.messages.run, "url": node.url,
        "policy": provider.policy.name,
        "serves": node.serves, "protocol": list(SPEAKS),
        "engine": {
            "url": node.engine.url, "up": node.engine.healthy, "reason": node.engine.reason,
            "running": load.running, "waiting": load.waiting,
            "kv_use": load.kv_tokens / node.engine.profile.kv_tokens, "profile": asdict(node.engine.profile),
            "each": [_engine(one, *each[one.label]) for one in node.engine.engines],
        },
        "held": provider.held, "remote": node.metrics.remote_now, "speed": node.speed,
        "payment": PAYMENTS[provider.market.payment], "tariff": _tariff(provider.tariff),
        "cost": _tariff(provider.cost), "markup": provider.markup,
        "margin": provider.margin, "stake": provider.stake,
        "prefix": {"entries": len(node.prefixes), **{where: _cache(node, where) for where in node.metrics.drifts}},
        "requests": node.metrics.totals(), "peers_known": len(provider.names),
        "peers": [_peer(node, row, out[provider.names[row]]) for row in rows],
        "other_versions": [
            {
                "key": name, "label": each.label, "url": each.url, "speaks": list(each.speaks),
                "reason": advice(each.speaks),
                "age_s": round(asyncio.get_running_loop().time() - each.heard_s, 3),
            } for name, each in node.membership.unspoken().items()
        ],
        "decisions": list(node.decisions),
        "duels": _duels(node),
        "ledger": node.accounts.overview() if node.accounts is not None else None,
    }  # fmt: skip


def _engine(engine: Engine, takes: float, running: float, waiting: float, kv_use: float) -> dict[str, Any]:
    """One of the own engines, with what `Pool.each` says of it."""
    return {
        "engine": engine.label, "url": engine.url, "up": engine.healthy, "takes": bool(takes), "reason": engine.reason,
        "running": running, "waiting": waiting, "kv_use": kv_use, "out": engine.out,
    }  # fmt: skip


def _rows(node: Dispatcher, most: int | None) -> Sequence[int]:
    names = node.provider.names
    if most is None or len(names) <= most:
        return range(len(names))

    def rank(row: int) -> tuple[bool, int]:
        with_it = node.metrics.traffic.get(names[row], NO_TRAFFIC)
        return names[row] in node.peers, with_it.handed + with_it.served

    return sorted(sorted(range(len(names)), key=rank, reverse=True)[:most])


def _peer(node: Dispatcher, row: int, out: int) -> dict[str, Any]:
    """A peer, as far as it is known here."""
    provider, name = node.provider, node.provider.names[row]
    advert, vector, stats = node.peers.get(name), provider.peers.adverts[row], provider.peers.peer_stats[row]
    there, records = advert is not None, node.delegation.duels.records
    named = {peer.key: peer.name for peer in node.config.peers}
    traffic = node.metrics.traffic.get(name, NO_TRAFFIC)
    return {
        "key": name, "label": node.labels.get(name) or named.get(name),
        "url": advert.url if advert else None, "there": there,
        "serves": list(advert.serves) if advert else [],
        "protocol": common(advert.speaks) if advert else None,
        "age_s": round(node.clock() - vector[AD_TIME_S], 3) if there else None,
        "running": vector[AD_RUNNING], "waiting": vector[AD_WAITING],
        "kv_use": vector[AD_KV_TOKENS] / vector[AD_KV_CAPACITY] if vector[AD_KV_CAPACITY] else None,
        "tariff": _tariff(vector[AD_TARIFF : AD_TARIFF + TARIFF_SIZE].tolist()), "stake": vector[AD_STAKE],
        "left_alone_s": round(node.delegation.cooling.left_s(name), 3),
        "out": out, **asdict(traffic),
        "pace": pace(stats), "record": record(stats), "overdue_s": stats[OVERDUE_S],
        "duels_won": int(stats[DUELS_WON]), "duels_lost": int(stats[DUELS_LOST]),
        "judged": asdict(records[name]) if name in records else None,
    }  # fmt: skip


def _cache(node: Dispatcher, where: str) -> dict[str, Any]:
    """What is known of prefix caches here or at peers."""
    drift, tokens = node.metrics.drifts[where], node.metrics.prompts[where]
    return {"drift": drift.share, "reports": drift.reports, "alarm": drift.alarm, **asdict(tokens)}


def _duels(node: Dispatcher) -> dict[str, Any]:
    """The own duels: how they ended, and the last of them."""
    duels, now_s = node.delegation.duels, asyncio.get_running_loop().time()
    return {
        "probability": node.config.market.duel_probability, "open": duels.open, **node.metrics.duels,
        "recent": [
            {
                "ago_s": round(now_s - each.at_s, 1), "executors": each.executors, "outcome": each.outcome,
                "winner": each.winner,
                "votes": {judge: VOTES.get(vote, "undecided") for judge, vote in each.votes.items()},
            } for each in duels.recent
        ],
    }  # fmt: skip


def _tariff(tariff: Sequence[float]) -> dict[str, float]:
    """A tariff for people and programs, credits per 1000 tokens."""
    return {"input": tariff[INPUT], "cached_input": tariff[CACHED_INPUT], "output": tariff[OUTPUT]}
