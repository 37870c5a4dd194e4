"""A spatial transformer against a plain CNN, on real handwritten digits. Run `python -m bench.demo`.

Two classifiers of about equal parameter count learn side by side, from the same batches: a plain
CNN, and the same CNN, narrower, with an affine spatial transformer in front (Jaderberg et al. 2015).
The data are scikit-learn's 1,797 scanned digits, upsampled and put on a larger canvas with a random
rotation, scale and shift. At the end: a table, and a picture of what the transformer looks at.

Fixed before any result on the test digits was looked at: the split (drawn from the clean digits, so
that no digit is in two parts), the distortions of the validation and test digits, both architectures,
the schedule and the number of epochs. These were chosen on the validation digits; each network meets
the test digits once, after its last epoch. `--seed` changes the initial weights, the order of the
batches and the training distortions, never the split or the evaluation distortions.

The data, the training and the module are those of `bench.experiments` and `tri_stn.nn`.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn
from tri_stn.files import obstacle

from .experiments import harness
from .experiments.classification import count_parameters
from .experiments.data import SIDE, Images, distorted, epoch_batch, load_digits, similarity
from .experiments.training import Training, now
from .measure import peak_bytes

CANVAS, WINDOW = 40, 24
"""Pixels along a side: of the canvas that a digit is put on, of the transformer's output."""

ROTATION, SCALE, SHIFT = 60.0, (0.7, 1.2), 7.0
"""The distortion: degrees either way, smallest and largest factor, pixels either way."""

COPIES = 4
"""Each held-out digit is evaluated under this many fixed distortions."""

VALIDATION_SEED, TEST_SEED = 1, 2

EPOCHS, RAMP = 40, 0.35
"""The distortion grows to its full size over this part of the epochs. A classifier that has met upright digits first
gives the localisation net a reason to turn them upright; without this ramp the transformer leaves most of the
rotation in.
"""

BATCH, LEARNING_RATE = 64, 4e-3

MEMORY_SHAPE = (64, 1, 256, 256)
"""The images that the sampler's memory is measured on."""


# --- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """Digits on their canvases, (N, 1, CANVAS, CANVAS), and how each was put there."""

    images: Tensor
    labels: Tensor
    theta: Tensor  # (N, 2, 3): canvas → digit


def distort(digits: Images, generator: torch.Generator, amount: float = 1.0) -> Scenes:
    """Put each digit on a canvas, rotated, scaled and shifted at random; `amount` from 0 (not at all) to 1."""
    scales = SCALE[0] ** amount, SCALE[1] ** amount
    shift = amount * SHIFT / (CANVAS / 2)
    transform = similarity(len(digits), generator, ROTATION * amount, scales, shift, CANVAS / SIDE)
    return Scenes(distorted(digits, transform, CANVAS).pixels, digits.labels, transform.theta.to(digits.labels.device))


# --- networks --------------------------------------------------------------------------------------


def block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, normalisation, activation; then half the size."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def classifier(side: int, *widths: int) -> nn.Sequential:
    """Images (N, 1, side, side) → logits (N, 10), through one block per width."""
    blocks = [block(a, b) for a, b in zip((1, *widths), widths, strict=False)]
    features = widths[-1] * (side // 2 ** len(widths)) ** 2
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(features, 10))


def plain_cnn() -> nn.Module:
    """The classifier for the whole canvas: one more block for its size, and wider."""
    return classifier(CANVAS, 26, 26, 54, 54)


