"""The benchmark: workloads × providers × directions, each row only after it matched the truth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import measure, records, targets
from .providers import Forward, Provider, copy_of
from .results import Row
from .workloads import Tensors, Workload, make_tensors

Call = Callable[[], tuple[Tensor, ...]]

LAUNCH_BOUND = 1e-3
"""Seconds on the device below which the host's part of a call is measured as well."""
ROUNDS = 3
"""Of rows one after another, where other processes share the device."""
TUNING_SECONDS = 30
"""After so long, no further mode of a provider is tried for a workload."""


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
    """What the whole run may take; no job begins later."""
    bandwidth: float
    """Bytes per second of a copy on this device."""


def plan(workloads: Sequence[Workload], providers: Sequence[Provider]) -> list[Job]:
    """What matters most first: of the workloads, and then of the sweeps, the rows that targets read, the other quick
    ones, and those of providers that are slow to build, again with what targets read first.
    """
    jobs: list[tuple[tuple[object, ...], Job]] = []
    for workload in workloads:
        groups: dict[tuple[bool, bool], dict[Provider, int]] = {}
        for provider in providers:
            read = _urgency(workload, provider)
            groups.setdefault((provider.slow_to_build, not read), {})[provider] = read
        for (slow, unread), group in groups.items():
            order = (bool(workload.sweep), slow, unread, -max(group.values()))
            jobs.append((order, Job(workload, tuple(group))))
    return [job for _, job in sorted(jobs, key=lambda item: item[0])]


def _urgency(workload: Workload, provider: Provider) -> int:
    rows = (Row(workload, provider.name, direction).to_json() for direction in workload.directions)
    return max(targets.urgency(records.record(row)) for row in rows)


def remaining(jobs: Sequence[Job], names: Container[str], directions: Sequence[str]) -> list[Job]:
    """The jobs, without the providers none of whose rows is among the names."""
    left = []
    for job in jobs:
        rows = left_out(job, directions, "")
        waiting = {row.provider for row in rows if row.name in names}
        if waiting:
            left.append(replace(job, providers=tuple(p for p in job.providers if p.name in waiting)))
    return left


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[list[Row]]:
    """The rows of one job after another, until the time is over."""
    start = time.monotonic()
    for job in jobs:
        if time.monotonic() - start > settings.time_limit:
            return
        if reason := too_large(job.workload, settings.device):
            yield left_out(job, settings.directions, reason)
            continue
        try:
            yield _run_job(job, settings)
        except torch.OutOfMemoryError:
            reason = "The device has too little memory for the tensors or the fp64 truth."
            yield left_out(job, settings.directions, reason)
        except Exception as error:  # so that a run with --resume begins behind this job
            reason = f"The run ended here: {_in_a_line(error)}"
            yield [replace(row, failed=True) for row in left_out(job, settings.directions, reason)]
            raise
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


def _run_job(job: Job, settings: Settings) -> list[Row]:
    """The rows of a job. On a CPU their times are taken in rounds, one row after another, as others use the machine."""
    found = list(_measured(job, settings))
    rows = [row for row, _ in found]
    with measure.settings_of(job.workload):
        for _ in range(ROUNDS - 1 if settings.device.type == "cpu" else 0):
            for i, (_, call) in enumerate(found):
                if call is not None:
                    more = measure.times(call, settings.device, settings.seconds / ROUNDS, least=1)
                    rows[i] = replace(rows[i], times=[*rows[i].times, *more])
    return rows


