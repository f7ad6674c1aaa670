"""The one way this project compiles a numeric kernel.

A kernel is a plain function over NumPy arrays that numba compiles. Compiled code is cached on disk, in a folder
named after the contents of every source that imports this module: numba itself notices only edits of the file that
holds a kernel, not of the kernels it calls, and would go on running the old rules of the game. `NUMBA_DISABLE_JIT=1`
runs every kernel as plain Python.
"""

import fcntl
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numba
import numba.core.event as event
import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

# What kernels take. Their scalars are plain float, int and bool.
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Bytes = NDArray[np.int8]
Bools = NDArray[np.bool_]

_ROOT = Path(__file__).resolve().parent.parent
_KERNEL_PACKAGES = ("agents", "envs")
Record = Any  # one record of a structured array
Records = NDArray[Any]

CACHE_LINE = 64  # bytes


def cache_root() -> Path:
    """Folder for what a machine keeps: `$WWWSERVE_CACHE`, `$XDG_CACHE_HOME/wwwserve` or `~/.cache/wwwserve`."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WWWSERVE_CACHE") or caches / "wwwserve")


def _cache_dir() -> Path:
    """Folder for compiled kernels, named by a digest of the sources."""
    digest = hashlib.sha256(numba.__version__.encode())
    for package in _KERNEL_PACKAGES:
        for source in sorted((_ROOT / package).rglob("*.py")):
            content = source.read_bytes()
            if b"wwwserve.agents.kernel import" in content:
                digest.update(source.name.encode() + content)
    return cache_root() / "kernels" / digest.hexdigest()[:16]


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_cache_dir())


def say_compiling() -> None:
    """Say on standard error why nothing is to be seen for a while."""
    print("wwwserve: compiling kernels, about a minute, once for each version", file=sys.stderr, flush=True)


def compiled_before(*programs: str) -> bool:
    """Whether these `programs` have gone through `one_at_a_time` with this version, so that all is in the cache."""
    return bool(numba.config.DISABLE_JIT) or all(_marker(program).exists() for program in programs)


def _marker(program: str) -> Path:
    return Path(numba.config.CACHE_DIR) / f"{program}.compiled"


class _FirstCompilation(event.Listener):  # type: ignore[misc]
    """Says so when the first kernel of this process is not in the cache and has to be compiled."""

    said = False

    def on_start(self, event: Any) -> None:
        """A kernel is compiled from here on; numba calls this for nothing that comes from the cache."""
        if not self.said:
            self.said = True
            say_compiling()

    def on_end(self, event: Any) -> None:
        """A kernel is compiled."""


event.register("numba:compile", _FirstCompilation())


def leave_blas_out() -> None:
    """Have numba load what it has for arrays without a BLAS, before the first kernel is loaded: no kernel needs one,
    and where SciPy is installed numba imports that for it, a tenth of the time in which a node starts."""
    if "numba.np.arraymath" in sys.modules:
        return
    linalg: Any = importlib.import_module("numba.np.linalg")

    def refuse() -> None:
        raise ImportError("no kernel needs a BLAS")

    looks, linalg.ensure_blas = linalg.ensure_blas, refuse
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = looks


@contextmanager
def one_at_a_time(program: str = "node") -> Iterator[None]:
    """Where processes of a `program` start together, let one compile what it needs while the others wait for that."""
    folder = Path(numba.config.CACHE_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    _marker(program).touch()


def kernel(function: F) -> F:
    """Compile `function` for scalars and arrays, without the GIL, cached; the result is called like the original.

    A kernel owns no memory: it is compiled without reference counts, which took a quarter of the market's time, and one
    that creates an array does not compile. A scratch buffer is an argument.
    """
    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function)
    return compiled


def plain(function: F) -> F:
    """A function that kernels call compiled, and everybody else as it stands: for one that is called while a
    configuration is read, which is not to wait for a compiler."""
    made: F = register_jitable(function)
    return made


def bound(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A kernel with its arguments, for calls that repeat: the types of many arrays are looked up once and not at each
    call, which takes longer than a short kernel."""
    if numba.config.DISABLE_JIT:
        return partial(function, *args)
    compiled: Any = function
    return partial(compiled.compile(tuple(numba.typeof(arg) for arg in args)), *args)


def records(shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeroed records whose fields kernels read as attributes, compiled or not; the first begins at a cache line."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.zeros(size + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    array = buffer[start : start + size].view(dtype).reshape(shape)
    return array.view(np.recarray) if numba.config.DISABLE_JIT else array


def inlined(function: F) -> F:
    """A kernel whose body is put in place of each call: for what a compiled function cannot return, such as records."""
    compiled: F = numba.njit(inline="always", error_model="numpy", _nrt=False)(function)
    return compiled
