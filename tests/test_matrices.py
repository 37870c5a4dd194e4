"""Builders and converters of matrices: what they mean, and that they agree with the libraries they speak for.

The oracles are OpenCV, kornia, scipy, scikit-image and torchvision, on a photograph. All of it is in
fp64 where the oracle is, so a tolerance is the rounding of fp64 except where it says otherwise.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tri_stn

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = {1: ((7,), (5,)), 2: ((9, 14), (11, 6)), 3: ((5, 4, 7), (3, 6, 4))}
ALIGN_CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Pictures are too large for Triton's interpreter, and the kernels have tests of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def photo():
    """(107, 160) grey, fp64, in [0, 1]."""
    image = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    return np.ascontiguousarray(image[::4, ::4].mean(-1) / 255)


@pytest.fixture
def generator(request):
    seed = 3
    print(f"{request.node.name}: seed {seed}")
    return torch.Generator().manual_seed(seed)


def random(generator, *shape):
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1


def near_identity(generator, *shape, spread=0.3):
    return torch.eye(*shape[-2:], dtype=torch.float64) + spread * random(generator, *shape)


def read(image, theta, size=None, **options):
    """warp of an (H, W) picture, as numpy."""
    image = torch.as_tensor(image)[None, None]
    return tri_stn.warp(image, tri_stn.Affine(theta), size, **options)[0, 0].numpy()


def read_projective(image, matrix, size, **options):
    """The same for a matrix (1, 3, 3), by a grid."""
    identity = torch.eye(2, 3, dtype=torch.float64)[None]
    points = F.affine_grid(identity, (1, 1, *size), align_corners=options["align_corners"])
    points = F.pad(points, (0, 1), value=1.0) @ matrix[0].mT
    grid = tri_stn.Grid(points[..., :2] / points[..., 2:])
    return tri_stn.warp(torch.as_tensor(image)[None, None], grid, **options)[0, 0].numpy()


# --- what the builders mean ------------------------------------------------------------------------


MOVES = {
    "left_turn": (tri_stn.rotation, {"angle": 90, "degrees": True}, lambda x, y: (y, 4 - x)),
    "right_turn": (tri_stn.rotation, {"angle": -math.pi / 2}, lambda x, y: (4 - y, x)),
    "left_turn_about_a_pixel": (
        tri_stn.rotation,
        {"angle": math.pi / 2, "center": (1, 2)},
        lambda x, y: (y - 1, 3 - x),
    ),
    "mirror": (tri_stn.scaling, {"scale": (-1, 1)}, lambda x, y: (4 - x, y)),
    "mirror_about_a_pixel": (tri_stn.scaling, {"scale": (1, -1), "center": (0, 1)}, lambda x, y: (x, 2 - y)),
    "shift": (tri_stn.translation, {"shift": (2, -1)}, lambda x, y: (x + 2, y - 1)),
    "shear": (tri_stn.shear, {"shear": (1, 0)}, lambda x, y: (x + y - 2, y)),
    "shear_about_a_pixel": (tri_stn.shear, {"shear": (0, -1), "center": (1, 0)}, lambda x, y: (x, y - (x - 1))),
}


@ALIGN_CORNERS
@pytest.mark.parametrize("build,arguments,goes", MOVES.values(), ids=MOVES)
def test_content_goes_where_it_is_said_to(build, arguments, goes, align_corners):
    """Pixel by pixel: where the one at (x, y) of 5 × 5 goes, y pointing down."""
    image, expected = np.arange(1.0, 26).reshape(5, 5), np.zeros((5, 5))
    for y, x in np.ndindex(5, 5):
        new_x, new_y = goes(x, y)
        if 0 <= new_x < 5 and 0 <= new_y < 5:
            expected[new_y, new_x] = image[y, x]
    theta = build(**arguments, size=(5, 5), align_corners=align_corners)
    actual = read(image, theta, align_corners=align_corners)
    np.testing.assert_allclose(actual, expected, atol=1e-4)  # theta is fp32


@ALIGN_CORNERS
@pytest.mark.parametrize("center", [None, (3.0, 90.5)], ids=["middle", "center"])
def test_rotation_and_scaling_are_opencvs(center, align_corners):
    """`cv2.getRotationMatrix2D`, for an image that is not square; turning and scaling about a point commute."""
    cv2 = pytest.importorskip("cv2")
    size, angle, scale = (107, 160), 33.0, 0.7
    theirs = cv2.getRotationMatrix2D(center or (79.5, 53.0), angle, scale)
    options = {"size": size, "align_corners": align_corners}
    point = None if center is None else torch.tensor(center, dtype=torch.float64)
    turn = tri_stn.rotation(torch.tensor(angle, dtype=torch.float64), degrees=True, center=point, **options)
    zoom = tri_stn.scaling(torch.tensor(scale, dtype=torch.float64), center=point, **options)
    expected = tri_stn.from_pixel_matrix(torch.from_numpy(theirs), size, size, align_corners=align_corners)
    torch.testing.assert_close(tri_stn.compose(turn, zoom), expected, **EXACT)
    torch.testing.assert_close(tri_stn.compose(zoom, turn), expected, **EXACT)


@ALIGN_CORNERS
def test_shear_and_translation_are_pixel_matrices(align_corners, generator):
    size, (x, y), shift = (9, 14), 0.4 * random(generator, 2), 5 * random(generator, 2)
    forward = torch.eye(3, dtype=torch.float64)
    forward[0, 1], forward[1, 0] = x, y
    options = {"size": size, "align_corners": align_corners}
    parts = tri_stn.translation(shift, **options), tri_stn.shear((x, y), center=torch.zeros(2).double(), **options)
    forward[:2, 2] = shift  # sheared about pixel (0, 0), then moved
    expected = tri_stn.from_pixel_matrix(forward[:2], size, size, align_corners=align_corners)
    torch.testing.assert_close(tri_stn.compose(*parts), expected, **EXACT)


@pytest.mark.parametrize("angle", [30.0, -100.0])
def test_rotation_shows_what_skimage_shows(photo, angle):
    transform = pytest.importorskip("skimage.transform")
    theta = tri_stn.rotation(torch.tensor(angle, dtype=torch.float64), degrees=True, size=photo.shape)
    np.testing.assert_allclose(read(photo, theta), transform.rotate(photo, angle, order=1), **EXACT)


def test_rotation_of_a_volume_is_scipys(generator):
    """A right-handed turn of the content about an axis of any length, in isotropic voxels."""
    rotations = pytest.importorskip("scipy.spatial.transform")
    axis, angle, size = random(generator, 4, 3), 3 * random(generator, 4), (3, 5, 9)
    unit = axis / axis.norm(dim=-1, keepdim=True)
    forward = torch.from_numpy(rotations.Rotation.from_rotvec((unit * angle[:, None]).numpy()).as_matrix())
    middle = torch.tensor([4.0, 2, 1]).double()[:, None]
    forward = torch.cat([forward, middle - forward @ middle], -1)
    expected = tri_stn.from_pixel_matrix(forward, size, size)
    torch.testing.assert_close(tri_stn.rotation(angle, axis=axis, size=size), expected, **EXACT)
    flat = tri_stn.rotation(angle, axis=(0, 0, -1))
    torch.testing.assert_close(flat[:, :2, [0, 1, 3]], tri_stn.rotation(angle), **EXACT)


@ALIGN_CORNERS
@pytest.mark.parametrize("dims", SIZES)
def test_crop_box_looks_from_corner_to_corner(dims, align_corners, generator):
    low, high = random(generator, 2, dims), random(generator, 2, dims)
    theta = tri_stn.crop_box(torch.cat([low, high], -1))
    corner = torch.ones(dims, 1, dtype=torch.float64)
    for sign, ends in ((-1, low), (1, high)):
        torch.testing.assert_close((theta[..., :dims] @ (sign * corner) + theta[..., dims:]).squeeze(-1), ends, **EXACT)
    # The middle half of 8 pixels, by their edges; or from the third to the fifth of 9, by their centres.
    n = 9 if align_corners else 8
    line, middle = torch.arange(n).double().view(1, 1, n), slice(2, 7) if align_corners else slice(2, 6)
    shown = tri_stn.warp(
        line, tri_stn.Affine(tri_stn.crop_box((-0.5, 0.5))), (n // 2 + align_corners,), align_corners=align_corners
    )
    torch.testing.assert_close(shown, line[..., middle], **EXACT)


# --- composition and inverse -----------------------------------------------------------------------


def test_compose_reads_at_b_of_a():
    """Maps from pixels to pixels, so that reading twice loses nothing; and they do not commute."""
    image = torch.arange(49.0, dtype=torch.float64).view(1, 1, 7, 7)
    a = tri_stn.translation((2, 0), size=(7, 7))
    b = tri_stn.rotation(90, degrees=True)
    c = tri_stn.scaling((-1, 1))
    assert (tri_stn.compose(a, b) - tri_stn.compose(b, a)).abs().max() > 0.5
    for maps in ((a,), (a, b), (b, a), (a, b, c), (c, b, a), (b, a, c)):
        expected = image
        for theta in reversed(maps):
            expected = tri_stn.warp(expected, tri_stn.Affine(theta))
        output = tri_stn.warp(image, tri_stn.Affine(tri_stn.compose(*maps)))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)  # theta is fp32


@pytest.mark.parametrize("dims", SIZES)
def test_compose_mixes_affine_and_projective(dims, generator):
    affine, projective = random(generator, 2, dims, dims + 1), random(generator, 2, 1, dims + 1, dims + 1)
    last = torch.eye(dims + 1).double()[-1:].expand(2, 1, -1)
    square = torch.cat([affine, last], -2)
    torch.testing.assert_close(tri_stn.compose(affine, projective), projective @ square[:, None], **EXACT)
    torch.testing.assert_close(tri_stn.compose(projective, affine), square[:, None] @ projective, **EXACT)
    assert tri_stn.compose(affine, affine).shape == affine.shape


def test_compose_matches_batches_from_the_left(generator):
    """(2,) with (2, 3): the maps of an image, with that image's."""
    one, many = random(generator, 2, 2, 3), random(generator, 2, 3, 2, 3)
    output = tri_stn.compose(one, many)
    for n in range(2):
        for k in range(3):
            torch.testing.assert_close(output[n, k], tri_stn.compose(one[n], many[n, k]), **EXACT)


