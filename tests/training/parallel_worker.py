"""One of n processes of `test_parallel`: first gradients, a few steps of SGD, and a whole `train`, into a file.

Run by ``torchrun``-like environment variables; without them it is the single process to compare with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_training import crops, network

from cadyq.backbones import Backbone, build_backbone
from cadyq.training.device import Device
from cadyq.training.loop import Recipe, to_tensor, train
from cadyq.training.loss import StepLoss
from cadyq.training.parallel import Workers

RECIPE = Recipe(
    steps=4, batch=4, patch=8, small_patch=8, bits="mixed", w_teacher=0.5, w_attention=10.0, degrade=True
)
BATCH = 4


def first_gradients(workers: Workers) -> dict[str, torch.Tensor]:
    """Of a dynamic network with a teacher, in float64: every term of the loss."""
    net, teacher = network(0).double(), network(1).double()
    hr, lr = (to_tensor(a).double() for a in (crops().hr, crops().lr))
    loss = workers.wrap(StepLoss(net, teacher, RECIPE, Device()))
    share = workers.share(BATCH)
    value, _ = loss(lr[share], hr[share], None, True, 0.01 * workers.size)
    value.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def sgd(workers: Workers, steps: int = 20) -> dict[str, torch.Tensor]:
    """Weights of a float network after some steps, in float64.

    In float32 one rounding can flip the sign that L1 hands back, and two orders of one sum part by 1e-5.
    """
    torch.manual_seed(2)
    net: Backbone = build_backbone("edsr", scale=2, channels=8, n_blocks=2).double()
    loss = workers.wrap(StepLoss(net, None, RECIPE, Device()))
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    hr, lr = (to_tensor(a).double() for a in (crops().hr, crops().lr))
    share = workers.share(BATCH)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(lr[share], hr[share], None, False, 0.0)[0].backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    workers = Workers.join()
    gradients, weights = first_gradients(workers), sgd(workers)
    net = network(0)
    train(
        net,
        crops(),
        RECIPE,
        out.parent / f"run-{workers.size}",
        teacher=network(1),
        workers=workers,
        log=lambda _: None,
    )
    if workers.rank == 0:
        trained = {name: p.detach() for name, p in net.named_parameters()}
        torch.save({"gradients": gradients, "weights": weights, "trained": trained}, out)
    workers.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
