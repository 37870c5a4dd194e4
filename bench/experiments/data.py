"""Handwritten digits, and the paper's ways to distort them.

MNIST from its idx files where a folder is given, else scikit-learn's 1,797 scanned digits, brought to MNIST's
form: 20 × 20 pixels in the middle of 28 × 28.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tri_stn
from tri_stn.transforms import Transform

SIDE = 28
"""Pixels along a side of an undistorted image."""
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) in [0, 1] and their labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def repeat(self, copies: int) -> Images:
        return Images(self.pixels.repeat(copies, 1, 1, 1), self.labels.repeat(copies))


@dataclass(frozen=True)
class Digits:
    """The three parts, in which no digit is twice."""

    name: str
    train: Images
    validation: Images
    test: Images


def load_digits(mnist: Path | None = None) -> Digits:
    """MNIST from a folder of idx files, or scikit-learn's digits: always in the same three parts.

    Raises:
        FileNotFoundError, ValueError: the folder lacks a file, or one is not what its name says.
    """
    if mnist is not None:
        parts = [
            Images(_idx(mnist, f"{part}-images-idx3-ubyte"), _idx(mnist, f"{part}-labels-idx1-ubyte").long())
            for part in ("train", "t10k")
        ]
        for part in parts:
            if part.pixels.shape[1:] != (SIDE, SIDE) or len(part.pixels) != len(part.labels):
                raise ValueError(
                    f"{mnist} must hold images of {SIDE} × {SIDE} pixels and a label for each; got "
                    f"{tuple(part.pixels.shape)} and {len(part.labels)} labels."
                )
        train, test = (Images(part.pixels.unsqueeze(1).float() / 255, part.labels) for part in parts)
        held = max(1, len(train) // 12)  # 5,000 of 60,000
        order = _shuffled(len(train))
        return Digits("MNIST", train[order[held:]], train[order[:held]], test)
    from sklearn.datasets import load_digits as load

    data = load()
    labels = torch.from_numpy(data.target).long()
    small = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    large = F.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False)
    strokes = torch.sigmoid(12 * (large - 0.45))  # contrast: edges sharp again, and the ground …
    pixels = F.pad((strokes - math.exp(-12 * 0.45)).clamp(0, 1), (4, 4, 4, 4))  # … as black as beyond the digit
    digits, order = Images(pixels, labels), _shuffled(len(labels))
    test, validation, train = order.split([400, 240, len(labels) - 640])
    return Digits("scikit-learn's digits", digits[train], digits[validation], digits[test])


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))


def _idx(folder: Path, name: str) -> Tensor:
    """An array of bytes from an idx file, plain or gzipped."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"There is no {name} or {name}.gz in {folder}; these are MNIST's own file names.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dims}I", content, 4)
    except (gzip.BadGzipFile, EOFError, struct.error) as error:
        raise ValueError(f"{path} is not a whole idx file: {error}.") from error
    start = 4 + 4 * dims
    if (zero, kind) != (0, 8) or len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is not an idx file of bytes, or it is cut short.")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


# --- scenes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What an experiment makes of digits."""

    title: str
    canvas: int
    """Pixels along a side."""
    make: Callable[[Images, torch.Generator, float], Images]
    """(digits, generator, difficulty from 0 to 1) → scenes (N, channels, canvas, canvas) and labels, as many."""
    channels: int = 1
    classes: int = 10


def distorted(images: Images, transform: Transform, canvas: int) -> Images:
    """Each image read through its own map, which is the sampler's: from the canvas to the image."""
    given = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    moved = {name: v.to(images.pixels.device) for name, v in given.items() if isinstance(v, Tensor)}
    transform = dataclasses.replace(transform, **moved)
    return Images(tri_stn.warp(images.pixels, transform, (canvas, canvas)), images.labels)


def similarity(
    n: int, generator: torch.Generator, degrees: float, scales: tuple[float, float], shift: float, zoom: float
) -> tri_stn.Affine:
    """Rotated by up to so many degrees, scaled, and moved.

    Args:
        n: how many.
        generator: where chance comes from.
        degrees: either way.
        scales: smallest and largest factor.
        shift: either way along each axis, in the canvas' half-widths.
        zoom: the canvas' width in widths of the image.
    """
    u = 2 * torch.rand(4, n, generator=generator) - 1
    angle = u[0] * math.radians(degrees)
    scale = scales[0] + (scales[1] - scales[0]) * (u[1] + 1) / 2
    cos, sin = angle.cos(), angle.sin()
    # The sampler asks where each canvas point looks in the image: undo the shift, the rotation, the scale.
    linear = torch.stack([cos, sin, -sin, cos], -1).view(n, 2, 2) * (zoom / scale)[:, None, None]
    return tri_stn.Affine(torch.cat([linear, -linear @ (shift * u[2:].T).unsqueeze(-1)], -1))


def _rotated(images: Images, generator: torch.Generator, amount: float) -> Images:
    return distorted(images, similarity(len(images), generator, 90 * amount, (1, 1), 0, 1), SIDE)


