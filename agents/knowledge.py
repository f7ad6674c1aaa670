"""What a provider knows, and how each message changes it.

Two tables. A provider's *advert* is the last thing it said of itself; a provider keeps one row for every peer, and one
for its own engine, which it refreshes at every scrape. Its *statistics* of a peer are what it saw for itself: what it
sent since the last advert, what is still out, and how delivery compares with what was promised. Both are float64
vectors whose columns are named here, so the simulator keeps them for every pair of a batch of markets and a live node
for its own peers, and the same kernels write them.
"""

import math
from typing import NamedTuple

import numpy as np

from wwwserve.agents.classes import MAX_CLASSES
from wwwserve.agents.hardware import (
    BLOCK_TOKENS,
    KV_BLOCKS,
    MAX_NUM_SEQS,
    PER_KV_TOKEN_S,
    PER_PAIR_S,
    PER_SEQ_S,
    PER_TOKEN_S,
    PREFILL_BASE_S,
    WEIGHT_S,
)
from wwwserve.agents.kernel import Floats, Ints, kernel

# Columns of an advert.
AD_TIME_S = 0  # when it was made
AD_RUNNING = 1
AD_WAITING = 2
AD_KV_TOKENS = 3  # tokens in the KV cache, whole blocks
AD_MEAN_PROMPT = 4  # tokens, of its recent requests
AD_MEAN_OUTPUT = 5
AD_CONTEXT = 6  # tokens that a running request is expected to attend to, over its stay
AD_UNSHARED = 7  # share of them that is in the KV cache for it alone, not for others that run as well
AD_MEAN_UNCACHED = 8  # tokens of their prompts that its recent requests had to have computed
AD_PREFILL = 9  # tokens that are still to be prefilled
AD_REUSE_S = 10  # how long a KV block that is not used stays in its prefix cache, s
AD_TARIFF = 11  # credits per 1000 tokens of input, cached input and output, see agents.tariff
AD_STAKE = AD_TARIFF + 3  # credits
AD_HELD = AD_STAKE + 1  # own users' requests its dispatcher holds, by class
AD_WEIGHT_S = AD_HELD + MAX_CLASSES  # the engine profile, see agents.hardware
AD_PER_SEQ_S = AD_WEIGHT_S + 1
AD_PER_KV_TOKEN_S = AD_WEIGHT_S + 2
AD_PREFILL_BASE_S = AD_WEIGHT_S + 3
AD_PER_TOKEN_S = AD_WEIGHT_S + 4
AD_PER_PAIR_S = AD_WEIGHT_S + 5
AD_KV_CAPACITY = AD_WEIGHT_S + 6  # tokens
AD_MAX_NUM_SEQS = AD_WEIGHT_S + 7
ADVERT_SIZE = AD_WEIGHT_S + 8

# Columns of the peer_stats with one peer.
SENT = 0  # requests sent since the advert of SENT_AD_S
SENT_AD_S = 1
REFUSED_AD_S = 2  # time of the last advert by which it was offered what it refused
OUT = 3  # requests it has of ours
PROMISED = 4  # tokens that those should have streamed by now
STREAMED = 5  # tokens that they have
OVERDUE_S = 6  # time past the promised first token, over those that have none
RECORD = 7  # aged sum of log(actual / promised duration) of what it completed
RECORD_WEIGHT = 8
DUELS_WON = 9  # seen from here
DUELS_LOST = 10
PEER_STATS_SIZE = 11

RECORD_AGEING = 0.9  # a new completion takes the weight of old ones down by this
LENGTH_AGEING = 0.99  # the same for mean lengths, which vary more and change less
PACE_PRIOR_TOKENS = 200.0  # evidence of tokens counts in full when there is far more than this
NO_TIME = -1e9
LONGEST_REUSE_S = 1e6  # what AD_REUSE_S is while nothing has had to go
RATE_WINDOW_S = 60.0  # over which arrivals and sales are averaged
OFFLINE_AFTER_S = 10.0  # a peer silent for so long is taken for offline (arXiv 2603.20661)
GOSSIPS_MISSED = 3.5  # or, where gossip is slow, for so many intervals


