"""A spatial transformer's windows while it learns to find digits, as an animation.

Only the labels are told: the windows close in on the digits because the classifier is then right more often.
The digits are scikit-learn's, put on a larger canvas at random places, sizes and angles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn

from ..files import write_whole
from .page import ACCENT, INK, MUTED, Page, page
from .photograph import Photo

DIGIT, CANVAS, WINDOW = 20, 48, 16
"""Pixels along a side: of an upright digit, of the canvas, of what the transformer reads."""
ANGLE, SCALE, SHIFT = 50.0, (0.8, 1.2), 11.0
"""Degrees either way, the smallest and largest factor, pixels either way."""
HELD_OUT = 300
BATCH, RATE, RAMP = 64, 3e-3, 0.4
"""The distortion grows to its full size over this part of the steps: upright digits in the middle come first."""


@dataclass(frozen=True)
class Shot:
    """What one frame shows: the step, the held-out error in percent, ten windows and what was read there."""

    step: int
    error: float
    corners: Tensor  # (10, 4, 2), pixels of the canvas; clockwise from the upper left
    read: Tensor  # (10, 1, WINDOW, WINDOW)
    answers: list[int]


class Finder(nn.Module):
    """A transformer that reads one window of the canvas, moved, turned and scaled, and a small classifier of it."""

    def __init__(self) -> None:
        super().__init__()
        localisation = tri_stn.nn.Convolutional(1, 4, channels=(16, 32), hidden=48)
        self.transformer = tri_stn.nn.SpatialTransformer(localisation, "similarity", size=WINDOW)
        self.classifier = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (WINDOW // 4) ** 2, 10),
        )  # fmt: skip

    def forward(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Canvases (N, 1, CANVAS, CANVAS) → logits (N, 10), what was read, and the maps (N, 2, 3)."""
        read, parameters = self.transformer(F.avg_pool2d(canvas, 2), canvas, return_parameters=True)
        return self.classifier(read), read, self.transformer.map(parameters).parameters


@dataclass
class Scenes:
    """Upright digits, and the means to scatter them."""

    generator: torch.Generator
    images: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        small = torch.from_numpy(data.images).float()[:, None] / 16
        large = F.interpolate(small, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False)
        order = torch.randperm(len(small), generator=self.generator)
        self.images = torch.sigmoid(12 * (large - 0.45)).sub(0.005).clamp(0, 1)[order]  # sharp strokes on black
        self.labels = torch.from_numpy(data.target).long()[order]

    def scattered(self, index: Tensor, amount: float = 1.0) -> Tensor:
        """These digits on their canvases, (N, 1, CANVAS, CANVAS); amount 0 leaves them upright in the middle."""
        a, b, x, y = torch.rand(4, len(index), generator=self.generator)
        angle = (2 * a - 1) * math.radians(ANGLE) * amount
        scale = (SCALE[0] + (SCALE[1] - SCALE[0]) * b) ** amount
        shift = (2 * torch.stack([x, y], -1) - 1) * amount * SHIFT / (CANVAS / 2)
        on_canvas = tri_stn.Similarity(scale * DIGIT / CANVAS, angle, shift)  # where the digit's points go
        return tri_stn.warp(self.images[index], on_canvas.inverse(), (CANVAS, CANVAS))


def draw(photo: Photo, path: Path, steps: int = 600, frames: int = 36, seed: int = 0) -> None:
    """Train, and write one frame per so many steps; the photograph only says on which device."""
    device = photo.pixels.device
    generator = torch.Generator().manual_seed(seed)
    scenes = Scenes(generator)
    held_out = torch.arange(HELD_OUT)
    canvases = scenes.scattered(held_out).to(device)
    # The first held-out digit of each class: shown as they come, not chosen.
    shown = torch.stack([(scenes.labels[:HELD_OUT] == c).nonzero()[0, 0] for c in range(10)])
    with torch.random.fork_rng(), page(*SHEET) as sheet:
        torch.manual_seed(seed)
        film = Film(sheet, canvases[shown, 0].cpu(), scenes.labels[shown])
        for shot in train(scenes, canvases, shown, steps, frames, device):
            film.take(shot)
        film.save(path)


