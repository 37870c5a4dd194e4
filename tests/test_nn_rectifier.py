"""A bent strip of text is read straight."""

import math

import pytest
import torch
from torch import nn

from tri_stn.nn import Convolutional, TPSRectifier

HALF = 0.4


def middle(x):
    """The height of the bent line of text, normalised."""
    return 0.35 * torch.sin(x)


def text(x, y):
    """Smooth strokes on the strip, from 0 to 1; nothing at its upper and lower edge."""
    strokes = (1 + torch.cos(9 * math.pi * x)) * (1 + torch.cos(2 * math.pi * y + 3 * x)) / 4
    return strokes * (1 - y**2).clamp(min=0)


def places(height, width):
    y, x = (torch.arange(n) * 2 / n + 1 / n - 1 for n in (height, width))
    return x.expand(height, width), y[:, None].expand(height, width)


class Fixed(nn.Module):
    """A localisation that gives the same changes for every image."""

    def __init__(self, changes):
        super().__init__()
        self.changes = nn.Parameter(changes.flatten())

    def forward(self, image):
        return self.changes.expand(len(image), -1)


@pytest.mark.parametrize("margins", [0.0, (0.05, 0.1)])
def test_the_right_fiducials_straighten_a_sinusoidal_strip(margins):
    """From an image where the line of text is bent and fills 40 % of the height."""
    x, y = places(96, 240)
    bent = text(x, (y - middle(x)) / HALF)[None, None]
    straight = text(*places(24, 80))[None, None]
    model = TPSRectifier(Fixed(torch.zeros(20, 2)), (24, 80), 20, margins=margins)
    before = (model(bent) - straight).abs()
    points = model.map.target_points
    right = torch.stack([points[:, 0], middle(points[:, 0]) + HALF * points[:, 1]], -1)
    model.localisation.changes.data = (right - points).flatten()
    strip, parameters = model(bent, return_parameters=True)
    torch.testing.assert_close(model.points(parameters)[0], right)
    after = (strip - straight).abs()
    # Between its two rows a plate bends less than they do, here by up to half an input pixel, or 0.027 of the strip's
    # half-height, over which strokes change by up to 2.5 per unit.
    print(f"off by {before.mean():.3f} before, {after.mean():.4f} after; at most {after.max():.3f}")
    assert before.mean() > 0.1 and after.mean() < 0.01 and after.max() < 0.1


def test_starts_with_the_whole_image():
    """To 1e-5, which is what the spline's fp32 sums leave of the identity."""
    image = torch.rand(2, 3, 12, 30)
    model = TPSRectifier(Convolutional(3, 12), (12, 30), fiducials=6, margins=0.05)
    strip, parameters = model(image, return_parameters=True)
    torch.testing.assert_close(strip, image, rtol=0, atol=1e-5)
    assert model.penalty(parameters) == 0 and not any("map" in name for name in model.state_dict())


def test_kernels_read_the_same_strip(backend):
    image, changes = torch.rand(1, 1, 8, 12), 0.2 * torch.rand(6, 2) - 0.1
    model = TPSRectifier(Fixed(changes), (4, 6), fiducials=6)
    strip = model(image)
    torch.testing.assert_close(model.to(backend)(image.to(backend)).cpu(), strip, rtol=0, atol=1e-5)


def test_learns_and_stays_within_bounds():
    """The gradient reaches the localisation network, and no point goes further than it may."""
    image = torch.rand(2, 1, 16, 32)
    model = TPSRectifier(Convolutional(1, 16, channels=(4,), pool=2), (8, 16), fiducials=8, bounds=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1000)
    for _ in range(2):
        strip, parameters = model(image, return_parameters=True)
        (strip - 1).square().mean().backward()
        optimizer.step()
    moved = (model.points(parameters) - model.map.target_points).abs()
    assert 0.05 < moved.max() <= 0.1 + 1e-6
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_fiducials_are_there_after_the_meta_device():
    make = lambda: TPSRectifier(Convolutional(1, 16), (8, 16), fiducials=8, margins=0.1)  # noqa: E731
    with torch.device("meta"):
        model = make()
    assert torch.equal(model.to_empty(device="cpu").map.target_points, make().map.target_points)


@pytest.mark.parametrize(
    "arguments,says",
    [
        ({"fiducials": 7}, "fiducials must be an even number, at least 4"),
        ({"fiducials": 2}, "fiducials must be an even number, at least 4"),
        ({"margins": 0.5}, "margins must be shares"),
        ({"margins": (0.1, 0.1, 0.1)}, "margins must be shares"),
    ],
)
def test_what_does_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        TPSRectifier(nn.Flatten(), **arguments)


def test_names_the_count_that_localisation_should_give():
    with pytest.raises(ValueError, match=r"localisation must give \(N, 12\)"):
        TPSRectifier(Convolutional(1, 40), fiducials=6)(torch.rand(1, 1, 16, 16))