@pytest.mark.parametrize("extra", [0, 1], ids=["affine", "projective"])
@pytest.mark.parametrize("dims", SIZES)
def test_invert(dims, extra, generator):
    matrix = random(generator, 3, 2, dims + extra, dims + 1)
    identity = torch.eye(dims + extra, dims + 1).double().expand_as(matrix)
    torch.testing.assert_close(tri_stn.compose(matrix, tri_stn.invert(matrix)), identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(tri_stn.invert(tri_stn.invert(matrix)), matrix, rtol=1e-7, atol=1e-8)
    singular = torch.cat([matrix[:1], torch.zeros_like(matrix[:1])])
    inverse = tri_stn.invert(singular)
    assert inverse[0].isfinite().all() and not inverse[1][..., 0].isfinite().any()


# --- pixel matrices --------------------------------------------------------------------------------


@ALIGN_CORNERS
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("extra", [0, 1], ids=["affine", "projective"])
@pytest.mark.parametrize("dims", SIZES)
def test_pixel_matrices_go_round(dims, extra, inverse, align_corners, generator):
    input_size, output_size = SIZES[dims]
    matrix = near_identity(generator, 3, 2, dims + extra, dims + 1)
    options = {"inverse": inverse, "align_corners": align_corners}
    theta = tri_stn.from_pixel_matrix(matrix, input_size, output_size, **options)
    back = tri_stn.to_pixel_matrix(theta, input_size, output_size, **options)
    torch.testing.assert_close(back, matrix, rtol=1e-8, atol=1e-8)
    assert theta.shape == matrix.shape and (theta - matrix).abs().max() > 0.1
    eye = torch.eye(dims + extra, dims + 1).double()
    same = tri_stn.from_pixel_matrix(eye, input_size, input_size, **options)
    assert torch.equal(same, eye[None])  # to the last bit


@ALIGN_CORNERS
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("extra", [0, 1], ids=["affine", "projective"])
@pytest.mark.parametrize(
    "sizes", [*SIZES.values(), ((1, 6), (4, 1)), ((1, 1), (1, 1)), ((3, 1, 2), (1, 4, 1))], ids=str
)
def test_coordinates_are_those_of_the_pixel_matrix(sizes, extra, inverse, align_corners, generator):
    """Every output pixel looks where the matrix says, by numpy; grid_sample's way from normalised to pixels."""
    input_size, output_size = sizes
    dims = len(input_size)
    matrix = near_identity(generator, dims + 1, dims + 1, spread=0.1)
    matrix[dims] = torch.eye(dims + 1)[dims] + (0.02 * random(generator, dims + 1) if extra else 0)
    options = {"inverse": inverse, "align_corners": align_corners}
    theta = tri_stn.from_pixel_matrix(matrix[: dims + extra], input_size, output_size, **options)[0]

    looks = matrix.numpy() if inverse else np.linalg.inv(matrix.numpy())
    pixels = np.stack([*np.meshgrid(*map(np.arange, output_size), indexing="ij")][::-1], -1).reshape(-1, dims)
    expected = np.concatenate([pixels, np.ones((len(pixels), 1))], -1) @ looks.T
    expected = expected[:, :dims] / expected[:, dims:]

    n = np.array(output_size[::-1])
    normalized = (2 * pixels / np.maximum(n - 1, 1) - (n > 1)) if align_corners else (2 * pixels + 1) / n - 1
    points = np.concatenate([normalized, np.ones((len(pixels), 1))], -1) @ theta.numpy().T
    points = points[:, :dims] / points[:, dims:] if extra else points
    n = np.array(input_size[::-1])
    actual = (points + 1) / 2 * (n - 1) if align_corners else ((points + 1) * n - 1) / 2
    told = np.full(dims, True) if not align_corners else n > 1  # an axis of one pixel is read at that pixel
    np.testing.assert_allclose(actual[:, told], expected[:, told], **EXACT)
    assert theta.isfinite().all()


MATRIX = np.array([[0.83, -0.42, 31.7], [0.35, 1.12, -14.3]])
"""Input pixels to output pixels, x first: turned, sheared and moved; parts of the output look outside."""
HOMOGRAPHY = np.array([[0.83, -0.42, 31.7], [0.35, 1.12, -14.3], [0.0011, -0.0007, 1.05]])


def from_numpy(matrix, photo, size, **options):
    return tri_stn.from_pixel_matrix(torch.from_numpy(matrix), photo.shape, size, **options)


@ALIGN_CORNERS
@pytest.mark.parametrize("projective", [False, True], ids=["affine", "perspective"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_opencv(photo, inverse, projective, align_corners):
    """OpenCV 5 computes in fp32. Before it, coordinates were rounded to 1/32 pixel for tables of weights."""
    cv2 = pytest.importorskip("cv2")
    size, flags = (90, 130), cv2.INTER_LINEAR | (cv2.WARP_INVERSE_MAP if inverse else 0)
    border = {"flags": flags, "borderMode": cv2.BORDER_REPLICATE}
    options = {"align_corners": align_corners, "padding_mode": "border"}
    matrix = HOMOGRAPHY if projective else MATRIX
    theta = from_numpy(matrix, photo, size, inverse=inverse, align_corners=align_corners)
    if projective:
        expected = cv2.warpPerspective(photo.astype(np.float32), matrix, size[::-1], **border)
        actual = read_projective(photo, theta, size, **options)
    else:
        expected = cv2.warpAffine(photo.astype(np.float32), matrix, size[::-1], **border)
        actual = read(photo, theta, size, **options)
    error = np.abs(actual - expected)
    steps = np.abs(np.diff(photo, axis=0)).max() + np.abs(np.diff(photo, axis=1)).max()
    # Places in fp32 are off by up to 1e-5 of a pixel; half a pixel off would be 3e-2 on average.
    largest, mean = (steps * 1e-4, 2e-6) if int(cv2.__version__.split(".")[0]) >= 5 else (steps / 32, 1.5e-3)
    print(f"largest difference {error.max():.2e}, allowed {largest:.2e}; mean {error.mean():.2e}, allowed {mean:.2e}")
    assert error.max() <= largest and error.mean() <= mean


@ALIGN_CORNERS
@pytest.mark.parametrize("projective", [False, True], ids=["affine", "perspective"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_kornia(photo, padding_mode, projective, align_corners):
    geometry = pytest.importorskip("kornia.geometry.transform")
    size, options = (90, 130), {"padding_mode": padding_mode, "align_corners": align_corners}
    matrix = HOMOGRAPHY if projective else MATRIX
    theirs = geometry.warp_perspective if projective else geometry.warp_affine
    image = torch.from_numpy(photo)[None, None]
    expected = theirs(image, torch.from_numpy(matrix)[None], size, **options)[0, 0].numpy()
    theta = from_numpy(matrix, photo, size, align_corners=align_corners)
    actual = (read_projective if projective else read)(photo, theta, size, **options)
    print(f"largest difference {np.abs(actual - expected).max():.2e}")
    np.testing.assert_allclose(actual, expected, **EXACT)


SCIPY_MODES = [
    ("grid-constant", "zeros", False),
    ("grid-constant", "zeros", True),
    ("nearest", "border", False),
    ("nearest", "border", True),
    ("reflect", "reflection", False),
    ("mirror", "reflection", True),
]


@pytest.mark.parametrize("mode,padding_mode,align_corners", SCIPY_MODES)
@pytest.mark.parametrize("dims", SIZES)
def test_scipy(photo, dims, mode, padding_mode, align_corners):
    """`affine_transform`, whose matrix sends output to input with the axes the other way around."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = {1: photo[50], 2: photo, 3: photo[:105].reshape(15, 7, 160)[:, :, ::4]}[dims]
    size = {1: (130,), 2: (90, 130), 3: (12, 9, 35)}[dims]
    matrix = np.eye(dims, dims + 1) + 0.3 * np.sin(np.arange(dims * (dims + 1.0))).reshape(dims, dims + 1)
    theta = tri_stn.from_pixel_matrix(
        torch.from_numpy(matrix), image.shape, size, inverse=True, align_corners=align_corners
    )
    image_tensor, options = torch.from_numpy(image.copy())[None, None], {"align_corners": align_corners}
    actual = tri_stn.warp(image_tensor, tri_stn.Affine(theta), size, padding_mode=padding_mode, **options)[0, 0]
    linear, offset = matrix[::-1, dims - 1 :: -1] if dims > 1 else matrix[:, :1], matrix[::-1, dims]
    expected = ndimage.affine_transform(image, linear, offset, output_shape=size, order=1, mode=mode)
    print(f"largest difference {np.abs(actual.numpy() - expected).max():.2e}")
    np.testing.assert_allclose(actual.numpy(), expected, **EXACT)


@ALIGN_CORNERS
@pytest.mark.parametrize("projective", [False, True], ids=["affine", "perspective"])
@pytest.mark.parametrize("mode,padding_mode", [("constant", "zeros"), ("edge", "border")])
def test_skimage(photo, mode, padding_mode, projective, align_corners):
    """`warp`, whose inverse_map sends output to input; and `warp` of a transform's inverse."""
    transform = pytest.importorskip("skimage.transform")
    size, options = (90, 130), {"padding_mode": padding_mode, "align_corners": align_corners}
    matrix = HOMOGRAPHY if projective else np.vstack([MATRIX, [0, 0, 1]])
    rows = 3 if projective else 2
    for inverse, map in ((True, matrix), (False, transform.ProjectiveTransform(matrix).inverse)):
        expected = transform.warp(photo, map, output_shape=size, order=1, mode=mode)
        theta = from_numpy(matrix[:rows], photo, size, inverse=inverse, align_corners=align_corners)
        actual = (read_projective if projective else read)(photo, theta, size, **options)
        print(f"largest difference {np.abs(actual - expected).max():.2e}")
        np.testing.assert_allclose(actual, expected, **EXACT)


# --- boxes -----------------------------------------------------------------------------------------

BOXES = torch.tensor([[[0.0, 0, 160, 107], [3.3, 7.1, 80.6, 99.9], [100, 20.5, 131, 21]],
                      [[10, 10, 13, 14], [150.2, 90, 160, 107], [0, 0, 1, 1]]]).double()  # fmt: skip


def pooled(images, theta, size, ratio, **options):
    """The recipe in the docstring of `boxes`."""
    size = tuple(n * ratio for n in size)
    output = tri_stn.warp(images, tri_stn.Affine(theta), size, padding_mode="border", **options)
    return F.avg_pool2d(output.flatten(0, 1), ratio)


@ALIGN_CORNERS
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("oracle", ["torchvision", "scipy"])
def test_boxes_are_roi_align(photo, oracle, ratio, aligned, align_corners):
    images, size = torch.from_numpy(np.stack([photo, photo[::-1]]))[:, None], (7, 5)
    fine = tuple(n * ratio for n in size)
    theta = tri_stn.boxes(BOXES, photo.shape, fine, aligned=aligned, align_corners=align_corners)
    actual = pooled(images, theta, size, ratio, align_corners=align_corners)
    if oracle == "torchvision":
        expected = roi_align(images, BOXES, size, ratio, aligned)
    else:
        expected = roi_align_by_definition(images, BOXES, size, ratio, aligned)
    print(f"largest difference {(actual - expected).abs().max():.2e}")
    torch.testing.assert_close(actual, expected, **EXACT)


def roi_align(images, boxes, size, ratio, aligned):
    try:
        from torchvision.ops import roi_align
    except (ImportError, RuntimeError) as error:  # a wheel for another torch fails while it registers operators
        pytest.skip(f"needs a torchvision that fits this torch: {error}")
    return roi_align(images, list(boxes), size, sampling_ratio=ratio, aligned=aligned)


def roi_align_by_definition(images, boxes, size, ratio, aligned):
    """Mask R-CNN's section 3: regularly spaced points in each bin, read bilinearly and averaged."""
    ndimage = pytest.importorskip("scipy.ndimage")
    outputs = []
    for image, (x1, y1, x2, y2) in zip(images.repeat_interleave(boxes.shape[1], 0), boxes.flatten(0, 1), strict=True):
        places = []
        for low, high, n in ((y1, y2, size[0]), (x1, x2, size[1])):
            length = (high - low if aligned else max(high - low, torch.ones_like(low))) / n / ratio
            places.append((low - 0.5 * aligned + (torch.arange(n * ratio).double() + 0.5) * length).numpy())
        points = ndimage.map_coordinates(image[0].numpy(), np.meshgrid(*places, indexing="ij"), order=1, mode="nearest")
        outputs.append(points.reshape(size[0], ratio, size[1], ratio).mean((1, 3)))
    return torch.from_numpy(np.stack(outputs))[:, None]


@ALIGN_CORNERS
@pytest.mark.parametrize("dims", SIZES)
def test_a_box_of_whole_pixels_is_a_slice(dims, align_corners):
    image = torch.arange(120.0, dtype=torch.float64).view(1, 1, *{1: (120,), 2: (10, 12), 3: (4, 5, 6)}[dims])
    low, high = (1, 2, 1)[:dims], (4, 3, 3)[:dims]  # x first
    size = tuple(b - a for a, b in zip(low, high, strict=True))[::-1]
    box = torch.tensor([[*low, *high]]).double()
    theta = tri_stn.boxes(box, image.shape[2:], size, align_corners=align_corners)
    output = tri_stn.warp(image, tri_stn.Affine(theta), size, align_corners=align_corners)
    window = tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))
    torch.testing.assert_close(output, image[(..., *window)], **EXACT)


# --- as tensors: derivatives, dtypes, devices, batches, errors -------------------------------------

CALLS = {
    "rotation": (lambda a, c: tri_stn.rotation(a, center=c, size=(5, 9)), ((2,), (2, 2))),
    "rotation_3d": (lambda a, v, c: tri_stn.rotation(a, axis=v, center=c, degrees=True), ((2,), (1, 3), (2, 4, 3))),
    "scaling": (lambda s, c: tri_stn.scaling(s, center=c, size=(5, 9)), ((2,), (2, 3, 2))),
    "scaling_axes": (lambda s: tri_stn.scaling(s, size=(4, 5, 9), align_corners=True), ((2, 3),)),
    "translation": (lambda s: tri_stn.translation(s, size=(5, 9)), ((2, 2),)),
    "shear": (lambda s, c: tri_stn.shear(s, center=c), ((2, 3, 2), (1, 2))),
    "crop_box": (tri_stn.crop_box, ((2, 6),)),
    "boxes": (lambda b: tri_stn.boxes(b, (5, 9), (3, 4), align_corners=True), ((2, 3, 4),)),
    "compose": (tri_stn.compose, ((2, 2, 3), (2, 4, 2, 3), (1, 3, 3))),
    "invert": (tri_stn.invert, ((2, 3, 4),)),
    "invert_projective": (tri_stn.invert, ((2, 3, 3),)),
    "from_pixel": (lambda m: tri_stn.from_pixel_matrix(m, (5, 9), (3, 4)), ((2, 2, 3),)),
    "from_pixel_projective": (lambda m: tri_stn.from_pixel_matrix(m, (5, 9), (3, 4), inverse=True), ((2, 3, 3),)),
    "to_pixel": (lambda m: tri_stn.to_pixel_matrix(m, (5, 9), (3, 4)), ((2, 3, 3),)),
}
"""Each function and the shapes of its arguments, with a batch of 2, or 1 for all."""
EACH = pytest.mark.parametrize("name", CALLS)


def call_and_arguments(name, generator):
    """Arguments away from what is singular: matrices near the identity, numbers between 0.3 and 0.9."""
    call, shapes = CALLS[name]
    if name.startswith(("compose", "invert", "from", "to")):
        return call, [near_identity(generator, *shape, spread=0.2) for shape in shapes]
    return call, [0.6 + 0.3 * random(generator, *shape) for shape in shapes]


@EACH
def test_gradients(name, generator):
    call, inputs = call_and_arguments(name, generator)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_computing_is_wide(name, dtype, generator):
    """One rounding at the end, under autocast too."""
    call, inputs = call_and_arguments(name, generator)
    inputs = [tensor.to(dtype) for tensor in inputs]
    truth = call(*(tensor.double() for tensor in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        output = call(*inputs)
    assert output.dtype == dtype
    computed = 1e-12 if dtype == torch.float64 else 3e-5
    format = torch.finfo(dtype)
    rounded = format.eps / 2 * truth.abs().clamp(min=format.smallest_normal)
    allowed = 1.01 * rounded + computed * truth.abs().max()
    assert ((output.double() - truth).abs() <= allowed).all()


@EACH
def test_nothing_looks_at_values(name, generator):
    """A meta tensor has none: a branch on one, or .item(), would raise. And one graph under torch.compile."""
    call, inputs = call_and_arguments(name, generator)
    output = call(*inputs)
    on_meta = call(*(tensor.to("meta") for tensor in inputs))
    assert on_meta.device.type == "meta" and on_meta.shape == output.shape and on_meta.dtype == output.dtype
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), output, **EXACT)
    with torch.device("meta"):  # nor at the default device
        torch.testing.assert_close(call(*inputs), output, **EXACT)


@pytest.mark.gpu
@EACH
def test_never_waits_for_the_device(name, generator):
    call, inputs = call_and_arguments(name, generator)
    expected = call(*inputs)
    inputs = [tensor.cuda() for tensor in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output.cpu(), expected, **EXACT)


@EACH
def test_one_by_one(name, generator):
    """A batch gives what its members give, and what has a batch of one serves all of them."""
    call, inputs = call_and_arguments(name, generator)
    output = call(*inputs)
    assert output.shape[0] == 2
    for n in range(2):
        members = [tensor if len(tensor) == 1 else tensor[n : n + 1] for tensor in inputs]
        torch.testing.assert_close(call(*members)[0], output[n], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_give_the_default_dtype(dtype):
    """And are computed with in fp64, whatever it is; with a tensor, its dtype counts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        theta = tri_stn.rotation(30, degrees=True, center=(1, 2.5), size=(5, 9))
    finally:
        torch.set_default_dtype(before)
    truth = tri_stn.rotation(torch.tensor(30.0, dtype=torch.float64), degrees=True, center=(1, 2.5), size=(5, 9))
    assert theta.dtype == dtype and theta.shape == truth.shape == (1, 2, 3)
    assert torch.equal(theta, truth.to(dtype))
    assert tri_stn.translation((torch.ones(4).double(), 0.5)).dtype == torch.float64


def test_numbers_and_sizes_compile_to_one_graph():
    """Sizes that are symbols, and numbers that no tensor gives a device."""

    def run(image):
        size = image.shape[2:]
        theta = tri_stn.compose(tri_stn.rotation(30, degrees=True, size=size), tri_stn.scaling(0.5, size=size))
        return tri_stn.warp(image, tri_stn.Affine(theta))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for height in (7, 8, 12):
        image = torch.rand(1, 1, height, 9, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(compiled(image), run(image))


EYE = torch.eye(2, 3)[None]


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: tri_stn.rotation("30"), TypeError, "angle must be a number"),
        (lambda: tri_stn.rotation(torch.tensor(30)), TypeError, "floating-point"),
        (lambda: tri_stn.rotation(torch.zeros(1, 1, 1)), ValueError, r"got shape \(1, 1, 1\)"),
        (lambda: tri_stn.rotation(0.1, size=(2, 3, 4)), ValueError, "needs its axis"),
        (lambda: tri_stn.rotation(0.1, center=(1, 2, 3)), ValueError, "center must have 2 numbers; got 3"),
        (lambda: tri_stn.rotation(0.1, axis=(0, 1)), ValueError, "axis must have 3 numbers"),
        (lambda: tri_stn.rotation(0.1, size=(2, 0)), ValueError, "at least one pixel"),
        (lambda: tri_stn.rotation(0.1, size=(2.0, 3)), TypeError, "2 integers"),
        (lambda: tri_stn.rotation(0.1, size=(2, 3), align_corners=None), TypeError, "True or False"),
        (lambda: tri_stn.rotation(torch.zeros(2), center=torch.zeros(3, 2)), ValueError, "same batch size"),
        (lambda: tri_stn.rotation(torch.zeros(2), center=torch.zeros(2, device="meta")), ValueError, "one device"),
        (lambda: tri_stn.scaling((1, 2), size=(2, 3, 4)), ValueError, r"\(H, W\)"),
        (lambda: tri_stn.translation(0.5), TypeError, "sequence of numbers"),
        (lambda: tri_stn.rotation(0.1, size=5), TypeError, "size must be a sequence"),
        (lambda: tri_stn.boxes(torch.zeros(2, 4), 5, (3, 4)), TypeError, "input_size must be a sequence"),
        (lambda: tri_stn.translation((1, None)), TypeError, r"shift\[1\]"),
        (lambda: tri_stn.crop_box((0, 0, 1)), ValueError, "2 or 4 or 6"),
        (lambda: tri_stn.boxes(torch.zeros(4), (5, 9), (3, 4)), ValueError, r"\(N, 4\) or \(N, K, 4\)"),
        (lambda: tri_stn.boxes(torch.zeros(2, 5), (5, 9), (3, 4)), ValueError, r"got \(2, 5\)"),
        (lambda: tri_stn.boxes(torch.zeros(2, 4), (5, 9), (3,)), ValueError, "output_size"),
        (lambda: tri_stn.compose(), ValueError, "got none"),
        (lambda: tri_stn.compose(EYE, torch.eye(4)), ValueError, "of one dimension"),
        (lambda: tri_stn.compose(EYE.expand(2, 2, 3), EYE.expand(3, 2, 3)), ValueError, "same batch size"),
        (lambda: tri_stn.invert(np.eye(3)), TypeError, "torch.Tensor"),
        (lambda: tri_stn.invert(torch.zeros(3, 2)), ValueError, r"got shape \(3, 2\)"),
        (lambda: tri_stn.from_pixel_matrix(EYE, (5, 9, 1), (3, 4)), ValueError, "input_size"),
        (lambda: tri_stn.to_pixel_matrix(EYE, (5, 9), (3, -4)), ValueError, "output_size"),
    ],
)
def test_errors_say_what_would_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
