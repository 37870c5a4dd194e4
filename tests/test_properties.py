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
MATRIX = st.tuples(st.tuples(ENTRY, ENTRY, ENTRY), st.tuples(ENTRY, ENTRY, ENTRY))


@st.composite
def cases(draw, largest):
    side = st.integers(1, largest)
    maps = draw(st.none() | st.integers(1, 3))
    kind = draw(st.sampled_from(["affine", "affine", "grid", "displacement"]))
    return Case(
        kind=kind,
        images=draw(st.integers(1, 2)),
        maps=maps,
        channels=draw(st.integers(1, 5)),
        input_size=(draw(side), draw(side)),
        size=(draw(side), draw(side)),
        mode=draw(st.sampled_from(["bilinear", "nearest", "bicubic"])),
        padding_mode=draw(st.sampled_from(["zeros", "border", "reflection"])),
        align_corners=draw(st.booleans()),
        dtype=draw(FLOATS),
        theta_dtype=draw(FLOATS),
        arrangement=draw(st.sampled_from(sorted(ARRANGEMENTS))),
        theta=draw(st.none() | MATRIX),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(largest=12))
def test_reference_agrees_with_torch(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@settings(
    max_examples=int(os.environ.get("TRI_STN_EXAMPLES", "25")),
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(case=cases(largest=8))
def test_kernels_agree_with_torch(backend, case):
    check(case, backend)
