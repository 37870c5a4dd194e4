"""One training, made so that it can stop anywhere and go on: a batch depends on its number alone.

And what the sampler costs in it: the same first steps with `tri_stn.warp` and with torch's sampler.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import peak_bytes
from ..results import write_whole
from .samplers import SAMPLERS

SAVE_EVERY = 20.0
"""Seconds between checkpoints."""


@dataclass
class Training:
    """What is learned, from what, and how fast."""

    model: nn.Module
    batch: Callable[[int], Any]
    """The batch of a step: the same one, whenever it is asked for."""
    loss: Callable[[nn.Module, Any], Tensor]
    steps: int
    rate: float
    """The largest learning rate of Adam, under a one-cycle schedule."""
    clip: float = 5.0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=self.rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, self.rate, total_steps=self.steps, pct_start=0.2
        )
        self.done = 0
        self.losses: list[float] = []

    def step(self) -> float:
        loss = self.loss(self.model, self.batch(self.done))
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def run(self, checkpoint: Path | None = None, report: Callable[[float], None] = lambda share: None) -> None:
        """All the steps, from those of the checkpoint on; afterwards the checkpoint is the finished training."""
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        self.model.train()
        saved = time.monotonic()
        while self.done < self.steps:
            self.step()
            if not math.isfinite(self.losses[-1]):
                raise FloatingPointError(f"The loss of step {self.done} is {self.losses[-1]}.")
            report(self.done / self.steps)
            if checkpoint is not None and (self.done == self.steps or time.monotonic() - saved > SAVE_EVERY):
                self._save(checkpoint)
                saved = time.monotonic()
        report(1.0)

    def _save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "schedule")}
        data = io.BytesIO()
        torch.save(state | {"done": self.done, "losses": self.losses}, data)
        write_whole(path, data.getvalue())

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=next(self.model.parameters()).device)
        for name in ("model", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.done, self.losses = state["done"], state["losses"]


@dataclass(frozen=True)
class Cost:
    """What a sampler costs in a training."""

    milliseconds: float
    """Median of a step, forward, backward and update."""
    peak_mebibytes: float
    """The most memory in use during a step's passes, beyond model, gradients and batch."""
    losses: list[float]


def costs(make: Callable[[str], Training], device: torch.device, steps: int = 50) -> dict[str, Cost]:
    """The first steps of the same training with each sampler."""
    found = {}
    for sampler in SAMPLERS:
        training = make(sampler)
        training.model.train()
        times = []
        for _ in range(min(steps, training.steps)):
            start = now(device)
            training.step()
            times.append(now(device) - start)

        peak = peak_bytes(_pass(training), device)
        found[sampler] = Cost(1000 * statistics.median(times), (peak or 0) / 2**20, training.losses)
    return found


def _pass(training: Training) -> Callable[[], tuple[Tensor, ...]]:
    batch, model = training.batch(training.done), training.model
    wanted = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(training.loss(model, batch), wanted)


def loss_difference(found: dict[str, Cost]) -> float:
    """The largest difference of two samplers' losses at a step, relative to the first loss."""
    one, other = (cost.losses for cost in found.values())
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / abs(one[0])


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