def _measured(job: Job, settings: Settings) -> Iterator[tuple[Row, Call | None]]:
    """Each row, and what it timed if that matched."""
    workload, device = job.workload, settings.device
    tensors = make_tensors(workload, device)
    truth: dict[str, Tensor] = {}
    limits: dict[bool, dict[str, float]] = {}
    if any(not p.is_limit and p.available(workload, device) is None for p in job.providers):
        truth, limits = measure.standard(workload, tensors)
    share = measure.touched(workload, tensors)
    with measure.settings_of(workload):
        for provider in job.providers:
            row = Row(workload, provider.name, "")
            directions = [d for d in workload.directions if d in settings.directions]
            reason = provider.available(workload, device)
            forward: Forward | None = None
            try:
                if reason is None and not provider.is_limit:
                    forward, mode = _build(provider, workload, tensors, settings)
                    row = replace(row, limits=limits[provider.rounds_grid], mode=mode)
                    result = measure.evaluate(forward, tensors, provider.twice)
                    row = replace(row, errors=measure.errors(result, truth, tensors.clear))
                    del result
            except Exception as error:
                reason, row = _explain(error, provider, device), replace(row, failed=_is_fault(error, provider))
            for direction in directions:
                why = reason
                if why is None and direction == "double" and not provider.twice:
                    why = f"The backward pass of {provider.name} cannot be differentiated."
                new, call = replace(row, direction=direction, reason=why or ""), None
                if why is None:
                    try:
                        new, call = _measure(new, forward, tensors, share, settings)
                    except Exception as error:
                        new = replace(new, reason=_explain(error, provider, device), failed=_is_fault(error, provider))
                yield new, call


def _build(provider: Provider, workload: Workload, tensors: Tensors, settings: Settings) -> tuple[Forward, str]:
    """A provider's forward pass, and its mode where it has several: on a GPU the one in which a step is fastest."""
    if not (provider.modes and settings.device.type == "cuda"):
        return provider.build(workload, tensors), ""
    return fastest(provider, workload, tensors, settings)


def fastest(provider: Provider, workload: Workload, tensors: Tensors, settings: Settings) -> tuple[Forward, str]:
    """A provider in each of its modes for a short time, and the fastest of them.

    The first has to run. Another may raise, and none is begun once the others took `TUNING_SECONDS`: what is built
    cannot be stopped, and later modes search longer.
    """
    start = time.monotonic()
    found: list[tuple[float, Forward, str]] = []
    for mode in provider.modes:
        if found and time.monotonic() - start > TUNING_SECONDS:
            break
        try:
            forward = provider.build(workload, tensors, mode)
            step = measure.call(forward, tensors, "both" if workload.gradients else "forward")
            times = measure.times(step, settings.device, settings.seconds / 4)
            found.append((statistics.median(times), forward, mode))
        except Exception as error:
            if not found:
                raise
            _explain(error, provider, settings.device)  # raises it if the device no longer answers
    _, forward, mode = min(found, key=lambda item: item[0])
    return forward, mode


def _measure(
    row: Row, forward: Forward | None, tensors: Tensors, share: float, settings: Settings
) -> tuple[Row, Call | None]:
    """The row with its times, if its result is right, and the call; without a forward, those of a copy of as many
    bytes.
    """
    moved = measure.bytes_moved(row.workload, row.direction, share)
    row = replace(row, bytes=moved, floor=moved / settings.bandwidth)
    if forward is None:
        copies = measure.times(copy_of(moved, settings.device), settings.device, settings.seconds)
        return replace(row, times=copies), None
    if not measure.matches(row.errors, row.limits, row.direction):
        return replace(row, match=False, failed=True, reason="The result is too far from the fp64 truth."), None
    call = measure.call(forward, tensors, row.direction)
    peak = measure.peak_bytes(call, settings.device)
    rounds = ROUNDS if settings.device.type == "cpu" else 1
    times = measure.times(call, settings.device, settings.seconds / rounds, least=1 if rounds > 1 else 3)
    row = replace(row, match=True, times=times, peak_bytes=peak)
    if settings.device.type == "cuda" and row.median < LAUNCH_BOUND:
        row = replace(row, wall=measure.wall_times(call, settings.device))
    return row, call


def left_out(job: Job, directions: Sequence[str], reason: str) -> list[Row]:
    """All rows of a job, without times."""
    chosen = [d for d in job.workload.directions if d in directions]
    return [Row(job.workload, provider.name, d, reason=reason) for provider in job.providers for d in chosen]


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
    return f"{provider.name} raised {_in_a_line(error)}"


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
