"""Writing a bundle from a torch policy: all of it or nothing."""

import io
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save as safetensors_bytes
from torch import Tensor, nn

from wwwserve.agents.policy.bundle import (
    CARD,
    FORMAT,
    MANIFEST,
    ONNX,
    WEIGHTS,
    Tree,
    architecture_table,
    decision_table,
    feature_table,
    golden_table,
    normaliser_table,
    results_table,
    seal,
)
from wwwserve.agents.policy.forward import Weights
from wwwserve.agents.policy.network import Actor
from wwwserve.agents.policy.runtime import LearnedPolicy, load
from wwwserve.agents.view import VIEW_VERSION, Views

OPSET = 17  # of ONNX
INPUTS, OUTPUTS = Views._fields, ("route", "admit", "price")


def weights_of(actor: Actor) -> Weights:
    """The actor's weights as `agents.policy.runtime` takes them."""
    return {name: t.detach().to("cpu", torch.float32).numpy().copy() for name, t in actor.state_dict().items()}


def actor_of(weights: Weights) -> Actor:
    """An actor on the CPU with these weights."""
    actor = Actor(len(weights["node_in.bias"]))
    actor.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return actor


def save(policy: Actor | Weights, folder: str | Path, about: Mapping[str, Any], views: Views) -> None:
    """Write a policy as a bundle to `folder`, replacing a bundle that is there.

    `about` goes into the manifest, where what is not a finite number becomes null; `views` [G], 1 to
    `agents.policy.bundle.MAX_GOLDEN` recorded ones, become the golden views.

    The bundle is written beside its place, loaded once to verify it, and moved; a failure leaves what was there.
    Raises ValueError if `folder` exists and is not a bundle, BundleError if the bundle would not be a sound one.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a policy bundle; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = weights_of(policy) if isinstance(policy, Actor) else policy
    manifest = {
        "name": "learned",
        **_plain(about),
        "format": FORMAT,
        "view_version": VIEW_VERSION,
        "architecture": architecture_table(len(weights["node_in.bias"])),
        "decisions": decision_table(),
        "features": feature_table(),
        "normaliser": normaliser_table(),
        "golden": golden_table(views, LearnedPolicy(weights, {}).logits(views)),
    }
    contents = {
        WEIGHTS: safetensors_bytes(weights),
        ONNX: onnx_bytes(actor_of(weights), views),
        CARD: card(manifest).encode(),
    }
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in contents.items():
            (draft / name).write_bytes(content)
        (draft / MANIFEST).write_bytes(seal(manifest, contents))
        load(draft)
        draft.chmod(0o755)
        if folder.exists():
            retired = draft.with_name(draft.name + "-old")
            os.replace(folder, retired)
            os.replace(draft, folder)
            shutil.rmtree(retired)
        else:
            os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _plain(value: Any) -> Any:
    """`value` as JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


class _FromViews(nn.Module):
    """An actor that takes views as they are recorded, and normalises them itself."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, nodes: Tensor, request: Tensor, me: Tensor, routes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits: tuple[Tensor, Tensor, Tensor] = self.actor(
            self.actor.inputs(nodes, request, me, routes.to(torch.int32))  # runtimes compare few types
        )
        return logits


def onnx_bytes(actor: Actor, views: Views) -> bytes:
    """The actor as an ONNX model: inputs the arrays of `views` [M, ...], outputs the logits of route, admit and price.

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


# The model card.

_CARD = """\
# {name}: a policy for providers of `wwwserve`

LLM providers serve each other's overflow without a coordinator. For the request at the head of its queue, a provider
with this policy decides whether to hold it, run it here or hand it to one of up to {candidates} candidates; and on what
terms it takes others' work, at which of its prices. It sees only what a provider knows: its own node, the adverts of
the candidates, and its dealings with them.

A {architecture} network of width {width}, {parameters:,} parameters: one encoder for every node in view, pooled, and a
score for each node, so that the order of the candidates does not matter.

## Use

```sh
wwwserve policy verify FOLDER
python -m eval.compare paper/mixed-hardware --policy FOLDER www_serve earliest_finish_trust
```

`wwwserve.agents.policy.runtime.load(FOLDER)` gives the policy in Python; it needs NumPy, numba and safetensors.
`policy.onnx` is the same function for other runtimes: inputs `nodes` [M, {nodes}, {node_features}],
`request` [M, {request_features}] and `me` [M, {self_features}], float32 in the physical units that
`manifest.json` lists (normalisation is in the graph), and the mask `routes` [M, {routes}], int8; outputs
the logits of `route`, `admit` and `price`. Take the most probable of each.

## Training

{training}

## Results

{results}

## Limits

- Trained and measured in the simulated market alone. Engines there are exact to the iteration, networks and users are
  models.
- It reads adverts, which may lie; it discounts them by the record of a peer, which a stranger does not have.
- Features are clipped to the ranges in the manifest; beyond them it cannot tell one load from another.
- It was trained on the markets named above; others, many more providers or other hardware may ask for another policy.
- Observation spec version {view_version}, bundle format {format}: other versions refuse it.
"""


def card(manifest: Tree) -> str:
    """The model card, in Markdown, of the policy that `manifest` describes."""
    rows = results_table(manifest)
    results = "Not measured.\n"
    if rows:
        lines = ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        results = (
            "Mean score (SLO attainment, or value delivered in time where requests have values) on test markets that "
            "training\nnever saw, with 95 % intervals; the last column is paired by market.\n\n" + "\n".join(lines)
        )
    facts = []
    if isinstance(manifest.get("agent_steps"), int):
        facts.append(f"- {manifest['agent_steps']:,} agent steps, seed {manifest.get('seed')}")
    for key, value in (manifest.get("environment") or {}).items():
        facts.append(f"- {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    git = manifest.get("git")
    if git:
        facts.append(f"- revision {git['revision']}" + (", with uncommitted changes" if git["dirty"] else ""))
    features = manifest["features"]
    return _CARD.format(
        name=manifest["name"],
        candidates=manifest["decisions"]["candidates"],
        architecture=manifest["architecture"]["name"],
        width=manifest["architecture"]["width"],
        parameters=manifest["architecture"]["parameters"],
        nodes=1 + manifest["decisions"]["candidates"],
        routes=len(manifest["decisions"]["routes"]),
        node_features=len(features["node"]),
        request_features=len(features["request"]),
        self_features=len(features["self"]),
        training="\n".join(facts) or "Not recorded.",
        results=results.rstrip(),
        view_version=manifest["view_version"],
        format=manifest["format"],
    )
