"""A node as it is, for people and programs: `GET /network`."""

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
)
from wwwserve.agents.protocol import CACHED_INPUT, INPUT, OUTPUT, PAYMENTS, TARIFF_SIZE
from wwwserve.serving.dispatcher import Dispatcher


def overview(node: Dispatcher) -> dict[str, Any]:
    """The node as it is, for people and programs."""
    now_s, load, provider = node.clock(), node.engine.load(), node.provider
    peers, records = [], node.delegation.duels.records
    named = {peer.key: peer.name for peer in node.config.peers}
    for row, name in enumerate(provider.names):
        advert, vector = node.peers.get(name), provider.peers.adverts[row]
        there = advert is not None
        peers.append(
            {
                "key": name, "label": node.labels.get(name) or named.get(name),
                "url": advert.url if advert else None, "there": there,
                "serves": list(advert.serves) if advert else [],
                "age_s": round(now_s - vector[AD_TIME_S], 3) if there else None,
                "running": vector[AD_RUNNING], "waiting": vector[AD_WAITING],
                "kv_use": vector[AD_KV_TOKENS] / vector[AD_KV_CAPACITY] if vector[AD_KV_CAPACITY] else None,
                "tariff": _tariff(vector[AD_TARIFF : AD_TARIFF + TARIFF_SIZE].tolist()), "stake": vector[AD_STAKE],
                "left_alone_s": round(node.delegation.cooling.left_s(name), 3),
                "out": sum(each.peer == name for each in node.delegation.handed.values()),
                "duels_won": int(provider.peers.peer_stats[row, DUELS_WON]),
                "duels_lost": int(provider.peers.peer_stats[row, DUELS_LOST]),
                "judged": asdict(records[name]) if name in records else None,
            }
        )  # fmt: skip
    return {
        "name": node.config.name, "key": node.messages.name, "run": node.messages.run, "url": node.url,
        "policy": provider.policy.name,
        "serves": node.serves,
        "engine": {
            "url": node.engine.url, "up": node.engine.healthy, "reason": node.engine.reason,
            "running": load.running, "waiting": load.waiting,
            "kv_use": load.kv_tokens / node.engine.profile.kv_tokens, "profile": asdict(node.engine.profile),
        },
        "held": provider.held, "remote": node.metrics.remote_now, "speed": node.speed,
        "payment": PAYMENTS[provider.market.payment], "tariff": _tariff(provider.tariff),
        "cost": _tariff(provider.cost), "markup": provider.markup,
        "margin": provider.margin,
        "prefix": {
            "entries": len(node.prefixes),
            **{
                where: {"drift": drift.share, "reports": drift.reports, "alarm": drift.alarm}
                for where, drift in node.metrics.drifts.items()
            },
        },
        "requests": node.metrics.totals(), "peers": peers, "decisions": list(node.decisions),
        "ledger": node.accounts.overview() if node.accounts is not None else None,
    }  # fmt: skip


def _tariff(tariff: Sequence[float]) -> dict[str, float]:
    """A tariff for people and programs, credits per 1000 tokens."""
    return {"input": tariff[INPUT], "cached_input": tariff[CACHED_INPUT], "output": tariff[OUTPUT]}
