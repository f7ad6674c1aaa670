"""Writing a bundle from a torch policy: all of it or nothing."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save as safetensors_bytes

from agents.network import Actor
from agents.runtime import FORMAT, MANIFEST, WEIGHTS, Weights, digest, feature_table, load
from agents.view import VIEW_VERSION


def weights_of(actor: Actor) -> Weights:
    """The actor's weights as `agents.runtime` takes them."""
    return {name: t.detach().to("cpu", torch.float32).numpy().copy() for name, t in actor.state_dict().items()}


def save(actor: Actor, folder: str | Path, about: dict[str, Any] | None = None) -> None:
    """Write `actor` as a bundle to `folder`, replacing a bundle that is there; `about` goes into the manifest.

    The bundle is written beside its place, loaded once to verify it, and moved; a failure leaves what was there.
    Raises ValueError if `folder` exists and is not a bundle.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a policy bundle; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors_bytes(weights_of(actor))
    manifest = {
        **(about or {}),
        "format": FORMAT,
        "view_version": VIEW_VERSION,
        "width": actor.width,
        "features": feature_table(),
        "sha256": {WEIGHTS: digest(content)},
    }
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (draft / WEIGHTS).write_bytes(content)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
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
