"""Parallel crops: 2 and 4 attention windows of 224 pixels on images of 448, as the paper reads birds (section 4.3).

The birds (CUB-200-2011) cannot ship, so nothing is learned that means something: images and labels are random, and
what counts is what the crops cost. A localisation network looks at the image at half its size; the windows read the
full image, which tri_stn does in place and torch's sampler from one copy per window.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn

from . import harness
from .samplers import SAMPLERS
from .training import Training, costs

CLASSES = 200


class Crops(nn.Module):
    """K windows of an image, features of each, and one classifier on all of them."""

    def __init__(self, windows: int, side: int, sampler: str) -> None:
        super().__init__()
        map = tri_stn.nn.AttentionMap(inside=True, start=0.6)
        localisation = tri_stn.nn.Convolutional(3, windows * map.count, channels=(8, 16))
        self.look = tri_stn.nn.SpatialTransformer(
            localisation, map, side // 2, parallel=windows, sampler=SAMPLERS[sampler]
        )
        self.features = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.classifier = nn.Linear(windows * 16 * 16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        crops = self.look(F.avg_pool2d(images, 2), images)  # (N, K, 3, side / 2, side / 2)
        return self.classifier(self.features(crops.flatten(0, 1)).view(len(images), -1))


def make(windows: int, side: int, images: int, steps: int, seed: int, device: torch.device, sampler: str) -> Training:
    """A training on random images, from its start."""
    torch.manual_seed(seed)
    model = Crops(windows, side, sampler).to(device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pixels = torch.rand(images, 3, side, side, generator=generator)
        labels = torch.randint(CLASSES, (images,), generator=generator)
        return pixels.to(device), labels.to(device)

    return Training(model, batch, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), steps, rate=1e-3)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; the exit status is 0 if both samplers' losses agree."""
    parser = harness.parser("crops", __doc__, trains=False)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4], metavar="K")
    parser.add_argument("--side", type=int, default=448, help="of the images, in pixels")
    parser.add_argument("--images", type=int, help="in a batch; 2 with --quick, else 32")
    arguments = harness.parse(parser, argv)
    if min(arguments.windows) < 1 or arguments.side < 16 or (arguments.images or 1) < 1:
        parser.error("--windows and --images must be positive, and --side at least 16.")
    images, steps = (2, 10) if arguments.quick else (32, 50)
    images, seed = arguments.images or images, arguments.seeds[0]
    rows: list[list[object]] = []
    document: dict[str, Any] = {}
    held = True
    said = [
        f"{images} images of {arguments.side} × {arguments.side} pixels in 3 channels, windows of half their side, "
        f"random data in fp32. A step is forward, backward and update of a small network."
    ]
    for windows in arguments.windows:
        make_one = functools.partial(make, windows, arguments.side, images, steps, seed, arguments.device)
        measured = costs(make_one, arguments.device, steps)
        headers, table = harness.cost_table(measured)
        rows += [[windows, *row] for row in table]
        document[str(windows)] = harness.cost_document(measured)
        said.append(f"{windows} windows: {harness.agreement(measured)}")
        held = held and document[str(windows)]["losses_agree"]
    command = ["python", "-m", "bench.experiments.crops", *(sys.argv[1:] if argv is None else argv)]
    path = harness.stem("crops", arguments)
    tables = {"Costs": (["windows", *headers], rows)}
    harness.write_results(
        path, "Parallel crops", said, tables, harness.about(arguments, command) | {"windows": document}
    )
    print(path.with_suffix(".md").read_text())
    print(f"Wrote {path}.json and .md.")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
