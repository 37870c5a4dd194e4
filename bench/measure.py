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
from pathlib import Path

import torch
from torch import Tensor

from .providers import EAGER, Forward, device_copy, keep, torch_warp
from .workloads import Tensors, Workload

CHUNK_ELEMENTS = {"cuda": 2**27, "cpu": 2**23}
"""The truth is computed a few images and channels at a time: about this many numbers per intermediate tensor."""
FLUSH_BYTES = 2**28
"""Larger than any GPU's L2 cache."""

# --- the truth, and how far from it a result may be -------------------------------------------------

GRADIENTS = ("grad_input", "grad_theta")
SECOND = ("grad_grad_output", "second_grad_input", "second_grad_theta")
"""What a second backward pass gives: the gradients of ⟨cotangents, gradients⟩ in grad_output, input and theta."""


def truth(workload: Workload, tensors: Tensors) -> dict[str, Tensor]:
    """The output and the gradients asked for, in fp64 from the very numbers that providers are given."""
    kept = keep(workload, tensors.theta.double())
    images = []
    for part in _chunks(workload, tensors):
        channels = [_truth_of_part(workload, piece, kept) for piece in part]
        # Over channels the gradients of the maps add up; everything else lies side by side.
        images.append({
            name: sum((c[name] for c in channels[1:]), start=channels[0][name])
            if name.endswith("theta")
            else torch.cat([c[name] for c in channels], 2 if name in ("output", "grad_grad_output") else 1)
            for name in channels[0]
        })  # fmt: skip
    whole = {name: torch.cat([image[name] for image in images]) for name in images[0]}
    shapes = {"output": tensors.grad_output.shape, "grad_theta": tensors.theta.shape}
    shapes |= {"grad_grad_output": shapes["output"], "second_grad_theta": shapes["grad_theta"]}
    return {name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in whole.items()}


