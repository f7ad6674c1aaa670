"""A learned policy's bundle: the files that an operator is handed, what they must say, writing and reading them.

A bundle is a folder of four files: `policy.safetensors` (the weights), `policy.onnx` (the same policy for other
runtimes), `README.md` (the model card) and `manifest.json`, which describes the policy and has the SHA-256 of all four;
its own is taken with zeros in its place. Digests tell of damage, not of who made a bundle. Nothing here needs a library
for learning.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as read_safetensors
from safetensors.numpy import save as safetensors_bytes

from wwwserve.agents.decision import CANDIDATES, NODES, ROUTES
from wwwserve.agents.policy import architecture
from wwwserve.agents.policy.architecture import (
    KEEP,
    LOGITS,
    MAX_WIDTH,
    MOST_KEEP,
    MOST_PAYS,
    PAYS,
    Weights,
    width_of,
)
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import NODE_FEATURES, REQUEST_FEATURES, SELF_FEATURES, VIEW_VERSION, Views, scales

FORMAT = 5
MANIFEST, WEIGHTS, ONNX, CARD = "manifest.json", "policy.safetensors", "policy.onnx", "README.md"
SEALED = (WEIGHTS, ONNX, CARD)  # the files whose digests the manifest has
MAX_BYTES = 16 * 2**20  # of one file
MAX_GOLDEN = 256
MAX_DEPTH = 16  # of the manifest
TOLERANCE = 1e-4  # between golden logits and those computed here
SHIPPED = {
    name: Path(__file__).parents[1] / "data" / "policies" / name for name in ("competitive", "cooperative")
}  # what each is for: own profit among strangers, the welfare of a federation
DEFAULT_BUNDLE = SHIPPED["competitive"]

Tree = dict[str, Any]
FEATURES = {"node": NODE_FEATURES, "request": REQUEST_FEATURES, "self": SELF_FEATURES}


class BundleError(ValueError):
    """A bundle that cannot be used; the message says which file and why."""


class Bundle(NamedTuple):
    """What a sound bundle holds."""

    folder: Path
    manifest: Tree
    weights: Weights
    views: Views  # [G] golden views
    logits: NDArray[np.float32]  # [G, LOGITS] what the policy made of them where it was saved


def folder_of(named: str | None) -> Path:
    """The folder of a policy that is shipped by its name, of any other by its folder; None is the default one."""
    if named is None:
        return DEFAULT_BUNDLE
    return SHIPPED.get(named, Path(named))


def digest(content: bytes) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


_UNSEALED = "0" * 64  # where a manifest's own digest will be


def seal(manifest: Tree, contents: Mapping[str, bytes]) -> bytes:
    """The manifest as a file, with its own digest and those of the contents of the `SEALED` files."""
    digests = {MANIFEST: _UNSEALED} | {name: digest(contents[name]) for name in SEALED}
    fields = {**manifest, "sha256": digests}
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items())
    draft = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    return draft.replace(_UNSEALED.encode(), digest(draft).encode())


# What a manifest must say to be of this version of the project.


def feature_table() -> dict[str, list[Tree]]:
    """The features of node, request and provider itself, in order."""
    return {
        part: [{"name": f.name, "unit": f.unit, "low": f.low, "high": f.high, "scale": f.scale} for f in features]
        for part, features in FEATURES.items()
    }


def decision_table() -> Tree:
    """What is decided: the routes, and the markups, credits for 1000 tokens of output beyond the own marginal cost."""
    return {
        "candidates": CANDIDATES,
        "routes": ["hold", "local", *(f"candidate {k + 1}" for k in range(CANDIDATES))],
        "markups": MARKUPS.tolist(),
    }


def normaliser_table() -> dict[str, dict[str, list[float]]]:
    """By part of the view, each feature's `log_unit` u (0 for a linear one) and `full_scale` t.

    A feature x becomes x / t if linear, else sign(x) log(1 + |x|/u) / t.
    """
    table = {}
    for part, features in FEATURES.items():
        unit, top = scales(features)
        table[part] = {"log_unit": plain(unit), "full_scale": plain(top)}
    return table


def architecture_table(width: int) -> Tree:
    """Name, width and parameter count of a policy of this width."""
    return {
        "name": architecture.NAME,
        "width": width,
        "parameters": architecture.parameters(width),
    }


def plain(singles: NDArray[Any]) -> Any:
    """An array as nested lists; of a float32 the shortest decimals that give the same float32 back."""
    if singles.ndim > 1:
        return [plain(row) for row in singles]
    return [float(str(x)) if isinstance(x, np.float32) else x.item() for x in singles]


def golden_table(views: Views, logits: NDArray[np.float32]) -> Tree:
    """Golden views [G] and their logits [G, LOGITS] as a manifest records them."""
    return {**{name: plain(array) for name, array in views._asdict().items()}, "logits": plain(logits)}


# Reading.


def read(folder: str | Path) -> Bundle:
    """The bundle in `folder`. Raises BundleError, with file and reason, for anything that is not a sound bundle.

    Checked is all but the golden logits, which `from_bundle` compares with its own.
    """
    folder = Path(folder)
    content = _content(folder, MANIFEST)
    manifest = _manifest(folder / MANIFEST, content)
    named = manifest.get("sha256")
    if not isinstance(named, dict) or set(named) != {MANIFEST, *SEALED}:
        raise BundleError(f"{folder / MANIFEST}: sha256 does not name exactly {', '.join((MANIFEST, *SEALED))}")
    contents = {MANIFEST: content.replace(str(named[MANIFEST]).encode(), _UNSEALED.encode())}
    contents |= {name: _content(folder, name) for name in SEALED}
    for name, content in contents.items():
        if named[name] != digest(content):
            raise BundleError(f"{folder / name}: its SHA-256 is not the one in {MANIFEST}")
    _check_tables(folder / MANIFEST, manifest)
    width = manifest["architecture"]["width"]
    weights = _weights(folder / WEIGHTS, contents[WEIGHTS], width)
    return Bundle(folder, manifest, weights, *_golden(folder / MANIFEST, manifest.get("golden")))


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if real.parent != folder.resolve():
            raise BundleError(f"{path}: a link that leads out of the bundle, expected a file in it")
        if not real.is_file():
            raise BundleError(f"{path}: not a regular file")
        size = real.stat().st_size
        if size > MAX_BYTES:
            raise BundleError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        return real.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    except RuntimeError:  # how older Pythons report it
        raise BundleError(f"{path}: cannot be read: a link to itself") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _manifest(path: Path, content: bytes) -> Tree:
    """The manifest, if it is of this format and observation spec."""
    try:
        manifest = json.loads(content.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise BundleError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise BundleError(f"{path}: not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: expected a JSON object")
    if _deeper(manifest, MAX_DEPTH):
        raise BundleError(f"{path}: nested too deeply, expected at most {MAX_DEPTH} levels")
    for key, number in (("format", FORMAT), ("view_version", VIEW_VERSION)):
        if manifest.get(key) != number:
            raise BundleError(f"{path}: {key} is {_shown(manifest.get(key))}, expected {number}")
    return manifest


def _deeper(tree: object, depth: int) -> bool:
    """Whether more than `depth` objects and lists lie in each other."""
    if not isinstance(tree, dict | list):
        return False
    return depth == 0 or any(_deeper(each, depth - 1) for each in (tree.values() if isinstance(tree, dict) else tree))


def _check_tables(path: Path, manifest: Tree) -> None:
    """That features, decisions, normaliser and architecture are this version's."""
    for key, table in (("features", feature_table()), ("decisions", decision_table())):
        if manifest.get(key) != table:
            raise BundleError(f"{path}: {key} differ from those of this version, {_where(manifest.get(key), table)}")
    normaliser: Any = manifest.get("normaliser")
    for part, rows in normaliser_table().items():
        for key, numbers in rows.items():
            try:
                found = np.array(normaliser[part][key], np.float64)
                same = found.shape == (len(numbers),) and bool(np.allclose(found, numbers, rtol=1e-6, atol=0))
            except (TypeError, ValueError, KeyError, IndexError, OverflowError):
                same = False
            if not same:
                raise BundleError(f"{path}: normaliser differs from that of this version, at {part}.{key}")
    made: Any = manifest.get("architecture")
    if not isinstance(made, dict):
        raise BundleError(f"{path}: architecture is {_shown(made)}, expected a JSON object")
    width = made.get("width")
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MAX_WIDTH:
        raise BundleError(f"{path}: width is {_shown(width)}, expected an integer from 1 to {MAX_WIDTH}")
    for key, value in architecture_table(width).items():
        if made.get(key) != value:
            raise BundleError(f"{path}: architecture.{key} is {_shown(made.get(key))}, expected {value!r}")


