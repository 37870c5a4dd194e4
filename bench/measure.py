"""Whether a provider is right, how long it takes, and how much memory it asks for.

Right comes first: results are compared with the same operation in fp64, and only what passed is
timed. Synchronising with the device is this file's privilege.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .providers import EAGER, Forward, device_copy, torch_warp
from .workloads import Tensors, Workload

CHUNK_ELEMENTS = 2**27
"""The truth is computed a few images at a time: about this many numbers per intermediate tensor."""
FLUSH_BYTES = 2**28
"""Larger than any GPU's L2 cache."""

# --- the truth, and how far from it a result may be -------------------------------------------------

GRADIENTS = ("grad_input", "grad_theta")


def truth(workload: Workload, tensors: Tensors) -> dict[str, Tensor]:
    """The output and the gradients asked for, in fp64 from the very numbers that providers are given."""
    parts: list[dict[str, Tensor]] = []
    for image, theta, grad_output in _chunks(workload, tensors):
        wanted = dict(zip(GRADIENTS, (image, theta), strict=True))
        wanted = {name: wanted[name].requires_grad_() for name in tensors.wanted}
        output = torch_warp(image, theta, workload)
        gradients = torch.autograd.grad(output, list(wanted.values()), grad_output) if wanted else ()
        parts.append({"output": output.detach(), **dict(zip(wanted, gradients, strict=True))})
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    shapes = {"output": tensors.grad_output.shape, "grad_theta": tensors.theta.shape}
    return {name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in whole.items()}


def touched(workload: Workload, tensors: Tensors) -> float:
    """The share of the input's pixels that the output depends on: nobody has to read the others."""
    count = 0
    for image, theta, _ in _chunks(workload, tensors):
        ones = torch.ones_like(image[:, :1]).requires_grad_()
        (weight,) = torch.autograd.grad(torch_warp(ones, theta, workload).sum(), ones)
        count += int((weight != 0).sum())
    return count / (workload.batch * math.prod(workload.input_size))