def _moved(images: Images, generator: torch.Generator, amount: float) -> Images:
    scales = 0.7**amount, 1.2**amount
    return distorted(images, similarity(len(images), generator, 45 * amount, scales, amount / 3, 42 / SIDE), 42)


CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _projected(images: Images, generator: torch.Generator, amount: float) -> Images:
    """The canvas' corners look at places up to 0.4 of a half-width from the image's, along each axis."""
    n = len(images)
    moved = CORNERS + 0.4 * amount * (2 * torch.rand(n, 4, 2, generator=generator) - 1)
    return distorted(images, tri_stn.Projective(homography(CORNERS.expand(n, 4, 2), moved)), SIDE)


def homography(targets: Tensor, sources: Tensor) -> Tensor:
    """(N, 3, 3) that take four points (N, 4, 2) to four others."""
    one, zero = torch.ones_like(targets[..., :1]), torch.zeros_like(targets)
    plane = torch.cat([targets, one], -1)  # (N, 4, 3)
    x, y = sources[..., :1], sources[..., 1:]
    rows_x = torch.cat([plane, zero, zero[..., :1], -x * targets], -1)
    rows_y = torch.cat([zero, zero[..., :1], plane, -y * targets], -1)
    system, wanted = torch.cat([rows_x, rows_y], 1).double(), torch.cat([x, y], 1).double()
    found = torch.linalg.solve(system, wanted).squeeze(-1)
    return torch.cat([found, torch.ones_like(found[:, :1])], 1).view(-1, 3, 3).to(targets.dtype)


KNOTS = torch.cartesian_prod(*[torch.linspace(-1, 1, 4)] * 2).flip(-1).contiguous()


def _bent(images: Images, generator: torch.Generator, amount: float) -> Images:
    """A thin-plate spline through 4 × 4 points, each moved at random."""
    moved = KNOTS + 0.15 * amount * torch.randn(len(images), len(KNOTS), 2, generator=generator)
    return distorted(images, tri_stn.ThinPlateSpline(KNOTS, moved), SIDE)


DISTORTIONS = {
    "R": Scene("rotation, ±90°", SIDE, _rotated),
    "RTS": Scene("rotation ±45°, scale 0.7 to 1.2, shift", 42, _moved),
    "P": Scene("projective", SIDE, _projected),
    "E": Scene("elastic", SIDE, _bent),
}


def _pairs(images: Images, generator: torch.Generator, amount: float) -> Images:
    """Two digits in two channels, each turned, scaled and moved in its own way; the label is their sum."""
    other = images[torch.randperm(len(images), generator=generator).to(images.labels.device)]
    one, two = (_moved(part, generator, amount) for part in (images, other))
    return Images(torch.cat([one.pixels, two.pixels], 1), one.labels + two.labels)


ADDITION = Scene("two digits, each with a rotation of ±45°, scale 0.7 to 1.2 and shift", 42, _pairs, 2, 19)

FRAGMENTS, FRAGMENT = 12, 6
"""Pieces of other digits in a cluttered scene, and the pixels along a side of one."""


def _cluttered(images: Images, generator: torch.Generator, amount: float) -> Images:
    """A digit somewhere on a canvas of 60 × 60, among pieces of other digits."""
    n, canvas, device = len(images), 60, images.pixels.device
    shift = amount * (1 - 20 / canvas)  # the digit itself, 20 pixels wide, stays inside
    scenes = distorted(images, similarity(n, generator, 0, (1, 1), shift, canvas / SIDE), canvas).pixels
    for _ in range(round(amount * FRAGMENTS)):
        other = images.pixels[torch.randint(n, (n,), generator=generator).to(device)]
        # A window of the other digit's middle, pasted somewhere: two maps, both with steps of whole pixels.
        start = torch.randint(4, SIDE - 4 - FRAGMENT, (n, 2), generator=generator)
        place = torch.randint(0, canvas - FRAGMENT, (n, 2), generator=generator)
        index = [a[:, :1] + torch.arange(FRAGMENT) for a in (start[:, :1], start[:, 1:], place[:, :1], place[:, 1:])]
        from_y, from_x, to_y, to_x = (i.to(device) for i in index)
        rows = torch.arange(n, device=device)[:, None, None]
        piece = other[rows, 0, from_y[:, :, None], from_x[:, None, :]]
        here = rows, 0, to_y[:, :, None], to_x[:, None, :]
        scenes[here] = torch.maximum(scenes[here], piece)
    return Images(scenes, images.labels)


CLUTTERED = Scene(f"a digit anywhere on 60 × 60 pixels, among {FRAGMENTS} pieces of others", 60, _cluttered)


def fixed_scenes(images: Images, scene: Scene, copies: int, seed: int) -> Images:
    """Held-out images in so many scenes each, which are always the same."""
    return scene.make(images.repeat(copies), torch.Generator().manual_seed(seed), 1.0)


def epoch_batch(n: int, step: int, size: int, seed: int) -> Tensor:
    """Which of n images are in a step's batch: every epoch, each image once, in an order of its own."""
    per_epoch = math.ceil(n / size)
    epoch, part = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[part * size : (part + 1) * size]
