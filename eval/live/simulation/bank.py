"""A bank that nobody doubts, in place of the nodes' ledgers: one account each, settled as `envs.market` does it.

Credit is in escrow from the moment at which an offer leaves; the executor has it when the answer is at the origin.
"""

import asyncio
from typing import Any

import numpy as np

from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    FREE,
    MICRO,
    NO_BOUND,
    PAYMENTS,
    STAKED,
    available_credit,
    lock,
    move_stake,
    price_of,
    settle,
)
from wwwserve.envs.scenario import Scenario
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.ledger.accounts import Came
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import due_of
from wwwserve.serving.ledger.statements import Terms
from wwwserve.serving.ledger.token_rate import TokenRate
from wwwserve.serving.market import Promise, Tariff


class Bank:
    """The accounts of all."""

    def __init__(self, loop: VirtualLoop, scenario: Scenario, names: list[str]) -> None:
        economy, count = scenario.economy, len(names)
        self.loop, self.payment, self.names = loop, PAYMENTS.index(economy.payment), names
        self.exposure = NO_BOUND if economy.exposure is None else round(economy.exposure * MICRO)
        self.accounts = np.zeros((count, ACCOUNT_SIZE), np.int64)
        for i, provider in enumerate(scenario.providers):
            credit = economy.initial_credit if provider.initial_credit is None else provider.initial_credit
            stake = economy.initial_stake if provider.initial_stake is None else provider.initial_stake
            self.accounts[i, FREE], self.accounts[i, STAKED] = round(credit * MICRO), round(stake * MICRO)
        self.begins = self.accounts.copy()  # with what each begins
        self.locked = np.zeros((count, count), np.int64)  # of each, for each
        self.holders = [IdealAccounts(self, i) for i in range(count)]

    def moved(self, *rows: int) -> None:
        """The free credit of these is another."""
        for i in rows:
            self.holders[i].ledger.changed.update(name for j, name in enumerate(self.names) if j != i)


class Payment:
    """What is in escrow for one request; a `serving.ledger.accounts.Payment`."""

    def __init__(self, bank: Bank, payer: int, payee: int, terms: Terms, most: int) -> None:
        self.refused, self.header = False, "of a bank"
        self._bank, self._payer, self._payee, self._terms, self._most = bank, payer, payee, terms, most

    def feed(self, chunk: bytes) -> None:
        """See `serving.ledger.accounts.Payment`."""

    def is_due(self, tokens: int) -> bool:
        """See `serving.ledger.accounts.Payment`; all is paid in the end."""
        return False

    def end(self, promise: Promise | None = None, came: Came | None = None) -> int:
        """See `serving.ledger.accounts.Payment`; what is not whole is not paid."""
        bank, payer, payee, amount, due = self._bank, self._payer, self._payee, self._terms.amount, 0
        if came is not None and came.whole and not self.refused:
            due = due_of(bank.payment, self._terms, promise, came.served("", self._terms, self._most), self._most)
        paid = settle(bank.accounts[payer], bank.accounts[payee], amount, due)
        bank.locked[payer, payee] -= amount
        bank.moved(payer, payee)
        return int(paid)


class Delivery:
    """A `serving.ledger.accounts.Delivery`: the origin pays, whatever its executor says."""

    passed: int | None = None

    async def check(self, meter: AnswerMeter) -> None:
        """See `serving.ledger.accounts.Delivery`."""

    def end(self, answer: str, came: Came) -> None:
        """See `serving.ledger.accounts.Delivery`."""

    def close(self) -> None:
        """See `serving.ledger.accounts.Delivery`."""


class _Books:
    def __init__(self, names: set[str]) -> None:
        self.channels = names


class _Ledger:
    """What a dispatcher asks of a `serving.ledger.channel_ledger.ChannelLedger`."""

    def __init__(self, bank: Bank, row: int) -> None:
        self._bank, self._row = bank, row
        self.changed = {name for j, name in enumerate(bank.names) if j != row}
        self.books = _Books(set(self.changed))
        self.full = ""

    def free_credit(self) -> int:
        """Micro-credits."""
        return int(self._bank.accounts[self._row, FREE])

    def available(self, peer: str) -> int:
        """Micro-credits that may be put in escrow with a peer."""
        bank, i = self._bank, self._row
        if bank.exposure == NO_BOUND:
            return self.free_credit()
        exposed = int(bank.locked[i, bank.names.index(peer)])
        return int(available_credit(bank.accounts[i], exposed, bank.exposure))

    def balances(self) -> list[Any]:
        """There are no channels."""
        return []


class IdealAccounts:
    """The `serving.ledger.accounts.Accounts` of one node."""

    def __init__(self, bank: Bank, row: int) -> None:
        self.bank, self.row = bank, row
        self.ledger = _Ledger(bank, row)
        self.rate = TokenRate()
        self.stakes_said: dict[str, float] = {}  # stake of each peer, credits, as it said last
        self._restaked_s: float | None = None

    @property
    def account(self) -> Any:
        """The own account [ACCOUNT_SIZE]."""
        return self.bank.accounts[self.row]

    async def run(self) -> None:
        """See `serving.ledger.accounts.Accounts`."""
        await asyncio.get_running_loop().create_future()

    async def escrow(self, peer: str, tariff: Tariff, prompt: int, most: int, body: bytes) -> Payment:
        """See `serving.ledger.accounts.Accounts`."""
        amount = int(price_of(self.bank.payment, np.array(tariff), prompt, 0, most))
        payee = self.bank.names.index(peer)
        if not lock(self.account, amount):
            raise LedgerError(f"{amount} micro-credits are not there")
        self.bank.locked[self.row, payee] += amount
        self.bank.moved(self.row)
        return Payment(self.bank, self.row, payee, Terms(tariff, prompt, amount), most)

    def advertised(self, tariff: Tariff) -> None:
        """See `serving.ledger.accounts.Accounts`."""

    def offered(self, header: bytes, tariff: Tariff, prompt: int, most: int | None) -> tuple[int, Terms]:
        """See `serving.ledger.accounts.Accounts`; the bank knows what is in escrow."""
        return 0, Terms(tariff, prompt, 0)

    def take(
        self, peer: str, id: int, terms: Terms, body: bytes, promise: Promise, longest: int, most: int | None,
        prompt: int = 0,
    ) -> Delivery:  # fmt: skip
        """See `serving.ledger.accounts.Accounts`."""
        return Delivery()

    def heard(self, peer: str) -> None:
        """See `serving.ledger.accounts.Accounts`."""

    def gone(self, peer: str) -> None:
        """See `serving.ledger.accounts.Accounts`."""

    def stake(self, peer: str) -> float:
        """See `serving.ledger.accounts.Accounts`."""
        return self.stakes_said[peer]

    async def restake(self, target: int, interval_s: float) -> float:
        """Move the stake toward `target` for the time since it was last moved; returns it, credits."""
        now_s = self.bank.loop.time()
        if self._restaked_s is not None:
            move_stake(self.account, target, now_s - self._restaked_s)
            self.bank.moved(self.row)
        self._restaked_s = now_s
        return float(self.account[STAKED]) / MICRO

    def overview(self) -> dict[str, Any]:
        """See `serving.ledger.accounts.Accounts`."""
        return {"free": self.account[FREE] / MICRO, "stake": self.account[STAKED] / MICRO}
