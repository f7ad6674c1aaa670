"""The learned policy and its critic, in torch.

One encoder for every node in view, pooled over nodes, so that one set of weights serves any number of peers in any
order; a pointer head over nodes, and heads for holding, for the terms and for the price.
"""

import torch
from torch import Tensor, nn

from agents.decision import ADMITS, PRICES
from agents.view import (
    FINISH_S,
    NODE_FEATURES,
    OVERDUE,
    OWN,
    PACE,
    RECORD,
    REQUEST_FEATURES,
    SELF_FEATURES,
    Feature,
    log_unit,
)

FORBIDDEN = -1e9  # the logit of a route that the mask rules out
USUAL_ADMIT = 4  # the terms and the price that an untrained policy prefers: up to a minute's wait, the second price
USUAL_PRICE = 1
USUAL_BONUS = 3.0
HOLD_BIAS = -3.0


class Normalise(nn.Module):
    """`agents.view.normalise` as a layer: features [..., F] to about [-1, 1]."""

    logs: Tensor
    unit: Tensor
    top: Tensor

    def __init__(self, features: tuple[Feature, ...]) -> None:
        super().__init__()
        logs = torch.tensor([f.scale == "log" for f in features])
        unit = torch.tensor([log_unit(f) if f.scale == "log" else 1.0 for f in features])
        high = torch.tensor([f.high for f in features])
        self.register_buffer("logs", logs, persistent=False)
        self.register_buffer("unit", unit, persistent=False)
        self.register_buffer("top", torch.where(logs, torch.log1p(high / unit), high), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale features [..., F]."""
        x = x / self.unit
        return torch.where(self.logs, torch.sign(x) * torch.log1p(x.abs()), x) / self.top


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Actor(nn.Module):
    """Logits of a batch of views.

    The route logits start from `prior` times the log of the earliest over each node's expected finish time, discounted
    by delivery against promise as the rule `earliest_finish_trust` does: a weak preference for the node that is
    expected to be done first, which learning is free to overrule.
    """

    def __init__(self, width: int = 32, prior: float = 6.0) -> None:
        super().__init__()
        self.width = width
        about = len(REQUEST_FEATURES) + len(SELF_FEATURES)
        relu = 2**0.5
        self.scale_nodes = Normalise(NODE_FEATURES)
        self.scale_request = Normalise(REQUEST_FEATURES)
        self.scale_me = Normalise(SELF_FEATURES)
        self.node_in = _linear(len(NODE_FEATURES), width, relu)
        self.about_in = _linear(about, width, relu)
        self.node_hidden = _linear(width, width, relu)
        self.pool = _linear(about + 2 * width, width, relu)
        self.score_node = _linear(width, width, relu)
        self.score_pool = _linear(width, width, relu)
        self.score = _linear(width, 1, 0.01)
        self.hold = _linear(width, 1, 0.01)
        self.admit = _linear(width, ADMITS, 0.01)
        self.price = _linear(width, PRICES, 0.01)
        self.prior = nn.Parameter(torch.tensor(prior))
        with torch.no_grad():
            self.hold.bias.fill_(HOLD_BIAS)
            self.admit.bias[USUAL_ADMIT] = USUAL_BONUS
            self.price.bias[USUAL_PRICE] = USUAL_BONUS

    def forward(self, nodes: Tensor, request: Tensor, me: Tensor, routes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of route [M, ROUTES], admit [M, ADMITS], price [M, PRICES] for views as in `agents.view`."""
        x = self.scale_nodes(nodes)
        about = torch.cat([self.scale_request(request), self.scale_me(me)], -1)
        hidden = torch.relu(self.node_in(x) + self.about_in(about).unsqueeze(-2))
        hidden = torch.relu(self.node_hidden(hidden))
        # A row of zeros is no node; the own node is flagged, a candidate's time per token is above 0.
        present = (nodes[..., FINISH_S] + nodes[..., OWN] > 0).unsqueeze(-1)
        hidden = hidden * present
        pooled = torch.cat([about, hidden.sum(-2) / present.sum(-2), hidden.amax(-2)], -1)
        pooled = torch.relu(self.pool(pooled))
        scored = torch.relu(self.score_node(hidden) + self.score_pool(pooled).unsqueeze(-2))
        score = self.score(scored).squeeze(-1)
        legal = routes[..., 1:] > 0
        trust = torch.exp(nodes[..., PACE].clamp_min(0.0) + nodes[..., RECORD].clamp_min(0.0))
        log_s = torch.log((nodes[..., FINISH_S] * trust + nodes[..., OVERDUE]).clamp_min(1e-3))
        soonest = torch.where(legal, log_s, torch.full_like(log_s, 1e9)).amin(-1, keepdim=True)
        score = score + self.prior * (soonest - log_s)
        route = torch.cat([self.hold(pooled), score], -1)
        route = torch.where(routes > 0, route, torch.full_like(route, FORBIDDEN))
        return route, self.admit(pooled), self.price(pooled)


class Critic(nn.Module):
    """Value of a provider's situation, given its own view and the pooled state of the whole market."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        own = len(NODE_FEATURES) + len(SELF_FEATURES)
        self.scale_nodes = Normalise(NODE_FEATURES)
        self.scale_request = Normalise(REQUEST_FEATURES)
        self.scale_me = Normalise(SELF_FEATURES)
        relu = 2**0.5
        self.body = nn.Sequential(
            _linear(3 * own + len(REQUEST_FEATURES), width, relu),
            nn.ReLU(),
            _linear(width, width, relu),
            nn.ReLU(),
        )
        self.last = _linear(width, 1, 1.0)

    def summary(self, nodes: Tensor, me: Tensor, present: Tensor) -> Tensor:
        """Mean and maximum over providers [B, N] of their own features; `present` [B, N] 1 for real ones."""
        own = torch.cat([self.scale_nodes(nodes[..., 0, :]), self.scale_me(me)], -1) * present.unsqueeze(-1)
        return torch.cat([own.sum(-2) / present.sum(-1, keepdim=True), own.amax(-2)], -1)

    def forward(self, nodes: Tensor, request: Tensor, me: Tensor, summary: Tensor) -> Tensor:
        """Values [M] (normalised) of providers with these views in markets with this `summary` [M, ...]."""
        own = torch.cat([self.scale_nodes(nodes[..., 0, :]), self.scale_me(me)], -1)
        value: Tensor = self.last(self.body(torch.cat([own, self.scale_request(request), summary], -1)))
        return value.squeeze(-1)