def train(
    scenes: Scenes, canvases: Tensor, shown: Tensor, steps: int, frames: int, device: torch.device
) -> Iterator[Shot]:
    """Learn from the digits that are not held out, and stop now and then to look at those that are."""
    net = Finder().to(device)
    rates = {net.transformer: RATE * 0.5, net.classifier: RATE}  # the windows move slowly
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates.items()]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, list(rates.values()), total_steps=steps + 1)
    moments = {round(steps * (i / (frames - 1)) ** 1.3) for i in range(frames)}  # more of them early, when much happens
    for step in range(steps + 1):
        if step in moments:
            yield look(net, canvases, scenes.labels[:HELD_OUT], shown, step)
        index = HELD_OUT + torch.randint(len(scenes.labels) - HELD_OUT, (BATCH,), generator=scenes.generator)
        inputs = scenes.scattered(index, amount=min(1.0, 0.15 + step / (RAMP * steps)))
        loss = F.cross_entropy(net(inputs.to(device))[0], scenes.labels[index].to(device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()


@torch.no_grad()
def look(net: Finder, canvases: Tensor, labels: Tensor, shown: Tensor, step: int) -> Shot:
    """The error on all held-out digits, and what the shown ones look like to the network."""
    net.eval()
    logits, read, theta = net(canvases)
    net.train()
    answers = logits.argmax(1).cpu()
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]) @ theta[shown].cpu().mT
    error = 100 * (answers != labels).float().mean().item()
    return Shot(step, error, ((corners + 1) * CANVAS - 1) / 2, read[shown].cpu(), answers[shown].tolist())


CELL, GAP, TOP, LEFT = 102, 8, 76, 118
SHEET = (LEFT + 10 * (CELL + GAP) + GAP, TOP + 2 * CELL + 60)


class Film:
    """The frames: one page whose lines and pictures are moved."""

    def __init__(self, sheet: Page, canvases: Tensor, labels: Tensor) -> None:
        from matplotlib.patches import Polygon

        self.sheet, self.labels, self.frames = sheet, labels.tolist(), list[Any]()
        sheet.write(LEFT, 14, "A spatial transformer learns where to look", size=15, weight="bold")
        self.caption = sheet.write(LEFT, 46, "", color=MUTED, size=12)
        for y, text in ((0, "input and\nwindow"), (CELL + GAP, "what it\nreads there")):
            sheet.write(LEFT - 12, TOP + y + CELL / 2, text, va="center", ha="right", size=11.5)
        sheet.write(LEFT - 12, TOP + 2 * CELL + 22, "its answer", ha="right", size=11.5)
        self.windows, self.edges, self.seen, self.answers = [], [], [], []
        for i, canvas in enumerate(canvases):
            x = LEFT + i * (CELL + GAP)
            above = sheet.picture(x, TOP, CELL, CELL, canvas[None])
            margin = 9  # a window may reach beyond the canvas
            above.set(xlim=(-0.5 - margin, CANVAS - 0.5 + margin), ylim=(CANVAS - 0.5 + margin, -0.5 - margin))
            self.windows.append(above.add_patch(Polygon([[0, 0]] * 4, fill=False, edgecolor=ACCENT, linewidth=1.4)))
            # The window's upper edge, thick, shows which way it takes to be up.
            self.edges += above.plot([], [], color=ACCENT, linewidth=3.8, solid_capstyle="round")
            below = sheet.picture(x, TOP + CELL + GAP, CELL, CELL, torch.zeros(1, WINDOW, WINDOW))
            below.spines[:].set(color=ACCENT, linewidth=1.2)
            self.seen.append(below.images[0])
            self.answers.append(sheet.write(x + CELL / 2, TOP + 2 * CELL + 18, "", ha="center", size=15, weight="bold"))

    def take(self, shot: Shot) -> None:
        """One more frame."""
        self.caption.set_text(f"Told only the labels. Step {shot.step}, validation error {shot.error:.0f} %")
        for i, (corners, read) in enumerate(zip(shot.corners, shot.read, strict=True)):
            self.windows[i].set_xy(corners.tolist())
            self.edges[i].set_data(*corners[:2].T.tolist())
            self.seen[i].set_data(read[0].numpy())
            right = shot.answers[i] == self.labels[i]
            self.answers[i].set(text=str(shot.answers[i]), color=INK if right else ACCENT)
        self.frames.append(self.sheet.pixels())

    def save(self, path: Path) -> None:
        """Short frames, and a pause on the first and the last; played for ever."""
        colours = _palette()
        first, *rest = (frame.quantize(palette=colours, dither=0) for frame in self.frames)
        durations = [900, *[160] * (len(rest) - 1), 3000][: len(self.frames)]
        write_whole(
            path,
            lambda temporary: first.save(
                temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True
            ),
        )


def _palette() -> Any:
    """Exact white, greys, and the page's colours fading into it: the same for all frames, so that nothing flickers."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    white, black = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    fades = ((black, white, 32), (ACCENT, white, 15), (ACCENT, black, 5), (MUTED, white, 8), (INK, white, 4))
    colours: list[int] = []
    for start, end, count in fades:
        for i in range(count):
            share = i / (count - 1)
            blend = (a + (b - a) * share for a, b in zip(to_rgb(start), to_rgb(end), strict=True))
            colours += (round(255 * value) for value in blend)
    image = Image.new("P", (1, 1))
    image.putpalette(colours)
    return image
