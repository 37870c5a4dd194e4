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
    return torch.from_numpy(((places - middle) / half)[..., ::-1].copy())[None]


def data(photo, dims):
    """A row of the photograph, all of it, or pieces of it as slices."""
    return {1: photo[50], 2: photo, 3: np.stack([photo[i : i + 40, :50] for i in range(0, 60, 12)])}[dims]


def warp(image, transform, size=None, **options):
    return tri_stn.warp(torch.from_numpy(image)[None, None], transform, size, **options)[0, 0].numpy()


# OpenCV's name for each padding, and the align_corners whose reflection it is.
BORDERS = [
    ("CONSTANT", "zeros", False),
    ("REPLICATE", "border", True),
    ("REFLECT", "reflection", False),
    ("REFLECT_101", "reflection", True),
]


def homography(generator):
    """Random input pixels to output pixels, with a divisor between 0.5 and 1.5 all over the output."""
    matrix = np.eye(3) + 0.3 * generator.uniform(-1, 1, (3, 3))
    matrix[:2, 2], matrix[2] = generator.uniform(-20, 20, 2), [*generator.uniform(-1, 1, 2) / 400, 1]
    return matrix


@pytest.mark.parametrize("border,padding_mode,align_corners", BORDERS)
@pytest.mark.parametrize("flag,mode", [("NEAREST", "nearest"), ("LINEAR", "bilinear"), ("CUBIC", "bicubic")])
@pytest.mark.parametrize("function", ["remap", "warpAffine", "warpPerspective"])
def test_opencv(photo, generator, function, flag, mode, border, padding_mode, align_corners):
    """Its cubic has torch's a = -0.75. It computes in fp32; before OpenCV 5, with places in steps of 1/32 pixel."""
    cv2 = pytest.importorskip("cv2")
    exact = int(cv2.__version__.split(".")[0]) >= 5
    if not exact and mode != "bilinear":
        pytest.skip("places in steps of 1/32 pixel leave no sharp criterion but for linear reading")
    image = photo.astype(np.float32)
    options = {"flags": getattr(cv2, f"INTER_{flag}"), "borderMode": getattr(cv2, f"BORDER_{border}")}
    if function == "remap":
        at = places(generator, photo.shape).astype(np.float32)
        axes = [np.ascontiguousarray(at[..., axis]) for axis in (1, 0)]
        theirs = cv2.remap(image, *axes, interpolation=options["flags"], borderMode=options["borderMode"])
        at = at.astype(np.float64)
        transform = tri_stn.Grid(to_grid(at, photo.shape, align_corners))
    else:
        matrix = homography(generator)
        if function == "warpAffine":
            matrix[2] = [0, 0, 1]
        rows = 2 if function == "warpAffine" else 3
        theirs = getattr(cv2, function)(image, matrix[:rows], SIZE[::-1], **options)
        x, y, divisor = np.linalg.inv(matrix) @ np.stack([*np.indices(SIZE)[::-1], np.ones(SIZE)]).reshape(3, -1)
        at = np.stack([y / divisor, x / divisor], -1).reshape(*SIZE, 2)
        looks = tri_stn.from_pixel_matrix(
            torch.from_numpy(matrix[:rows]), photo.shape, SIZE, align_corners=align_corners
        )
        transform = tri_stn.Affine(looks) if function == "warpAffine" else tri_stn.Projective(looks)
    ours = warp(photo, transform, SIZE, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
    steps = np.abs(np.diff(photo, axis=0)).max() + np.abs(np.diff(photo, axis=1)).max()
    error = np.abs(ours - theirs)
    if mode == "nearest":  # and there, not where a place in fp32 may round to either side
        error = error[(np.abs(at - np.floor(at) - 0.5) > 1e-4).all(-1)]
        assert error.size > 0.99 * ours.size
    print(f"largest difference {error.max():.2e}")
    # In fp32, places of some hundred pixels are off by a few 1e-5, which moves a value by so many of the largest steps.
    assert error.max() < steps * (1e-4 if exact else 1 / 32)


SCIPY = [
    ("grid-constant", "zeros", True),
    ("nearest", "border", False),
    ("mirror", "reflection", True),
    ("reflect", "reflection", False),
]


@pytest.mark.parametrize("order,mode", [(0, "nearest"), (1, "bilinear")])
@pytest.mark.parametrize("border,padding_mode,align_corners", SCIPY)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_scipy_map_coordinates(photo, generator, dims, border, padding_mode, align_corners, order, mode):
    """scipy rounds halves up, torch to even: random places hold none."""
    image = data(photo, dims)
    at = places(generator, image.shape, {1: (90,), 2: SIZE, 3: (6, 20, 25)}[dims])
    theirs = map_coordinates(image, np.moveaxis(at, -1, 0), order=order, mode=border)
    grid = tri_stn.Grid(to_grid(at, image.shape, align_corners))
    ours = warp(image, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)  # fp64, through places of some hundred pixels


@pytest.mark.parametrize("order,mode", [(0, "nearest"), (1, "bilinear")])
@pytest.mark.parametrize(
    "bound,padding_mode,align_corners",
    [
        ("zero", "zeros", False),
        ("replicate", "border", True),
        ("dct2", "reflection", False),
        ("dct1", "reflection", True),
    ],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torch_interpol_pull_and_push(photo, generator, dims, bound, padding_mode, align_corners, order, mode):
    """It pushes as `splat` does: both are the adjoint of reading."""
    interpol = pytest.importorskip("interpol")
    image = data(photo, dims)
    at = places(generator, image.shape, {1: (90,), 2: SIZE, 3: (6, 20, 25)}[dims])
    theirs_at, tensor = torch.from_numpy(at)[None], torch.from_numpy(image)[None, None]
    grid = tri_stn.Grid(to_grid(at, image.shape, align_corners))
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    pulled = interpol.grid_pull(tensor, theirs_at, order, bound, extrapolate=True)
    torch.testing.assert_close(tri_stn.warp(tensor, grid, **options), pulled, rtol=0, atol=1e-11)
    pushed = interpol.grid_push(pulled, theirs_at, list(image.shape), order, bound, extrapolate=True)
    # Sums of up to some hundred such terms, where reflection and border bring them to one pixel.
    torch.testing.assert_close(tri_stn.splat(pulled, grid, image.shape, **options), pushed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("function", ["homography_warp", "warp_perspective", "warp_affine"])
def test_kornia(photo, generator, function, padding_mode, mode):
    """homography_warp takes what Projective does, and makes its grid for align_corners=True, whatever it is given."""
    geometry = pytest.importorskip("kornia.geometry.transform")
    image = torch.from_numpy(photo)[None, None]
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": True}
    if function == "homography_warp":
        matrix = np.eye(3) + 0.2 * generator.uniform(-1, 1, (1, 3, 3))  # a divisor of 0.4 at least
        transform = tri_stn.Projective(torch.from_numpy(matrix))
        theirs = geometry.homography_warp(image, transform.matrix, SIZE, **options)
    else:
        rows = 2 if function == "warp_affine" else 3
        matrix = torch.from_numpy(homography(generator)[None, :rows])
        looks = tri_stn.from_pixel_matrix(matrix, photo.shape, SIZE, align_corners=True)
        transform = tri_stn.Affine(looks) if rows == 2 else tri_stn.Projective(looks)
        theirs = getattr(geometry, function)(image, matrix, SIZE, **options)
    ours = tri_stn.warp(image, transform, SIZE, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)  # fp64, through two inverses


def test_a_homography_and_its_inverse_bring_the_photograph_back(photo, generator):
    """Where both looked inside."""
    transform = tri_stn.Projective(torch.from_numpy(np.eye(3) + 0.1 * generator.standard_normal((1, 3, 3))))
    image = torch.from_numpy(photo)[None, None]
    back = tri_stn.warp(tri_stn.warp(image, transform), transform.inverse())
    seen = tri_stn.warp(torch.ones_like(image), transform.inverse()) > 0.999
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
