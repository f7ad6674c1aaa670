"""Work spread over processes. Threads would wait for each other: a market's step is too short to hand over."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each(job: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """`job` of each item, in order, in `processes` processes; one is this process itself."""
    if processes == 1:
        yield from map(job, items)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(job, items)
