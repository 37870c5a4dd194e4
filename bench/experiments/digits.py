"""Distorted digits: plain networks against the same with a spatial transformer (Jaderberg et al. 2015, table 1).

For each distortion (rotation R, rotation-translation-scale RTS, projective P, elastic E) and each model, one training
per seed. The fully connected network FCN and the convolutional CNN are given as many parameters as their twins
with a transformer in front, ST-FCN and ST-CNN, whose maps are affine, projective or thin-plate splines.

Fixed before any test digit was looked at: the split, the distortions of validation and test digits, the models, the
schedule. Settings were chosen on the validation digits; each network meets the test digits once, after its last
step. The exit status is 0 if ST-FCN has fewer test errors than FCN on every distortion; with several seeds,
by more than the two spreads (standard deviations) together.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn

from . import harness
from .data import DISTORTIONS, SIDE, Digits, Images, epoch_batch, fixed_scenes, load_digits
from .harness import Job
from .samplers import SAMPLERS, sampling_grid
from .training import Training, costs

PAPER = {
    "FCN": (2.1, 5.2, 3.1, 3.2),
    "CNN": (1.2, 0.8, 1.5, 1.4),
    "ST-FCN affine": (1.2, 0.8, 1.5, 2.7),
    "ST-FCN projective": (1.3, 0.9, 1.4, 2.6),
    "ST-FCN thin_plate_spline": (1.1, 0.8, 1.4, 2.4),
    "ST-CNN affine": (0.7, 0.5, 0.8, 1.2),
    "ST-CNN projective": (0.8, 0.6, 0.8, 1.3),
    "ST-CNN thin_plate_spline": (0.7, 0.5, 0.8, 1.1),
}
"""Test errors in percent, table 1, on MNIST: R, RTS, P, E."""

VALIDATION_SEED, TEST_SEED = 1, 2
COPIES = 4
"""Held-out digits are evaluated under so many distortions each, if there are less than 5,000 of them."""


@dataclass(frozen=True)
class Settings:
    """What a training is made of, apart from its model and distortion."""

    models: tuple[str, ...]
    fully_connected: int
    """Parameters of FCN and ST-FCN, about."""
    convolutional: int
    batch: int
    epochs: int
    rate: float
    ramp: float
    """Distortions grow to their full size over this part of the epochs. A classifier that has met upright digits gives the
    localisation network a reason to turn them upright.
    """
    slowness: float
    """The localisation network's share of the learning rate."""


QUICK = Settings(
    ("FCN", "CNN", "ST-FCN affine", "ST-CNN affine"), fully_connected=100_000, convolutional=32_000, batch=64, epochs=40,
    rate=3e-3, ramp=0.35, slowness=0.3,
)  # fmt: skip
FULL = Settings(
    tuple(PAPER), fully_connected=400_000, convolutional=400_000, batch=256, epochs=150, rate=3e-3, ramp=0.35, slowness=0.3,
)  # fmt: skip


# --- models ------------------------------------------------------------------------------------------