def _shown(value: object) -> str:
    """A value of a manifest, short enough for a message."""
    text = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


def _where(found: object, expected: object, at: str = "") -> str:
    """Where two trees first differ."""
    if isinstance(found, dict) and isinstance(expected, dict) and set(found) == set(expected):
        pairs = [(f"{at}.{key}", found[key], expected[key]) for key in expected]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(f"{at}[{k}]", found[k], expected[k]) for k in range(len(expected))]
    else:
        kind = "another form" if isinstance(expected, dict | list) else f"{_shown(found)}, expected {expected!r}"
        return f"at {at.lstrip('.') or 'the top'}: {kind}"
    return next(_where(a, b, name) for name, a, b in pairs if a != b)


def _weights(path: Path, content: bytes, width: int) -> Weights:
    try:
        weights: Weights = read_safetensors(content)
    except Exception as error:  # safetensors raises its own and struct errors for malformed files
        raise BundleError(f"{path}: not a safetensors file: {error}") from None
    for name, default in architecture.SET.items():
        weights.setdefault(name, np.array(default))
    table = architecture.shapes(width)
    if extra := sorted(set(weights) - set(table)):
        raise BundleError(f"{path}: {_shown(extra[0])} is no weight of this architecture")
    for name, shape in table.items():
        found = weights.get(name)
        if found is None:
            raise BundleError(f"{path}: {name} is missing, expected float32{list(shape)}")
        if found.shape != shape or found.dtype != np.float32:
            raise BundleError(f"{path}: {name} is {found.dtype}{list(found.shape)}, expected float32{list(shape)}")
        if not np.isfinite(found).all():
            raise BundleError(f"{path}: {name} has numbers that are not finite")
    for name, most in ((PAYS, MOST_PAYS), (KEEP, MOST_KEEP)):
        if not 0.0 <= weights[name] <= most:
            raise BundleError(f"{path}: {name} is {weights[name]:g}, expected 0 to {most:g}")
    return weights