def _truth_of_part(workload: Workload, part: Tensors, kept: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return evaluate(lambda: torch_warp(part.input, part.theta, workload, kept), part)


def touched(workload: Workload, tensors: Tensors) -> float:
    """The share of the input's pixels that the output depends on: nobody has to read the others."""
    kept, count = keep(workload, tensors.theta.double()), 0
    for part in _chunks(workload, tensors, channels=1):
        for piece in part:
            ones = torch.ones_like(piece.input).requires_grad_()
            output = torch_warp(ones, piece.theta.detach(), workload, kept)
            (weight,) = torch.autograd.grad(output.sum(), ones)
            count += int((weight != 0).sum())
    return count / (workload.batch * math.prod(workload.input_size))


def _chunks(workload: Workload, tensors: Tensors, channels: int | None = None) -> Iterator[Iterator[Tensors]]:
    """For some images after others, some channels after others: tensors in fp64, maps (n, K, …), output
    gradients (n, K, C, *size). With `channels`, only so many channels of each image.
    """
    w = workload
    channels = channels or w.channels
    images_of = {"input": tensors.input.detach()}
    maps_of = {"theta": tensors.theta.detach()}
    if tensors.cotangents:
        images_of["grad_input"], maps_of["grad_theta"] = (
            tensors.cotangents["grad_input"],
            tensors.cotangents["grad_theta"],
        )
    maps_of = {name: t.reshape(w.batch, w.maps, *w.transform.shape(w.size)) for name, t in maps_of.items()}
    grad_output = tensors.grad_output.reshape(w.batch, w.maps, w.channels, *w.size)
    clear = tensors.clear.reshape(w.batch, w.maps, 1, *w.size)
    per_channel = math.prod(w.input_size) + w.maps * math.prod(w.size)
    budget = CHUNK_ELEMENTS[tensors.input.device.type] // (16 if w.second else 1)  # torch composes it of many tensors
    images = max(1, budget // (per_channel * channels))
    step = max(1, min(channels, budget // per_channel))

    def pieces(part: slice) -> Iterator[Tensors]:
        for first in range(0, channels, step):
            some = slice(first, min(first + step, channels))
            wide = {name: t[part, some].double() for name, t in images_of.items()}
            wide |= {name: t[part].double() for name, t in maps_of.items()}
            yield Tensors(
                wide["input"].requires_grad_(tensors.input.requires_grad),
                wide["theta"].requires_grad_(tensors.theta.requires_grad),
                grad_output[part, :, some].double(),
                clear[part],
                {name: wide[name] for name in tensors.cotangents},
            )

    for first in range(0, w.batch, images):
        yield pieces(slice(first, first + images))


def evaluate(forward: Forward, tensors: Tensors, twice: bool = True) -> dict[str, Tensor]:
    """A provider's output and gradients, under the names that `truth` gives them; with `twice` also the second ones,
    where the workload asks for them.
    """
    # Memory that comes back from the allocator holds NaN, so that a pixel nobody wrote is noticed.
    for tensor in (tensors.grad_output, *tensors.wanted.values()):
        torch.full_like(tensor, math.nan, requires_grad=False)
    wanted = tensors.wanted
    output = forward()
    if not wanted:
        return {"output": output.detach()}
    if not (twice and tensors.cotangents):
        gradients = torch.autograd.grad(output, list(wanted.values()), tensors.grad_output)
        return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}
    grad_output, gradients = _first(output, tensors)
    second = torch.autograd.grad(gradients, (grad_output, *wanted.values()), tuple(tensors.cotangents.values()))
    result = {"output": output.detach(), **{k: g.detach() for k, g in zip(wanted, gradients, strict=True)}}
    return result | dict(zip(SECOND, second, strict=True))


def _first(output: Tensor, tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A first backward pass that keeps its graph: what it started from, and the gradients."""
    grad_output = tensors.grad_output.detach().requires_grad_()
    return grad_output, torch.autograd.grad(output, tuple(tensors.wanted.values()), grad_output, create_graph=True)


def errors(result: dict[str, Tensor], expected: dict[str, Tensor], clear: Tensor) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest number in it; not a number if one is not."""
    found = {}
    for name, reference in expected.items():
        if name in SECOND and name not in result:
            continue  # of a provider whose backward pass cannot be differentiated
        if result[name].shape != reference.shape:
            raise ValueError(f"{name} has shape {tuple(result[name].shape)}; it should be {tuple(reference.shape)}.")
        difference = (result[name].double() - reference).abs_()
        if name in ("output", "grad_grad_output"):
            difference.masked_fill_(~clear, 0)
        found[name] = (difference.max() / reference.abs().max().clamp_min(1e-30)).item()
    return found


def limits(workload: Workload, tensors: Tensors, own_errors: dict[str, float]) -> dict[str, float]:
    """What each error may be: what rounding alone explains, plus an error that a provider is known for.

    Rounding is one of the result to its dtype, and fp32 coordinates: on an axis of S pixels
    they are off by up to S eps, and a pixel apart values differ by up to twice the largest. Where a map
    is a sum of terms larger than itself, its coordinates, and the gradients of its numbers, are off by as much more.
    """
    fp32 = torch.finfo(torch.float32).eps
    terms, gradient_terms = workload.transform.amplification(tensors.theta, workload.size)
    coordinates = 2 * max(workload.input_size) * fp32 * terms
    allowed = {}
    for name in ("output", *tensors.wanted, *(SECOND if tensors.cotangents else ())):
        own = own_errors.get(name, 0.0)
        dtype = tensors.theta.dtype if name.endswith("theta") else tensors.input.dtype
        allowed[name] = (own if math.isfinite(own) else 0.0) + torch.finfo(dtype).eps + coordinates
        if name.endswith("theta"):
            # Pixels' gradients have both signs, so that their sum is smaller than they are: measured, by up to 4.
            allowed[name] += 8 * fp32 * gradient_terms
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
    gradients = set(GRADIENTS)
    names = {
        "forward": {"output"}, "backward": gradients, "both": {"output", *gradients}, "double": set(SECOND)
    }[direction]  # fmt: skip
    return all(found[name] <= allowed[name] for name in names & found.keys())  # False for NaN


@contextlib.contextmanager
def settings_of(workload: Workload) -> Iterator[None]:
    """Torch's global settings that the workload asks for."""
    if not workload.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Torch would also fill every new tensor with NaN, which is no part of the sums and not asked of anyone else.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


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
    if direction == "backward":
        return lambda: torch.autograd.grad(output, wanted, tensors.grad_output, retain_graph=True)
    grad_output, gradients = _first(output, tensors)
    inputs, cotangents = (grad_output, *wanted), tuple(tensors.cotangents.values())
    return lambda: torch.autograd.grad(gradients, inputs, cotangents, retain_graph=True)


def bytes_moved(workload: Workload, direction: str, share: float = 1.0) -> int:
    """The least that must go through memory, a few numbers per map aside.

    Forward: the input pixels that are looked at (their `share`) and the output. Backward: the
    output's gradient, the same input pixels for theta's gradient, all of the input's gradient. A dense
    map is read in both, and its gradient written. Double: input and output's gradient are read, as are a cotangent of
    each gradient, and the gradients of all three tensors are written.
    """
    w = workload
    image, output = w.image_elements * w.itemsize, w.output_elements * w.itemsize
    numbers = w.field_elements * 4
    theta, input = "theta" in w.gradients, "input" in w.gradients
    forward = share * image + output + numbers
    backward = output + share * image * theta + image * input + numbers * (1 + theta)
    double = 2 * output + (2 * share + 1) * image + 3 * numbers
    return round({"forward": forward, "backward": backward, "both": forward + backward, "double": double}[direction])


def available_memory() -> int | None:
    """Bytes that a process of this machine can still take; None where that cannot be known."""
    found = []
    try:
        about = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(about["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:  # what a container is allowed
        limit, used = (Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def times(function: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """Seconds of each of many calls, after a warm-up, in about the time given; on a CPU of so many at least."""
    if device.type == "cuda":
        return _cuda_times(function, device, seconds)
    return _cpu_times(function, seconds, least)


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


def _cpu_times(function: Callable[[], object], seconds: float, least: int) -> list[float]:
    function()
    found: list[float] = []
    while len(found) < least or (sum(found) < seconds and len(found) < 100):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def wall_times(function: Callable[[], object], device: torch.device, rounds: int = 10, calls: int = 20) -> list[float]:
    """Seconds of a call with the host's part of it, on warm caches: of many calls in a row, waited for at the end."""
    found = []
    for _ in range(rounds + 1):  # the first is the warm-up
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - start) / calls)
    return found[1:]


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
