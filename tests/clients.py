"""Clients of others in an environment of their own, pinned, which is made once."""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from wwwserve.agents.kernel import cache_root

PACKAGES = ("langchain-openai==1.7.4", "litellm==1.110.2", "openai==3.57.0")
RECIPE = "recipe"  # what it was made from, written last


def python() -> Path:
    """The Python of that environment, which is made if it is not there: a minute, and a package registry."""
    folder = cache_root() / "clients"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = "\n".join((sys.version, *PACKAGES))
    made = folder / "env"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / RECIPE).exists() or (made / RECIPE).read_text() != recipe:
            shutil.rmtree(made, ignore_errors=True)
            venv.create(made, with_pip=True, symlinks=True)
            pip = [str(made / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary", ":all:"]
            done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, env=environment())
            assert done.returncode == 0, done.stderr[-2000:]
            (made / RECIPE).write_text(recipe)
    return made / "bin" / "python"


def environment() -> dict[str, str]:
    """For programs of it: the process's, without what brings in our packages, and without requests to the outside."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONSAFEPATH": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