class SpatialTransformerNet(nn.Module):
    """Look at the whole canvas, choose a window, read it upright, classify that."""

    def __init__(self) -> None:
        super().__init__()
        localisation = nn.Sequential(nn.AvgPool2d(2), tri_stn.nn.Convolutional(1, 6, channels=(16, 24), pool=5))
        self.transformer = tri_stn.nn.SpatialTransformer(localisation, "affine", (WINDOW, WINDOW))
        self.classifier = classifier(WINDOW, 16, 32, 32)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What it sees, (N, 1, WINDOW, WINDOW), and where: theta (N, 2, 3), window → canvas."""
        seen, theta = self.transformer(images, return_parameters=True)
        return seen, theta.view(-1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.transformer(images))


# --- learning --------------------------------------------------------------------------------------


class Learner:
    """A network and its training; how long it took and how well it did."""

    def __init__(self, net: nn.Module, batch: Callable[[int], Scenes], steps: int) -> None:
        self.net = net
        self.training = Training(
            net, batch, lambda net, s: F.cross_entropy(net(s.images), s.labels), steps, LEARNING_RATE
        )
        self.seconds = 0.0
        self.validation: list[float] = []

    def step(self, device: torch.device) -> None:
        self.training.batch(self.training.done)  # made before the clock starts
        start = now(device)
        self.training.step()
        self.seconds += now(device) - start

    @torch.no_grad()
    def error(self, scenes: Scenes) -> float:
        """Percent of the scenes that get another digit's label."""
        self.net.eval()
        wrong = [(self.net(x).argmax(1) != y).sum() for x, y in _batches(scenes, 256)]
        self.net.train()
        return 100 * int(sum(wrong)) / len(scenes.labels)


def batches(digits: Images, steps: int, seed: int) -> Callable[[int], Scenes]:
    """The batch of a step, the last one kept: every epoch each digit once, freshly distorted."""

    @functools.lru_cache(maxsize=1)
    def batch(step: int) -> Scenes:
        index = epoch_batch(len(digits), step, BATCH, seed).to(digits.labels.device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return distort(digits[index], generator, min(1.0, (step + 1) / (RAMP * steps)))

    return batch


def train(learners: list[Learner], validation: Scenes, epochs: int, report: Callable[[], None]) -> None:
    """All learners see the same batches."""
    for _ in range(epochs):
        for _ in range(learners[0].training.steps // epochs):
            for learner in learners:
                learner.step(validation.images.device)
        for learner in learners:
            learner.validation.append(learner.error(validation))
        report()


@torch.no_grad()
def rotation_spread(net: SpatialTransformerNet, scenes: Scenes) -> tuple[float, float]:
    """Standard deviation of the digits' rotation in degrees, as they come and as the classifier sees them.

    Within each class and then averaged, because what counts as upright is each class's own affair.
    """
    net.eval()
    theta = torch.cat([net.look(x)[1] for x, _ in _batches(scenes, 256)])
    to_digit = scenes.theta[:, :, :2]
    spreads = []
    for linear in (to_digit, to_digit @ theta[:, :, :2]):  # from the canvas, from the window
        # The rotation in the polar decomposition of a 2×2 matrix.
        angle = torch.atan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1]).rad2deg()
        spreads.append(sum(float(angle[scenes.labels == c].std()) for c in range(10)) / 10)
    return spreads[0], spreads[1]


def _batches(scenes: Scenes, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(scenes.images.split(size), scenes.labels.split(size), strict=True))


# --- the sampler's memory --------------------------------------------------------------------------


def sampler_memory(device: torch.device) -> dict[str, float]:
    """Peak MiB of one forward and backward pass beyond what anyone must hold.

    That is: beyond input, theta, output and the gradients of all three.
    """
    input = torch.rand(MEMORY_SHAPE, device=device, requires_grad=True)
    angle = torch.linspace(-1, 1, MEMORY_SHAPE[0])
    theta = torch.stack([angle.cos(), angle.sin(), 0 * angle, -angle.sin(), angle.cos(), 0 * angle], -1).view(-1, 2, 3)
    theta = theta.to(device).requires_grad_()
    grad_output = torch.rand(MEMORY_SHAPE, device=device)
    samplers: dict[str, Callable[[], Tensor]] = {
        "affine_grid + grid_sample": lambda: F.grid_sample(
            input, F.affine_grid(theta, list(MEMORY_SHAPE), align_corners=False), align_corners=False
        ),
        "tri_stn.warp": lambda: tri_stn.warp(input, tri_stn.Affine(theta)),
    }
    peaks = {}
    for name, sample in samplers.items():

        def run(sample: Callable[[], Tensor] = sample) -> tuple[Tensor, ...]:
            output = sample()
            return output, *torch.autograd.grad(output, [input, theta], grad_output)

        run()  # compiles kernels and sets up libraries' workspaces
        peaks[name] = (peak_bytes(run, device) or 0) / 2**20
    return peaks


