"""When would a request be done on a node? From the node's advert, what was sent since, and the lengths one expects."""

import math

from wwwserve.agents.hardware import CHUNK_TOKENS
from wwwserve.agents.kernel import Floats, kernel
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_MAX_NUM_SEQS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_PER_KV_TOKEN_S,
    AD_PER_PAIR_S,
    AD_PER_SEQ_S,
    AD_PER_TOKEN_S,
    AD_PREFILL,
    AD_PREFILL_BASE_S,
    AD_RUNNING,
    AD_UNSHARED,
    AD_WAITING,
    AD_WEIGHT_S,
)

# A request in its decode stands, on average over the time it takes, at E[O^2] / (2 E[O]^2) of its mean output: 0.5 for
# equal lengths, 0.62 for a lognormal of sigma 0.75 cut at about twice its median.
CONTEXT_SHARE = 0.62
LOGISTIC = 1.702  # the normal distribution function at z is about 1 / (1 + exp(-1.702 z))


@kernel
def context_of(prompt: float, mean_output: float, generated: float) -> float:
    """Tokens that a running request, of which `generated` are out, is expected to hold over its stay."""
    return prompt + max(generated, CONTEXT_SHARE * mean_output)


@kernel
def _occupancy(advert: Floats, sent: float) -> tuple[float, float, float]:
    """Context of a request, in tokens; requests at once; requests ahead.

    A node runs as many at once as its slots and its KV cache hold, where a prefix that several of them share is once;
    `sent` requests went there since its advert.
    """
    context = max(1.0, advert[AD_CONTEXT])
    taken = max(1.0, advert[AD_UNSHARED] * context)
    at_once = max(1.0, min(advert[AD_MAX_NUM_SEQS], advert[AD_KV_CAPACITY] / taken))
    return context, at_once, advert[AD_RUNNING] + advert[AD_WAITING] + sent


@kernel
def prefill_delay_s(advert: Floats, uncached: float, cached: float, each: float) -> float:
    """How much longer than a step of decode it takes to compute `uncached` tokens of prompts that have `each` of them
    and `cached` tokens before those, to which they attend, s; what fits under the weight read takes none."""
    chunks = max(1.0, uncached / CHUNK_TOKENS)
    pairs = uncached * (cached + 0.5 * each)
    compute_s = advert[AD_PER_TOKEN_S] * uncached + advert[AD_PER_PAIR_S] * pairs
    return float(max(0.0, chunks * (advert[AD_PREFILL_BASE_S] - advert[AD_WEIGHT_S]) + compute_s))


@kernel
def expect(advert: Floats, sent: float, prompt: float, cached: float) -> tuple[float, float]:
    """Expected time to first token and time per token, both in s, of a request of `prompt` tokens on a node that has
    `cached` of them in its prefix cache.

    `sent` requests went there since the advert. The node runs as many requests at once as its slots and its KV cache
    hold at the mean context. Beyond that they queue, and leave the queue at the pace of completions (mean output times
    time per token, over the number at once); below it they wait for each other's prefill alone. While a request
    decodes, those that finish beside it are replaced by others (one in mean output over number at once iterations),
    whose prefill holds up everyone.
    """
    output = max(1.0, advert[AD_MEAN_OUTPUT])
    context, at_once, ahead = _occupancy(advert, sent)
    decoding = min(ahead + 1.0, at_once)
    decode_s = advert[AD_WEIGHT_S] + (advert[AD_PER_SEQ_S] + advert[AD_PER_KV_TOKEN_S] * context) * decoding
    usual = advert[AD_MEAN_UNCACHED]
    before = max(0.0, advert[AD_MEAN_PROMPT] - usual)
    token_s = decode_s + decoding / output * prefill_delay_s(advert, usual, before, usual)

    own_prefill_s = advert[AD_WEIGHT_S] + prefill_delay_s(advert, prompt - cached, cached, prompt - cached)
    behind = max(0.0, advert[AD_WAITING] + sent)
    queued = max(0.0, ahead + 1.0 - at_once)
    taken = advert[AD_UNSHARED] * context
    full = advert[AD_RUNNING] + 0.5 >= advert[AD_MAX_NUM_SEQS] or advert[AD_KV_TOKENS] + taken >= advert[AD_KV_CAPACITY]
    if full and advert[AD_WAITING] >= 0.5:  # the queue itself shows that the node can take no more
        queued = max(queued, behind + 1.0)
    queued_prefill_s = prefill_delay_s(advert, advert[AD_PREFILL] + sent * usual, before, usual)
    wait_s = queued * output * token_s / at_once + queued_prefill_s
    return wait_s + own_prefill_s + decode_s, token_s


