"""3-D registration: an affine network and a displacement network learn to lay one head over another.

Volumes are made here (`volumes.py`): a skull, grey matter, white matter and ventricles, bent anew for each subject.
For a moving and a fixed volume, a `SpatialTransformer` gives an affine map, then a small U-Net the displacement that is
left; both learn from local correlation and smoothness alone, without labels, as VoxelMorph does. All of it is
`tri_stn.nn`. Dice says how well the labels of a moving volume lie over those of the fixed one: before, after
the affine map, after both.

Held-out subjects, networks, losses and schedule are the same for every seed. Settings were chosen on the validation
pairs, with a seed of its own; each training meets the test pairs once, after its last step. `AFFINE_UNIT` was chosen
so after a first test had been seen, of another learning rate for the affine network (mean Dice 0.439, 0.668, 0.746;
one seed). The exit status is 0 if on the test pairs the mean Dice rises from stage to stage for every seed, and both
samplers give the same first losses.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn

from . import harness
from .harness import Job
from .samplers import SAMPLERS
from .training import Training, costs
from .volumes import LABELS, Heads, heads

STAGES = ("before", "affine", "affine + displacement")
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 100, 1, 2
"""Of the subjects. That of a training is added to the first."""


@dataclass(frozen=True)
class Settings:
    """What a training is made of."""

    side: int
    """Voxels along an axis of a volume."""
    subjects: int
    """To learn from; pairs of them are drawn at random."""
    pairs: int
    """Of the validation, and of the test, each of two subjects of its own."""
    batch: int
    steps: int
    rate: float
    affine_channels: tuple[int, ...]
    channels: tuple[int, ...]
    """Of the U-Net, from the full size down."""
    window: int
    smoothness: float
    """What the squared slopes of the displacement count beside the correlation, which is between 0 and 1."""


QUICK = Settings(
    side=32, subjects=48, pairs=8, batch=2, steps=400, rate=3e-3, affine_channels=(8, 16, 16), channels=(8, 16, 16),
    window=7, smoothness=0.1,
)  # fmt: skip
FULL = Settings(
    side=96, subjects=200, pairs=32, batch=4, steps=6000, rate=1e-3, affine_channels=(16, 32, 32, 32),
    channels=(16, 32, 32, 32), window=9, smoothness=0.1,
)  # fmt: skip


ASIDE = 1e-3
"""Deviation of what networks give at first, beside the identity. Exactly there, every voxel is read at a kink of linear
interpolation, and a rounding decides which of two slopes is the gradient: no two samplers would learn the same.
"""

AFFINE_UNIT = 0.1
"""Of the affine network's numbers, normalised. Adam's steps have one size for all weights, and one of theta moves the
volume's edges by as many half-widths: in whole ones, the affine network hardly learned. How soon it
learns still differs from seed to seed.
"""


# --- networks ----------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two volumes in, (N, 2, *size), a displacement out, (N, 3, *size): a thousandth of a voxel at first."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(_convolution(a, b, stride=1 if a == 2 else 2) for a, b in pairwise((2, *channels)))
        upwards = list(reversed(channels))
        self.up = nn.ModuleList(_convolution(a + b, b) for a, b in pairwise(upwards))
        self.last = nn.Conv3d(channels[0], 3, 3, padding=1)
        nn.init.normal_(self.last.weight, std=ASIDE)

    def forward(self, pair: Tensor) -> Tensor:
        levels = [pair]
        for block in self.down:
            levels.append(block(levels[-1]))
        features = levels.pop()
        for block, level in zip(self.up, reversed(levels[1:]), strict=True):
            features = block(torch.cat([F.interpolate(features, size=level.shape[2:]), level], 1))
        return self.last(features)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(0.2))


@dataclass
class Registered:
    """What a `Registration` gives for N pairs."""

    affine: tri_stn.Affine
    flow: Tensor  # (N, 3, *size), in voxels, x first
    after_affine: Tensor  # (N, 1, *size), the moving volume
    warped: Tensor

    @property
    def transform(self) -> tri_stn.Compose:
        """Both maps in one, so that the moving volume, or its labels, are read once."""
        return tri_stn.Compose(tri_stn.Displacement(self.flow.movedim(1, -1), unit="pixel"), self.affine)


class _Scaled(nn.Module):
    """A network whose output counts in another unit."""

    def __init__(self, network: nn.Module, unit: float) -> None:
        super().__init__()
        self.network, self.unit = network, unit

    def forward(self, input: Tensor) -> Tensor:
        return self.unit * self.network(input)


class Registration(nn.Module):
    """Moving and fixed volumes (N, 1, *size) in; the maps, and the moving volume through them, out."""

    def __init__(self, settings: Settings, sampler: Callable[..., Tensor]) -> None:
        super().__init__()
        localisation = tri_stn.nn.Convolutional(2, 12, settings.affine_channels, kernel_size=3, pool=2, dims=3)
        nn.init.normal_(localisation[-1].bias, std=ASIDE)  # type: ignore[arg-type]
        self.affine = tri_stn.nn.SpatialTransformer(
            _Scaled(localisation, AFFINE_UNIT), tri_stn.nn.AffineMap(dims=3), sampler=sampler
        )
        self.unet = UNet(settings.channels)
        self.warp = tri_stn.nn.DisplacementWarp(x_first=True, sampler=sampler)

    def forward(self, moving: Tensor, fixed: Tensor) -> Registered:
        after_affine, theta = self.affine(torch.cat([moving, fixed], 1), moving, return_parameters=True)
        flow = self.unet(torch.cat([after_affine, fixed], 1))
        return Registered(self.affine.map(theta), flow, after_affine, self.warp(after_affine, flow))


def loss(settings: Settings) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Correlation after each stage, and smoothness of the displacement."""
    unlike, rough = tri_stn.nn.LocalNCCLoss(settings.window), tri_stn.nn.GradientLoss("l2")

    def of(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        moving, fixed = pair
        found = model(moving, fixed)
        return unlike(found.after_affine, fixed) + unlike(found.warped, fixed) + settings.smoothness * rough(found.flow)

    return of


# --- trainings ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def subjects(part: str, settings: Settings, seed: int) -> Heads:
    """Those to learn from, of a training's seed; or those of the validation or test pairs, always the same."""
    if part == "train":
        return heads(settings.subjects, settings.side, TRAIN_SEED + seed)
    return heads(2 * settings.pairs, settings.side, VALIDATION_SEED if part == "validation" else TEST_SEED)


def make(job: Job, sampler: str) -> Training:
    """The training of a job, from its start."""
    settings, seed, device = _settings(job), job.settings["seed"], torch.device(job.settings["device"])
    torch.manual_seed(seed)
    model = Registration(settings, SAMPLERS[sampler]).to(device)
    volumes = subjects("train", settings, seed).volumes.to(device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        order = torch.randperm(len(volumes), generator=generator).to(device)
        return volumes[order[: settings.batch]], volumes[order[settings.batch : 2 * settings.batch]]

    return Training(model, batch, loss(settings), settings.steps, settings.rate)


def _settings(job: Job) -> Settings:
    chosen = job.settings["settings"]
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
    return Settings(**fields)


def work(job: Job, checkpoint: Path, report: Callable[[float], None]) -> dict[str, Any]:
    """One training and what came of it, on validation and test pairs."""
    training = make(job, job.settings["sampler"])
    training.run(checkpoint, report)
    parts = {part: evaluate(training.model, part, _settings(job)) for part in ("validation", "test")}
    return {"parameters": sum(p.numel() for p in training.model.parameters()), "loss": training.losses[-1]} | parts


def pairs(part: str, settings: Settings, device: torch.device) -> Iterator[tuple[Heads, Heads]]:
    """Each held-out pair, (moving, fixed)."""
    held = subjects(part, settings, 0).to(device)
    for i in range(settings.pairs):
        yield held[torch.tensor([2 * i], device=device)], held[torch.tensor([2 * i + 1], device=device)]


@torch.no_grad()
def evaluate(model: nn.Module, part: str, settings: Settings) -> dict[str, Any]:
    """Dice of each label at each stage, the mean over pairs; and the share of voxels where a map folds, in percent."""
    model.eval()
    scores, folded = [], []
    for moving, fixed in pairs(part, settings, next(model.parameters()).device):
        found = model(moving.volumes, fixed.volumes)
        scores.append([dice(labels, fixed.labels) for labels in moved_labels(moving.labels, found).values()])
        folded.append(100 * folds(found.flow))
    mean = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()  # (pairs, stages, labels) → (stages, labels)
    found_dice = {stage: dict(zip(LABELS, row, strict=True)) for stage, row in zip(STAGES, mean, strict=True)}
    return {"dice": found_dice, "folded": statistics.fmean(folded)}


def moved_labels(labels: Tensor, found: Registered) -> dict[str, Tensor]:
    """The moving volume's labels at each stage, each read once."""
    values = labels.float()
    after = [
        tri_stn.warp(values, transform, labels.shape[2:], mode="nearest")
        for transform in (found.affine, found.transform)
    ]
    return dict(zip(STAGES, [values, *after], strict=True))


def dice(one: Tensor, other: Tensor) -> list[float]:
    """2 |A ∩ B| / (|A| + |B|) of each label."""
    values = range(1, len(LABELS) + 1)
    return [
        2 * float(((one == v) & (other == v)).sum()) / max(1.0, float((one == v).sum() + (other == v).sum()))
        for v in values
    ]


def folds(flow: Tensor) -> float:
    """The share of voxels at which the map p + flow(p), (N, 3, *size), x first, turns space inside out."""
    slopes = [torch.gradient(flow, dim=axis)[0] for axis in (4, 3, 2)]  # along x, y, z
    jacobian = torch.stack(slopes, -1).movedim(1, -2) + torch.eye(3, device=flow.device)  # (N, *size, 3, 3)
    return float((torch.linalg.det(jacobian) <= 0).double().mean())


def mean_dice(result: dict[str, Any], stage: str, part: str = "test") -> float:
    return statistics.fmean(result[part]["dice"][stage].values())


# --- the command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write it with a picture; the exit status."""
    parser = harness.parser("registration", __doc__)
    parser.add_argument("--side", type=int, help="voxels along an axis, instead of the settings' own")
    parser.add_argument("--steps", type=int, help="of the training, likewise")
    arguments = harness.parse(parser, argv)
    settings = asdict(QUICK if arguments.quick else FULL)
    settings |= {name: value for name in ("side", "steps") if (value := getattr(arguments, name)) is not None}
    smallest = 2 ** (len(settings["affine_channels"]) + 1)
    if settings["side"] < smallest or settings["steps"] < 1:
        parser.error(f"--side must be at least {smallest} and --steps at least 1.")
    jobs = [
        Job(
            f"registration seed {seed} {arguments.sampler}",
            {"seed": seed, "sampler": arguments.sampler, "settings": settings, "device": str(arguments.device)},
        )
        for seed in arguments.seeds
    ]
    found = harness.run(jobs, work, arguments)
    command = ["python", "-m", "bench.experiments.registration", *(sys.argv[1:] if argv is None else argv)]
    return report(arguments, jobs, found, command)


def report(
    arguments: argparse.Namespace, jobs: Sequence[Job], found: Sequence[dict[str, Any]], command: Sequence[str]
) -> int:
    """Tables, verdicts, picture; the exit status."""
    settings = _settings(jobs[0])

    def table(part: str) -> list[list[object]]:
        return [
            [stage, *(harness.spread([r[part]["dice"][stage][label] for r in found], 3) for label in LABELS),
             harness.spread([mean_dice(r, stage, part) for r in found], 3)]
            for stage in STAGES
        ]  # fmt: skip

    rises = all(mean_dice(r, a) < mean_dice(r, b) for r in found for a, b in pairwise(STAGES))
    measured = costs(lambda sampler: make(jobs[0], sampler), arguments.device)
    said = [
        f"Volumes of {settings.side}³ voxels: {settings.subjects} subjects to learn from, {settings.pairs} pairs of "
        f"others for validation and {settings.pairs} for the test. {settings.steps:,} steps of {settings.batch} pairs; "
        f"{found[0]['parameters']:,} parameters. "
        f"{f'{len(found)} seeds, mean ± standard deviation' if len(found) > 1 else f'Seed {arguments.seeds[0]}'}. "
        f"Sampler: {arguments.sampler}.",
        f"The mean Dice of the test pairs {'rises' if rises else 'DOES NOT rise'} from stage to stage"
        f"{' for every seed' if len(found) > 1 else ''}. The displacement folds at "
        f"{statistics.fmean(r['test']['folded'] for r in found):.3f} % of their voxels.",
        harness.agreement(measured),
    ]
    headers = ["Dice", *LABELS, "mean"]
    tables = {
        "Test": (headers, table("test")), "Validation": (headers, table("validation")),
        "Sampler": harness.cost_table(measured),
    }  # fmt: skip
    document = harness.about(arguments, command) | {
        "settings": asdict(settings), "dice_rises": rises, "costs": harness.cost_document(measured),
        "rows": [job.settings | result for job, result in zip(jobs, found, strict=True)],
    }  # fmt: skip
    path = harness.stem("registration", arguments)
    harness.write_results(path, "3-D registration", said, tables, document)
    print(path.with_suffix(".md").read_text())
    draw(path.with_suffix(".png"), jobs[0], arguments)
    print(f"Wrote {path}.json, .md and .png.")
    return 0 if rises and document["costs"]["losses_agree"] else 1


# --- the picture -------------------------------------------------------------------------------------


PLANES = {"from above": 0, "from the front": 1, "from the side": 2}
"""Slices through the middle, by the axis (z, y, x) that they cut."""
COLOURS = ("#e4572e", "#3bb273", "#2e86de", "#f2c14e")
"""Of the fixed volume's labels, as outlines."""


@torch.no_grad()
def draw(path: Path, job: Job, arguments: argparse.Namespace) -> None:
    """The first test pair in three planes, with the fixed volume's labels as outlines, and the displacement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    settings = _settings(job)
    training = make(job, arguments.sampler)
    training.run(job.file(arguments.out / "checkpoints"))
    moving, fixed = next(pairs("test", settings, arguments.device))
    found = training.model.eval()(moving.volumes, fixed.volumes)
    shown = {
        "fixed": fixed.volumes, "moving": moving.volumes, "after the affine map": found.after_affine,
        "after the displacement": tri_stn.warp(moving.volumes, found.transform),
    }  # fmt: skip
    ink = "#1f2933"
    with plt.rc_context({"font.size": 10, "text.color": ink, "axes.labelcolor": ink}):
        figure, panels = plt.subplots(3, 5, figsize=(11, 7.1), squeeze=False)
        for (plane, axis), row in zip(PLANES.items(), panels, strict=True):
            outline = _slice(fixed.labels, axis)
            for (title, volume), axes in zip(shown.items(), row, strict=False):
                axes.imshow(_slice(volume, axis), cmap="gray", vmin=0, vmax=1)
                for value, colour in enumerate(COLOURS, 1):
                    axes.contour(outline == value, [0.5], colors=colour, linewidths=0.7)
                axes.set_title(title if axis == 0 else "")
            flow = _slice(found.flow.flip(1), axis)  # (z, y, x) first
            down, across = (i for i in range(3) if i != axis)
            index = torch.arange(settings.side).numpy()
            y, x = index[:, None] + flow[down], index + flow[across]
            step = max(1, math.ceil(settings.side / 32))
            row[-1].plot(x[:, ::step], y[:, ::step], color=ink, linewidth=0.4)
            row[-1].plot(x[::step].T, y[::step].T, color=ink, linewidth=0.4)
            row[-1].set(xlim=(-0.5, settings.side - 0.5), ylim=(settings.side - 0.5, -0.5), aspect="equal")
            row[-1].set_title("where it reads" if axis == 0 else "")
            row[0].set_ylabel(plane)
            for axes in row:
                axes.set(xticks=[], yticks=[])
        figure.legend(
            [Line2D([], [], color=c) for c in COLOURS], [f"{label} of the fixed volume" for label in LABELS],
            loc="lower center", ncols=len(LABELS), frameon=False,
        )  # fmt: skip
        figure.subplots_adjust(left=0.03, right=0.995, top=0.96, bottom=0.05, wspace=0.04, hspace=0.04)
        harness.save_figure(figure, path)
        plt.close(figure)


def _slice(volume: Tensor, axis: int) -> Any:
    """The middle slice of the one volume of a batch, (H, W), or (C, H, W) of several channels, as numpy's."""
    return volume[0].squeeze(0).select(axis - 3, volume.shape[2 + axis] // 2).cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
