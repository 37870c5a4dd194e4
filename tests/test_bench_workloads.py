"""The benchmark's workloads: each kind of map means the same to tri_stn, to torch and to the fp64 truth, and a
wrong result is refused. Tiny versions, on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bench import measure, run
from bench.providers import COMPILE, COPY, CUDNN, EAGER, KORNIA, PROVIDERS, TRI_STN, Provider
from bench.workloads import DIRECTIONS, SWEEPS, WORKLOADS, make_tensors

CPU = torch.device("cpu")
SETTINGS = run.Settings(CPU, DIRECTIONS, 0.001, 60, 1e9)


def _tiny(workload):
    """Less than small: the sizes do not matter here."""
    w = workload.small()
    return replace(
        w,
        channels=min(w.channels, 3),
        maps=min(w.maps, 3),
        input_size=tuple(min(n, 13) for n in w.input_size),
        size=(1, 40) if w.size[0] == 1 else tuple(min(n, 13) for n in w.size),
    )


FIRST = {w.name: _tiny(w) for w in WORKLOADS if w.dtype == "float32" and w.layout == "contiguous"}
"""One form of each name: of those that come twice the later, which is deterministic."""
OF_KIND = {(w.transform.kind, len(w.size)): w for w in FIRST.values()}


@pytest.fixture(autouse=True)
def _plain_path(monkeypatch):
    """CPU tensors take tri_stn's path for them, as in the benchmark, and not the interpreter's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _rows(workload, *providers):
    return {(row.provider, row.direction): row for row in run._run_job(run.Job(workload, providers), SETTINGS)}


@pytest.mark.parametrize("workload", FIRST.values(), ids=str)
def test_tri_stn_torch_and_kornia_compute_what_the_truth_is(workload):
    for row in _rows(workload, TRI_STN, EAGER, KORNIA).values():
        assert row.match or row.provider == "kornia", (row.name, row.reason, row.errors, row.limits)
        assert row.times or "kornia" in row.reason, row
        assert not row.failed


@pytest.mark.parametrize("kind", OF_KIND, ids=lambda kind: f"{kind[0]}-{kind[1]}d")
def test_in_16_bits_and_channels_last_too(kind):
    workload = replace(OF_KIND[kind], dtype="bfloat16", layout="channels_last", channels=3)
    tensors = make_tensors(workload, CPU)
    assert not tensors.input.is_contiguous()
    assert tensors.theta.dtype == torch.float32
    for row in _rows(workload, TRI_STN, EAGER).values():
        assert row.match, (row.name, row.reason, row.errors, row.limits)


