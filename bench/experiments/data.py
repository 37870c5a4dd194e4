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
            Images(_idx(mnist, f"{part}-images-idx3-ubyte").unsqueeze(1).float() / 255, _idx(mnist, f"{part}-labels-idx1-ubyte").long())
            for part in ("train", "t10k")
        ]  # fmt: skip
        for part in parts:
            if part.pixels.shape[1:] != (1, SIDE, SIDE) or len(part.pixels) != len(part.labels):
                raise ValueError(
                    f"{mnist} must hold images of {SIDE} × {SIDE} pixels and a label for each; got "
                    f"{tuple(part.pixels.shape)} and {len(part.labels)} labels."
                )
        train, test = parts
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


# --- distortions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distortion:
    """One of the paper's: how a digit is put on its canvas. The map is from the canvas to the image, as samplers take it."""

    title: str
    canvas: int
    """Pixels along a side."""
    draw: Callable[[int, torch.Generator, float], Transform]
    """(images, generator, amount from 0 to 1) → a transform for so many images."""

    def apply(self, images: Images, generator: torch.Generator, amount: float = 1.0) -> Images:
        """Each image distorted in its own way."""
        transform = self.draw(len(images), generator, amount)
        given = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
        moved = {name: v.to(images.pixels.device) for name, v in given.items() if isinstance(v, Tensor)}
        transform = dataclasses.replace(transform, **moved)
        return Images(tri_stn.warp(images.pixels, transform, (self.canvas, self.canvas)), images.labels)


def similarity(
    n: int, generator: torch.Generator, degrees: float, scales: tuple[float, float], shift: float, zoom: float
) -> Tensor:
    """theta (N, 2, 3): rotated by up to so many degrees, scaled, and moved by up to so many canvas widths.

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
    return torch.cat([linear, -linear @ (shift * u[2:].T).unsqueeze(-1)], -1)


def _rotation(n: int, generator: torch.Generator, amount: float) -> Transform:
    return tri_stn.Affine(similarity(n, generator, 90 * amount, (1, 1), 0, 1))


def _similarity(n: int, generator: torch.Generator, amount: float) -> Transform:
    scales = 0.7**amount, 1.2**amount
    return tri_stn.Affine(similarity(n, generator, 45 * amount, scales, amount * 7 / 21, 42 / 28))


CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _projective(n: int, generator: torch.Generator, amount: float) -> Transform:
    """The canvas' corners look at places up to 0.4 of a half-width from the image's, along each axis."""
    moved = CORNERS + 0.4 * amount * (2 * torch.rand(n, 4, 2, generator=generator) - 1)
    return tri_stn.Projective(homography(CORNERS.expand(n, 4, 2), moved))


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


def _elastic(n: int, generator: torch.Generator, amount: float) -> Transform:
    """A thin-plate spline through 4 × 4 points, each moved at random."""
    moved = KNOTS + 0.15 * amount * torch.randn(n, len(KNOTS), 2, generator=generator)
    return tri_stn.ThinPlateSpline(KNOTS, moved)


DISTORTIONS = {
    "R": Distortion("rotation, ±90°", SIDE, _rotation),
    "RTS": Distortion("rotation ±45°, scale 0.7 to 1.2, shift", 42, _similarity),
    "P": Distortion("projective", SIDE, _projective),
    "E": Distortion("elastic", SIDE, _elastic),
}


def fixed_scenes(images: Images, distortion: Distortion, copies: int, seed: int) -> Images:
    """Held-out images, each under so many distortions that are always the same."""
    return distortion.apply(images.repeat(copies), torch.Generator().manual_seed(seed))


def epoch_batch(n: int, step: int, size: int, seed: int) -> Tensor:
    """Which of n images are in a step's batch: every epoch, each image once, in an order of its own."""
    per_epoch = math.ceil(n / size)
    epoch, part = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[part * size : (part + 1) * size]
