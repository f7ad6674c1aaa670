"""A learned policy without torch: a bundle's weights in numba kernels.

`load` verifies a bundle as `agents.policy.bundle.read` does, and that the kernels give its golden logits.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import ADMITS, ROUTES, TERMS_SIZE, Actions, write_terms
from wwwserve.agents.kernel import Bools, Floats, Ints32, Singles, kernel
from wwwserve.agents.policy.bundle import DEFAULT_BUNDLE as DEFAULT_BUNDLE
from wwwserve.agents.policy.bundle import FORMAT as FORMAT
from wwwserve.agents.policy.bundle import MANIFEST, Bundle, read
from wwwserve.agents.policy.bundle import BundleError as BundleError
from wwwserve.agents.policy.forward import ABOUT, LOGITS, Net, Weights, logits, net_of, room
from wwwserve.agents.view import NODE_FEATURES, NODES, Views

TOLERANCE = 1e-4  # between golden logits and those computed here


class LearnedPolicy:
    """A policy from a bundle; it takes the most probable choice."""

    def __init__(self, weights: Weights, manifest: dict[str, Any]) -> None:
        self.weights = weights
        self.manifest = manifest
        self.name = str(manifest.get("name", "learned"))
        self._net = net_of(weights)
        self._room = (room(self._net), np.zeros((NODES, len(NODE_FEATURES)), np.float32), np.zeros(ABOUT, np.float32))

    def decide(self, views: Views, active: NDArray[np.bool_], dice: NDArray[np.float64], actions: Actions) -> None:
        """See `agents.rules.Policy.decide`; the dice are not used. `actions` must be contiguous arrays."""
        if not all(array.flags.c_contiguous for array in actions):
            raise ValueError("actions must be contiguous arrays, or what is written to them is lost")
        nodes, request, me, routes = views
        flat = Views(
            nodes.reshape(-1, *nodes.shape[-2:]), request.reshape(-1, request.shape[-1]), me.reshape(-1, me.shape[-1]),
            routes.reshape(-1, routes.shape[-1]),
        )  # fmt: skip
        work, x, about = self._room
        _decide(
            self._net, flat, active.reshape(-1), x, about, work, np.zeros(LOGITS, np.float32),
            actions.route.reshape(-1), actions.terms.reshape(-1, TERMS_SIZE), actions.price.reshape(-1),
        )  # fmt: skip

    def logits(self, views: Views) -> NDArray[np.float32]:
        """Logits [M, LOGITS] of views [M]: of routes, then admits, then prices."""
        work, x, about = self._room
        out = np.zeros((len(views.me), LOGITS), np.float32)
        _logits(self._net, views, x, about, work, out)
        return out


@kernel
def _logits(net: Net, views: Views, x: Singles, about: Singles, work: Singles, out: Singles) -> None:
    for k in range(out.shape[0]):
        logits(net, views.nodes[k], views.request[k], views.me[k], views.routes[k], x, about, work, out[k])


@kernel
def _decide(
    net: Net, views: Views, active: Bools, x: Singles, about: Singles, work: Singles, out: Singles,
    route: Ints32, terms: Floats, price: Ints32,
) -> None:  # fmt: skip
    for k in range(active.size):
        if active[k]:
            logits(net, views.nodes[k], views.request[k], views.me[k], views.routes[k], x, about, work, out)
            route[k] = np.argmax(out[:ROUTES])
            write_terms(terms[k], int(np.argmax(out[ROUTES : ROUTES + ADMITS])))
            price[k] = np.argmax(out[ROUTES + ADMITS :])


def from_bundle(bundle: Bundle) -> LearnedPolicy:
    """The policy of a bundle that was read. Raises BundleError unless it gives the golden logits."""
    policy = LearnedPolicy(bundle.weights, bundle.manifest)
    error = golden_error(policy, bundle)
    if not error <= TOLERANCE:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: logits of a golden view differ by {error:.3g} from those computed here, "
            f"expected at most {TOLERANCE:g}"
        )
    return policy


def golden_error(policy: LearnedPolicy, bundle: Bundle) -> float:
    """Largest difference between the bundle's golden logits and the policy's."""
    return float(np.max(np.abs(policy.logits(bundle.views).astype(np.float64) - bundle.logits)))


def load(folder: str | Path) -> LearnedPolicy:
    """The policy of a bundle. Raises BundleError, with file and reason, for anything that is not a sound bundle."""
    return from_bundle(read(folder))
