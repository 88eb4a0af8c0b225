"""Several processes, started by ``torchrun``: the same training, with each step's patches divided among them.

Plain ``DistributedDataParallel``, because the loop is ours anyway: what Lightning Fabric or Accelerate would add
(launching, moving batches, wrapping optimizers, their own checkpoints) is done here already or by torchrun, and
would have to be taught that checkpoints are exact and that the bit loss is a sum. Three rules make n processes
equal one: every process draws the whole batch from the same seed and keeps its share; the loss, not the network, is
the wrapped module, so that selectors, which only the bit loss sees, are reduced too; and terms that are sums over
patches are multiplied by the number of processes, because gradients are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cadyq.errors import ArgumentError

__all__ = ["Workers"]


@dataclass(frozen=True)
class Workers:
    """This process among all.

    Attributes:
        rank: number of this process; 0 saves, validates and reports.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "cpu") -> Workers:
        """Join the group that ``torchrun`` describes in the environment; a lone process without it."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo" if torch.device(device).type == "cpu" else "nccl")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Leave the group, if there is one."""
        if self.size > 1:
            dist.destroy_process_group()

    def wrap(self, loss: nn.Module) -> nn.Module:
        """The module that computes a process's loss, with gradients averaged over all processes."""
        if self.size == 1:
            return loss
        return DistributedDataParallel(loss, find_unused_parameters=True)

    def share(self, batch: int) -> slice:
        """Patches of this process among ``batch``. Raises `ArgumentError` if they cannot be divided."""
        if batch % self.size:
            raise ArgumentError("batch", batch, f"a multiple of the {self.size} processes")
        part = batch // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over all processes; every process gets the same."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        total = total.cuda() if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def agree(self, flag: bool) -> bool:
        """What process 0 says."""
        if self.size == 1:
            return flag
        word = torch.tensor([int(flag)])
        word = word.cuda() if dist.get_backend() == "nccl" else word
        dist.broadcast(word, 0)
        return bool(word.item())