def _chunks(workload: Workload, tensors: Tensors) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some images with their maps (n, K, 2, 3) and output gradients (n, K, C, *size), all in fp64."""
    n, k = workload.batch, workload.maps
    theta = tensors.theta.detach().view(n, k, 2, 3)
    grad_output = tensors.grad_output.view(n, k, workload.channels, *workload.size)
    per_image = workload.channels * (math.prod(workload.input_size) + k * math.prod(workload.size))
    step = max(1, CHUNK_ELEMENTS // per_image)
    for first in range(0, n, step):
        part = slice(first, first + step)
        yield tensors.input.detach()[part].double(), theta[part].double(), grad_output[part].double()


def evaluate(forward: Forward, tensors: Tensors) -> dict[str, Tensor]:
    """A provider's output and gradients, under the names that `truth` gives them."""
    # Memory that comes back from the allocator holds NaN, so that a pixel nobody wrote is noticed.
    for tensor in (tensors.grad_output, *tensors.wanted.values()):
        torch.full_like(tensor, math.nan, requires_grad=False)
    output = forward()
    wanted = tensors.wanted
    gradients = torch.autograd.grad(output, list(wanted.values()), tensors.grad_output) if wanted else ()
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def errors(result: dict[str, Tensor], expected: dict[str, Tensor], clear: Tensor) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest number in it; not a number if one is not."""
    found = {}
    for name, reference in expected.items():
        if result[name].shape != reference.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}; it should be {tuple(reference.shape)}.")
        difference = (result[name].double() - reference).abs_()
        if name == "output":
            difference.masked_fill_(~clear, 0)
        found[name] = (difference.max() / reference.abs().max().clamp_min(1e-30)).item()
    return found


def limits(workload: Workload, tensors: Tensors, own_errors: dict[str, float]) -> dict[str, float]:
    """What each error may be: what rounding alone explains, plus an error that a provider is known for.

    Rounding is one of the result to its dtype, and fp32 coordinates: on an axis of S pixels
    they are off by up to S eps, and a pixel apart values differ by up to twice the largest.
    """
    coordinates = 2 * max(workload.input_size) * torch.finfo(torch.float32).eps
    dtypes = {"output": tensors.input.dtype, "grad_input": tensors.input.dtype, "grad_theta": tensors.theta.dtype}
    allowed = {}
    for name in ("output", *tensors.wanted):
        own = own_errors.get(name, 0.0)
        allowed[name] = (own if math.isfinite(own) else 0.0) + torch.finfo(dtypes[name]).eps + coordinates
    return allowed


def standard(workload: Workload, tensors: Tensors) -> tuple[dict[str, Tensor], dict[bool, dict[str, float]]]:
    """The truth, and how far from it each tensor may be: by whether a provider rounds the grid.

    Torch rounds the grid to the image's dtype; in bf16 its error is then of the order of the values,
    and to allow that to others would let a tensor of zeros pass.
    """
    expected, eager_errors = truth(workload, tensors), {}
    if EAGER.available(workload, tensors.input.device) is None:
        eager_errors = errors(evaluate(EAGER.build(workload, tensors), tensors), expected, tensors.clear)
    return expected, {True: limits(workload, tensors, eager_errors), False: limits(workload, tensors, {})}


def matches(found: dict[str, float], allowed: dict[str, float], direction: str) -> bool:
    """Whether everything that a direction computes is as close to the truth as it must be."""
    names = {"forward": {"output"}, "backward": set(GRADIENTS), "both": {"output", *GRADIENTS}}[direction]
    return all(found[name] <= allowed[name] for name in names & found.keys())  # False for NaN


# --- what is measured -------------------------------------------------------------------------------


def call(forward: Forward, tensors: Tensors, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """One direction as a function of nothing that returns everything it must hand over."""
    wanted = tuple(tensors.wanted.values())

    def both() -> tuple[Tensor, ...]:
        output = forward()
        return output.detach(), *torch.autograd.grad(output, wanted, tensors.grad_output)

    if direction == "both":
        return both
    if direction == "forward":
        return lambda: (forward(),)
    output = forward()
    return lambda: torch.autograd.grad(output, wanted, tensors.grad_output, retain_graph=True)


def bytes_moved(workload: Workload, direction: str, share: float = 1.0) -> int:
    """The least that must go through memory, theta aside.

    Forward: the input pixels that are looked at (their `share`) and the output. Backward: the
    output's gradient, the same input pixels for theta's gradient, all of the input's gradient.
    """
    w = workload
    image = w.batch * w.channels * math.prod(w.input_size) * w.itemsize
    output = w.batch * w.maps * w.channels * math.prod(w.size) * w.itemsize
    forward = share * image + output
    backward = output + share * image * ("theta" in w.gradients) + image * ("input" in w.gradients)
    return round({"forward": forward, "backward": backward, "both": forward + backward}[direction])


def times(function: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each of many calls, after a warm-up, in about the time given."""
    if device.type == "cuda":
        return _cuda_times(function, device, seconds)
    return _cpu_times(function, seconds)


def _cuda_times(function: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Time on the device, each call on a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def repeat(rounds: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, stop in events:
            flush.zero_()
            start.record()
            function()
            stop.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(stop) / 1000 for start, stop in events]

    repeat(3)
    estimate = statistics.median(repeat(5))
    return repeat(min(max(round(seconds / max(estimate, 1e-6)), 20), 500))


def _cpu_times(function: Callable[[], object], seconds: float) -> list[float]:
    function()
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < 100):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    copy, moved = device_copy(device)
    return moved / statistics.median(times(copy, device, seconds))


def peak_bytes(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int | None:
    """The most memory in use during a call, beyond what was before it and what it hands over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        # The profiler sees every allocation that goes through torch's CPU allocator.
        with _muted(), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:  # fmt: skip
            result = function()
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        in_use = peak = 0
        for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            in_use += change
            peak = max(peak, in_use)
    return max(0, peak - sum(tensor.numel() * tensor.element_size() for tensor in result))


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """The profiler announces itself on the process's stderr, each time."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
