"""How far from fp64 a warp is, by image width: tri_stn beside `F.affine_grid` and `F.grid_sample`.

Everybody is given the same numbers, rounded to the dtype of the row: image, theta and the output's
gradient. The truth is torch in fp64 on those numbers, so what is counted is the error of computing
alone. Images are noise in 0 … 1 and few rows high, because torch's 16-bit sampler on the CPU counts
positions in 16 bits (see NOTES.md).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tri_stn
from tri_stn.testing import Case, near_discontinuity, truth_grid, warp_truth

WIDTHS = (64, 128, 224, 512, 1024, 2048)
HEIGHT = 8
THETA = ((0.93, 0.02, 0.021), (-0.004, 0.9, 0.03))
"""Every sample lands inside the image, on no particular place."""

Sample = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Image, theta and output size to output."""


@dataclass(frozen=True)
class Setting:
    """What a user runs: the dtype of the tensors, and whether under autocast."""

    name: str
    dtype: torch.dtype
    autocast: bool = False


SETTINGS = (
    Setting("fp32", torch.float32),
    Setting("fp16", torch.float16),
    Setting("bf16", torch.bfloat16),
    Setting("bf16 autocast", torch.float32, autocast=True),
)


def tri_stn_sample(image: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    return tri_stn.warp(image, tri_stn.Affine(theta), size)


def torch_sample(image: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


PROVIDERS: dict[str, Sample] = {"tri_stn": tri_stn_sample, "torch": torch_sample}


@dataclass(frozen=True)
class Row:
    """Errors are relative to the largest number of the tensor: the largest one, and the root of their mean square."""

    setting: str
    width: int
    provider: str
    output_max: float
    output_rms: float
    grad_input_max: float
    grad_input_rms: float
    grad_theta_max: float
    grad_theta_rms: float
    other_pixels_forward: float
    """The share of samples whose left neighbour, among the pixels read, is not the one in fp64."""
    other_pixels_backward: float
    """The same among the pixels that the gradient is sent to."""


def measure_all(device: torch.device, widths: Sequence[int] = WIDTHS) -> Iterator[Row]:
    for setting in SETTINGS:
        for width in widths:
            for provider in PROVIDERS:
                yield measure(setting, width, provider, device)


def count(widths: Sequence[int] = WIDTHS) -> int:
    """How many rows `measure_all` makes."""
    return len(SETTINGS) * len(widths) * len(PROVIDERS)


def measure(setting: Setting, width: int, provider: str, device: torch.device) -> Row:
    size = HEIGHT, width
    case = Case(images=1, channels=3, input_size=size, size=size, dtype=setting.dtype, theta_dtype=setting.dtype)
    image, theta, grad = case.with_(theta=THETA).tensors(device)
    image = image.abs()
    # Where rounding alone chooses between two slopes, either is right.
    grad = torch.where(near_discontinuity(case, theta).unsqueeze(1), 0, grad)

    found = _gradients(lambda x, t: _run(setting, provider, x, t, size), image, theta, grad)
    truth = _gradients(lambda x, t: warp_truth(case, x, t), image.double(), theta.double(), grad.double())
    errors: dict[str, float] = {}
    for name, got, want in zip(("output", "grad_input", "grad_theta"), found, truth, strict=True):
        error = (got.double() - want).abs() / want.abs().max()
        errors |= {f"{name}_max": error.max().item(), f"{name}_rms": error.square().mean().sqrt().item()}
    forward, backward = _other_pixels(setting, width, provider, theta)
    return Row(setting.name, width, provider, **errors, other_pixels_forward=forward, other_pixels_backward=backward)


def _gradients(sample: Callable[..., Tensor], image: Tensor, theta: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    image, theta = image.detach().requires_grad_(), theta.detach().requires_grad_()
    output = sample(image, theta)
    return output.detach(), *torch.autograd.grad(output, (image, theta), grad.to(output.dtype))


def _run(setting: Setting, provider: str, image: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    autocast = torch.autocast(image.device.type, torch.bfloat16) if setting.autocast else contextlib.nullcontext()
    with autocast:
        return PROVIDERS[provider](image, theta, size)


def _other_pixels(setting: Setting, width: int, provider: str, theta: Tensor) -> tuple[float, float]:
    """Which pixels are read, and which are given a gradient: asked of one row, not derived from coordinates.

    Channel c of the image is 1 in column c alone, so the output holds the weight of every pixel in every
    sample; and a gradient that is 1 at sample c alone comes back as its weights. Both are (pixels, samples).
    """
    size = 2, width  # torch makes no fp16 grid of one row on the CPU; both rows read the image's only one
    theta = theta * theta.new_tensor([[1, 0, 1], [0, 0, 0]])
    image = torch.eye(width, dtype=setting.dtype, device=theta.device)[None, :, None].requires_grad_()
    output = _run(setting, provider, image, theta, size)
    alone = torch.cat([image.detach(), torch.zeros_like(image)], 2)
    (grad,) = torch.autograd.grad(output, image, alone.to(output.dtype))
    exact = truth_grid(Case(input_size=(1, width), size=size), theta)[0, 0, :, 0]
    expected = ((exact + 1) * width / 2 - 0.5).floor()
    shares = []
    for weights in (output.detach()[0, :, 0], grad[0, :, 0].T):
        left = (weights != 0).int().argmax(0)  # the first of the largest
        shares.append((left != expected).double().mean().item())
    return shares[0], shares[1]


HEADERS = (
    "dtype", "width", "provider", "output max", "output rms", "grad_input max", "grad_input rms",
    "grad_theta max", "grad_theta rms", "other pixels, forward", "other pixels, backward",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    *errors, forward, backward = list(asdict(row).values())[3:]
    return [
        row.setting, str(row.width), row.provider,
        *(f"{error:.1e}" for error in errors), f"{forward:.1%}", f"{backward:.1%}",
    ]  # fmt: skip


def to_json(rows: Sequence[Row], device: str) -> str:
    return json.dumps({"device": device, "rows": [asdict(row) for row in rows]}, indent=1)
