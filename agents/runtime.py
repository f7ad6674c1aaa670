"""A learned policy without torch: the bundle's weights and NumPy.

A bundle is a folder with `policy.safetensors` and `manifest.json`. It is verified when loaded: format, observation
version, features, shapes and the digest of the weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as read_safetensors

from agents.decision import ADMITS, PRICES, Actions, set_admit
from agents.view import (
    FINISH_S,
    NODE_FEATURES,
    OVERDUE,
    OWN,
    PACE,
    RECORD,
    REQUEST_FEATURES,
    SELF_FEATURES,
    VIEW_VERSION,
    Views,
    normalise,
)

FORMAT = 1
WEIGHTS, MANIFEST = "policy.safetensors", "manifest.json"
MAX_BYTES = 16 * 2**20
FORBIDDEN = np.float32(-1e9)
Weights = dict[str, NDArray[np.float32]]


class BundleError(ValueError):
    """A bundle that cannot be used; the message says which file and why."""


def feature_table() -> dict[str, list[list[Any]]]:
    """The observation spec as a manifest records it: name, unit, low, high, scale of each feature, in order."""
    return {
        "node": [list(f[:5]) for f in NODE_FEATURES],
        "request": [list(f[:5]) for f in REQUEST_FEATURES],
        "self": [list(f[:5]) for f in SELF_FEATURES],
    }


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a policy of this width; matrices are [outputs, inputs]."""
    about = len(REQUEST_FEATURES) + len(SELF_FEATURES)
    layers = {
        "node_in": (width, len(NODE_FEATURES)),
        "about_in": (width, about),
        "node_hidden": (width, width),
        "pool": (width, about + 2 * width),
        "score_node": (width, width),
        "score_pool": (width, width),
        "score": (1, width),
        "hold": (1, width),
        "admit": (ADMITS, width),
        "price": (PRICES, width),
    }
    table: dict[str, tuple[int, ...]] = {"prior": ()}
    for name, shape in layers.items():
        table[f"{name}.weight"] = shape
        table[f"{name}.bias"] = shape[:1]
    return table


def forward(
    w: Weights,
    nodes: NDArray[np.float32],
    request: NDArray[np.float32],
    me: NDArray[np.float32],
    routes: NDArray[np.int8],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Logits of route [M, ROUTES], admit [M, ADMITS] and price [M, PRICES]; see `agents.network.Actor`."""

    def layer(name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    zero = np.float32(0)
    x = normalise(nodes, NODE_FEATURES)
    about = np.concatenate([normalise(request, REQUEST_FEATURES), normalise(me, SELF_FEATURES)], -1)
    hidden = np.maximum(layer("node_in", x) + layer("about_in", about)[:, None], zero)
    hidden = np.maximum(layer("node_hidden", hidden), zero)
    present = (nodes[..., FINISH_S] + nodes[..., OWN] > 0)[..., None]
    hidden = hidden * present
    pooled = np.concatenate([about, hidden.sum(-2) / present.sum(-2, dtype=np.float32), hidden.max(-2)], -1)
    pooled = np.maximum(layer("pool", pooled), zero)
    scored = np.maximum(layer("score_node", hidden) + layer("score_pool", pooled)[:, None], zero)
    score = layer("score", scored)[..., 0]
    trust = np.exp(np.maximum(nodes[..., PACE], zero) + np.maximum(nodes[..., RECORD], zero))
    log_s = np.log(np.maximum(nodes[..., FINISH_S] * trust + nodes[..., OVERDUE], np.float32(1e-3)))
    soonest = np.where(routes[:, 1:] > 0, log_s, np.float32(1e9)).min(-1, keepdims=True)
    score = score + w["prior"] * (soonest - log_s)
    route = np.concatenate([layer("hold", pooled), score], -1)
    return np.where(routes > 0, route, FORBIDDEN), layer("admit", pooled), layer("price", pooled)


class LearnedPolicy:
    """A policy from a bundle; it takes the most probable choice."""

    def __init__(self, weights: Weights, manifest: dict[str, Any]) -> None:
        self.weights = weights
        self.manifest = manifest
        self.name = str(manifest.get("name", "learned"))

    def decide(self, views: Views, active: NDArray[np.bool_], dice: NDArray[np.float64], actions: Actions) -> None:
        """See `agents.rules.Policy.decide`; the dice are not used."""
        rows = np.nonzero(active)
        if rows[0].size == 0:
            return
        route, admit, price = forward(
            self.weights, views.nodes[rows], views.request[rows], views.me[rows], views.routes[rows]
        )
        actions.route[rows] = route.argmax(-1)
        terms = actions.terms[rows]
        set_admit(actions._replace(terms=terms), admit.argmax(-1))
        actions.terms[rows] = terms
        actions.price[rows] = price.argmax(-1)


def digest(content: bytes) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None


def load(folder: str | Path) -> LearnedPolicy:
    """The policy of a bundle. Raises BundleError, with file and reason, for anything that is not a sound bundle."""
    folder = Path(folder)
    manifest_path, weights_path = folder / MANIFEST, folder / WEIGHTS
    try:
        manifest = json.loads(_read(manifest_path).decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{manifest_path}: not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{manifest_path}: expected a JSON object")
    for key, expected in (("format", FORMAT), ("view_version", VIEW_VERSION), ("features", feature_table())):
        if manifest.get(key) != expected:
            shown = "" if key == "features" else f" is {manifest.get(key)!r}, expected {expected!r}"
            raise BundleError(f"{manifest_path}: {key}{shown or ' differ from those of this version'}")
    content = _read(weights_path)
    named = manifest.get("sha256")
    if not isinstance(named, dict) or named.get(WEIGHTS) != digest(content):
        raise BundleError(f"{weights_path}: its SHA-256 is not the one in {MANIFEST}")
    width = manifest.get("width")
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= 1024:
        raise BundleError(f"{manifest_path}: width is {width!r}, expected an integer from 1 to 1024")
    try:
        weights = read_safetensors(content)
    except Exception as error:  # safetensors raises its own and struct errors for malformed files
        raise BundleError(f"{weights_path}: not a safetensors file: {error}") from None
    for name, shape in shapes(width).items():
        found = weights.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
            about = "is missing" if found is None else f"is {found.dtype}{list(found.shape)}"
            raise BundleError(f"{weights_path}: {name} {about}, expected finite float32{list(shape)}")
    return LearnedPolicy(weights, manifest)
