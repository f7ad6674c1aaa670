"""Membership in memory: adverts reach every other member once, one way delay later; nobody sends signs of life.

Who joins hears the last advert of everyone that is there. A member whose process ends is gone for the others as late as
if its signs of life had ceased.
"""

import msgspec

from wwwserve.eval.live.simulation.loop import Process
from wwwserve.eval.live.simulation.network import MemoryNetwork
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.membership.heartbeat import SILENT_S, Advert, Gone, Heard, Unspoken


class Members:
    """All who may be members, by the names of their keys, each on a host of the network."""

    def __init__(self, network: MemoryNetwork, hosts: dict[str, str]) -> None:
        self.network, self.hosts = network, hosts
        self.there: dict[str, MemoryMembership] = {}
        self._ended: set[tuple[str, int]] = set()  # runs whose adverts may still be on their way

    def tell(self, advert: Advert, true_at_s: float, to: str) -> None:
        """Send one member's advert to another, who hears it if both are there by then."""
        self.network.tell(self.hosts[advert.name], self.hosts[to], self._arrive, advert, true_at_s, to)

    def _arrive(self, advert: Advert, true_at_s: float, to: str) -> None:
        member = self.there.get(to)
        if member is not None:
            age_s = self.network.loop.time() - true_at_s
            member.process.hear(member.hear, msgspec.structs.replace(advert, age_s=age_s))
            if (advert.name, advert.run) in self._ended:  # nothing follows on it
                self._miss(member, advert)

    def lose(self, member: "MemoryMembership") -> None:
        """A member's process has ended."""
        if self.there.get(member.name) is member:
            del self.there[member.name]
        if member.advert is not None:
            self._ended.add((member.name, member.advert.run))
            for other in self.there.values():
                self._miss(other, member.advert)

    def _miss(self, member: "MemoryMembership", last: Advert) -> None:
        self.network.loop.outside(SILENT_S, member.process.hear, member.miss, last)


class MemoryMembership:
    """A `serving.membership.heartbeat.Membership` of one run of a node."""

    def __init__(self, members: Members, name: str, process: Process) -> None:
        self.members, self.name = members, name
        self.advert: Advert | None = None
        self._true_at_s = 0.0
        self.process = process
        self._known: dict[str, tuple[int, int]] = {}  # run and number of the last advert of each that is there
        self._heard: Heard = lambda advert: None
        self._gone: Gone = lambda name: None

    async def run(self, heard: Heard, gone: Gone) -> None:
        """See `Membership`."""
        self._heard, self._gone = heard, gone
        members = self.members
        self.process.on_kill(lambda: members.lose(self))
        members.there[self.name] = self
        for other in members.there.values():
            if other.advert is not None:
                members.tell(other.advert, other._true_at_s, self.name)
        await members.network.loop.create_future()

    def publish(self, advert: Advert, now_s: float) -> None:
        """See `Membership`."""
        if not self.process.alive:
            return
        self.advert, self._true_at_s = advert, now_s
        for name in self.members.hosts:
            if name != self.name:
                self.members.tell(advert, now_s, name)

    def knows(self, name: str) -> bool:
        """See `Membership`."""
        return name != self.name and name in self.members.hosts

    def unspoken(self) -> dict[str, Unspoken]:
        """See `Membership`. All are of one version."""
        return {}

    def received(self, body: bytes) -> str:
        """See `Membership`."""
        raise Refused("malformed", "adverts do not come over the data plane here")

    def hear(self, advert: Advert) -> None:
        """An advert of another is there; an older one than was heard before is not new."""
        made = advert.run, advert.number
        if self.process.alive and made > self._known.get(advert.name, (0, 0)):
            self._known[advert.name] = made
            self._heard(advert)

    def miss(self, last: Advert) -> None:
        """Another has been silent since its process ended, unless it runs again."""
        known = self._known.get(last.name)
        if self.process.alive and known is not None and known[0] == last.run:
            del self._known[last.name]
            self._gone(last.name)
