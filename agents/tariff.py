"""What a request costs the provider that runs it, and the tariff made of that.

A provider's *marginal cost* of one more request has three parts, in credits: *compute*; *present*, what the delay that
it brings takes from those that run there; *future*, what it takes from those who come there during its stay. It is
kept per token of input, of input that the engine still has in its prefix cache and of output, for a request of the
lengths that are usual there. The *tariff* is the cost plus a *markup*, in credits per 1000 tokens; the markup on input
is as much less than that on output as users pay less for it. Own users' requests lose their value when they are late;
of peers' requests the lateness clause takes the payment.
"""

import math

import numpy as np

from wwwserve.agents.classes import CLASS_MAX, CLASS_MEAN, CLASS_MEDIAN, CLASS_SIGMA, CLASS_VALUE, worth_of
from wwwserve.agents.estimate import LOGISTIC, chance_on_time, expect, full_batch, marginal_delay
from wwwserve.agents.kernel import Floats, Ints, kernel
from wwwserve.agents.knowledge import (
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_PER_TOKEN_S,
    AD_RUNNING,
    AD_WAITING,
)
from wwwserve.agents.protocol import CACHED_INPUT, INPUT, MICRO, OUTPUT, TARIFF_SIZE

MARKUPS = np.array([-0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8])  # credits for 1000 tokens of output
MAX_TARIFF = 1000.0  # credits per 1000 tokens
CACHED_SHARE = 0.25  # of the compute of other input; by GPU time 0.15 to 0.45
FOLLOWING = 2.0  # who is delayed is in the way of who comes after: times what those who run now lose
AHEAD = 1.0 - math.exp(-0.5)  # how far a load has gone to where it is going, half a service time from now


@kernel
def in_micro(price: float) -> int:
    """A price in credits as micro-credits."""
    return round(price * MICRO)


@kernel
def write_compute(compute: Floats, own: Floats, per_ktok: float) -> None:
    """Write what a token of each kind costs in compute, credits [TARIFF_SIZE]; 1000 of output cost `per_ktok` credits.

    One of input costs as much less as it takes the engine less time than one of output does in a full batch of requests
    of the lengths that are usual in the own advert [ADVERT_SIZE].
    """
    at_once, iteration_s = full_batch(own)
    compute[OUTPUT] = per_ktok / 1000.0
    compute[INPUT] = compute[OUTPUT] * min(1.0, own[AD_PER_TOKEN_S] * at_once / iteration_s)
    compute[CACHED_INPUT] = CACHED_SHARE * compute[INPUT]


@kernel
def on_time_by(deadline_s: float, expected_s: float) -> float:
    """Chance that what is expected to take `expected_s` takes at most `deadline_s`: `chance_on_time` for one deadline
    and a known length, with a log-logistic error of shape 8 (0.21 in log time), the tails beyond a factor of 3 cut."""
    if deadline_s >= 3.0 * expected_s:
        return 1.0
    if 3.0 * deadline_s <= expected_s:
        return 0.0
    ratio = expected_s / deadline_s
    fourth = ratio * ratio * ratio * ratio  # a power of two takes no logarithm
    return 1.0 / (1.0 + fourth * fourth)


@kernel
def share_paid(promised_s: float, expected_s: float) -> float:
    """Share of its price that the lateness clause is expected to leave of a request that was promised in `promised_s`
    and is expected to take `expected_s`: 1 less the chance to be later than u, over u from 1 to 2 promised times."""
    late = 0.0
    for k in range(4):
        late += 1.0 - on_time_by((1.125 + 0.25 * k) * promised_s, expected_s)
    return 1.0 - 0.25 * late


@kernel
def expected_output(mean: float, generated: float, longest: float) -> float:
    """Tokens that an answer of which `generated` are there is expected to have."""
    return min(max(mean, 1.25 * generated), max(longest, generated + 1.0))


@kernel
def value_lost_per_s(known: Floats, deadlines: Floats, generated: float, elapsed_s: float, token_s: float) -> float:
    """What a second of delay takes from an own user's running request, credits.

    known [CLASS_SIZE], deadlines [T]: of its class; `generated` tokens are there, `elapsed_s` after its arrival, and
    others come at one in `token_s`. The length is log-logistic (median and sigma of the class), given `generated`; the
    loss is its density at the token that is out at the deadline.
    """
    shape = LOGISTIC / max(known[CLASS_SIGMA], 1e-2)
    alive = 1.0 + (max(generated, 1e-9) / known[CLASS_MEDIAN]) ** shape  # 1 over the chance to be longer
    lost = 0.0
    for k in range(deadlines.size):
        more = (deadlines[k] - elapsed_s) / token_s
        tokens = generated + more
        if more <= 0.0 or tokens >= known[CLASS_MAX]:
            continue
        odds = (tokens / known[CLASS_MEDIAN]) ** shape
        lost += shape * odds / (tokens * (1.0 + odds) * (1.0 + odds))
    return float(known[CLASS_VALUE] * lost * alive / (deadlines.size * token_s))