def _golden(path: Path, table: object) -> tuple[Views, NDArray[np.float32]]:
    """The golden views and logits of a manifest."""
    wanted = {
        "nodes": (NODES, len(NODE_FEATURES)),
        "request": (len(REQUEST_FEATURES),),
        "me": (len(SELF_FEATURES),),
        "routes": (ROUTES,),
        "logits": (LOGITS,),
    }
    if not isinstance(table, dict) or set(table) != set(wanted):
        raise BundleError(f"{path}: golden does not hold exactly {', '.join(wanted)}")
    arrays: dict[str, NDArray[np.float64]] = {}
    for name, shape in wanted.items():
        try:
            found = np.array(table[name], np.float64)
        except (TypeError, ValueError, OverflowError):
            found = np.zeros(0)
        count = len(arrays["nodes"]) if arrays else len(found) if found.ndim else 0
        sound = found.shape == (count, *shape) and 1 <= count <= MAX_GOLDEN
        if not sound or not (np.abs(found) < 1e30).all():
            expected = f"1 to {MAX_GOLDEN} times {list(shape)} finite numbers, as many as there are nodes"
            raise BundleError(f"{path}: golden {name} is not {expected}")
        arrays[name] = found
    nodes, request, me, logits = (arrays[name].astype(np.float32) for name in ("nodes", "request", "me", "logits"))
    routes = (arrays["routes"] > 0).astype(np.int8)
    return Views(nodes, request, me, routes), logits


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


# Writing.


def save(
    weights: Weights, folder: str | Path, about: Mapping[str, Any], views: Views, onnx: bytes,
    card: Callable[[Tree], str],
) -> None:  # fmt: skip
    """Write a policy as a bundle to `folder`, replacing a bundle that is there.

    `about` goes into the manifest, where what is not a finite number becomes null; `views` [G], 1 to MAX_GOLDEN
    recorded ones, become the golden views; `onnx` is the same policy for other runtimes, `card` writes the model card
    of a manifest.

    The bundle is written beside its place, loaded once to verify it, and moved; a failure leaves what was there.
    Raises ValueError if `folder` exists and is not a bundle, BundleError if the bundle would not be a sound one.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a policy bundle; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = {
        "name": "learned",
        **_plain(about),
        "format": FORMAT,
        "view_version": VIEW_VERSION,
        "architecture": architecture_table(width_of(weights)),
        "decisions": decision_table(),
        "features": feature_table(),
        "normaliser": normaliser_table(),
        "golden": golden_table(views, LearnedPolicy(weights, {}).logits(views)),
    }
    contents = {
        WEIGHTS: safetensors_bytes(weights),
        ONNX: onnx,
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


# What the results say, for the model card and for people at a terminal.


def results_table(manifest: Tree) -> list[list[str]]:
    """Header and a row for each family of markets: the policy's score, `www_serve`'s, the best rule's, and its own less
    the best rule's, paired, each with the half-width of its 95 % interval.

    Empty unless the results are those of `eval.regret.judge` and have this policy.
    """
    try:
        results, name = manifest["results"], manifest["name"]
        policies, best = results["policies"], results["best_rule"]
        rows = [["markets", str(name), "www_serve", "best rule", "less the best rule"]]
        for family, rule in best.items():
            own, rest = policies[name], policies.get("www_serve", {"score": {}})
            (behind, half) = own["regret"][family]
            rows.append([
                str(family), _figure(own["score"][family]), _figure(rest["score"].get(family)),
                f"{_figure(policies[rule]['score'][family])} {rule}",
                _figure([None if behind is None else -behind, half], "+"),
            ])  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):
        return []
    return rows


def _figure(pair: Any, sign: str = "") -> str:
    if pair is None or pair[0] is None:
        return "–"
    return f"{pair[0]:{sign}.4f}" + (f" ± {pair[1]:.4f}" if pair[1] is not None else "")