class Peers(NamedTuple):
    """What a provider knows of its peers, a row for each [N]; its own row, if there is one, is not read."""

    adverts: Floats  # [N, ADVERT_SIZE] the last that each said of itself
    peer_stats: Floats  # [N, PEER_STATS_SIZE]
    credit: Ints  # [N] micro-credits that may be put in escrow with each


@kernel
def write_profile(advert: Floats, profile: Floats, speed: float) -> None:
    """Put an engine profile into an advert, its times divided by `speed` (1 is honest)."""
    advert[AD_WEIGHT_S] = profile[WEIGHT_S] / speed
    advert[AD_PER_SEQ_S] = profile[PER_SEQ_S] / speed
    advert[AD_PER_KV_TOKEN_S] = profile[PER_KV_TOKEN_S] / speed
    advert[AD_PREFILL_BASE_S] = profile[PREFILL_BASE_S] / speed
    advert[AD_PER_TOKEN_S] = profile[PER_TOKEN_S] / speed
    advert[AD_PER_PAIR_S] = profile[PER_PAIR_S] / speed
    advert[AD_KV_CAPACITY] = profile[KV_BLOCKS] * BLOCK_TOKENS
    advert[AD_MAX_NUM_SEQS] = profile[MAX_NUM_SEQS]


@kernel
def on_scrape(
    advert: Floats, now_s: float, running: float, waiting: float, kv_tokens: float, prefill: float, reuse_s: float
) -> None:
    """Take an engine's load into its advert: requests that run and wait, tokens in use and to be prefilled, and how
    long a block that is not used stays in its prefix cache, s."""
    advert[AD_TIME_S] = now_s
    advert[AD_RUNNING] = running
    advert[AD_WAITING] = waiting
    advert[AD_KV_TOKENS] = kv_tokens
    advert[AD_PREFILL] = prefill
    advert[AD_REUSE_S] = min(reuse_s, LONGEST_REUSE_S)


@kernel
def misreport_load(advert: Floats, factor: float) -> None:
    """Say of a load that it is so many times what it is."""
    advert[AD_RUNNING] *= factor
    advert[AD_WAITING] *= factor
    advert[AD_KV_TOKENS] *= factor
    advert[AD_PREFILL] *= factor
    for c in range(MAX_CLASSES):
        advert[AD_HELD + c] *= factor


@kernel
def on_length(advert: Floats, prompt: float, cached: float, output: float) -> None:
    """Age the mean lengths by one more completed request, of whose prompt `cached` tokens were in the prefix cache."""
    advert[AD_MEAN_UNCACHED] += (1.0 - LENGTH_AGEING) * (prompt - cached - advert[AD_MEAN_UNCACHED])
    advert[AD_MEAN_PROMPT] += (1.0 - LENGTH_AGEING) * (prompt - advert[AD_MEAN_PROMPT])
    advert[AD_MEAN_OUTPUT] += (1.0 - LENGTH_AGEING) * (output - advert[AD_MEAN_OUTPUT])


@kernel
def on_sent(peer_stats: Floats, advert: Floats) -> None:
    """A request of ours goes to a peer with this advert. It counts from now on, so that the next is not sent after it
    while the answer is on its way."""
    peer_stats[SENT] = sent_since(peer_stats, advert) + 1.0
    peer_stats[SENT_AD_S] = advert[AD_TIME_S]
    peer_stats[OUT] += 1.0


@kernel
def on_refused(peer_stats: Floats, advert_s: float) -> None:
    """A peer refused one of our requests, offered by its advert of `advert_s`, as sent since which it counts no more.
    What it says in a later advert stands."""
    if peer_stats[SENT_AD_S] == advert_s:
        peer_stats[SENT] = max(0.0, peer_stats[SENT] - 1.0)
    peer_stats[REFUSED_AD_S] = max(peer_stats[REFUSED_AD_S], advert_s)