def test_every_kind_that_users_have_is_there():
    assert set(OF_KIND) == {
        ("affine", 2), ("projective", 2), ("thin_plate", 2), ("displacement", 2), ("grid", 2),
        ("affine", 3), ("displacement", 3),
    }  # fmt: skip
    assert {w.sweep for w in SWEEPS} == {"size", "channels", "scale", "angle"}
    names = [str(w) for w in (*WORKLOADS, *SWEEPS)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", OF_KIND, ids=lambda kind: f"{kind[0]}-{kind[1]}d")
def test_a_map_that_is_a_little_off_is_refused(kind):
    """A tenth of a pixel, in every kind: far beyond rounding, and invisible on a picture."""
    workload = OF_KIND[kind]

    def build(w, tensors):
        tensors = replace(tensors, input=tensors.input.roll(1, -1) * 0.1 + tensors.input * 0.9)
        return EAGER.build(w, tensors)

    rows = _rows(workload, Provider("wrong", lambda *_: None, build))
    for row in rows.values():
        assert (row.match, row.failed, row.times) == (False, True, ()), row


@pytest.mark.parametrize("name", [name for name, w in FIRST.items() if w.gradients])
def test_gradients_of_another_map_are_refused(name):
    workload = FIRST[name]
    tensors = make_tensors(workload, CPU)
    truth, limits = measure.standard(workload, tensors)
    wrong = {k: t if k == "output" else t * 1.02 for k, t in truth.items()}
    errors = measure.errors(wrong, truth, tensors.clear)
    assert measure.matches(errors, limits[True], "forward")
    assert not measure.matches(errors, limits[True], "backward")


def test_truth_does_not_depend_on_its_chunks(monkeypatch):
    for workload in (replace(OF_KIND["affine", 2], maps=2, second=True), OF_KIND["displacement", 3]):
        workload = replace(workload, batch=3, channels=5, gradients=("input", "theta"))
        tensors = make_tensors(workload, CPU)
        whole, share = measure.truth(workload, tensors), measure.touched(workload, tensors)
        monkeypatch.setitem(measure.CHUNK_ELEMENTS, "cpu", 1)  # one channel of one image at a time
        parts = measure.truth(workload, tensors)
        assert measure.touched(workload, tensors) == share
        for name, tensor in whole.items():
            # fp64 sums in another order
            torch.testing.assert_close(parts[name], tensor, rtol=1e-10, atol=1e-10 * tensor.abs().max().item())
        monkeypatch.undo()


def test_second_gradients_are_those_of_torch_and_checked():
    workload = replace(FIRST["feature_56_c64"], second=True, deterministic=False)
    assert workload.directions == DIRECTIONS
    rows = _rows(workload, TRI_STN, EAGER)
    assert {row.match for row in rows.values()} == {True}
    assert set(rows["tri_stn", "double"].errors) >= set(measure.SECOND)
    assert rows["tri_stn", "double"].bytes > rows["tri_stn", "backward"].bytes

    tensors = make_tensors(workload, CPU)
    truth, limits = measure.standard(workload, tensors)
    for name in measure.SECOND:
        wrong = measure.errors(truth | {name: truth[name] * 1.01}, truth, tensors.clear)
        assert not measure.matches(wrong, limits[True], "double"), name


def test_a_provider_without_second_gradients_says_so():
    once = replace(EAGER, name="once", twice=False)
    rows = _rows(replace(FIRST["feature_56_c64"], second=True, deterministic=False), once)
    assert rows["once", "both"].match
    assert (rows["once", "double"].times, rows["once", "double"].failed) == ((), False)
    assert "cannot be differentiated" in rows["once", "double"].reason
    assert not COMPILE.twice
    assert not CUDNN.twice


def test_deterministic_rows_run_in_torch_s_mode_and_leave_it():
    seen = []

    def build(workload, tensors):
        forward = TRI_STN.build(workload, tensors)

        def watched():
            seen.append(torch.get_deterministic_debug_mode())
            return forward()

        return watched

    before = torch.get_deterministic_debug_mode()
    (workload,) = (w for w in FIRST.values() if w.name == "border_224")
    assert str(workload) == "border_224-float32-contiguous-deterministic-small"
    rows = _rows(workload, Provider("watched", lambda *_: None, build))
    assert all(row.match for row in rows.values())
    assert set(seen) == {2}  # raises where something is not
    assert torch.get_deterministic_debug_mode() == before != 2
    assert "deterministic" in EAGER.available(workload, torch.device("cuda"))


def test_the_limit_is_a_row_that_moves_the_least_bytes():
    workload = OF_KIND["displacement", 2]
    image, field = math.prod(workload.input_size), math.prod(workload.size) * 2
    rows = _rows(workload, COPY)
    row = rows["copy", "forward"]
    share = measure.touched(workload, make_tensors(workload, CPU))
    images = workload.batch * workload.channels
    assert row.bytes == round((images * (image * share + math.prod(workload.size)) + workload.batch * field) * 4)
    assert row.match is None
    assert row.times


def test_the_host_s_part_of_a_call_stands_beside_the_device_s():
    calls = []
    wall = measure.wall_times(lambda: calls.append(1), CPU, rounds=3, calls=4)
    assert (len(wall), len(calls)) == (3, 16)
    row = next(iter(_rows(OF_KIND["affine", 2], TRI_STN).values()))
    assert "wall" not in row.to_json()["extra_info"]  # a CPU's times have it in them
    assert replace(row, wall=wall).to_json()["extra_info"]["wall"]["median"] > 0


def test_what_does_not_fit_is_left_out_and_says_why(monkeypatch):
    workload = FIRST["frame_4k"]
    monkeypatch.setattr(measure, "available_memory", lambda: workload.memory - 1)
    (rows,) = run.run([run.Job(workload, (TRI_STN,))], SETTINGS)
    assert all("GiB of memory" in row.reason and not row.failed for row in rows)
    monkeypatch.setattr(measure, "available_memory", lambda: workload.memory)
    assert not run.too_large(workload, CPU)


def test_a_full_workload_s_estimate_is_about_what_it_takes():
    """Of plain tensors alone: a frame of four gigabytes must not count as small."""
    (frame,) = (w for w in WORKLOADS if str(w) == "frame_4k-float32-contiguous")
    plain = 8 * 3 * 2160 * 3840 * 4 * 2
    assert 4 * plain < frame.memory < 20 * plain


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda p: p.name)
def test_providers_say_what_they_cannot_do_in_a_sentence(provider):
    for workload in (*WORKLOADS, *SWEEPS):
        for device in (CPU, torch.device("cuda")):
            reason = provider.available(workload, device)
            assert reason is None or (reason[-1] == "." and len(reason) > 20)