# --- what is shown ---------------------------------------------------------------------------------


def draw(plain: Learner, transformer: Learner, scenes: Scenes, path: Path) -> None:
    """Two distortions of a digit of each class, what the transformer made of each, and the learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Polygon
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    net = transformer.net
    assert isinstance(net, SpatialTransformerNet)
    net.eval()
    digits = len(scenes.labels) // COPIES
    # The first test digit of each class: shown as they come, not chosen.
    first = torch.stack([(scenes.labels[:digits] == c).nonzero()[0, 0] for c in range(10)])
    before, after = rotation_spread(net, scenes)
    ink, accent, muted, pale = "#1f2933", "#e4572e", "#7b8794", "#cbd2d9"
    style: dict[Any, Any] = {
        "font.size": 11, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": pale, "xtick.color": muted,
        "ytick.color": muted,
    }  # fmt: skip
    # In inches: the figure; a cell and the gap beside it; the left edge and the upper edges of the rows.
    width, height, cell, gap, left = 12.9, 7.85, 1.08, 0.07, 1.3
    tops = (0.98, 2.1, 3.4, 4.52)
    with plt.rc_context(style):
        figure = plt.figure(figsize=(width, height), facecolor="white")

        def place(x: float, y: float, w: float, h: float) -> Any:
            """Axes by their upper left corner and size."""
            return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

        def write(y: float, text: str, **options: Any) -> None:
            figure.text(left / width, 1 - y / height, text, va="top", **options)

        write(0.16, "A spatial transformer learns to find digits and turn them upright", size=17, weight="bold")
        write(
            0.52, "Told only the labels. Rotation of the test digits, spread (standard deviation) within a class: "
            f"{before:.0f}° as they come, {after:.0f}° as the classifier sees them.", color=muted,
        )  # fmt: skip
        for pair in range(2):
            with torch.no_grad():
                images = scenes.images[first + pair * digits]
                seen, theta = net.look(images)
                seen = seen.cpu()
            corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
            windows = ((corners @ theta.cpu().mT + 1) * CANVAS - 1) / 2  # (10, 4, 2), in pixels
            for column in range(10):
                x = left + column * (cell + gap)
                above, below = (place(x, y, cell, cell) for y in tops[2 * pair : 2 * pair + 2])
                above.imshow(images[column, 0].cpu(), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
                above.add_patch(Polygon(windows[column].tolist(), fill=False, edgecolor=accent, linewidth=1.3))
                # The window's upper edge, thick, shows which way it takes to be up.
                above.plot(*windows[column, :2].T.tolist(), color=accent, linewidth=3.6, solid_capstyle="round")
                below.imshow(seen[column, 0], cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
                # A margin, because a window may reach beyond the canvas.
                for axes, edge, pixels, margin in ((above, pale, CANVAS, 6), (below, accent, WINDOW, 0)):
                    low, high = -0.5 - margin, pixels - 0.5 + margin
                    axes.set(xticks=[], yticks=[], xlim=(low, high), ylim=(high, low))
                    axes.spines[:].set(color=edge, linewidth=1.2)
                if column == 0:
                    for axes, text in ((above, "input"), (below, "what the\ntransformer\nmade of it")):
                        axes.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8)
        curves = place(left, 5.95, 10 * cell + 9 * gap, 1.3)
        epochs = range(1, len(plain.validation) + 1)
        for learner, name, colour in ((plain, "plain CNN", muted), (transformer, "with the transformer", accent)):
            curves.plot(epochs, learner.validation, color=colour, linewidth=2, label=name, marker="o", markersize=3)
        curves.set(yscale="log", xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        curves.set_ylabel("validation\nerror, %", rotation=0, ha="right", va="center", labelpad=8)
        curves.yaxis.set(major_locator=FixedLocator([1, 2, 5, 10, 20, 50]), minor_locator=NullLocator())
        curves.yaxis.set_major_formatter("{x:g}")
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.spines[["top", "right"]].set_visible(False)
        curves.grid(axis="y", color="#e4e7eb")
        curves.legend(frameon=False, loc="upper right")
        harness.save_figure(figure, path, dpi=120)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Train both, print the table, draw the picture; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where to write the picture (.png)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and training distortions")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {arguments.epochs}.")
    if why := obstacle(arguments.out):
        parser.error(why)
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"there is no folder {arguments.out.parent} to write {arguments.out.name} in; create it first.")
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"The demo needs {error.name}, which is not installed: pip install -e .[demo]", file=sys.stderr)
        return 2
    device = harness.device(parser, arguments.device)
    # Networks this small gain little from threads, lose much when cores are shared, and repeat exactly on one.
    torch.set_num_threads(1)
    demo(arguments.out, arguments.epochs, arguments.seed, device)
    return 0


def demo(out: Path, epochs: int, seed: int, device: torch.device) -> None:
    """Data, both networks, training, tables and picture."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    data = load_digits()
    validation, test = (
        distort(d.repeat(COPIES).to(device), torch.Generator().manual_seed(s))
        for d, s in ((data.validation, VALIDATION_SEED), (data.test, TEST_SEED))
    )
    torch.manual_seed(seed)
    transformer_net, plain_net = SpatialTransformerNet().to(device), plain_cnn().to(device)
    steps = epochs * math.ceil(len(data.train) / BATCH)
    batch = batches(data.train.to(device), steps, seed)
    plain, transformer = learners = Learner(plain_net, batch, steps), Learner(transformer_net, batch, steps)
    console.print(
        f"{len(data.train)} digits to learn from, {len(data.validation)} for validation, {len(data.test)} for the "
        f"test, on {device}.\n"
        f"Parameters: plain CNN {count_parameters(plain_net):,}, with the transformer "
        f"{count_parameters(transformer_net):,}."
    )
    columns = (
        TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs)

        def report() -> None:
            errors = (
                f"validation error: plain {plain.validation[-1]:.1f} %, transformer {transformer.validation[-1]:.1f} %"
            )
            progress.update(task, advance=1, description=errors)

        train(list(learners), validation, epochs, report)
    print_tables(console, plain, transformer, test, epochs, sampler_memory(device), device)
    draw(plain, transformer, test, out)
    console.print(f"Wrote {out}: test digits, and what the transformer made of them.")


