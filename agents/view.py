"""The observation: what a policy sees of its own node, the request at the head, and the candidates for it.

Features are in physical units and clipped to the range given here, so rules read them as they are; `normalise` brings
them to about [-1, 1] for networks. The order, units and ranges are versioned: a policy trained on another version is
refused. The own node and the candidates have the same features, so one encoder serves both.
"""

import math
from typing import NamedTuple

import numpy as np

from wwwserve.agents.classes import (
    CLASS_LAST_DEADLINE_S,
    CLASS_MAX,
    CLASS_MEAN,
    CLASS_MEDIAN,
    CLASS_SIGMA,
    CLASS_VALUE,
)
from wwwserve.agents.decision import CANDIDATES, FIRST_CANDIDATE, HOLD, LOCAL, NODES, ROUTES, may_hold, may_offer
from wwwserve.agents.estimate import chance_on_time, expect, slowdown
from wwwserve.agents.kernel import Bytes, Floats, Ints, Record, Records, Singles, kernel
from wwwserve.agents.knowledge import (
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_PER_SEQ_S,
    AD_PREFILL,
    AD_REUSE_S,
    AD_RUNNING,
    AD_STAKE,
    AD_TARIFF,
    AD_TIME_S,
    AD_WAITING,
    AD_WEIGHT_S,
    OUT,
    OVERDUE_S,
    Peers,
    duel_rate,
    pace,
    record,
    refused_since,
    sent_since,
)
from wwwserve.agents.protocol import MICRO, PER_REQUEST, TARIFF_SIZE
from wwwserve.agents.tariff import cost_of, price_by

VIEW_VERSION = 9


class Feature(NamedTuple):
    """One number of the observation."""

    name: str
    unit: str
    low: float
    high: float
    scale: str  # "linear" or "log": how `normalise` compresses it
    meaning: str


