"""The learned policy and its critic, in torch.

One encoder for every node in view, pooled over nodes, so that one set of weights serves any number of peers in any
order; a pointer head over nodes, and heads for holding and for the markup. Both read features that are normalised
already; `Actor.inputs` makes them from views.
"""

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from wwwserve.agents.decision import AT_COST
from wwwserve.agents.policy.architecture import (
    ABOUT,
    EVIDENCE,
    FORBIDDEN,
    FULL_WIDTH,
    HEADS,
    KEEP,
    MOST_LATENESS,
    PAYS,
    PAYS_IN_FULL,
    SETTING_UNITS,
    SHORTEST_S,
    Layers,
    Weights,
    sizes,
    width_of,
)
from wwwserve.agents.view import FINISH_S, NODE_FEATURES, OWN, REQUEST_FEATURES, SELF_FEATURES, Feature, Views, scales

HOLD_BIAS = -3.0
MARKUP_BONUS = 1.0  # of the markup to begin with, since several levels of prices are near an equilibrium
USUAL_SETTINGS = (1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.3, 0.7, 0.1, 0.1)  # of the rule within, in `SETTING_UNITS`
SUMMARY = 2 * (len(NODE_FEATURES) + len(SELF_FEATURES))  # mean and maximum over a market's providers


class Normalise(nn.Module):
    """`agents.view.normalise` as a layer: features [..., F] to about [-1, 1]."""

    logs: Tensor
    unit: Tensor
    top: Tensor

    def __init__(self, features: tuple[Feature, ...]) -> None:
        super().__init__()
        unit, top = (torch.from_numpy(x) for x in scales(features))
        self.register_buffer("logs", unit > 0, persistent=False)
        self.register_buffer("unit", torch.where(unit > 0, unit, 1.0), persistent=False)
        self.register_buffer("top", top, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale features [..., F]."""
        x = x / self.unit
        return torch.where(self.logs, torch.sign(x) * torch.log1p(x.abs()), x) / self.top


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Inputs(NamedTuple):
    """A batch of views as the networks read them, leading axes [M]."""

    nodes: Tensor  # [M, NODES, len(NODE_FEATURES)] normalised, zeros where there is no node
    about: Tensor  # [M, ABOUT] normalised: the request, then the provider
    evidence: Tensor  # [M, NODES, len(EVIDENCE)] as in the view
    present: Tensor  # [M, NODES] 1 for a node, else 0
    routes: Tensor  # [M, ROUTES] the mask


class Actor(nn.Module):
    """Logits of a batch of views.

    Within it is a rule, `trust_cap` made smooth: the route logits contain `prior` times the log of the earliest over
    each node's expected time, discounted by delivery against promise and by what it costs others, less a penalty for
    nodes that are full, which holding gets where all are, plus `prior` times what the request brings there. What one
    tunes in a rule for a kind of market, its settings, is an output of the network here, made anew for every view.
    Learning is free to overrule the rule.
    """

    setting_units: Tensor
    pays: Tensor
    keep: Tensor

    def __init__(
        self, width: int = 32, prior: float = 6.0, pays: float = float(PAYS_IN_FULL), keep: float = 0.0
    ) -> None:
        """`prior` is what learning begins with, as is selling at cost; `pays`, the share of its cost that others' work
        has to bring, and `keep`, see `agents.decision`, stay."""
        super().__init__()
        self.scale_nodes = Normalise(NODE_FEATURES)
        self.scale_request = Normalise(REQUEST_FEATURES)
        self.scale_me = Normalise(SELF_FEATURES)
        for name, size in sizes(width)._asdict().items():
            self.add_module(name, _linear(size.inputs, size.outputs, 0.01 if name in HEADS else 2**0.5))
        self.prior = nn.Parameter(torch.tensor(prior))
        self.register_buffer(PAYS, torch.tensor(pays))
        self.register_buffer(KEEP, torch.tensor(keep))
        self.register_buffer("setting_units", torch.tensor(SETTING_UNITS), persistent=False)
        at = self.layers()
        with torch.no_grad():
            at.setting.bias.copy_(torch.log(torch.expm1(torch.tensor(USUAL_SETTINGS))))
            at.hold.bias.fill_(HOLD_BIAS)
            at.markup.bias[AT_COST] = MARKUP_BONUS

    def layers(self) -> Layers[nn.Linear]:
        """The linear layers."""
        return Layers(*(getattr(self, name) for name in Layers._fields))

    def inputs(self, nodes: Tensor, request: Tensor, me: Tensor, routes: Tensor) -> Inputs:
        """Views [M, ...] as in `agents.view`, as the networks read them."""
        present = (nodes[..., OWN] + nodes[..., FINISH_S] > 0).to(nodes.dtype)
        about = torch.cat([self.scale_request(request), self.scale_me(me)], -1)
        x = self.scale_nodes(nodes) * present.unsqueeze(-1)
        return Inputs(x, about, nodes[..., list(EVIDENCE)], present, routes)

    def forward(self, view: Inputs) -> tuple[Tensor, Tensor]:
        """Logits of route [M, ROUTES] and of markup [M, MARKUPS.size]."""
        at = self.layers()
        hidden = torch.relu(at.node_in(view.nodes) + at.about_in(view.about).unsqueeze(-2))
        hidden = torch.relu(at.node_hidden(hidden)) * view.present.unsqueeze(-1)
        mean = hidden.sum(-2) / view.present.sum(-1, keepdim=True)
        pooled = torch.relu(at.pool(torch.cat([view.about, mean, hidden.amax(-2)], -1)))
        scored = torch.relu(at.score_node(hidden) + at.score_pool(pooled).unsqueeze(-2))
        settings = self.settings(pooled)
        full = settings[..., 8:9] * self.fullness(view.evidence, settings[..., 6:8])
        preferred = settings[..., 5:6] * self.log_time(view.evidence, settings[..., :5])
        cost = self.prior * (preferred - settings[..., 9:] * view.evidence[..., -1]) + full
        legal = (view.routes[..., 1:] > 0) & (view.present > 0)
        least = torch.where(legal, cost, 1e9).amin(-1, keepdim=True)
        emptiest = torch.where(legal, full, 1e9).amin(-1, keepdim=True)
        hold = at.hold(pooled) + torch.where(legal.any(-1, keepdim=True), emptiest, 0.0)
        route = torch.cat([hold, at.score(scored).squeeze(-1) - (cost - least)], -1)
        allowed = torch.cat([view.routes[..., :1] > 0, legal], -1)
        route = torch.where(allowed, route, float(FORBIDDEN))
        return route, at.markup(pooled)

    def settings(self, pooled: Tensor) -> Tensor:
        """Settings [M, SETTINGS] of the rule within, at least 0; see `agents.policy.architecture.SETTING_UNITS`."""
        return nn.functional.softplus(self.layers().setting(pooled)) * self.setting_units

    def log_time(self, evidence: Tensor, weights: Tensor) -> Tensor:
        """Log of the expected times to finish [M, NODES], discounted with weights [M, 5]."""
        finish_s, pace, record, overdue_s, slowdown_s, load_s, *_ = evidence.unbind(-1)
        a, b, c, d, e = weights.unsqueeze(-1).unbind(-2)
        trust = torch.exp((a * pace.clamp_min(0.0) + b * record.clamp_min(0.0)).clamp_max(float(MOST_LATENESS)))
        return torch.log((finish_s * trust + c * overdue_s + d * slowdown_s + e * load_s).clamp_min(float(SHORTEST_S)))

    def fullness(self, evidence: Tensor, caps: Tensor) -> Tensor:
        """How full nodes are [M, NODES], 0 to 1, with caps [M, 2] of the fastest and the slowest."""
        *_, kv_use, speed_rank, waiting, _ = evidence.unbind(-1)
        fast, slow = caps.unsqueeze(-1).unbind(-2)
        smooth = torch.sigmoid((kv_use - fast - (slow - fast) * speed_rank) / float(FULL_WIDTH))
        return torch.where(waiting >= 0.5, 1.0, smooth)


class Critic(nn.Module):
    """Value of a provider's situation, given its own view and the pooled state of the whole market."""

    def __init__(self, width: int = 64, central: bool = True) -> None:
        super().__init__()
        self.central = central
        relu = 2**0.5
        self.body = nn.Sequential(
            _linear(len(NODE_FEATURES) + ABOUT + SUMMARY * central, width, relu),
            nn.ReLU(),
            _linear(width, width, relu),
            nn.ReLU(),
        )
        self.last = _linear(width, 1, 1.0)

    def forward(self, own: Tensor, about: Tensor, summary: Tensor) -> Tensor:
        """Values [M] (normalised) of providers in a situation.

        Normalised features, own [M, len(NODE_FEATURES)] of the own node, about [M, ABOUT] as in `Inputs`; `summary`
        [M, SUMMARY] of the market, which an independent critic (`central` false) does not read.
        """
        seen = [own, about, summary] if self.central else [own, about]
        value: Tensor = self.last(self.body(torch.cat(seen, -1)))
        return value.squeeze(-1)


def weights_of(actor: Actor) -> Weights:
    """The actor's weights by name."""
    return {name: t.detach().to("cpu", torch.float32).numpy().copy() for name, t in actor.state_dict().items()}


def actor_of(weights: Weights) -> Actor:
    """An actor on the CPU with these weights."""
    actor = Actor(width_of(weights))
    actor.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return actor


# For other runtimes.

OPSET = 17  # of ONNX
INPUTS, OUTPUTS = Views._fields, ("route", "markup")


class _FromViews(nn.Module):
    """An actor that takes views as they are recorded, and normalises them itself."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, nodes: Tensor, request: Tensor, me: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
        logits: tuple[Tensor, Tensor] = self.actor(
            self.actor.inputs(nodes, request, me, routes.to(torch.int32))  # runtimes compare few types
        )
        return logits


def onnx_bytes(actor: Actor, views: Views) -> bytes:
    """The actor as an ONNX model: inputs the arrays of `views` [M, ...], outputs the logits of route and
    markup.

    M is free; `views` serve as the example that is traced. Normalisation and mask are in the graph.
    """
    model = _FromViews(actor).eval()
    file: Any = io.BytesIO()  # which is taken, though not by its type
    with warnings.catch_warnings():
        # The older exporter: the newer one's graph is thrice as large and quotes the source files of whoever exported.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in views),
            file,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_axes={name: {0: "batch"} for name in (*INPUTS, *OUTPUTS)},
            opset_version=OPSET,
            dynamo=False,
        )
    content: bytes = file.getvalue()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    return content