def fully_connected(side: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def convolutional(side: int, width: int) -> nn.Module:
    """The paper's: 9 × 9 and 7 × 7 filters, each with max-pooling."""
    left = ((side - 8) // 2 - 6) // 2
    return nn.Sequential(
        nn.Conv2d(1, width, 9), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(width, width, 7), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * left * left, 10),
    )  # fmt: skip


def build(name: str, canvas: int, settings: Settings, sampler: str) -> nn.Module:
    """A model of the table, as wide as its parameters allow."""
    kind, _, transform = name.partition(" ")
    plain, budget = (
        (fully_connected, settings.fully_connected) if kind.endswith("FCN") else (convolutional, settings.convolutional)
    )
    if not transform:
        return widest(lambda width: plain(canvas, width), budget)
    count = tri_stn.nn.maps.NAMED[transform]().count

    def with_transformer(width: int) -> nn.Module:
        if kind == "ST-FCN":
            localisation: nn.Module = tri_stn.nn.FullyConnected(canvas * canvas, count)
        else:
            localisation = nn.Sequential(nn.AvgPool2d(2), tri_stn.nn.Convolutional(1, count, (12, 16), pool=5))
        transformer = tri_stn.nn.SpatialTransformer(localisation, transform, (SIDE, SIDE), sampler=SAMPLERS[sampler])
        return nn.Sequential(transformer, plain(SIDE, width))

    return widest(with_transformer, budget)


def widest(build: Callable[[int], nn.Module], budget: int) -> nn.Module:
    """The model of the largest width within a number of parameters."""
    low, high = 1, 1024
    while low < high:
        middle = (low + high + 1) // 2
        with torch.device("meta"):
            fits = count_parameters(build(middle)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return build(low)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def transformers(model: nn.Module) -> list[tri_stn.nn.SpatialTransformer]:
    return [m for m in model.modules() if isinstance(m, tri_stn.nn.SpatialTransformer)]


# --- trainings ---------------------------------------------------------------------------------------


def make(job: Job, digits: Digits, sampler: str) -> Training:
    """The training of a job, from its start."""
    chosen, distortion = job.settings, DISTORTIONS[job.settings["distortion"]]
    settings = Settings(**chosen["settings"])
    train, seed, device = digits.train, chosen["seed"], torch.device(chosen["device"])
    torch.manual_seed(seed)
    model = build(chosen["model"], distortion.canvas, settings, sampler).to(device)
    per_epoch = math.ceil(len(train) / settings.batch)
    steps = settings.epochs * per_epoch

    def batch(step: int) -> Images:
        index = epoch_batch(len(train), step, settings.batch, seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return distortion.apply(train[index.to(device)], generator, min(1.0, (step + 1) / (settings.ramp * steps)))

    return Training(
        model, batch, lambda model, batch: F.cross_entropy(model(batch.pixels), batch.labels), steps, settings.rate,
        [p for t in transformers(model) for p in t.parameters()], settings.slowness,
    )  # fmt: skip


def work(job: Job, checkpoint: Path, report: Callable[[float], None]) -> dict[str, Any]:
    """One training and what came of it, on validation and test digits."""
    chosen, device = job.settings, torch.device(job.settings["device"])
    digits = on(load_digits(chosen["mnist"] and Path(chosen["mnist"])), device)
    training = make(job, digits, chosen["sampler"])
    training.run(checkpoint, report)
    errors = {
        part: error(training.model, scenes(digits, chosen["distortion"], part)) for part in ("validation", "test")
    }
    return {"parameters": count_parameters(training.model), **errors, "loss": training.losses[-1]}


def on(digits: Digits, device: torch.device) -> Digits:
    return Digits(digits.name, *(part.to(device) for part in (digits.train, digits.validation, digits.test)))


def scenes(digits: Digits, distortion: str, part: str) -> Images:
    """The held-out digits, distorted as always."""
    images = digits.test if part == "test" else digits.validation
    copies = COPIES if len(images) < 5000 else 1
    return fixed_scenes(images, DISTORTIONS[distortion], copies, TEST_SEED if part == "test" else VALIDATION_SEED)


@torch.no_grad()
def error(model: nn.Module, scenes: Images) -> float:
    """Percent of the scenes that get another digit's label."""
    model.eval()
    parts = zip(scenes.pixels.split(500), scenes.labels.split(500), strict=True)
    return 100 * sum(int((model(x).argmax(1) != y).sum()) for x, y in parts) / len(scenes)


# --- the command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write it with a picture; the exit status."""
    parser = harness.parser("digits", __doc__)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="MNIST's four idx files, plain or gzipped")
    parser.add_argument("--models", nargs="+", choices=list(PAPER), metavar="MODEL", help="only these rows")
    parser.add_argument("--distortions", nargs="+", choices=list(DISTORTIONS), default=list(DISTORTIONS))
    parser.add_argument("--epochs", type=int, help="instead of the settings' own")
    arguments = harness.parse(parser, argv)
    try:
        digits = load_digits(arguments.mnist)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    settings = asdict(QUICK if arguments.quick else FULL)
    if arguments.models:
        settings["models"] = tuple(arguments.models)
    if arguments.epochs:
        settings["epochs"] = arguments.epochs
    jobs = [
        Job(
            f"{distortion} {model} seed {seed} {arguments.sampler}",
            {
                "model": model, "distortion": distortion, "seed": seed, "sampler": arguments.sampler,
                "settings": settings, "device": str(arguments.device), "mnist": arguments.mnist and str(arguments.mnist),
            },
        )
        for distortion in arguments.distortions for model in settings["models"] for seed in arguments.seeds
    ]  # fmt: skip
    found = harness.run(jobs, work, arguments)
    return report(
        arguments, digits, settings, jobs, found, ["python", "-m", "bench.experiments.digits", *(argv or sys.argv[1:])]
    )


def report(
    arguments: argparse.Namespace, digits: Digits, settings: dict[str, Any], jobs: Sequence[Job],
    found: Sequence[dict[str, Any]], command: Sequence[str],
) -> int:  # fmt: skip
    """Tables, verdicts, picture; the exit status."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job, result in zip(jobs, found, strict=True):
        rows.setdefault((job.settings["model"], job.settings["distortion"]), []).append(result)

    def cell(model: str, distortion: str, part: str = "test") -> str:
        return spread([r[part] for r in rows[model, distortion]])

    models, distortions = settings["models"], arguments.distortions
    headers = ["test error, %", "parameters", *(f"{d} (paper)" for d in distortions)]
    table = [
        [model, f"{rows[model, distortions[0]][0]['parameters']:,}"]
        + [f"{cell(model, d)} ({PAPER[model][list(DISTORTIONS).index(d)]})" for d in distortions]
        for model in models
    ]
    validation = [[model, *(cell(model, d, "validation") for d in distortions)] for model in models]
    verdicts = {
        f"{twin} {transform} against {twin.removeprefix('ST-')}": {
            d: beats(*([r["test"] for r in rows[m, d]] for m in (f"{twin} {transform}", twin.removeprefix("ST-"))))
            for d in distortions
        }
        for twin in ("ST-FCN", "ST-CNN") for transform in ("affine", "projective", "thin_plate_spline")
        if f"{twin} {transform}" in models and twin.removeprefix("ST-") in models
    }  # fmt: skip
    said = [
        f"{digits.name}: {len(digits.train):,} digits to learn from, {len(digits.validation):,} for validation, "
        f"{len(digits.test):,} for the test, under {COPIES if len(digits.test) < 5000 else 1} distortions each. "
        f"{len(arguments.seeds)} seeds, mean ± standard deviation. Sampler: {arguments.sampler}. In brackets the paper's "
        "error, which is of MNIST and of its own distortions: an ordering to compare with, not a number to reach.",
        *(
            f"{name}: " + ", ".join(f"{d} {'fewer errors' if won else 'NOT fewer beyond the spread'}" for d, won in wins.items()) + "."
            for name, wins in verdicts.items()
        ),
    ]  # fmt: skip
    held = all(won for name, wins in verdicts.items() if name.startswith("ST-FCN") for won in wins.values())
    tables = {"Test": (headers, table), "Validation": (["validation error, %", *distortions], validation)}
    document = harness.about(arguments, command) | {
        "data": digits.name, "settings": settings, "ordering_held_for_fcn": held, "verdicts": verdicts,
        "rows": [job.settings | result for job, result in zip(jobs, found, strict=True)],
    }  # fmt: skip
    transformed = next((job for job in jobs if job.settings["model"].startswith("ST-")), None)
    if transformed is not None:
        torch.set_num_threads(1)
        local = on(digits, arguments.device)
        measured = costs(lambda sampler: make(transformed, local, sampler), arguments.device)
        said.append(
            f"{transformed.settings['model']} on {transformed.settings['distortion']}: {harness.agreement(measured)}"
        )
        tables["Sampler"] = harness.cost_table(measured)
        document["costs"] = harness.cost_document(measured)
        held = held and document["costs"]["losses_agree"]
    path = harness.stem("digits", arguments)
    harness.write_results(path, "Distorted digits", said, tables, document)
    print(path.with_suffix(".md").read_text())
    if transformed is not None:
        draw(path.with_suffix(".png"), jobs, local, arguments)
    print(f"Wrote {path}.json, .md and .png.")
    return 0 if held else 1


def spread(values: Sequence[float]) -> str:
    """Mean, and with several values their standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one has lower errors than the other, by more than both spreads together."""
    spreads = sum(statistics.stdev(values) if len(values) > 1 else 0.0 for values in (one, other))
    return statistics.fmean(other) - statistics.fmean(one) > spreads


def draw(path: Path, jobs: Sequence[Job], digits: Digits, arguments: argparse.Namespace) -> None:
    """For each distortion, the first test digit of each class, the transformer's window on it, and what it read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown: dict[tuple[str, str], Job] = {}
    for job in jobs:
        if job.settings["model"].startswith("ST-"):
            shown.setdefault((job.settings["distortion"], job.settings["model"]), job)
    ink, accent, pale = "#1f2933", "#e4572e", "#cbd2d9"
    with plt.rc_context({"font.size": 10, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": pale}):
        figure, panels = plt.subplots(2 * len(shown), 10, figsize=(11, 2.15 * len(shown)), squeeze=False)
        for row, ((distortion, name), job) in enumerate(shown.items()):
            training = make(job, digits, arguments.sampler)
            training.run(job.file(arguments.out / "checkpoints"))
            (transformer,), images = transformers(training.model.eval()), scenes(digits, distortion, "test")
            half = len(images) // COPIES if len(images) < 5000 else len(images)
            first = torch.stack([(images.labels[:half] == c).nonzero()[0, 0] for c in range(10)])
            pixels = images.pixels[first]
            with torch.no_grad():
                read, parameters = transformer(pixels, return_parameters=True)
            outline = window(transformer.map(parameters), pixels.shape[-1])
            for column in range(10):
                above, below = panels[2 * row : 2 * row + 2, column]
                above.imshow(pixels[column, 0].cpu(), cmap="gray_r", vmin=0, vmax=1)
                above.plot(*outline[column].T.tolist(), color=accent, linewidth=1.2)
                side = len(outline[column]) // 4
                above.plot(*outline[column, : side + 1].T.tolist(), color=accent, linewidth=3)
                below.imshow(read[column, 0].cpu(), cmap="gray_r", vmin=0, vmax=1)
                margin = 4
                above.set(xlim=(-margin, pixels.shape[-1] + margin), ylim=(pixels.shape[-1] + margin, -margin))
                for axes in (above, below):
                    axes.set(xticks=[], yticks=[])
            panels[2 * row, 0].set_ylabel(f"{distortion}\ninput", rotation=0, ha="right", va="center", labelpad=6)
            kind = name.replace(" ", "\n").replace("_", " ")
            panels[2 * row + 1, 0].set_ylabel(f"read by\n{kind}", rotation=0, ha="right", va="center", labelpad=6)
        figure.subplots_adjust(left=0.11, right=0.995, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05)
        harness.save_figure(figure, path)
        plt.close(figure)


def window(transform: tri_stn.transforms.Transform, side: int, steps: int = 12) -> Tensor:
    """Where the output's outline lies in the input, (N, 4 × steps + 1, 2) in pixels, upper edge first."""
    image = torch.zeros(1, 1, side, side)
    # The outline of a grid whose outermost points are the output's corners.
    moved = sampling_grid(transform, (steps + 1, steps + 1), image, True).detach().cpu()
    edges = [moved[:, 0, :-1], moved[:, :-1, -1], moved[:, -1, 1:].flip(1), moved[:, 1:, 0].flip(1), moved[:, 0, :1]]
    return ((torch.cat(edges, 1) + 1) * side - 1) / 2


if __name__ == "__main__":
    sys.exit(main())
