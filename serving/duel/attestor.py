"""An executor's side of a duel."""

from collections import OrderedDict

import msgspec

from wwwserve.serving.duel.messages import Attest, Declined
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import StatementError
from wwwserve.serving.ledger.verdicts import Answer, committed, verify_opening

ANSWERS_KEPT = 4096  # that an executor can still be asked to sign


class Attestor:
    """What an executor answered to whom, to which it puts its name once, when asked."""

    def __init__(self, identity: Identity, stakes: Stakes | None = None) -> None:
        self.identity, self.stakes = identity, stakes
        self._answered: OrderedDict[tuple[str, str], tuple[str, str, str]] = OrderedDict()
        self._signed: OrderedDict[tuple[str, str], tuple[str, bytes]] = OrderedDict()

    def answered(self, origin: str, request: str, answer: str, secret: str) -> None:
        """An origin has the whole answer with this digest to its request with that, for which it was given the
        commitment to a secret."""
        self._answered[origin, committed(secret)] = request, answer, secret
        while len(self._answered) > ANSWERS_KEPT:
            self._answered.popitem(last=False)

    def attest(self, origin: str, body: bytes) -> bytes:
        """The signed answer. Raises Declined."""
        try:
            attest = msgspec.json.decode(body, type=Attest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Declined(f"not a request to sign: {error}") from None
        opening, own = attest.opening, self.identity.name
        party = next((each for each in (opening.a, opening.b) if each.name == own), None)
        if opening.origin != origin or party is None:
            raise Declined("that is not a duel of its sender with this node")
        key, duel = (origin, party.commitment), opening.name()
        signed_of, signed = self._signed.get(key, ("", b""))
        if signed_of == duel:
            return signed
        request, answer, secret = self._answered.get(key, ("", "", ""))
        if (request, answer) != (opening.request, attest.answer):
            raise Declined("that was not answered here, long ago, or is signed for another duel")
        stake = None
        if opening.epoch:
            stake = self.stakes.latest.get(own) if self.stakes and self.stakes.has(opening.epoch) else None
            if stake is None:
                raise Declined("it is of another epoch, or nothing was ever staked here")
        try:
            verify_opening(opening)
        except StatementError as error:
            raise Declined(str(error)) from None
        made = Answer(own, duel, answer, secret, stake).signed(self.identity)
        self._signed[key] = duel, msgspec.json.encode(made)
        del self._answered[key]
        while len(self._signed) > ANSWERS_KEPT:
            self._signed.popitem(last=False)
        return self._signed[key][1]
