"""What a small step costs the host, measured without a GPU: launches are prepared as for one, and nothing runs.

A step on small images takes as long as Python, torch and Triton take to start its kernels. Left out is what a driver
adds: a call in C for each launch, a few microseconds, in torch's own operators as well.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import tri_stn

from .measure import wall_times
from .resources import kernels_on_the_cpu, launched_by

HEADERS = ("step", "launches", "forward, µs", "forward + backward, µs")
Step = Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]
"""A forward pass, which returns its output and the tensors that want a gradient."""
_SHAPE = 8, 1, 28, 28


@contextlib.contextmanager
def nothing_runs(arch: str = "sm_90") -> Iterator[list]:
    """Tensors on the CPU take the kernels' road, up to the call that would start one: (kernel, grid, arguments)."""
    started: list = []
    with kernels_on_the_cpu(), launched_by(lambda *start: started.append(start), arch):
        yield started


def steps() -> dict[str, Step]:
    """By name: small steps."""
    image, theta = torch.rand(_SHAPE, requires_grad=True), torch.eye(2, 3).repeat(8, 1, 1).requires_grad_()
    angle, shift = torch.zeros(8, requires_grad=True), torch.zeros(8, 2, requires_grad=True)
    scale, field = torch.ones(8, requires_grad=True), torch.zeros(8, 28, 28, 2, requires_grad=True)
    return {
        "affine": lambda: (tri_stn.warp(image, tri_stn.Affine(theta)), [image, theta]),
        "affine, border": lambda: (tri_stn.warp(image, tri_stn.Affine(theta), padding_mode="border"), [image, theta]),
        "similarity": lambda: (
            tri_stn.warp(image, tri_stn.Similarity(scale, angle, shift)),
            [image, scale, angle, shift],
        ),
        "displacement": lambda: (tri_stn.warp(image, tri_stn.Displacement(field)), [image, field]),
        "swap-in": lambda: (
            tri_stn.grid_sample(image, tri_stn.affine_grid(theta, _SHAPE, False), align_corners=False),
            [image, theta],
        ),
    }


def measure() -> Iterator[tuple[object, ...]]:
    """Medians of rounds, one thread; last, torch's operators on an image of 2 × 2, which start no kernel at all."""
    torch.set_num_threads(1)
    with nothing_runs() as started:
        for name, forward in steps().items():
            both(forward)  # compiles
            started.clear()
            both(forward)
            launches = len(started)
            yield name, launches, *_times(forward, started)
    image, theta = torch.rand(1, 1, 2, 2, requires_grad=True), torch.eye(2, 3)[None].requires_grad_()

    def eager() -> tuple[torch.Tensor, list[torch.Tensor]]:
        grid = F.affine_grid(theta, [1, 1, 2, 2], align_corners=False)
        return F.grid_sample(image, grid, align_corners=False), [image, theta]

    yield "torch's affine, on the CPU", "", *_times(eager, [])


def both(forward: Step) -> None:
    output, inputs = forward()
    torch.autograd.grad(output, inputs, output)


def _times(forward: Step, started: list) -> tuple[str, str]:
    def microseconds(call: Callable[[], object]) -> str:
        def call_and_let_go() -> None:
            call()
            started.clear()  # it holds tensors

        return f"{1e6 * statistics.median(wall_times(call_and_let_go, torch.device('cpu'), calls=200)):.0f}"

    return microseconds(forward), microseconds(lambda: both(forward))
