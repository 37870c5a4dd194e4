"""The workloads through pytest-benchmark: ``pytest bench/``. Full ones on CUDA, small ones elsewhere.

What is timed here includes the host's part of a call; `python -m bench` times the device alone.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench import measure, results, run
from bench.providers import PROVIDERS
from bench.workloads import DIRECTIONS, WORKLOADS, make_tensors

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOSEN = [w if DEVICE.type == "cuda" else w.small() for w in WORKLOADS]


@functools.lru_cache(maxsize=1)
def _prepare(workload):
    """Tensors, truth and what error is allowed: shared by the tests of a workload, which run in a row."""
    tensors = make_tensors(workload, DEVICE)
    return tensors, *measure.standard(workload, tensors)


@pytest.mark.parametrize(
    ("workload", "provider", "direction"),
    [
        pytest.param(workload, provider, direction, id=f"{workload}-{name}-{direction}")
        for workload in CHOSEN
        for name, provider in PROVIDERS.items()
        if not provider.is_limit
        if DEVICE.type == "cuda" or not provider.slow_to_build  # on a CPU, python -m bench compiles
        for direction in workload.directions
    ],
)
def test_workload(benchmark, workload, provider, direction):
    reason = provider.available(workload, DEVICE) or run.too_large(workload, DEVICE)
    if direction == "double" and not provider.twice:
        reason = reason or f"The backward pass of {provider.name} cannot be differentiated."
    if reason:
        pytest.skip(reason)
    tensors, truth, standards = _prepare(workload)
    limits = standards[provider.rounds_grid]
    with measure.settings_of(workload):
        forward = provider.build(workload, tensors)
        errors = measure.errors(measure.evaluate(forward, tensors, provider.twice), truth, tensors.clear)
        assert measure.matches(errors, limits, direction), f"too far from the fp64 truth: {errors}, allowed: {limits}"

        call = measure.call(forward, tensors, direction)

        def timed() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.group = f"{workload}/{direction}"
        benchmark.extra_info |= {"provider": provider.name, "bytes": measure.bytes_moved(workload, direction)}
        benchmark.extra_info["device"] = results.device_name(DEVICE)
        benchmark.pedantic(timed, rounds=20 if DEVICE.type == "cuda" else 3, warmup_rounds=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small tensors do not feed more than one, and waiting for the others is what would be timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_workload_has_a_name_of_its_own():
    names = [str(workload) for workload in (*WORKLOADS, *(w.small() for w in WORKLOADS))]
    assert len(set(names)) == len(names)
    assert {d for workload in WORKLOADS for d in workload.directions} == set(DIRECTIONS)
