"""Dense maps, homographies and splines against other people's samplers, on a photograph.

Affine and projective pixel matrices are compared in test_matrices. All on the CPU path, in fp64 unless the
oracle computes in fp32; tests of the kernels hold them to the same numbers.
"""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

import tri_stn

SIZE = (60, 70)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(params=range(2))
def generator(request):
    print(f"seed {request.param}")
    return np.random.default_rng(request.param)


@pytest.fixture(scope="module")
def photo():
    """(H, W), 0 to 1, in fp64; not square."""
    data = pytest.importorskip("skimage.data")
    return data.camera()[100:350:2, 50:400:2].astype(np.float64) / 255


def places(generator, input_size, size=SIZE):
    """Source pixels (*size, d), axes in the order of the shape, a share of them outside the image."""
    return generator.uniform([-0.2 * n for n in input_size], [1.2 * n for n in input_size], (*size, len(input_size)))


def to_grid(places, input_size, align_corners=True):
    """The same as a normalised grid (1, *size, d), x first."""
    half = np.array([(n - align_corners) / 2 for n in input_size])
    middle = np.array([(n - 1) / 2 for n in input_size])
    return torch.from_numpy(np.ascontiguousarray(((places - middle) / half)[..., ::-1]))[None]


def warp(image, transform, size=None, **options):
    return tri_stn.warp(torch.from_numpy(image)[None, None], transform, size, **options)[0, 0].numpy()


def test_opencv_remap(photo, generator):
    """In fp32; before OpenCV 5, coordinates in steps of 1/32 pixel."""
    cv2 = pytest.importorskip("cv2")
    at = places(generator, photo.shape).astype(np.float32)
    maps = (np.ascontiguousarray(at[..., 1]), np.ascontiguousarray(at[..., 0]))
    theirs = cv2.remap(photo.astype(np.float32), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    ours = warp(
        photo, tri_stn.Grid(to_grid(at.astype(np.float64), photo.shape)), padding_mode="border", align_corners=True
    )
    steps = np.abs(np.diff(photo, axis=0)).max() + np.abs(np.diff(photo, axis=1)).max()
    exact = int(cv2.__version__.split(".")[0]) >= 5
    assert np.abs(ours - theirs).max() < steps * (1e-4 if exact else 1 / 32)


@pytest.mark.parametrize("order,mode", [(0, "nearest"), (1, "bilinear")])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("dims", [2, 3])
def test_scipy_map_coordinates(photo, generator, dims, padding_mode, order, mode):
    """scipy rounds halves up, torch to even: random places hold none."""
    image = photo if dims == 2 else np.stack([photo[i : i + 40, :50] for i in range(0, 60, 12)])
    at = places(generator, image.shape, SIZE if dims == 2 else (6, 20, 25))
    border = {"zeros": "grid-constant", "border": "nearest", "reflection": "mirror"}[padding_mode]
    theirs = map_coordinates(image, np.moveaxis(at, -1, 0), order=order, mode=border)
    grid = tri_stn.Grid(to_grid(at, image.shape))
    ours = warp(image, grid, mode=mode, padding_mode=padding_mode, align_corners=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bound,padding_mode", [("zero", "zeros"), ("replicate", "border"), ("dct2", "reflection")])
@pytest.mark.parametrize("dims", [2, 3])
def test_torch_interpol_pull_and_push(photo, generator, dims, bound, padding_mode):
    interpol = pytest.importorskip("interpol")
    image = photo if dims == 2 else np.stack([photo[i : i + 40, :50] for i in range(0, 60, 12)])
    at = places(generator, image.shape, SIZE if dims == 2 else (6, 20, 25))
    theirs_at, tensor = torch.from_numpy(at)[None], torch.from_numpy(image)[None, None]
    grid, options = tri_stn.Grid(to_grid(at, image.shape, False)), {"padding_mode": padding_mode}
    pulled = interpol.grid_pull(tensor, theirs_at, "linear", bound, extrapolate=True)
    torch.testing.assert_close(tri_stn.warp(tensor, grid, **options), pulled, rtol=0, atol=1e-10)
    pushed = interpol.grid_push(pulled, theirs_at, list(image.shape), "linear", bound, extrapolate=True)
    torch.testing.assert_close(tri_stn.splat(pulled, grid, image.shape, **options), pushed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("align_corners", [False, True])
def test_kornia_homography_warp(photo, generator, align_corners):
    transform = pytest.importorskip("kornia.geometry.transform")
    matrix = torch.from_numpy(np.eye(3) + 0.1 * generator.standard_normal((1, 3, 3)))
    image = torch.from_numpy(photo)[None, None]
    theirs = transform.homography_warp(image, matrix, SIZE, align_corners=True)  # its grid is that of True
    if align_corners:
        ours = tri_stn.warp(image, tri_stn.Projective(matrix), SIZE, align_corners=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    else:  # read back by the inverse, the photograph is there again where both looked inside
        there = tri_stn.warp(image, tri_stn.Projective(matrix))
        back = tri_stn.warp(there, tri_stn.Projective(matrix).inverse())
        seen = tri_stn.warp(torch.ones_like(image), tri_stn.Projective(matrix).inverse()) > 0.999
        assert (back - image)[seen].abs().mean() < 0.03  # two bilinear readings blur


def test_kornia_thin_plate(photo, generator):
    transform = pytest.importorskip("kornia.geometry.transform")
    targets = torch.from_numpy(generator.uniform(-1, 1, (8, 2)))
    sources = targets + 0.1 * torch.from_numpy(generator.standard_normal((1, 8, 2)))
    image = torch.from_numpy(photo)[None, None]
    spline = tri_stn.ThinPlateSpline(targets, sources)
    _, weights, plane = spline.parameters.unflatten(-1, (-1, 2)).split([8, 8, 3], 1)
    # Its U is r² log r, half of ours. Its own solver puts the knots at the other points, so it gives another map.
    theirs = transform.warp_image_tps(image, targets[None], 2 * weights, plane, align_corners=True)
    ours = tri_stn.warp(image, spline, align_corners=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