NODE_FEATURES = (
    Feature("own", "0/1", 0, 1, "linear", "this is the own node, seen fresh"),
    Feature("finish_s", "s", 0, 1e4, "log", "expected time from now until the request is done there"),
    Feature("chance", "share", 0, 1, "linear", "chance to be on time, mean over the deadlines, given its delivery"),
    Feature("first_token_s", "s", 0, 1e4, "log", "expected time from now to the first token"),
    Feature("token_s", "s", 0, 1, "log", "expected time per token"),
    Feature("slowdown_s", "s", 0, 1e4, "log", "delay it would bring to the requests that run there, summed"),
    Feature("load_s", "s", 0, 1e4, "log", "time per token, summed over the requests there and those sent since"),
    Feature("finish_rank", "share", 0, 1, "linear", "share of the other nodes in view expected to finish it earlier"),
    Feature("speed_rank", "share", 0, 1, "linear", "share of the other nodes in view that decode faster when idle"),
    Feature("kv_use", "share", 0, 1, "linear", "share of the KV cache in use"),
    Feature("kv_tokens", "tokens", 0, 1e7, "log", "tokens of the KV cache in use"),
    Feature("cached", "share", 0, 1, "linear", "share of the prompt in its prefix cache; of peers, as is believed"),
    Feature("uncached", "tokens", 0, 65536, "log", "prompt tokens that it would have to compute"),
    Feature("cached_age_s", "s", 0, 1e4, "log", "time since what is cached was last used by this origin"),
    Feature("reuse_s", "s", 0, 1e6, "log", "how long a block that is not used stays in its prefix cache"),
    Feature("prefill", "tokens", 0, 1e6, "log", "prompt tokens to be computed there, by its advert"),
    Feature("running", "requests", 0, 512, "log", "requests running in the engine"),
    Feature("waiting", "requests", 0, 512, "log", "requests waiting in the engine"),
    Feature("held_tighter", "requests", 0, 512, "log", "undecided there, of classes no looser than this request's"),
    Feature("held_looser", "requests", 0, 512, "log", "undecided there, of looser classes"),
    Feature("sent", "requests", 0, 64, "log", "sent there since its advert"),
    Feature("out", "requests", 0, 256, "log", "own requests that are there now"),
    Feature("cost", "share", 0, 10, "log", "price of the request there, here its marginal cost, over its value"),
    Feature("utility", "share", -10, 1, "log", "chance less cost: what it brings there, over its value"),
    Feature("stake", "credits", 0, 100, "log", "its stake"),
    Feature("pace", "log ratio", -1, 5, "linear", "tokens promised by now over tokens streamed"),
    Feature("record", "log ratio", -3, 5, "linear", "actual over promised duration of what it completed"),
    Feature("overdue_s", "s", 0, 1e4, "log", "time past the promised first token, summed over requests out there"),
    Feature("age_s", "s", 0, 60, "log", "age of its advert"),
    Feature("duel_rate", "share", 0, 1, "linear", "share of duels won"),
    Feature("refused", "0/1", 0, 1, "linear", "it refused a request under this advert"),
)
REQUEST_FEATURES = (
    Feature("prompt", "tokens", 0, 65536, "log", "prompt length"),
    Feature("turn", "1", 0, 512, "log", "its place in its session, from 1"),
    Feature("since_s", "s", 0, 1e4, "log", "time from the answer before to its arrival, 0 on a first turn"),
    Feature("output", "tokens", 0, 65536, "log", "expected output length"),
    Feature("output_sigma", "1", 0, 3, "linear", "standard deviation of the log output length"),
    Feature("value", "credits", 0, 100, "log", "what an answer in time is worth"),
    Feature("waited_s", "s", 0, 1e4, "log", "time since arrival"),
    Feature("first_slack_s", "s", -100, 1e4, "log", "time left to the first deadline"),
    Feature("last_slack_s", "s", -100, 1e4, "log", "time left to the last deadline"),
    Feature("looseness", "share", 0, 1, "linear", "share of the market's other classes with a tighter deadline"),
    Feature("refusals", "requests", 0, CANDIDATES, "linear", "candidates that refused it in this round of decisions"),
    Feature("candidates", "nodes", 0, CANDIDATES, "linear", "candidates drawn for it"),
)
SELF_FEATURES = (
    Feature("has_request", "0/1", 0, 1, "linear", "a request waits at the head"),
    Feature("advert_due", "0/1", 0, 1, "linear", "the markup chosen now goes out with the next advert"),
    Feature("held", "requests", 0, 512, "log", "own users' requests undecided"),
    Feature("arrivals_per_s", "1/s", 0, 100, "log", "own users' arrivals, averaged over the last minute or so"),
    Feature("remote", "requests", 0, 512, "log", "peers' requests running or waiting here"),
    Feature("credit", "credits", 0, 1e6, "log", "free credit"),
    Feature("markup", "credits", -1, 1, "linear", "own markup in force, for 1000 tokens of output"),
    Feature("own_cost", "share", 0, 10, "log", "marginal cost of a usual request here, over its value"),
    Feature("peer_price", "share", 0, 10, "log", "lowest price of peers for a usual request, over its value"),
    Feature("peers", "nodes", 0, 512, "log", "peers heard lately"),
    Feature("sold_per_s", "1/s", 0, 100, "log", "peers' requests taken, averaged over the last minute or so"),
)

(
    OWN, FINISH_S, CHANCE, FIRST_TOKEN_S, TOKEN_S, SLOWDOWN_S, LOAD_S, FINISH_RANK, SPEED_RANK, KV_USE, KV_TOKENS,
    CACHED, UNCACHED, CACHED_AGE_S, REUSE_S, PREFILL, RUNNING, WAITING, HELD_TIGHTER, HELD_LOOSER, SENT_SINCE,
    OUT_THERE, COST, UTILITY, STAKE, PACE, RECORD, OVERDUE, AGE_S, DUEL_RATE, REFUSED,
) = range(len(NODE_FEATURES))  # fmt: skip
(
    PROMPT, TURN, SINCE_S, OUTPUT, OUTPUT_SIGMA, VALUE, WAITED_S, FIRST_SLACK_S, LAST_SLACK_S, LOOSENESS, REFUSALS,
    N_CANDIDATES,
) = range(len(REQUEST_FEATURES))  # fmt: skip
(
    HAS_REQUEST, ADVERT_DUE, HELD, ARRIVALS_PER_S, REMOTE, CREDIT, MARKUP, OWN_COST, PEER_PRICE, PEERS,
    SOLD_PER_S,
) = range(len(SELF_FEATURES))  # fmt: skip


def bounds(features: tuple[Feature, ...]) -> tuple[Singles, Singles]:
    """Lowest and highest value of each feature."""
    return np.array([f.low for f in features], np.float32), np.array([f.high for f in features], np.float32)


_NODE_LOW, _NODE_HIGH = bounds(NODE_FEATURES)
_REQUEST_LOW, _REQUEST_HIGH = bounds(REQUEST_FEATURES)
_SELF_LOW, _SELF_HIGH = bounds(SELF_FEATURES)


