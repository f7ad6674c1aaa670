"""What several tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from wwwserve.serving import local_nodes as network
from wwwserve.serving.engine.local_vllm import SMOLLM2

if TYPE_CHECKING:
    from ledger_sides import Sides

# What hypothesis tries is the same in each run, so that what fails is of the change that is tested.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

pytest.register_assert_rewrite("market_checker", "stub_nodes", "ledger_sides", "duel_net")


@pytest.fixture(params=["memory", "sqlite"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[Sides]":
    """The two sides of a channel, once with journals in memory and once with journals in files."""
    from ledger_sides import Sides, play  # once its asserts are to be rewritten

    made = Sides(request.param, tmp_path)
    play(made.exchange)
    yield made
    for journal in made.journals.values():
        journal.close()


@pytest.fixture
def alone() -> None:
    """What earlier tests left over is collected before this one, so that none of it ends on this one's event loop."""
    gc.collect()


@pytest.fixture(scope="session")
def vllm_network() -> Iterator[network.Network]:
    """Two nodes before real vLLM servers of SmolLM2, `engine_urls`; they take 5.6 GB, so only one test file may ask for
    them, as each worker of pytest-xdist has its own."""
    plan = network.Plan(2, 0, None, gpu="", model=SMOLLM2, max_num_seqs=0, speed=1.0, engine="vllm")
    with network.running(plan) as made:
        yield made
