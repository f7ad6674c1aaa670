"""Routers that see what no provider can: every engine as it is now, and for one of them how long answers will be.

They stand beside the policies as yardsticks. Both decide for all providers, request by request.
"""

import numpy as np

from agents.decision import HOLD, NO_DIRECTION, Actions
from agents.hardware import MAX_BATCHED_TOKENS
from agents.kernel import kernel
from envs.batch import MarketBatch
from envs.engine import ENGINE, JOB, advance, kv_use, reset_engine, reset_jobs, submit

CENTRALIZED, OMNISCIENT = "centralized", "omniscient"
KEEP_BELOW_KV_USE = 0.6  # a request stays at its source below this (arXiv 2603.20661)
FAR_S = 1e6
