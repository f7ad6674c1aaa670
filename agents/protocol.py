"""The rules of the game: candidates by stake, prices, escrow, stake, duels. Kernels over integer micro-credits.

An account is a vector (free, staked, escrow). Every function that moves credits keeps the sum over all accounts that it
touches; none makes an amount negative. Stake and duel rules are those of WWW.Serve (arXiv 2603.20661).
"""

import math

from wwwserve.agents.generator import uniform
from wwwserve.agents.kernel import Bools, Floats, Ints, kernel

MICRO = 1_000_000  # micro-credits in a credit

FREE, STAKED, ESCROW = 0, 1, 2
ACCOUNT_SIZE = 3

NO_BOUND = 1 << 62  # on what may be in escrow with one peer

# What a request costs that a peer runs: by its tariff, less what the lateness clause takes; by its tariff; or a credit.
LATENESS, QUOTED, PER_REQUEST = 0, 1, 2
PAYMENTS = ("lateness", "quoted", "per_request")  # their names, in this order

# Columns of a tariff, per 1000 tokens; the cached ones are those of the input that the executor had computed before.
INPUT, CACHED_INPUT, OUTPUT = 0, 1, 2
TARIFF_SIZE = 3

TARGET_KV_USE = 0.65  # middle of the paper's 0.6 to 0.7
STAKE_STEP_PER_S = 2 * MICRO  # a stake moves at most so fast
MINORITY_SHARE = 5  # a judge outvoted loses a fifth of its stake,
SILENT_SHARE = 20  # one that did not vote a twentieth

VOTE_SILENT, VOTE_A, VOTE_B, VOTE_UNDECIDED = 0, 1, 2, 3
TIE, A_WINS, B_WINS = 0, 1, 2


@kernel
def draw_by_stake(stake: Floats, eligible: Bools, count: int, generator: Ints, drawn: Ints) -> int:
    """Draw up to `count` of the eligible without replacement, weight equal to stake, in the order drawn.

    `stake` [N] >= 0 in any unit, `eligible` [N] is spent; those without stake come last, evenly. Writes indices to
    `drawn` and returns how many. Successive sampling, the law of sorting by -ln(u)/w (Efraimidis and Spirakis 2006).
    """
    total = 0.0
    staked = 0
    idle = 0
    for j in range(stake.size):
        if eligible[j] and stake[j] > 0.0:
            total += stake[j]
            staked += 1
        elif eligible[j]:
            idle += 1
    count = min(count, staked + idle)
    for found in range(count):
        pick = -1
        if staked > 0:
            staked -= 1
            left = uniform(generator) * total
            for j in range(stake.size):
                if eligible[j] and stake[j] > 0.0:
                    pick = j  # the last one, should rounding leave a rest
                    left -= stake[j]
                    if left <= 0.0:
                        break
            total -= stake[pick]
        else:
            skip = min(int(uniform(generator) * idle), idle - 1)
            idle -= 1
            for j in range(stake.size):
                if eligible[j]:
                    pick = j
                    if skip == 0:
                        break
                    skip -= 1
        eligible[pick] = False
        drawn[found] = pick
    return count