def print_tables(
    console: Any, plain: Learner, transformer: Learner, test: Scenes, epochs: int, memory: dict[str, float],
    device: torch.device,
) -> None:  # fmt: skip
    from rich.table import Table

    assert isinstance(transformer.net, SpatialTransformerNet)
    before, after = rotation_spread(transformer.net, test)
    table = Table(
        title=f"{len(test.labels):,} test scenes of {len(test.labels) // COPIES} unseen digits", title_justify="left"
    )
    table.add_column("")
    for heading in ("plain CNN", "with the transformer"):
        table.add_column(heading, justify="right")
    both = (plain, transformer)
    table.add_row("parameters", *(f"{count_parameters(learner.net):,}" for learner in both))
    table.add_row("validation error, %", *(f"{learner.validation[-1]:.2f}" for learner in both))
    table.add_row("test error, %", *(f"{learner.error(test):.2f}" for learner in both), style="bold")
    table.add_row("training, seconds per epoch", *(f"{learner.seconds / epochs:.2f}" for learner in both))
    table.add_row("rotation that it sees, std, degrees", f"{before:.1f}", f"{after:.1f}")
    console.print(table)
    shape = "×".join(map(str, MEMORY_SHAPE))
    table = Table(
        title=f"Peak memory of the sampler, {shape} fp32, forward and backward, {device}", title_justify="left"
    )
    table.add_column("")
    table.add_column("MiB beyond images, theta and gradients", justify="right")
    for name, peak in memory.items():
        table.add_row(name, f"{peak:.1f}")
    console.print(table)
    if device.type == "cpu":
        console.print(
            "On the CPU tri_stn takes torch's own sampler, a part of the grid at a time; its kernels run on GPUs."
        )


if __name__ == "__main__":
    sys.exit(main())
