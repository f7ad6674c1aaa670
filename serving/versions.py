"""Versions of the protocol between nodes: what one speaks, and what it makes of another.

Every advert says from which version to which its sender speaks; two nodes that have one in common trade by the highest
of these. `PROTOCOL` goes up when a message between nodes comes to mean something else, or has to have what it had not;
what a peer adds that is not known here is left unread. A release that still understands the version before speaks
both, so that nodes can be upgraded one after the other.
"""

from typing import NamedTuple

from wwwserve.serving.market import Whole


class Versions(NamedTuple):
    """From one version to another, both included."""

    oldest: Whole
    newest: Whole

    def __str__(self) -> str:
        return f"{self.oldest}" if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


PROTOCOL = 2
SPEAKS = Versions(2, PROTOCOL)
UNSAID = Versions(1, 1)  # what a node speaks whose advert does not say, as no advert did before version 2


def common(theirs: Versions) -> int | None:
    """The version in which this node and another speak; None if there is none."""
    newest = min(SPEAKS.newest, theirs.newest)
    return newest if newest >= max(SPEAKS.oldest, theirs.oldest) else None


def advice(theirs: Versions) -> str:
    """What is wrong with a node with which there is none in common, and what to do."""
    older = "it" if theirs.newest < SPEAKS.oldest else "this node"
    return f"speaks protocol {theirs}, this node {SPEAKS}: upgrade {older}"
