"""Lanes whose corners are the same pixels add them up before the atomics: nothing is lost, and half the atomics are
spared.
"""

import numpy as np
import pytest
import torch
from conftest import interpreted
from test_warp import compare
from tri_stn.kernels import tiling
from triton.runtime.interpreter import InterpreterBuilder

import tri_stn
from tri_stn.testing import Case

kernels = pytest.mark.parametrize("backend", ["kernels"], indirect=True)


def smooth(case, device, reach=0.3, shift=0.4):
    """A field that moves neighbours almost alike, so that most of them share corners, in pixels."""
    image, field, grad = case.tensors(device)
    waves = torch.linspace(0, 2, field[0, ..., 0].numel(), device=device).sin().view(field.shape[1:-1])
    return (
        image,
        torch.stack([shift + reach * (a + 1) * waves for a in range(len(case.size))], -1)[None] + 0 * field,
        grad,
    )


@kernels
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    "size,input_size", [((11, 21), (9, 18)), ((3, 5, 9), (4, 4, 8)), ((9, 3), (9, 3)), ((40,), (38,))]
)
def test_smooth_fields_match_torch(backend, size, input_size, padding_mode):
    case = Case(kind="pixel_displacement", size=size, input_size=input_size, images=1, padding_mode=padding_mode)
    compare(case, *smooth(case, backend))


@kernels
@pytest.mark.parametrize("shift", [-1.6, 0.4, 2.4])
def test_rows_that_leave_the_image_match_torch(backend, shift):
    """Where lanes side by side look across an edge, one shares what the other has outside."""
    case = Case(kind="pixel_displacement", size=(6, 19), input_size=(6, 17), images=1, channels=3)
    compare(case, *smooth(case, backend, reach=1.3, shift=shift))


@kernels
def test_an_infinite_gradient_reaches_its_four_pixels_alone(backend):
    case = Case(kind="pixel_displacement", size=(9, 20), input_size=(9, 20), images=1, channels=1)
    image, field, grad = smooth(case, backend, reach=0.0)
    grad[0, 0, 4, 7] = torch.inf
    image.requires_grad_()
    output = tri_stn.warp(image, case.transform(field), case.size)
    (got,) = torch.autograd.grad(output, image, grad)
    y, x = torch.nonzero(~got[0, 0].isfinite(), as_tuple=True)
    assert sorted(zip(y.tolist(), x.tolist(), strict=True)) == [(4, 7), (4, 8), (5, 7), (5, 8)]


@kernels
@interpreted
def test_lanes_side_by_side_share_atomics(backend, monkeypatch):
    """Of 4 corners each lane adds 2, but for the last of a row of the tile, which adds all that lie in the image."""
    case = Case(kind="pixel_displacement", size=(8, 32), input_size=(8, 32), images=1, channels=1)
    image, field, grad = smooth(case, backend, reach=0.0)
    added, atomic = [], InterpreterBuilder.create_atomic_rmw

    def counted(self, operation, ptr, val, mask, *rest):
        added.append(np.count_nonzero(mask.data))
        return atomic(self, operation, ptr, val, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
    output = tri_stn.warp(image.requires_grad_(), case.transform(field), case.size)
    torch.autograd.grad(output, image, grad)
    width = tiling.scatter_tile(case.size, 1, False, case.dtype, taps=2, all_channels=False).block[0]
    rows = 8 + 7  # of upper corners, and of lower ones but for the last
    assert width == 16 and sum(added) == rows * 32 + rows