class Views(NamedTuple):
    """Observations of a batch of providers, leading axes [...]."""

    nodes: Singles  # [..., NODES, len(NODE_FEATURES)], zeros where there is no candidate
    request: Singles  # [..., len(REQUEST_FEATURES)], zeros without a request
    me: Singles  # [..., len(SELF_FEATURES)]
    routes: Bytes  # [..., ROUTES] 1 where the route is legal; hold alone without a request


class ViewScratch(NamedTuple):
    """Buffers for writing one view."""

    idle_token_s: Floats  # [NODES]
    looser_than: Ints  # [MAX_CLASSES]


def make_views(*shape: int) -> Views:
    """Views of nothing."""
    return Views(
        nodes=np.zeros((*shape, NODES, len(NODE_FEATURES)), np.float32),
        request=np.zeros((*shape, len(REQUEST_FEATURES)), np.float32),
        me=np.zeros((*shape, len(SELF_FEATURES)), np.float32),
        routes=np.zeros((*shape, ROUTES), np.int8),
    )


def log_unit(feature: Feature) -> float:
    """Where a log feature turns from linear to logarithmic."""
    return 1.0 if feature.high > 10 else feature.high / 1000


def scales(features: tuple[Feature, ...]) -> tuple[Singles, Singles]:
    """What `normalise_row` scales each feature by: its unit, 0 for a linear feature, and its full scale."""
    unit = [log_unit(f) if f.scale == "log" else 0.0 for f in features]
    top = [math.log1p(f.high / u) if u else f.high for f, u in zip(features, unit, strict=True)]
    return np.array(unit, np.float32), np.array(top, np.float32)


@kernel
def normalise_row(row: Singles, unit: Singles, top: Singles, out: Singles) -> None:
    """Features [F] brought to about [-1, 1]: x / high, or sign(x) log(1 + |x|/u) / log(1 + high/u)
    with u = 1 above a range of 10 and a thousandth of the range below; `unit` and `top` are `scales`."""
    for k in range(row.size):
        x = row[k]
        if x == 0.0:
            out[k] = 0.0
        elif unit[k] == 0.0:
            out[k] = x / top[k]
        else:
            size = np.float32(math.log1p(abs(x / unit[k])))
            out[k] = (size if x > 0.0 else -size) / top[k]


@kernel
def _normalise_rows(rows: Singles, unit: Singles, top: Singles, out: Singles) -> None:
    for k in range(rows.shape[0]):
        normalise_row(rows[k], unit, top, out[k])


def normalise(values: Singles, features: tuple[Feature, ...]) -> Singles:
    """`normalise_row` for features [..., len(features)]."""
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, len(features))
    out = np.empty_like(rows)
    _normalise_rows(rows, *scales(features), out)
    return out.reshape(values.shape)


@kernel
def _clip(row: Singles, low: Singles, high: Singles) -> None:
    for k in range(row.size):
        row[k] = min(max(row[k], low[k]), high[k])


