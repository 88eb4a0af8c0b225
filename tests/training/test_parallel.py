"""Two processes with half a batch each are one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import cadyq
from cadyq.errors import ArgumentError
from cadyq.training.parallel import Workers

HERE = Path(__file__).parent


def start(out: Path, rank: int, size: int, port: int) -> subprocess.Popen[str]:
    """A worker, with the variables that torchrun sets; alone without them."""
    path = os.pathsep.join([str(Path(cadyq.__file__).parents[1]), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if size > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "parallel_worker.py"), str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What one process and two processes computed."""
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    base = tmp_path_factory.mktemp("parallel")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [start(base / "one.pt", 0, 1, port)]
    workers += [start(base / "two.pt", rank, 2, port) for rank in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    return [torch.load(base / name, weights_only=True) for name in ("one.pt", "two.pt")]


def test_first_gradients_are_equal(results: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    one, two = (r["gradients"] for r in results)
    assert one.keys() == two.keys() and any("selector" in name for name in one)
    for name, value in one.items():
        assert value.dtype == torch.float64
        assert float((value - two[name]).norm()) <= 1e-10 * float(value.norm()), name


def test_twenty_steps_of_sgd_stay_together(results: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    one, two = (r["weights"] for r in results)
    for name, value in one.items():
        assert float((value - two[name]).norm()) <= 1e-5 * float(value.norm()), name


def test_whole_training_draws_the_same_patches(results: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    """Damage, random bits and patches do not depend on the number of processes; only Adam's rounding does."""
    one, two = (r["trained"] for r in results)
    for name, value in one.items():
        assert float((value - two[name]).norm()) <= 1e-3 * float(value.norm()) + 1e-6, name


def test_a_batch_must_be_divisible() -> None:
    assert Workers(1, 4).share(16) == slice(4, 8)
    with pytest.raises(ArgumentError, match="multiple of the 3 processes"):
        Workers(0, 3).share(16)
