"""The market as it runs. Read from `clock`, which calls the others."""

from wwwserve.envs.market.clock import start_market, step_range

__all__ = ["start_market", "step_range"]