@kernel
def write_node(
    row: Singles,
    advert: Floats,
    peer_stats: Floats,
    own: bool,
    now_s: float,
    rtt_s: float,
    prompt: float,
    cached: float,
    cached_age_s: float,
    known: Floats,
    deadlines: Floats,
    waited_s: float,
    looser_than: Ints,
    payment: int,
    cost: Floats,
) -> None:
    """One node's features, ranks aside. `cached` of the prompt's tokens are there, last used `cached_age_s` ago.

    `known` [CLASS_SIZE] and `deadlines` [T] are of the request's class; `cost` [TARIFF_SIZE] is the own marginal cost,
    which is read on the own node alone.

    `looser_than` [MAX_CLASSES] is 1 for the classes with a looser deadline than the request's. On the own node
    `peer_stats` are not read, and the request travels nowhere.
    """
    sent = 0.0 if own else sent_since(peer_stats, advert)
    first_s, token_s = expect(advert, sent, prompt, cached)
    if not own:
        first_s += rtt_s  # the request there, its answer back
    row[OWN] = 1.0 if own else 0.0
    row[FIRST_TOKEN_S] = first_s
    row[TOKEN_S] = token_s
    row[SLOWDOWN_S] = slowdown(advert, sent, prompt, cached)
    row[LOAD_S] = token_s * (advert[AD_RUNNING] + advert[AD_WAITING] + sent)
    row[FINISH_S] = first_s + known[CLASS_MEAN] * token_s
    lateness = 0.0 if own else max(0.0, pace(peer_stats)) + max(0.0, record(peer_stats))
    delivery = math.exp(min(lateness, 100.0))  # beyond that nothing is on time, and far beyond it exp overflows
    chance = chance_on_time(
        deadlines, waited_s, first_s * delivery, token_s * delivery, known[CLASS_MEDIAN], known[CLASS_SIGMA],
        known[CLASS_MAX],
    )  # fmt: skip
    if own:
        price = cost_of(cost, prompt, cached, known[CLASS_MEAN])
    elif payment == PER_REQUEST:
        price = 1.0
    else:
        price = price_by(advert[AD_TARIFF : AD_TARIFF + TARIFF_SIZE], prompt, cached, known[CLASS_MEAN])
    share = price / max(known[CLASS_VALUE], 1e-9)
    row[CHANCE] = chance
    row[COST] = share
    row[UTILITY] = chance - share
    row[KV_USE] = advert[AD_KV_TOKENS] / advert[AD_KV_CAPACITY]
    row[KV_TOKENS] = advert[AD_KV_TOKENS]
    row[CACHED] = cached / max(1.0, prompt)
    row[UNCACHED] = prompt - cached
    row[CACHED_AGE_S] = cached_age_s if cached > 0.0 else 0.0
    row[REUSE_S] = advert[AD_REUSE_S]
    row[PREFILL] = advert[AD_PREFILL]
    row[RUNNING] = advert[AD_RUNNING]
    row[WAITING] = advert[AD_WAITING]
    tighter = 0.0
    looser = 0.0
    for c in range(looser_than.size):
        if looser_than[c] > 0:
            looser += advert[AD_HELD + c]
        else:
            tighter += advert[AD_HELD + c]
    row[HELD_TIGHTER] = tighter
    row[HELD_LOOSER] = looser
    row[SENT_SINCE] = sent
    row[STAKE] = advert[AD_STAKE]
    row[AGE_S] = now_s - advert[AD_TIME_S]
    if own:
        row[OUT_THERE] = 0.0
        row[PACE] = 0.0
        row[RECORD] = 0.0
        row[OVERDUE] = 0.0
        row[DUEL_RATE] = 0.5
        row[REFUSED] = 0.0
    else:
        row[OUT_THERE] = peer_stats[OUT]
        row[PACE] = pace(peer_stats)
        row[RECORD] = record(peer_stats)
        row[OVERDUE] = peer_stats[OVERDUE_S]
        row[DUEL_RATE] = duel_rate(peer_stats)
        row[REFUSED] = 1.0 if refused_since(peer_stats, advert) else 0.0
    _clip(row, _NODE_LOW, _NODE_HIGH)


@kernel
def _write_ranks(nodes: Singles, idle_token_s: Floats, count: int) -> None:
    """Ranks among the first `count` nodes, `idle_token_s` [>= count] being their speed when idle."""
    for a in range(count):
        earlier = 0
        faster = 0
        for c in range(count):
            if nodes[c, FINISH_S] < nodes[a, FINISH_S]:
                earlier += 1
            if idle_token_s[c] < idle_token_s[a]:
                faster += 1
        nodes[a, FINISH_RANK] = earlier / max(1, count - 1)
        nodes[a, SPEED_RANK] = faster / max(1, count - 1)


@kernel
def idle_token_time(advert: Floats) -> float:
    """Seconds per token of a lone request on an idle node."""
    return float(advert[AD_WEIGHT_S] + advert[AD_PER_SEQ_S])


