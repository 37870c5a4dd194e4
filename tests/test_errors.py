"""Bad input is a named error, before any launch, that says what was given and what is allowed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from user_maps import RadialDistortion

import tri_stn

IMAGE = torch.rand(2, 3, 4, 5)
THETA = torch.rand(2, 2, 3)


def nested(layout):
    return torch.nested.nested_tensor([*IMAGE], layout=layout)


def affine(theta=THETA):
    return tri_stn.Affine(theta)


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: tri_stn.warp(IMAGE[0], affine()), ValueError, r"\(N, C, H, W\).*got \(3, 4, 5\)"),
        (lambda: tri_stn.warp(IMAGE[None], affine()), ValueError, r"4 dimensions; got \(1, 2, 3, 4, 5\)"),
        (lambda: tri_stn.warp(IMAGE[:, :, :0], affine()), ValueError, r"at least one pixel; got spatial size \(0, 5\)"),
        (lambda: tri_stn.warp(IMAGE.long(), affine()), TypeError, "complex64, complex128; got torch.int64"),
        (lambda: tri_stn.warp(IMAGE.numpy(), affine()), TypeError, "torch.Tensor; got ndarray"),
        (lambda: tri_stn.warp(IMAGE.to_sparse(), affine()), TypeError, "dense tensor; got layout torch.sparse_coo"),
        (lambda: tri_stn.warp(nested(torch.strided), affine()), TypeError, "one dense tensor; got a nested one"),
        (lambda: tri_stn.warp(nested(torch.jagged), affine()), TypeError, "one dense tensor; got a nested one"),
        (lambda: tri_stn.warp(IMAGE, THETA), TypeError, r"tri_stn.Affine\(theta\); got Tensor"),
        (lambda: tri_stn.warp(IMAGE, affine(THETA[:1].repeat(3, 1, 1))), ValueError, "got 2 images and 3 maps"),
        (lambda: tri_stn.warp(IMAGE, affine(torch.rand(3, 4, 2, 3))), ValueError, "got 2 images and 3 maps"),
        (lambda: tri_stn.warp(IMAGE, affine(THETA.to("meta"))), ValueError, "same device; got cpu and meta"),
        (lambda: tri_stn.warp(IMAGE.to("meta"), affine(THETA.to("meta"))), None, ""),
        (
            lambda: tri_stn.Attention(torch.ones(2, device="meta"), torch.zeros(2, 2)),
            ValueError, "scale on meta, translation on cpu",
        ),
        (
            lambda: tri_stn.Similarity(torch.ones(2), torch.ones(2, device="meta"), torch.ones(2, 2)),
            ValueError, "angle on meta",
        ),
        (
            lambda: tri_stn.ThinPlateSpline(torch.rand(3, 2), torch.rand(1, 3, 2, device="meta")),
            ValueError, "target_points on cpu, source_points on meta",
        ),
        (
            lambda: tri_stn.PiecewiseAffine(
                torch.rand(3, 2), torch.zeros(1, 3, dtype=torch.long, device="meta"), torch.rand(1, 3, 2)
            ),
            ValueError, "triangles on meta",
        ),
        (
            lambda: tri_stn.LinearBasis(torch.rand(2, 2, 3), torch.rand(3, 5, 5, device="meta")),
            ValueError, "coefficients on cpu, basis on meta",
        ),
        (
            lambda: tri_stn.Compose(tri_stn.Compose(affine()), tri_stn.FreeForm(torch.rand(1, 4, 4, 2, device="meta"))),
            ValueError, "Compose on cpu, FreeForm on meta",
        ),
        (lambda: RadialDistortion(torch.rand(2), torch.rand(2, device="meta")), ValueError, "k1 on cpu, k2 on meta"),
        (lambda: tri_stn.warp(IMAGE, affine(), mode="cubic"), ValueError, "'nearest', 'bicubic', but got: 'cubic'"),
        (lambda: tri_stn.warp(IMAGE, affine(), padding_mode="wrap"), ValueError, "'zeros', .*, but got: 'wrap'"),
        (lambda: tri_stn.warp(IMAGE, affine(), align_corners=None), TypeError, "True or False; got None"),
        (lambda: tri_stn.warp(IMAGE, affine(), 5), TypeError, r"sequence of 2 integers, \(H, W\); got 5"),
        (lambda: tri_stn.warp(IMAGE, affine(), (5.0, 5)), TypeError, r"integers, \(H, W\); got \(5.0, 5\)"),
        (lambda: tri_stn.warp(IMAGE, affine(), (True, 5)), TypeError, r"integers, \(H, W\); got \(True, 5\)"),
        (lambda: tri_stn.warp(IMAGE, affine(), (np.float64(4), 5)), TypeError, r"integers, \(H, W\); got"),
        (lambda: tri_stn.warp(IMAGE, affine(), torch.tensor([4, 5]).unbind()), TypeError, r"integers, \(H, W\); got"),
        (lambda: tri_stn.rotation(1.0, size=(4, True)), TypeError, r"integers, \(H, W\); got \(4, True\)"),
        (lambda: tri_stn.warp(IMAGE, affine(), (2, 3, 5, 5)), ValueError, "Leave out the batch and channels"),
        (lambda: tri_stn.warp(IMAGE, affine(), (-1, 5)), ValueError, r"not be negative; got \(-1, 5\)"),
        (lambda: tri_stn.warp(IMAGE, affine(), 5.0), TypeError, r"sequence of 2 integers, \(H, W\); got 5.0"),
        (lambda: tri_stn.Grid(torch.rand(2, 5, 5, 3)), ValueError, "Grid takes grid of shape"),
        (lambda: tri_stn.warp(IMAGE, tri_stn.Grid(torch.rand(2, 5, 5, 5, 3))), ValueError, "5 dimensions; got"),
        (lambda: tri_stn.warp(IMAGE, tri_stn.Grid(torch.rand(2, 5, 6, 2)), (6, 5)), ValueError, "Leave size out"),
        (lambda: tri_stn.Displacement(THETA.int()), TypeError, "Displacement takes field in a floating-point"),
        (
            lambda: tri_stn.warp(torch.empty(2, 3, 4, 2**24 + 1, device="meta"), affine(THETA.to("meta"))),
            ValueError, "needs fp64",
        ),
        (lambda: tri_stn.splat(IMAGE, affine(), (0, 3)), ValueError, "at least one pixel"),
        (lambda: tri_stn.splat(IMAGE[0], affine(), (4, 3)), ValueError, r"shape \(N, C, H, W\); got \(3, 4, 5\)"),
        (
            lambda: tri_stn.splat(IMAGE, tri_stn.Affine(THETA[:, None].expand(2, 5, 2, 3)), (4, 3)),
            ValueError, r"shape \(N, K = 5, C, H, W\)",
        ),
        (
            lambda: tri_stn.splat(IMAGE, tri_stn.Grid(torch.rand(2, 3, 5, 2)), (4, 3)),
            ValueError, r"an input of size \(3, 5\); got \(4, 5\)",
        ),
        (
            lambda: tri_stn.splat(IMAGE, affine(), (4, 3), mode="bicubic", normalize=True),
            ValueError, "weights of 'bicubic' have both signs",
        ),
        (lambda: tri_stn.Affine(THETA[0]), ValueError, r"\(N, 2, 3\) or \(N, K, 2, 3\).*got \(2, 3\)"),
        (lambda: tri_stn.Affine(THETA.mT), ValueError, r"got \(2, 3, 2\)"),
        (lambda: tri_stn.Affine(THETA.int()), TypeError, r"floating-point dtype; got torch.int32"),
        (
            lambda: tri_stn.ThinPlateSpline(torch.rand(3, 2), torch.rand(1, 3, 2), "a"),
            TypeError, "regularization as a number; got 'a'",
        ),
        (lambda: tri_stn.Affine(THETA.to_sparse()), TypeError, "theta as a dense tensor; got layout torch.sparse_coo"),
        (lambda: tri_stn.Grid(torch.rand(2, 5, 5, 2).to_mkldnn()), TypeError, "dense tensor; got layout torch._mkldnn"),
        (lambda: tri_stn.invert(THETA.to_sparse()), TypeError, "matrices as a dense tensor; got layout"),
        (lambda: tri_stn.Affine([[1, 0, 0], [0, 1, 0]]), TypeError, "torch.Tensor; got list"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    if error is None:
        assert call().device.type == "meta"  # shapes alone: tracing needs no backend
        return
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda size: tri_stn.warp(IMAGE, affine(), size),
        lambda size: tri_stn.splat(IMAGE, affine(), size),
        lambda size: tri_stn.rotation(1.0, size=size),
        lambda size: tri_stn.boxes(IMAGE[0, 0, :, :4], size, size),
        lambda size: tri_stn.from_pixel_matrix(THETA, size, size),
    ],
)
def test_integers_of_numpy_are_integers(call):
    got = call((np.int64(3), np.int32(7)))
    assert torch.equal(got, call((3, 7)))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_cuda_tensors_without_triton_get_one_sentence():
    code = """
import sys
sys.modules["triton"] = None
import tri_stn.ops
try:
    tri_stn.ops.kernels()
except ModuleNotFoundError as error:
    print(error)
"""
    result = run(code)
    assert result.stdout.startswith("tri_stn's GPU kernels need Triton, which is not installed"), result.stderr


def test_unsupported_devices_get_one_sentence():
    from tri_stn.ops import _backend

    class Elsewhere:
        device = torch.device("mps")

    with pytest.raises(NotImplementedError, match="CUDA and ROCm devices and on the CPU; got a tensor on mps"):
        _backend(Elsewhere())
