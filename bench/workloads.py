"""What is measured: named workloads, as data, and the tensors that each of them stands for.

A workload says everything that decides the work: shapes, dtype, layout, maps per image, how the
maps are drawn, padding, which gradients are asked for, and the seed. Two runs of one workload do
the same work on any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 2e-3
"""Pixels around a discontinuity in which no provider is held to the truth: about ten times what
fp32 leaves of a coordinate on an axis of 1024 pixels."""


@dataclass(frozen=True)
class Maps:
    """How the affine maps of a workload are drawn: uniformly from these ranges, one per output.

    Each axis draws a scale and a translation of its own. A map of scale s looks at the share s of
    the image.
    """

    scale: tuple[float, float]
    angle: tuple[float, float] = (0.0, 0.0)
    """Degrees."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Normalised: 2 is the whole image."""

    def draw(self, count: int, seed: int) -> Tensor:
        """Theta, (count, 2, 3) in fp32 on the CPU: the same on every device."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * torch.rand(shape, generator=generator)

        scale, shift, angle = uniform(self.scale, count, 2), uniform(self.shift, count, 2), uniform(self.angle, count)
        cos, sin = (angle * math.pi / 180).cos(), (angle * math.pi / 180).sin()
        rotation = torch.stack([cos, -sin, sin, cos], -1).view(count, 2, 2)
        return torch.cat([rotation * scale[:, None], shift[..., None]], -1)


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    """Images."""
    channels: int
    input_size: tuple[int, int]
    size: tuple[int, int]
    transform: Maps
    maps: int = 1
    """Maps per image."""
    gradients: tuple[str, ...] = ("input", "theta")
    """What a training step needs: an image that is data takes none, nor does a map drawn at random."""
    dtype: str = "float32"
    layout: str = "contiguous"
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    seed: int = 0
    variant: str = "full"
    """"small" marks a scaled-down stand-in, never to be compared with the full one."""

    def __str__(self) -> str:
        parts = [self.name, self.dtype, self.layout]
        return "-".join(parts if self.variant == "full" else [*parts, self.variant])

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.gradients else DIRECTIONS[:1]

    @property
    def lead(self) -> tuple[int, ...]:
        """The batch shape of theta and of the output: (N,), (N, K), or (K,) maps of one image."""
        return (self.batch, self.maps) if self.maps > 1 and self.batch > 1 else (self.batch * self.maps,)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def small(self) -> Workload:
        """A stand-in that a CPU finishes in a moment: the same kind of work, much less of it."""
        shrink = max(1, round(max(*self.input_size, *self.size) / 64))
        return replace(
            self,
            batch=min(self.batch, 2),
            channels=min(self.channels, 16),
            maps=min(self.maps, 16),
            input_size=(self.input_size[0] // shrink, self.input_size[1] // shrink),
            size=(self.size[0] // shrink, self.size[1] // shrink),
            variant="small",
        )


DIRECTIONS = ("forward", "backward", "both")

_AUGMENT = Maps(scale=(0.7, 1.1), angle=(-30, 30), shift=(-0.1, 0.1))
_CROP = Maps(scale=(0.5, 0.5), shift=(-0.5, 0.5))  # of a 448 image to 224: one pixel per pixel, as in the paper
_IMAGENET = ((224, 224), (224, 224))
_NAMED = (
    # Digits, as in the paper: tiny, so what counts is the number of launches.
    Workload("mnist_28", 1024, 1, (28, 28), (28, 28), _AUGMENT, gradients=("theta",)),
    # Fine-grained birds, as in the paper: K windows of half the image's size, learnt.
    *(Workload(f"cub_crops_k{k}", 32, 3, (448, 448), (224, 224), _CROP, k, gradients=("theta",)) for k in (1, 2, 4)),
    # Data augmentation: nobody asks for a gradient.
    Workload("augment_224", 256, 3, *_IMAGENET, _AUGMENT, gradients=()),
    # A transformer between the layers of a network.
    *(Workload(f"feature_56_c{c}", 64, c, (56, 56), (56, 56), _AUGMENT) for c in (64, 256)),
    # Large enough that memory alone decides. "Identity" stays a fraction of a pixel away from
    # itself: exactly on the pixels, the gradient in theta is one of two.
    Workload("rotate_1k", 64, 3, (1024, 1024), (1024, 1024), Maps((1, 1), angle=(30, 30))),
    Workload("identity_1k", 64, 3, (1024, 1024), (1024, 1024), Maps((1, 1), shift=(0.4 / 1024, 1.6 / 1024))),
    # Zoomed out: many samples fold onto the edge.
    Workload("border_224", 64, 3, *_IMAGENET, Maps((1.2, 1.5), angle=(-30, 30)), padding_mode="border"),
    # Degenerate magnification: every output pixel looks at the same few input pixels.
    Workload("magnify_224", 64, 3, *_IMAGENET, Maps((0.02, 0.02), angle=(-30, 30))),
    # A thousand boxes on one feature map; the boxes are data.
    Workload(
        "detection_rois", 1, 256, (56, 56), (7, 7), Maps((0.05, 0.4), shift=(-0.6, 0.6)), 1000, gradients=("input",)
    ),
)

WORKLOADS = tuple(
    replace(workload, dtype=dtype, layout=layout, seed=seed)
    # Names innermost: a run that is cut short has seen every name before a second dtype or layout.
    for layout in ("contiguous", "channels_last")
    for dtype in ("float32", "bfloat16")
    for seed, workload in enumerate(_NAMED)
    if layout == "contiguous" or workload.channels > 1
)


# --- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    """(N, C, *input_size)."""
    theta: Tensor
    """(*lead, 2, 3), always fp32: what a localisation network gives."""
    grad_output: Tensor
    """(*lead, C, *size)."""
    clear: Tensor
    """(*lead, 1, *size): output pixels outside the band around discontinuities. grad_output is zero in the band."""

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The tensors whose gradients are asked for, under the gradients' names."""
        both = {"grad_input": self.input, "grad_theta": self.theta}
        return {name: tensor for name, tensor in both.items() if tensor.requires_grad}


