"""The processes of a training run, which share its markets and its gradients."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wwwserve.eval import regret


class Processes:
    """The processes of a run: one, or those that torchrun started."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1:
            dist.init_process_group("gloo")

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes."""
        if self.world > 1:
            on_cpu = x.cpu()
            dist.all_reduce(on_cpu)
            x = on_cpu.to(x.device)
        return x

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace gradients by their sum over all processes."""
        if self.world > 1:
            flat = self.sum(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)

    def shared(
        self, among: regret.Families, measure: Callable[[regret.Families], dict[str, float]]
    ) -> dict[str, float]:
        """What `measure` finds in all families; every process looks at some of them."""
        names = list(among)
        mine = measure({name: among[name] for name in names[self.rank :: self.world]})
        found = [mine]
        if self.world > 1:
            found = [{} for _ in range(self.world)]
            dist.all_gather_object(found, mine)
        return {name: found[k % self.world][name] for k, name in enumerate(names)}

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()