@kernel
def write_request_view(
    view: Views, p: Record, a: Record, request: Record, peers: Peers, now_s: float, scratch: ViewScratch
) -> None:
    """The view of a request at the head.

    view: `Views` of one provider; p, a, request: records of `agents.provider`; peers: `agents.knowledge.Peers`;
    scratch: `ViewScratch`.
    """
    nodes, row, routes = view.nodes, view.request, view.routes
    klass = request.klass
    waited_s = now_s - request.arrival_s
    of_class, due_s = p.known[klass], a.deadlines[klass][: a.n_deadlines]
    last_deadline_s = p.known[klass, CLASS_LAST_DEADLINE_S]
    tighter = 0
    scratch.looser_than[:] = 0
    for c in range(a.n_classes):
        if p.known[c, CLASS_LAST_DEADLINE_S] > last_deadline_s:
            scratch.looser_than[c] = 1
        elif p.known[c, CLASS_LAST_DEADLINE_S] < last_deadline_s:
            tighter += 1
    routes[:] = 0
    routes[HOLD] = 1 if may_hold(waited_s, last_deadline_s) else 0
    routes[LOCAL] = 1
    prompt = float(request.prompt)
    write_node(
        nodes[0], p.own, peers.peer_stats[0], True, now_s, a.rtt_s, prompt, float(request.prefix[0]),
        request.prefix_age_s[0], of_class, due_s, waited_s, scratch.looser_than, a.payment, p.cost,
    )  # fmt: skip
    scratch.idle_token_s[0] = idle_token_time(p.own)
    refusals = 0
    for k in range(request.n_candidates):
        j = request.candidates[k]
        write_node(
            nodes[1 + k], peers.adverts[j], peers.peer_stats[j], False, now_s, a.rtt_s, prompt,
            float(request.prefix[1 + k]), request.prefix_age_s[1 + k], of_class, due_s, waited_s,
            scratch.looser_than, a.payment, p.cost,
        )  # fmt: skip
        scratch.idle_token_s[1 + k] = idle_token_time(peers.adverts[j])
        routes[FIRST_CANDIDATE + k] = 1 if may_offer(a.payment, request, peers, k) else 0
        refusals += (request.refused >> k) & 1
    nodes[1 + request.n_candidates :] = 0.0
    _write_ranks(nodes, scratch.idle_token_s, 1 + request.n_candidates)
    row[PROMPT] = prompt
    row[TURN] = request.turn
    row[SINCE_S] = request.arrival_s - request.last_s if request.turn > 1 else 0.0
    row[OUTPUT] = p.known[klass, CLASS_MEAN]
    row[OUTPUT_SIGMA] = p.known[klass, CLASS_SIGMA]
    row[VALUE] = p.known[klass, CLASS_VALUE]
    row[WAITED_S] = waited_s
    row[FIRST_SLACK_S] = due_s[0] - waited_s
    row[LAST_SLACK_S] = last_deadline_s - waited_s
    row[LOOSENESS] = tighter / max(1, a.n_classes - 1)
    row[REFUSALS] = refusals
    row[N_CANDIDATES] = request.n_candidates
    _clip(row, _REQUEST_LOW, _REQUEST_HIGH)


@kernel
def write_idle_view(view: Views, own_advert: Floats, now_s: float) -> None:
    """The view without a request: the own node's load, and hold as the only route."""
    view.nodes[:] = 0.0
    view.request[:] = 0.0
    view.routes[:] = 0
    view.routes[HOLD] = 1
    row = view.nodes[0]
    row[OWN] = 1.0
    row[KV_USE] = own_advert[AD_KV_TOKENS] / own_advert[AD_KV_CAPACITY]
    row[KV_TOKENS] = own_advert[AD_KV_TOKENS]
    row[REUSE_S] = own_advert[AD_REUSE_S]
    row[PREFILL] = own_advert[AD_PREFILL]
    row[RUNNING] = own_advert[AD_RUNNING]
    row[WAITING] = own_advert[AD_WAITING]
    row[STAKE] = own_advert[AD_STAKE]
    row[AGE_S] = now_s - own_advert[AD_TIME_S]
    row[DUEL_RATE] = 0.5
    _clip(row, _NODE_LOW, _NODE_HIGH)


@kernel
def write_view(view: Views, p: Record, a: Record, q: Records, peers: Peers, now_s: float, scratch: ViewScratch) -> None:
    """What provider `p` sees: itself, and the request at its head with the candidates for it, or none. See
    `write_request_view`; `q` are the request records."""
    if p.head >= 0:
        write_request_view(view, p, a, q[p.head], peers, now_s, scratch)
    else:
        write_idle_view(view, p.own, now_s)
    me = view.me
    me[HAS_REQUEST] = 1.0 if p.head >= 0 else 0.0
    me[ADVERT_DUE] = 1.0 if p.advert_due == 1 else 0.0
    me[HELD] = p.held
    me[ARRIVALS_PER_S] = p.arrival_rate.sum()
    me[REMOTE] = p.remote
    me[CREDIT] = p.credit / MICRO
    me[MARKUP] = p.markup
    usual = max(p.known[0, CLASS_VALUE] / p.known[0, CLASS_MEAN] * p.own[AD_MEAN_OUTPUT], 1e-9)  # its value
    me[OWN_COST] = cost_of(p.cost, p.own[AD_MEAN_PROMPT], 0.0, p.own[AD_MEAN_OUTPUT]) / usual
    me[PEER_PRICE] = p.peer_price / usual
    me[PEERS] = p.heard
    me[SOLD_PER_S] = p.sold
    _clip(me, _SELF_LOW, _SELF_HIGH)
