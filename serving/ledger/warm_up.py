"""Have what payment runs compiled before a node starts: else the first paid request waits, and all beside it."""

import numpy as np

from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    QUOTED,
    TARIFF_SIZE,
    available_credit,
    due_after,
    duel_outcome,
    lock,
    milliseconds,
    move_stake,
    move_stakes,
    price_of,
    price_of_part,
    settle,
)


def warm_up() -> None:
    """Call each kernel of the protocol that a ledger calls, as it does."""
    accounts, tariff = np.zeros((3, ACCOUNT_SIZE), np.int64), np.zeros(TARIFF_SIZE, np.int64)
    price_of(QUOTED, tariff, 1, 0, 1)
    price_of_part(QUOTED, tariff, 1, 0, 1, 2)
    due_after(QUOTED, 0, 1, 1)
    milliseconds(1.0)
    available_credit(accounts[0], 0, 0)
    lock(accounts[0], 0)
    settle(accounts[0], accounts[1], 0, 0)
    move_stake(accounts[0], 0, 1.0)
    votes = np.zeros(1, np.int64)
    move_stakes(accounts, 0, 1, np.full(1, 2, np.int64), votes, int(duel_outcome(votes)))
