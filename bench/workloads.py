"""What is measured: named workloads, as data, and the tensors that each of them stands for.

A workload says everything that decides the work: shapes, dtype, layout, maps per image, of which kind
and how they are drawn, padding, which gradients are asked for, and the seed. Two runs of one workload do
the same work on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .maps import AnyMaps, Fields, Homographies, Maps, Points, Splines

BAND = 2e-3
"""Pixels around a discontinuity in which no provider is held to the truth: about ten times what
fp32 leaves of a coordinate on an axis of 1024 pixels. On longer axes it is as much wider."""


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    """Images."""
    channels: int
    input_size: tuple[int, ...]
    size: tuple[int, ...]
    transform: AnyMaps
    maps: int = 1
    """Maps per image."""
    gradients: tuple[str, ...] = ("input", "theta")
    """What a training step needs: an image that is data takes none, nor does a map drawn at random. "theta" stands
    for the numbers of any kind of map."""
    dtype: str = "float32"
    layout: str = "contiguous"
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    seed: int = 0
    second: bool = False
    """Whether the backward of the backward is measured as well; it takes both gradients."""
    deterministic: bool = False
    """Run under `torch.use_deterministic_algorithms(True)`."""
    sweep: str = ""
    """What the workloads of one sweep differ in."""
    variant: str = "full"
    """"few" has fewer images, and all else as it is; "small" marks a scaled-down stand-in, which says nothing about the
    full one. Neither is compared with another."""

    def __str__(self) -> str:
        parts = [self.name, self.dtype, self.layout] + ["deterministic"] * self.deterministic
        return "-".join(parts if self.variant == "full" else [*parts, self.variant])

    @property
    def directions(self) -> tuple[str, ...]:
        if not self.gradients:
            return DIRECTIONS[:1]
        return DIRECTIONS if self.second else DIRECTIONS[:3]

    @property
    def lead(self) -> tuple[int, ...]:
        """The batch shape of the maps and of the output: (N,), (N, K), or (K,) maps of one image."""
        return (self.batch, self.maps) if self.maps > 1 and self.batch > 1 else (self.batch * self.maps,)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def image_elements(self) -> int:
        return self.batch * self.channels * math.prod(self.input_size)

    @property
    def output_elements(self) -> int:
        return self.batch * self.maps * self.channels * math.prod(self.size)

    @property
    def field_elements(self) -> int:
        """Numbers of a dense map: what has to be read, unlike a few numbers per map."""
        d = len(self.size)
        return self.batch * self.maps * math.prod(self.size) * d if self.transform.dense else 0

    @property
    def memory(self) -> int:
        """Bytes that measuring it takes, about: the tensors, two results, the fp64 truth and a grid in fp64."""
        tensors = self.image_elements + self.output_elements
        grid = self.batch * self.maps * math.prod(self.size) * len(self.size)
        return tensors * (4 * self.itemsize + 3 * 8) * (2 if self.second else 1) + grid * (3 * 8 + 3 * 4)

    def few(self) -> Workload:
        """The same with no more images than a CPU reads in seconds, but two at least: a thread takes one."""
        most = max(self.image_elements, self.output_elements) // self.batch
        return replace(self, batch=min(self.batch, max(2, 2**22 // most)), variant="few")

    def small(self) -> Workload:
        """A stand-in that a CPU finishes in a moment: the same kind of work, much less of it."""
        dims, longest = len(self.size), 64 if len(self.size) == 2 else 24
        shrink = max(1, round(max(self.input_size) / longest))
        # A long row of points is a number of samples and not a width.
        size = (1, 256) if self.size[0] == 1 else tuple(max(4, n // shrink) for n in self.size)
        return replace(
            self,
            batch=min(self.batch, 2),
            channels=min(self.channels, 16 if dims == 2 else 4),
            maps=min(self.maps, 16),
            input_size=tuple(max(4, n // shrink) for n in self.input_size),
            size=size,
            variant="small",
        )


DIRECTIONS = ("forward", "backward", "both", "double")
"""double: the backward pass of the backward pass, on a kept graph."""

_AUGMENT = Maps(scale=(0.7, 1.1), angle=(-30, 30), shift=(-0.1, 0.1))
_CROP = Maps(scale=(0.5, 0.5), shift=(-0.5, 0.5))  # of a 448 image to 224: one pixel per pixel, as in the paper
_ALIGN = Maps(scale=(0.9, 1.1), angle=(-15, 15), shift=(-0.05, 0.05))
_IMAGENET = ((224, 224), (224, 224))
_FRAME = ((2160, 3840), (2160, 3840))
_BRAIN = (160, 192, 224)
_NAMED = (
    # Digits, as in the paper: tiny, so what counts is the number of launches.
    Workload("mnist_28", 1024, 1, (28, 28), (28, 28), _AUGMENT, gradients=("theta",)),
    # Fine-grained birds, as in the paper: K windows of half the image's size, learnt.
    *(Workload(f"cub_crops_k{k}", 32, 3, (448, 448), (224, 224), _CROP, k, gradients=("theta",)) for k in (1, 2, 4)),
    # Data augmentation: nobody asks for a gradient.
    Workload("augment_224", 256, 3, *_IMAGENET, _AUGMENT, gradients=()),
    # A transformer between the layers of a network.
    *(Workload(f"feature_56_c{c}", 64, c, (56, 56), (56, 56), _AUGMENT, second=c == 64) for c in (64, 256)),
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
    # Large again, where a sample is not a pixel: two pixels apart, and half a pixel.
    Workload("shrink_1k", 48, 3, (2048, 2048), (1024, 1024), Maps((1, 1), shift=(0.4 / 2048, 1.6 / 2048))),
    Workload("zoom_1k", 64, 3, (1024, 1024), (1024, 1024), Maps((0.5, 0.5), shift=(-0.3, 0.3))),
    *(
        Workload(f"feature_{side}_c{c}", 64, c, (side, side), (side, side), _AUGMENT)
        for side, c in ((56, 512), (64, 64), (64, 128), (64, 512))
    ),
    # The one convention that cuDNN's spatial transformer knows.
    Workload("corners_224", 64, 3, *_IMAGENET, _AUGMENT, align_corners=True),
    # Documents and video, straightened.
    Workload("frame_4k", 8, 3, *_FRAME, Homographies((0.85, 1.0), angle=(-5, 5), shift=(-0.05, 0.05))),
    # A strip of text, as text recognisers rectify it.
    Workload("text_32x100", 256, 3, (64, 256), (32, 100), Splines(20, scale=0.8, bend=0.15), gradients=("theta",)),
    # Optical flow, with the convention of its networks.
    Workload("flow_720p", 8, 3, (720, 1280), (720, 1280), Fields(8.0, cells=12), align_corners=True),
    # The same on features, where channels outweigh the field.
    Workload("flow_features", 8, 64, (184, 320), (184, 320), Fields(4.0, cells=12), align_corners=True),
    # A million points, each somewhere else, as fields of features are read.
    Workload("points", 1, 128, (512, 512), (1, 2**20), Points()),
    # Medical images: an affine alignment, features of a network, and a registration's field.
    *(Workload(f"volume_3d_c{c}", 1, c, _BRAIN, _BRAIN, _ALIGN) for c in (1, 8, 32)),
    Workload("volume_flow", 1, 1, _BRAIN, _BRAIN, Fields(3.0, cells=6), align_corners=True),
)

_FORMS = tuple(
    replace(workload, dtype=dtype, layout=layout, seed=seed, second=workload.second and dtype == "float32")
    # Names innermost: a run that is cut short has seen every name before a second dtype or layout.
    for layout in ("contiguous", "channels_last")
    for dtype in ("float32", "bfloat16")
    for seed, workload in enumerate(_NAMED)
    if layout == "contiguous" or workload.channels > 1
)
_DETERMINISTIC = ("feature_56_c64", "border_224", "frame_4k", "volume_3d_c8")

WORKLOADS = _FORMS + tuple(
    replace(workload, deterministic=True, second=False)
    for workload in _FORMS
    if workload.name in _DETERMINISTIC and workload.dtype == "float32" and workload.layout == "contiguous"
)


def _sweeps() -> Iterator[Workload]:
    """One thing at a time is varied, about the same bytes each."""
    for side in (32, 64, 128, 256, 512, 1024, 2048):
        yield Workload(f"sweep_size_{side}", 2**22 // side**2, 3, (side, side), (side, side), _AUGMENT, sweep="size")
    for c in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512):
        yield Workload(f"sweep_channels_{c}", 2**9 // c, c, (128, 128), (128, 128), _AUGMENT, sweep="channels")
    for scale in (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0):
        # Zoomed out, the output is smaller instead: samples that fall beside the image are no work.
        side = round(512 / max(scale, 1.0))
        maps = Maps((min(scale, 1.0),) * 2, shift=(-0.02, 0.02))
        yield Workload(f"sweep_scale_{scale:g}", 16, 3, (512, 512), (side, side), maps, sweep="scale")
    for angle in (0, 15, 30, 45, 60, 75, 90):
        maps = Maps((1, 1), angle=(angle, angle), shift=(-0.02, 0.02))
        yield Workload(f"sweep_angle_{angle}", 16, 3, (512, 512), (512, 512), maps, sweep="angle")


SWEEPS = tuple(_sweeps()) + tuple(
    replace(workload, dtype="bfloat16", layout="channels_last")
    for workload in _sweeps()
    if workload.sweep == "channels" and workload.channels > 1
)


# --- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    """(N, C, *input_size)."""
    theta: Tensor
    """The maps' numbers (*lead, …), always fp32, as networks give them: of an affine map (*lead, d, d + 1), of a
    field (*lead, *size, d); see `bench.maps`."""
    grad_output: Tensor
    """(*lead, C, *size)."""
    clear: Tensor
    """(*lead, 1, *size): output pixels outside the band around discontinuities. grad_output is zero in the band."""
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    """Under the gradients' names, what a second backward pass starts from; empty where there is none."""

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
    channels_last = torch.channels_last if len(w.size) == 2 else torch.channels_last_3d
    layout = channels_last if w.layout == "channels_last" else torch.contiguous_format

    def noise(images: int, size: tuple[int, ...]) -> Tensor:
        image = torch.empty(images, w.channels, *size, dtype=dtype, device=device, memory_format=layout)
        return image.normal_(generator=generator)

    theta = w.transform.draw(w.batch * w.maps, w.size, w.seed).to(device)
    clear = torch.cat([_clear_of_kinks(w, part) for part in theta.split(max(1, 2**22 // math.prod(w.size)))])
    grad_output = noise(w.batch * w.maps, w.size).mul_(clear)
    input = noise(w.batch, w.input_size)
    theta = theta.unflatten(0, w.lead)
    cotangents = {}
    if w.second:
        directions = {"grad_input": input, "grad_theta": theta}
        cotangents = {k: torch.empty_like(t).normal_(generator=generator) for k, t in directions.items()}
    return Tensors(
        input.requires_grad_("input" in w.gradients),
        theta.requires_grad_("theta" in w.gradients),
        grad_output.unflatten(0, w.lead),
        clear.unflatten(0, w.lead),
        cotangents,
    )


def _clear_of_kinks(workload: Workload, theta: Tensor) -> Tensor:
    """Maps' numbers (n, …) → (n, 1, *size): whether each sample is clear of where rounding changes the answer.

    Linear interpolation has a kink on every pixel, where the gradient in theta is one of two;
    nearest jumps halfway between pixels.
    """
    w, theta = workload, theta.double()
    kept = w.transform.kept(w.size, w.input_size, w.align_corners, theta)
    grid = w.transform.grid(theta, kept, w.size, w.align_corners)
    sizes = grid.new_tensor(w.input_size[::-1])
    x = (grid + 1) / 2 * (sizes - 1) if w.align_corners else ((grid + 1) * sizes - 1) / 2
    if w.mode == "nearest":
        x = x + 0.5
    band = BAND * max(1, max(w.input_size) / 1024)
    return ((x - x.round()).abs() > band).all(-1).unsqueeze(1)