def make_tensors(workload: Workload, device: torch.device) -> Tensors:
    """Allocate and fill what the workload reads; the same on every run on one kind of device."""
    w = workload
    generator = torch.Generator(device).manual_seed(w.seed)
    dtype = getattr(torch, w.dtype)
    layout = torch.channels_last if w.layout == "channels_last" else torch.contiguous_format

    def noise(images: int, size: tuple[int, int]) -> Tensor:
        image = torch.empty(images, w.channels, *size, dtype=dtype, device=device, memory_format=layout)
        return image.normal_(generator=generator)

    theta = w.transform.draw(w.batch * w.maps, w.seed).to(device)
    clear = torch.cat([_clear_of_kinks(w, part) for part in theta.split(max(1, 2**22 // math.prod(w.size)))])
    grad_output = noise(w.batch * w.maps, w.size).mul_(clear)
    return Tensors(
        noise(w.batch, w.input_size).requires_grad_("input" in w.gradients),
        theta.view(*w.lead, 2, 3).requires_grad_("theta" in w.gradients),
        grad_output.view(*w.lead, *grad_output.shape[1:]),
        clear.view(*w.lead, *clear.shape[1:]),
    )


def _clear_of_kinks(workload: Workload, theta: Tensor) -> Tensor:
    """(n, 2, 3) → (n, 1, *size): whether each sample is clear of where rounding changes the answer.

    Linear interpolation has a kink on every pixel, where the gradient in theta is one of two;
    nearest jumps halfway between pixels.
    """
    grid = F.affine_grid(theta.double(), [len(theta), 1, *workload.size], align_corners=workload.align_corners)
    width_height = grid.new_tensor(workload.input_size[::-1])
    x = (grid + 1) / 2 * (width_height - 1) if workload.align_corners else ((grid + 1) * width_height - 1) / 2
    if workload.mode == "nearest":
        x = x + 0.5
    return ((x - x.round()).abs() > BAND).all(-1).unsqueeze(1)