@kernel
def full_batch(advert: Floats) -> tuple[float, float]:
    """Requests of usual lengths that a node runs at once when it is full, and the seconds of an iteration then."""
    context, at_once, _ = _occupancy(advert, 0.0)
    each_s = advert[AD_PER_SEQ_S] + advert[AD_PER_KV_TOKEN_S] * context
    return at_once, advert[AD_WEIGHT_S] + each_s * at_once


@kernel
def marginal_delay(advert: Floats) -> tuple[float, float, float]:
    """Delay, s, that one more request brings to each that decodes beside it: by a token of its prompt that is computed,
    by any token of its prompt, which is read for every token of a usual answer, and by a token of its answer.

    Of a usual prompt, what takes longer to compute than the iteration that it joins would have anyway."""
    prompt, output = max(1.0, advert[AD_MEAN_PROMPT]), max(1.0, advert[AD_MEAN_OUTPUT])
    computed_s = prefill_delay_s(advert, prompt, 0.0, prompt) / prompt
    token_s = advert[AD_PER_SEQ_S] + advert[AD_PER_KV_TOKEN_S] * CONTEXT_SHARE * output
    return computed_s, float(output * advert[AD_PER_KV_TOKEN_S]), float(token_s)


@kernel
def slowdown(advert: Floats, sent: float, prompt: float, cached: float) -> float:
    """Delay, in s and summed over them, that one more request of `prompt` tokens, `cached` of them in the prefix cache,
    brings to those that run on a node.

    Each waits for its prefill, then decodes for CONTEXT_SHARE of a mean output more, and every iteration takes the
    newcomer's share longer.
    """
    context, at_once, ahead = _occupancy(advert, sent)
    slower_s = advert[AD_PER_SEQ_S] + advert[AD_PER_KV_TOKEN_S] * context
    prefill_s = prefill_delay_s(advert, prompt - cached, cached, prompt - cached)
    return float(min(ahead, at_once) * (prefill_s + CONTEXT_SHARE * max(1.0, advert[AD_MEAN_OUTPUT]) * slower_s))


@kernel
def chance_on_time(
    deadlines: Floats,
    elapsed_s: float,
    first_token_s: float,
    token_s: float,
    median: float,
    sigma: float,
    longest: float,
) -> float:
    """Mean, over the `deadlines` (s since arrival), of the chance to be done by them, `elapsed_s` after arrival.

    The output is lognormal (`median`, `sigma`) and cut at `longest`; the normal distribution function is taken as the
    logistic 1 / (1 + exp(-1.702 z)), off by less than 0.01 (Johnson and Kotz, Continuous Univariate Distributions).
    """
    total = 0.0
    for k in range(deadlines.size):
        tokens = (deadlines[k] - elapsed_s - first_token_s) / token_s
        if tokens >= longest:
            total += 1.0
        elif tokens >= 1.0:
            z = math.log(tokens / median) / max(sigma, 1e-3)
            total += 1.0 / (1.0 + math.exp(min(-LOGISTIC * z, 700.0)))  # in plain Python, exp raises beyond 709
    return total / deadlines.size
