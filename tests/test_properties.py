"""Random shapes, layouts, dtypes and maps: the sampler agrees with torch in fp64 on all of them."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_warp import check

from tri_stn.testing import ARRANGEMENTS, Case

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
ENTRY = st.floats(-2, 2, width=16)
EXAMPLES = os.environ.get("TRI_STN_EXAMPLES")
"""More of them than a usual run can wait for."""


@st.composite
def cases(draw, largest, most):
    """Images of up to `largest` pixels along an axis; up to `most` maps of an image."""
    dims = draw(st.sampled_from([2, 2, 2, 1, 3]))
    kinds = ["affine", "affine", "projective", "grid", "displacement"]
    side = st.integers(1, largest if dims < 3 else max(2, largest // 3))
    matrix = st.tuples(*[st.tuples(*[ENTRY] * (dims + 1))] * dims)
    return Case(
        kind=draw(st.sampled_from(kinds if dims > 1 else [k for k in kinds if k != "projective"])),
        images=draw(st.integers(1, 2)),
        maps=draw(st.none() | st.integers(1, most)),
        channels=draw(st.integers(1, 2 * most - 1)),
        input_size=draw(st.tuples(*[side] * dims)),
        size=draw(st.tuples(*[side] * dims)),
        mode=draw(st.sampled_from(["bilinear", "nearest", "bicubic"])),
        padding_mode=draw(st.sampled_from(["zeros", "border", "reflection"])),
        align_corners=draw(st.booleans()),
        dtype=draw(FLOATS),
        theta_dtype=draw(FLOATS),
        arrangement=draw(st.sampled_from(sorted(ARRANGEMENTS))) if dims > 1 else "contiguous",
        theta=draw(st.none() | matrix),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@settings(max_examples=int(EXAMPLES or 400), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(largest=12, most=3))
def test_reference_agrees_with_torch(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@settings(max_examples=int(EXAMPLES or 25), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(largest=6, most=2))
def test_kernels_agree_with_torch(backend, case):
    check(case, backend)