@kernel
def on_ended(peer_stats: Floats) -> None:
    """One of our requests is no longer with the peer, whatever became of it."""
    peer_stats[OUT] = max(0.0, peer_stats[OUT] - 1.0)


@kernel
def on_answer(peer_stats: Floats, took_s: float, promised_s: float) -> None:
    """The peer completed a request in `took_s` after promising, for the tokens it delivered, `promised_s`."""
    peer_stats[RECORD] = RECORD_AGEING * peer_stats[RECORD] + math.log(max(took_s, 1e-3) / max(promised_s, 1e-3))
    peer_stats[RECORD_WEIGHT] = RECORD_AGEING * peer_stats[RECORD_WEIGHT] + 1.0


@kernel
def clear_progress(peer_stats: Floats) -> None:
    """Begin a new count of what the requests out with a peer have streamed."""
    peer_stats[PROMISED] = 0.0
    peer_stats[STREAMED] = 0.0
    peer_stats[OVERDUE_S] = 0.0


@kernel
def on_progress(
    peer_stats: Floats, waited_s: float, promised_ttft_s: float, promised_tpot_s: float, streamed: float
) -> None:
    """Count one request out with the peer: `streamed` tokens so far, `waited_s` after it was taken."""
    late_s = waited_s - promised_ttft_s
    if late_s > 0.0:
        if streamed == 0:
            peer_stats[OVERDUE_S] += late_s
        due = 1.0 + late_s / promised_tpot_s
        peer_stats[PROMISED] += due
        peer_stats[STREAMED] += min(float(streamed), due)


@kernel
def aged_rate(per_s: float, elapsed_s: float) -> float:
    """A rate of events after a time without one; each event adds 1 / RATE_WINDOW_S."""
    return per_s * max(0.0, 1.0 - elapsed_s / RATE_WINDOW_S)  # a process may be stopped for longer than the window


@kernel
def silent_after_s(gossip_s: float) -> float:
    """Age of its advert, s, beyond which a peer that should send one every `gossip_s` is taken for offline."""
    return max(OFFLINE_AFTER_S, GOSSIPS_MISSED * gossip_s)


@kernel
def sent_since(peer_stats: Floats, advert: Floats) -> float:
    """Requests sent to a peer that its advert does not show yet."""
    return float(peer_stats[SENT]) if peer_stats[SENT_AD_S] == advert[AD_TIME_S] else 0.0


@kernel
def refused_since(peer_stats: Floats, advert: Floats) -> bool:
    """Whether the peer refused what it was offered by its present advert."""
    return bool(peer_stats[REFUSED_AD_S] == advert[AD_TIME_S])


@kernel
def pace(peer_stats: Floats) -> float:
    """In-flight evidence: log of tokens promised by now over tokens streamed, above 0 when the peer lags."""
    return math.log((peer_stats[PROMISED] + PACE_PRIOR_TOKENS) / (peer_stats[STREAMED] + PACE_PRIOR_TOKENS))


@kernel
def record(peer_stats: Floats) -> float:
    """Mean log of actual over promised duration of completed work, drawn toward 0 while there is little."""
    return float(peer_stats[RECORD] / (peer_stats[RECORD_WEIGHT] + 1.0))


@kernel
def duel_rate(peer_stats: Floats) -> float:
    """Share of duels won, from one half toward the observed share."""
    return float((peer_stats[DUELS_WON] + 1.0) / (peer_stats[DUELS_WON] + peer_stats[DUELS_LOST] + 2.0))


def make_peer_stats(*shape: int) -> Floats:
    """Statistics of peers of whom nothing was seen, [*shape, PEER_STATS_SIZE]."""
    peer_stats = np.zeros((*shape, PEER_STATS_SIZE))
    peer_stats[..., [SENT_AD_S, REFUSED_AD_S]] = NO_TIME
    return peer_stats
