"""Imports point down only, serving stays free of training libraries, and the repository keeps its shape."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "agents": set(),
    "envs": {"agents"},
    "serving": {"agents"},
    "eval": {"agents", "envs", "serving"},
    "train": {"agents", "envs", "eval"},
}

TRAINING_LIBRARIES = {"torch", "pettingzoo", "gymnasium", "stable_baselines3", "onnx", "onnxscript", "onnxruntime"}
LIGHT_PACKAGES = {"agents", "serving"}
MAY_NEED_TRAINING_LIBRARIES = {"agents/policy/network.py"}

TOP_LEVEL = {
    *MAY_IMPORT,
    "tests",
    "docs",
    ".ci",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "mkdocs.yml",
    "README.md",
    "pyproject.toml",
}


def imported_modules(source: str, path: str) -> list[tuple[int, str]]:
    """Line and dotted name of everything that `source` imports, wherever in the file.

    `path` is relative to the repository root; relative imports are resolved against it.
    """
    package = ("wwwserve", *Path(path).parent.parts)
    found = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import envs` out of a package names its modules in the aliases.
            whole = module in ("", "wwwserve")
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names] if whole else [module]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            name = node.args[0]
            if (
                called in {"import_module", "__import__"}
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                found.append((node.lineno, name.value))
    return found


def violations(source: str, path: str) -> list[str]:
    """What the module at `path` imports and must not, one line each."""
    layer = Path(path).parts[0]
    found = []
    for line, module in imported_modules(source, path):
        root, _, inner = module.partition(".")
        top = inner.split(".")[0] if root == "wwwserve" else root
        if root in MAY_IMPORT:
            found.append(f"{path}:{line}: {module} is installed as wwwserve.{module}")
        elif top in MAY_IMPORT and top != layer and top not in MAY_IMPORT[layer]:
            found.append(f"{path}:{line}: {layer} must not import {module}")
        if top in TRAINING_LIBRARIES and layer in LIGHT_PACKAGES and path not in MAY_NEED_TRAINING_LIBRARIES:
            found.append(f"{path}:{line}: {module} is for training only")
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_down(layer):
    modules = sorted((ROOT / layer).rglob("*.py"))
    assert modules, f"{layer}/ has no modules"
    found = [
        line
        for module in modules
        for line in violations(module.read_text(encoding="utf-8"), module.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agents/view.py", "import wwwserve.envs.market"),
        ("agents/view.py", "from wwwserve.envs import market"),
        ("agents/view.py", "def f():\n    from wwwserve.serving.app import App"),
        ("agents/view.py", "import numpy, wwwserve.train.mappo as mappo"),
        ("agents/view.py", "import torch"),
        ("agents/view.py", "try:\n    from torch import nn\nexcept ImportError:\n    nn = None"),
        ("agents/view.py", "from .. import envs"),
        ("agents/view.py", "from ..envs import market"),
        ("envs/market.py", "from wwwserve.serving import app"),
        ("envs/market.py", "import importlib\nimportlib.import_module('wwwserve.eval.compare')"),
        ("serving/http/routes.py", "from importlib import import_module\nx = import_module('wwwserve.envs.emulator')"),
        ("serving/http/routes.py", "__import__('pettingzoo')"),
        ("serving/local_nodes.py", "import stable_baselines3.common"),
        ("agents/policy/bundle.py", "import onnxruntime"),
        ("eval/compare.py", "from wwwserve.train.mappo import Args"),
        ("train/mappo.py", "import wwwserve.serving"),
        ("train/mappo.py", "from wwwserve import serving"),
        ("train/mappo.py", "from eval import compare"),
    ],
)
def test_checker_sees_a_violation(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "agents/view.py",
            "import numpy\nfrom . import knowledge\nfrom .kernel import kernel\nimport wwwserve.agents.decision",
        ),
        ("agents/policy/network.py", "import torch"),
        ("envs/market_v1.py", "import pettingzoo\nfrom wwwserve.agents import protocol"),
        (
            "serving/http/routes.py",
            "from wwwserve.agents.policy.bundle import Bundle\nfrom wwwserve.serving.engine.adapter import Engine",
        ),
        ("eval/live/trial.py", "import wwwserve.agents, wwwserve.envs, wwwserve.serving"),
        ("train/mappo.py", "import torch\nfrom wwwserve.eval import compare\nfrom wwwserve.envs.batch import Batch"),
        ("serving/http/routes.py", "name = 'torch'\nprint('import envs')"),
    ],
)
def test_checker_allows_what_is_allowed(path, source):
    assert violations(source, path) == []


def test_top_level_holds_only_the_allowed_entries():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")  # an unpacked archive; `make test` in a clone has one
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    entries = {name.split("/")[0] for name in listed.split("\0") if name}
    assert entries <= TOP_LEVEL, f"unexpected at the top level: {sorted(entries - TOP_LEVEL)}"