@kernel
def payment_lost_per_s(price: float, promised_s: float, expected_s: float) -> float:
    """What a second of delay takes, by the lateness clause, from the payment of `price` credits for a peer's request
    that was promised in `promised_s` and is expected to take `expected_s`."""
    falling = on_time_by(2.0 * promised_s, expected_s) - on_time_by(promised_s, expected_s)
    return float(price * falling / promised_s)


@kernel
def future_loss(own: Floats, rates: Floats, known: Floats, deadlines: Floats, n_deadlines: int) -> float:
    """What one more request of usual lengths takes from those who come during its stay, credits; peers' requests count
    as own users' of the class that they are most like.

    own [ADVERT_SIZE]: the fresh own state; rates [C]: requests that are placed here, 1/s; known [C, CLASS_SIZE];
    deadlines [>= C, >= T], s, of which the first T = `n_deadlines` are read. The loss of their chance to be on time is
    the mean of that at three loads: the one expected half a service time from now, and its standard deviation, as of a
    Poisson count, less or more.
    """
    prompt, output = own[AD_MEAN_PROMPT], max(1.0, own[AD_MEAN_OUTPUT])
    cached = max(0.0, prompt - own[AD_MEAN_UNCACHED])
    first_s, token_s = expect(own, 0.0, prompt, cached)
    stay_s = first_s + output * token_s
    steady = 0.0
    for c in range(rates.size):
        steady += rates[c] * (first_s + known[c, CLASS_MEAN] * token_s)
    now = own[AD_RUNNING] + own[AD_WAITING]
    ahead = now + AHEAD * (steady - now)
    spread = math.sqrt(max(ahead, 1.0))
    lost = 0.0
    for k in range(-1, 2):
        more = max(ahead + k * spread, 0.0) - now
        first_s, token_s = expect(own, more, prompt, cached)
        later_first_s, later_token_s = expect(own, more + 1.0, prompt, cached)
        for c in range(rates.size):
            if rates[c] > 0.0:
                due_s = deadlines[c][:n_deadlines]
                median, sigma, longest = known[c, CLASS_MEDIAN], known[c, CLASS_SIGMA], known[c, CLASS_MAX]
                before = chance_on_time(due_s, 0.0, first_s, token_s, median, sigma, longest)
                after = chance_on_time(due_s, 0.0, later_first_s, later_token_s, median, sigma, longest)
                lost += rates[c] * known[c, CLASS_VALUE] * max(0.0, before - after) / 3.0
    return float(stay_s * lost)


@kernel
def write_cost(cost: Floats, compute: Floats, at_once: float, spread: float, future: float, own: Floats) -> None:
    """Write the marginal cost of a token of input, of cached input and of output, credits [TARIFF_SIZE].

    compute [TARIFF_SIZE]: credits a token; `at_once`, `spread`: what a second's delay takes from all that runs there,
    credits/s, if it comes at once, as from a prefill, and if it comes over the stay of a request of usual length;
    future: see `future_loss`.
    """
    computed_s, read_s, output_s = marginal_delay(own)
    reading = FOLLOWING * spread * read_s
    cost[INPUT] = compute[INPUT] + FOLLOWING * at_once * computed_s + reading
    cost[CACHED_INPUT] = compute[CACHED_INPUT] + reading
    cost[OUTPUT] = compute[OUTPUT] + FOLLOWING * spread * output_s + future / max(1.0, own[AD_MEAN_OUTPUT])


@kernel
def cost_of(cost: Floats, prompt: float, cached: float, output: float) -> float:
    """Marginal cost of a request, `cached` tokens of whose prompt are in the prefix cache, credits."""
    return float(cost[INPUT] * (prompt - cached) + cost[CACHED_INPUT] * cached + cost[OUTPUT] * output)


@kernel
def write_tariff(tariff: Floats, cost: Floats, dearer: float, markup: float) -> None:
    """Write the tariff [TARIFF_SIZE], credits per 1000 tokens: the cost [TARIFF_SIZE] of a token times `dearer`, and
    the markup, credits for 1000 tokens of output."""
    tariff[INPUT] = 1000.0 * dearer * cost[INPUT] + markup * worth_of(1.0, 0.0, 0.0)
    tariff[CACHED_INPUT] = 1000.0 * dearer * cost[CACHED_INPUT] + markup * worth_of(0.0, 1.0, 0.0)
    tariff[OUTPUT] = 1000.0 * dearer * cost[OUTPUT] + markup * worth_of(0.0, 0.0, 1.0)
    for k in range(TARIFF_SIZE):
        tariff[k] = min(max(tariff[k], 0.0), MAX_TARIFF)


@kernel
def price_by(tariff: Floats | Ints, prompt: float, cached: float, output: float) -> float:
    """Price of a request, `cached` tokens of whose prompt are in the prefix cache, by a tariff per 1000 tokens; in the
    tariff's unit."""
    given = tariff[INPUT] * (prompt - cached) + tariff[CACHED_INPUT] * cached
    return float((given + tariff[OUTPUT] * output) / 1000.0)