@kernel
def price_of(payment: int, tariff: Ints, prompt: int, cached: int, output: int) -> int:
    """What a request of `prompt` tokens, `cached` of them cached, and `output` generated ones costs by a tariff
    [TARIFF_SIZE] of micro-credits per 1000 tokens; in micro-credits, rounded down."""
    if payment == PER_REQUEST:
        return MICRO
    by_token = tariff[INPUT] * (prompt - cached) + tariff[CACHED_INPUT] * cached + tariff[OUTPUT] * output
    return int(by_token // 1000)


@kernel
def price_of_part(payment: int, tariff: Ints, prompt: int, cached: int, output: int, most: int) -> int:
    """What an answer costs that broke off, or was not wanted any more, after `output` tokens: `price_of`, or where a
    request costs a credit the share of it that they are of `most`, the longest that it could have been."""
    if payment == PER_REQUEST:
        return MICRO * min(output, most) // max(most, 1)
    return price_of(payment, tariff, prompt, cached, output)


@kernel
def due_after(payment: int, price: int, promised_ms: int, took_ms: int) -> int:
    """What is due of `price` for an answer that was complete `took_ms` after the acceptance that promised it in
    `promised_ms`: all of it up to then, falling linearly to nothing at twice that time (the lateness clause); all of it
    always unless payment is LATENESS. Rounded down."""
    if payment != LATENESS or took_ms <= promised_ms:
        return price
    return price * max(0, 2 * promised_ms - took_ms) // max(promised_ms, 1)


@kernel
def milliseconds(seconds: float) -> int:
    """A duration as the two sides agree on it: whole milliseconds, at least 1."""
    return max(1, round(1000.0 * min(seconds, 1e9)))


@kernel
def available_credit(payer: Ints, exposed: int, limit: int) -> int:
    """How much more the payer may put in escrow with one payee who has `exposed` of it already: within its free credit
    and `limit`."""
    return max(0, min(int(payer[FREE]), limit - exposed))


@kernel
def lock(payer: Ints, amount: int) -> bool:
    """Move `amount` from the payer's free credit to escrow; False, and nothing moved, if it has less."""
    if payer[FREE] < amount:
        return False
    payer[FREE] -= amount
    payer[ESCROW] += amount
    return True


@kernel
def settle(payer: Ints, payee: Ints, locked: int, due: int) -> int:
    """Pay `due`, at most `locked`, out of the payer's escrow; the rest of it is free again. Returns the payment."""
    paid = min(locked, due)
    payer[ESCROW] -= locked
    payer[FREE] += locked - paid
    payee[FREE] += paid
    return paid


@kernel
def stake_target(kv_use: float, waiting: int, held: int) -> int:
    """The stake that a load calls for, in micro-credits: 4, 3, 2, 1 at a KV use up to 25, 50, 75, 100 % of the target
    use, 0 above it or when the engine queues, less 2 if the dispatcher holds requests."""
    score = 0
    if waiting == 0 and kv_use <= TARGET_KV_USE:
        score = 4 - min(3, max(0, math.ceil(4.0 * kv_use / TARGET_KV_USE) - 1))
    if held > 0:
        score -= 2
    return max(0, score) * MICRO


@kernel
def move_stake(account: Ints, target: int, elapsed_s: float) -> None:
    """Move the stake toward `target` micro-credits, at the permitted pace and within the free credit."""
    step = int(STAKE_STEP_PER_S * elapsed_s)
    change = min(max(target - account[STAKED], -step), step)
    change = min(change, account[FREE])
    account[FREE] -= change
    account[STAKED] += change


@kernel
def duel_outcome(votes: Ints) -> int:
    """A_WINS, B_WINS or TIE by plain majority of the votes for A and for B."""
    a = 0
    b = 0
    for k in range(votes.size):
        if votes[k] == VOTE_A:
            a += 1
        elif votes[k] == VOTE_B:
            b += 1
    if a == b:
        return TIE
    return A_WINS if a > b else B_WINS


@kernel
def settle_duel(accounts: Ints, a: int, b: int, judges: Ints, votes: Ints) -> int:
    """Move stakes by the judges' majority on executors a and b; a tie moves nothing. Returns the outcome.

    `accounts` [N, ACCOUNT_SIZE]; `judges` and `votes` of equal length. See `move_stakes`.
    """
    outcome = duel_outcome(votes)
    move_stakes(accounts, a, b, judges, votes, outcome)
    return outcome


@kernel
def move_stakes(accounts: Ints, a: int, b: int, judges: Ints, votes: Ints, outcome: int) -> None:
    """Move stakes by the outcome of a duel, for which at least one judge voted unless it is a tie.

    The loser's whole stake goes to the winner's. Judges in the minority lose a fifth of their stake, silent ones a
    twentieth, shared evenly by those who voted for the outcome; what does not divide goes to the first of them.
    """
    if outcome == TIE:
        return
    winner, loser = (a, b) if outcome == A_WINS else (b, a)
    accounts[winner, STAKED] += accounts[loser, STAKED]
    accounts[loser, STAKED] = 0
    pot = 0
    majority = 0
    for k in range(votes.size):
        judge = judges[k]
        if votes[k] == outcome:  # VOTE_A and A_WINS are the same number, as are VOTE_B and B_WINS
            majority += 1
            continue
        share = 0
        if votes[k] == VOTE_SILENT:
            share = SILENT_SHARE
        elif votes[k] != VOTE_UNDECIDED:
            share = MINORITY_SHARE
        if share > 0:
            fine = accounts[judge, STAKED] // share
            accounts[judge, STAKED] -= fine
            pot += fine
    each = pot // majority
    extra = pot - each * majority
    for k in range(votes.size):
        if votes[k] == outcome:
            accounts[judges[k], STAKED] += each + extra
            extra = 0


@kernel
def vote_of(strength_a: float, strength_b: float, u: float) -> int:
    """A judge's vote on answers of two Bradley-Terry log-strengths: A with chance 1 / (1 + exp(b - a))."""
    odds = math.exp(min(strength_b - strength_a, 700.0))  # in plain Python, exp raises beyond 709
    return VOTE_A if u * (1.0 + odds) < 1.0 else VOTE_B


@kernel
def delivered_value(value: float, deadlines: Floats, latency_s: float) -> float:
    """What an answer after `latency_s` is worth: `value` times the share of `deadlines` [T] that it meets."""
    met = 0
    for k in range(deadlines.size):
        if latency_s <= deadlines[k]:
            met += 1
    return value * met / deadlines.size
