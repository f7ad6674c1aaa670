"""What providers of a market are told, written down in order: a market's tape.

A tape holds each message that reaches a provider, with what it says, and the moments at which a provider is asked and
decides. Replayed through another implementation of a provider it must give the same views and decisions; a live node's
is held to the simulator in this way. Tapes are for tests and study; a market writes one only where asked to.
"""

import numpy as np

from wwwserve.agents.dice import WORDS
from wwwserve.agents.kernel import kernel

PLACES = 4  # numbers of a note
NO_TAPE = -1

# What a note is of, and what its numbers `x` are. `who` is the provider that is told, `peer` whom it is about.
(
    SCRAPED,  # the own engine was read: running, waiting, KV tokens
    TICKED,  # a tick went by: seconds
    ARRIVED,  # a user asks: class, prompt, arrival
    MISSED,  # a user asks while it is offline
    CAME_BACK,  # `request` comes back from a peer that is gone
    DROPPED,  # the head of a class is given up: class
    PUBLISHED,  # its advert went out to all: stake
    SENT,  # `peer` took a request
    REFUSED,  # `peer` refused the request that was decided on, or was not there
    ENDED,  # a request of its own is no longer with `peer`
    ANSWERED,  # `peer` completed a request: seconds it took, seconds promised
    FINISHED,  # the own engine completed a request: prompt, output
    LOOK,  # it looks at all that it has out
    LOOKED,  # one request out with `peer`: waited, promised first token, promised token, streamed
    DUELLED,  # `peer` won a duel (1) or lost it (0)
    GUESTS,  # peers' requests here: one more or one less
    PROBED,  # it is asked to take a request: prompt, uniform, whether it does
    ADVERT_DUE,  # the price and terms chosen next go out
    LEFT,  # it goes offline
    ASKED,  # it picks its head: free micro-credits; the market's dice are in `dice`
    TURN,  # what it decided is carried out
) = range(21)

NOTE = np.dtype(
    [
        ("kind", np.int32),
        ("who", np.int32),
        ("peer", np.int32),
        ("request", np.int32),
        ("now_s", np.float64),
        ("x", np.float64, PLACES),
        ("dice", np.int64, WORDS),
    ],
    align=True,
)


@kernel
def note(m, tape, kind, who, peer, request, a, b, c, d):
    """Write a note to the market's tape, if it keeps one and there is room."""
    if m.noted == NO_TAPE:
        return
    if m.noted < tape.size:
        n = tape[m.noted]
        n.kind, n.who, n.peer, n.request = kind, who, peer, request
        n.now_s = m.now_s
        n.x[0], n.x[1], n.x[2], n.x[3] = a, b, c, d
        for k in range(m.dice.size):
            n.dice[k] = m.dice[k]
    m.noted += 1
