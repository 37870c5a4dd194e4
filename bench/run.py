"""The benchmark: workloads × providers × directions, each row only after it matched the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import measure
from .providers import Forward, Provider, copy_of
from .results import Row
from .workloads import Tensors, Workload, make_tensors

LAUNCH_BOUND = 1e-3
"""Seconds on the device below which the host's part of a call is measured as well."""


@dataclass(frozen=True)
class Job:
    """One workload and the providers that run it side by side, on the same tensors."""

    workload: Workload
    providers: tuple[Provider, ...]


@dataclass(frozen=True)
class Settings:
    device: torch.device
    directions: tuple[str, ...]
    seconds: float
    """What the timing of one row may take, about."""
    time_limit: float
    """What the whole run may take; rows that come later are left out, and say so."""
    bandwidth: float
    """Bytes per second of a copy on this device."""


def plan(workloads: Sequence[Workload], providers: Sequence[Provider]) -> list[Job]:
    """Quick providers through all workloads first, so that slow ones can only use what time is left."""
    groups = (tuple(p for p in providers if p.slow_to_build is slow) for slow in (False, True))
    return [Job(workload, group) for group in groups if group for workload in workloads]


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[list[Row]]:
    """The rows of one job after another."""
    start = time.monotonic()
    for job in jobs:
        if time.monotonic() - start > settings.time_limit:
            yield _all_left_out(job, settings, f"The time limit of {settings.time_limit:.0f} s was reached.")
            continue
        if reason := too_large(job.workload, settings.device):
            yield _all_left_out(job, settings, reason)
            continue
        try:
            yield list(_run_job(job, settings))
        except torch.OutOfMemoryError:
            yield _all_left_out(job, settings, "The device has too little memory for the tensors or the fp64 truth.")
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def too_large(workload: Workload, device: torch.device) -> str:
    """Why the workload does not fit into this machine's memory, by an estimate; empty if it does.

    On a GPU an allocation that fails costs one row; on a CPU the system may end the process instead.
    """
    available = measure.available_memory() if device.type == "cpu" else None
    if available is None or workload.memory <= available:
        return ""
    need, have = (f"{number / 2**30:.1f} GiB" for number in (workload.memory, available))
    return f"Measuring it takes about {need} of memory; this machine has {have} to spare."


def _run_job(job: Job, settings: Settings) -> Iterator[Row]:
    workload, device = job.workload, settings.device
    tensors = make_tensors(workload, device)
    truth, limits = measure.standard(workload, tensors)
    share = measure.touched(workload, tensors)
    with measure.settings_of(workload):
        for provider in job.providers:
            row = Row(workload, provider.name, "", limits={} if provider.is_limit else limits[provider.rounds_grid])
            directions = [d for d in workload.directions if d in settings.directions]
            reason = provider.available(workload, device)
            forward: Forward | None = None
            try:
                if reason is None and not provider.is_limit:
                    forward = provider.build(workload, tensors)
                    result = measure.evaluate(forward, tensors, provider.twice)
                    row = replace(row, errors=measure.errors(result, truth, tensors.clear))
                    del result
            except Exception as error:
                reason, row = _explain(error, provider, device), replace(row, failed=_is_fault(error, provider))
            for direction in directions:
                why = reason
                if why is None and direction == "double" and not provider.twice:
                    why = f"The backward pass of {provider.name} cannot be differentiated."
                new = replace(row, direction=direction, reason=why or "")
                if why is None:
                    try:
                        new = _measure(new, forward, tensors, share, settings)
                    except Exception as error:
                        new = replace(new, reason=_explain(error, provider, device), failed=_is_fault(error, provider))
                yield new


def _measure(row: Row, forward: Forward | None, tensors: Tensors, share: float, settings: Settings) -> Row:
    """The row with its times, if its result is right; without a forward, those of a copy of as many bytes."""
    moved = measure.bytes_moved(row.workload, row.direction, share)
    row = replace(row, bytes=moved, floor=moved / settings.bandwidth)
    if forward is None:
        return replace(row, times=measure.times(copy_of(moved, settings.device), settings.device, settings.seconds))
    if not measure.matches(row.errors, row.limits, row.direction):
        return replace(row, match=False, failed=True, reason="The result is too far from the fp64 truth.")
    call = measure.call(forward, tensors, row.direction)
    peak = measure.peak_bytes(call, settings.device)
    row = replace(row, match=True, times=measure.times(call, settings.device, settings.seconds), peak_bytes=peak)
    if settings.device.type == "cuda" and row.median < LAUNCH_BOUND:
        return replace(row, wall=measure.wall_times(call, settings.device))
    return row


def _all_left_out(job: Job, settings: Settings, reason: str) -> list[Row]:
    directions = [d for d in job.workload.directions if d in settings.directions]
    return [Row(job.workload, provider.name, d, reason=reason) for provider in job.providers for d in directions]


def _is_fault(error: Exception, provider: Provider) -> bool:
    """Whether an error counts against the run: what torch.compile makes of a machine is that machine's affair."""
    return not provider.slow_to_build and not isinstance(error, torch.OutOfMemoryError)


def _explain(error: Exception, provider: Provider, device: torch.device) -> str:
    """An error in one line; raises it if the device no longer answers, as every later row would fail as well."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise error from None
    if isinstance(error, torch.OutOfMemoryError):
        return "The device has too little memory."
    lines = str(error).strip().splitlines()
    return f"{provider.name} raised {type(error).__name__}: {lines[0] if lines else 'no message'}"
