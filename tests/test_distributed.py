"""Training in several processes: DistributedDataParallel over gloo, on the CPU path."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import tri_stn

PROCESSES = 2
SECONDS = 60
"""After which a process that waits for another gives up."""


def network() -> nn.Module:
    """The smallest network that has all the parts: localisation, sampler, and something that learns from it."""
    localisation = tri_stn.nn.FullyConnected(6 * 7, 6, hidden=())
    nn.init.normal_(localisation[-1].weight, std=0.01)
    return nn.Sequential(
        tri_stn.nn.SpatialTransformer(localisation, "affine", (4, 5)), nn.Flatten(), nn.Linear(4 * 5, 3)
    )


def train(rank: int, processes: int) -> nn.Module:
    """Two steps on this process' part of a batch; the model after them."""
    torch.manual_seed(0)
    images, labels = torch.rand(8, 1, 6, 7, dtype=torch.float64), torch.rand(8, 3, dtype=torch.float64)
    model = network().double()
    trained = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(trained(images[rank::processes]), labels[rank::processes]).backward()
        optimizer.step()
    return model


def run_process(rank: int, folder: str) -> None:
    """Train and leave the weights in the folder. What goes wrong is raised, and reaches the test with its traceback."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        torch.save(train(rank, PROCESSES).state_dict(), f"{folder}/{rank}.pt")
        dist.barrier()  # neither leaves while the other still listens to it
    finally:
        dist.destroy_process_group()
    # Gloo's threads outlive their group (torch 2.13). One that drops a tensor while the interpreter is taken down
    # aborts the process (pytorch/pytorch#190489), now and then, so it is not taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_processes_with_half_a_batch_each_learn_what_one_learns(backend, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # a host's own name need not lead anywhere
    context = torch.multiprocessing.start_processes(
        run_process, (str(tmp_path),), nprocs=PROCESSES, join=False, daemon=True, start_method="spawn"
    )
    try:
        waits = 0
        while not context.join(timeout=5):  # raises what a process raised
            waits += 1
            assert waits < SECONDS // 5, "the processes are still not done"
    finally:
        for process in context.processes:
            process.kill()
    expected = train(0, 1).state_dict()
    assert expected["0.localisation.1.bias"].abs().max() > 1e-4  # it started at 0
    for rank in range(PROCESSES):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
