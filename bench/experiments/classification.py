"""Classifiers of digits with and without spatial transformers: what the experiments with digits share.

A study names its scenes, models and settings; `main` trains every model on every scene, prints the table and writes
it with a picture.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn

from . import harness
from .data import SIDE, Digits, Images, Scene, epoch_batch, fixed_scenes, load_digits
from .harness import Job
from .samplers import SAMPLERS, sampling_grid
from .training import Training, costs

VALIDATION_SEED, TEST_SEED = 1, 2
COPIES, FEW = 4, 5000
"""Held-out digits are in so many scenes each, if there are few of them."""


@dataclass(frozen=True)
class Settings:
    """What a training is made of, apart from its model and scene."""

    models: tuple[str, ...]
    fully_connected: int
    """Parameters of FCN and ST-FCN, about."""
    convolutional: int
    batch: int
    epochs: int
    rate: float
    ramp: float
    """Scenes grow to their full difficulty over this part of the epochs. A classifier that has met upright digits gives
    the localisation network a reason to turn them upright.
    """


@dataclass(frozen=True)
class Study:
    """One experiment."""

    name: str
    """Of its module in this package, which has it as STUDY."""
    title: str
    doc: str
    scenes: Mapping[str, Scene]
    paper: Mapping[str, Sequence[float]]
    """Test errors in percent, scene by scene, of the models that the paper has."""
    quick: Settings
    full: Settings
    parallel: int | None = None
    """Transformers beside each other, where there are any."""


# --- models ------------------------------------------------------------------------------------------


def fully_connected(channels: int, side: int, classes: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, classes),
    )  # fmt: skip


def convolutional(channels: int, side: int, classes: int, width: int) -> nn.Module:
    """The paper's: 9 × 9 and 7 × 7 filters, each with max-pooling."""
    left = ((side - 8) // 2 - 6) // 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 9), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(width, width, 7), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(width * left * left, classes),
    )  # fmt: skip


def build(name: str, scene: Scene, settings: Settings, parallel: int | None, sampler: str | None) -> nn.Module:
    """A model of the table, as wide as its parameters allow."""
    kind, _, transform = name.partition(" ")
    plain, budget = (
        (fully_connected, settings.fully_connected) if kind.endswith("FCN") else (convolutional, settings.convolutional)
    )
    if not transform:
        return widest(lambda width: plain(scene.channels, scene.canvas, scene.classes, width), budget)
    maps = parallel or 1
    count = maps * tri_stn.nn.maps.NAMED[transform]().count

    def with_transformer(width: int) -> nn.Module:
        if kind == "ST-FCN":
            localisation: nn.Module = tri_stn.nn.FullyConnected(scene.channels * scene.canvas**2, count)
        else:
            head = tri_stn.nn.Convolutional(scene.channels, count, (12, 16), pool=5)
            localisation = nn.Sequential(nn.AvgPool2d(2), head)
        transformer = tri_stn.nn.SpatialTransformer(
            localisation, transform, (SIDE, SIDE), parallel=parallel, sampler=SAMPLERS[sampler or "tri_stn"]
        )
        stack = [nn.Flatten(1, 2)] if parallel else []  # the maps' outputs, as channels
        return nn.Sequential(transformer, *stack, plain(scene.channels * maps, SIDE, scene.classes, width))

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


def study_of(job: Job) -> Study:
    return importlib.import_module(f".{job.settings['study']}", __package__).STUDY


def make(job: Job, digits: Digits, sampler: str | None) -> Training:
    """The training of a job, from its start."""
    chosen, study = job.settings, study_of(job)
    settings, scene = Settings(**chosen["settings"]), study.scenes[chosen["scene"]]
    train, seed, device = digits.train, chosen["seed"], torch.device(chosen["device"])
    torch.manual_seed(seed)
    model = build(chosen["model"], scene, settings, study.parallel, sampler).to(device)
    steps = settings.epochs * math.ceil(len(train) / settings.batch)

    def batch(step: int) -> Images:
        index = epoch_batch(len(train), step, settings.batch, seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return scene.make(train[index.to(device)], generator, min(1.0, (step + 1) / (settings.ramp * steps)))

    return Training(
        model, batch, lambda model, batch: F.cross_entropy(model(batch.pixels), batch.labels), steps, settings.rate
    )


def work(job: Job, checkpoint: Path, report: Callable[[float], None]) -> dict[str, Any]:
    """One training and what came of it, on validation and test digits."""
    chosen, device = job.settings, torch.device(job.settings["device"])
    digits = on(load_digits(chosen["mnist"] and Path(chosen["mnist"])), device)
    training = make(job, digits, chosen["sampler"])
    training.run(checkpoint, report)
    scene = study_of(job).scenes[chosen["scene"]]
    errors = {part: error(training.model, held_out(digits, scene, part)) for part in ("validation", "test")}
    return {"parameters": count_parameters(training.model), **errors, "loss": training.losses[-1]}


def on(digits: Digits, device: torch.device) -> Digits:
    return Digits(digits.name, *(part.to(device) for part in (digits.train, digits.validation, digits.test)))


def held_out(digits: Digits, scene: Scene, part: str) -> Images:
    """The scenes of validation or test digits, always the same."""
    images = digits.test if part == "test" else digits.validation
    return fixed_scenes(images, scene, _copies(images), TEST_SEED if part == "test" else VALIDATION_SEED)


def _copies(images: Images) -> int:
    return COPIES if len(images) < FEW else 1


@torch.no_grad()
def error(model: nn.Module, scenes: Images) -> float:
    """Percent of the scenes that get another label than theirs."""
    model.eval()
    parts = zip(scenes.pixels.split(500), scenes.labels.split(500), strict=True)
    return 100 * sum(int((model(x).argmax(1) != y).sum()) for x, y in parts) / len(scenes)


# --- the command -------------------------------------------------------------------------------------


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write it with a picture; the exit status."""
    parser = harness.parser(study.name, study.doc)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="MNIST's four idx files, plain or gzipped")
    known = list(dict.fromkeys([*study.paper, *study.quick.models]))
    parser.add_argument("--models", nargs="+", choices=known, metavar="MODEL", help=f"only these: {', '.join(known)}")
    parser.add_argument("--scenes", nargs="+", choices=list(study.scenes), default=list(study.scenes))
    parser.add_argument("--epochs", type=int, help="instead of the settings' own")
    arguments = harness.parse(parser, argv)
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {arguments.epochs}.")
    try:
        digits = load_digits(arguments.mnist)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    settings = asdict(study.quick if arguments.quick else study.full)
    models = settings["models"] = tuple(arguments.models or settings["models"])
    settings["epochs"] = arguments.epochs or settings["epochs"]
    common = {
        "study": study.name, "settings": settings, "device": str(arguments.device),
        "mnist": str(arguments.mnist) if arguments.mnist else None,
    }  # fmt: skip

    def job(scene: str, model: str, seed: int) -> Job:
        # A plain network samples nothing, so that its training serves both samplers.
        sampler = arguments.sampler if model.startswith("ST-") else None
        chosen = {"model": model, "scene": scene, "seed": seed, "sampler": sampler, **common}
        return Job(f"{scene} {model} seed {seed}", chosen)

    jobs = [job(scene, model, seed) for scene in arguments.scenes for model in models for seed in arguments.seeds]
    found = harness.run(jobs, work, arguments)
    command = ["python", "-m", f"bench.experiments.{study.name}", *(sys.argv[1:] if argv is None else argv)]
    return report(study, arguments, digits, jobs, found, command)


def report(
    study: Study, arguments: argparse.Namespace, digits: Digits, jobs: Sequence[Job],
    found: Sequence[dict[str, Any]], command: Sequence[str],
) -> int:  # fmt: skip
    """Tables, verdicts, picture; the exit status."""
    settings, scenes = jobs[0].settings["settings"], arguments.scenes
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job, result in zip(jobs, found, strict=True):
        results.setdefault((job.settings["model"], job.settings["scene"]), []).append(result)

    def errors(model: str, scene: str, part: str = "test") -> list[float]:
        return [result[part] for result in results[model, scene]]

    models = settings["models"]
    places = [list(study.scenes).index(scene) for scene in scenes]
    test = [
        [model, f"{results[model, scenes[0]][0]['parameters']:,}"]
        + [
            harness.spread(errors(model, s)) + (f" ({study.paper[model][i]})" if model in study.paper else "")
            for s, i in zip(scenes, places, strict=True)
        ]
        for model in models
    ]
    validation = [[model, *(harness.spread(errors(model, s, "validation")) for s in scenes)] for model in models]
    verdicts = {
        f"{model} against {plain}": {s: beats(errors(model, s), errors(plain, s)) for s in scenes}
        for model in models
        if model.startswith("ST-") and (plain := model.split()[0].removeprefix("ST-")) in models
    }
    said = [
        f"{digits.name}: {len(digits.train):,} digits to learn from, {len(digits.validation):,} for validation, "
        f"{len(digits.test):,} for the test, in {_copies(digits.test)} scenes each. Seeds: {arguments.seeds}; mean "
        f"± standard deviation. Sampler: {arguments.sampler}. In brackets the paper's error, which is of MNIST and "
        "of its own scenes: an ordering to compare with, not a number to reach."
    ]
    for name, wins in verdicts.items():
        outcomes = [f"{s} {'fewer errors' if won else 'NOT fewer beyond the spread'}" for s, won in wins.items()]
        said.append(f"{name}: {', '.join(outcomes)}.")
    # The paper's ordering is held to where it is largest; where there is no ST-FCN, to all.
    judged = [name for name in verdicts if name.startswith("ST-FCN")] or list(verdicts)
    held = all(won for name in judged for won in verdicts[name].values())
    tables = {
        "Test": (["test error, %", "parameters", *(f"{s} (paper)" for s in scenes)], test),
        "Validation": (["validation error, %", *scenes], validation),
    }
    document = harness.about(arguments, command) | {
        "data": digits.name, "settings": settings, "ordering_held": held, "verdicts": verdicts,
        "rows": [job.settings | result for job, result in zip(jobs, found, strict=True)],
    }  # fmt: skip
    path = harness.stem(study.name, arguments)
    local = on(digits, arguments.device)
    shown = [
        job for job in jobs if job.settings["model"].startswith("ST-") and job.settings["seed"] == arguments.seeds[0]
    ]
    if shown:
        measured = costs(lambda sampler: make(shown[0], local, sampler), arguments.device)
        said.append(f"{shown[0].title}: {harness.agreement(measured)}")
        tables["Sampler"] = harness.cost_table(measured)
        document["costs"] = harness.cost_document(measured)
        held = held and document["costs"]["losses_agree"]
        draw(path.with_suffix(".png"), shown, local, arguments)
    harness.write_results(path, study.title, said, tables, document)
    print(path.with_suffix(".md").read_text())
    print(f"Wrote {path}.json and .md{' and .png' if shown else ''}.")
    return 0 if held else 1


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one has lower errors than the other, by more than both spreads together."""
    spreads = sum(statistics.stdev(values) if len(values) > 1 else 0.0 for values in (one, other))
    return statistics.fmean(other) - statistics.fmean(one) > spreads


INK, PALE, ACCENTS = "#1f2933", "#cbd2d9", ("#e4572e", "#2e7de4")


def draw(path: Path, jobs: Sequence[Job], digits: Digits, arguments: argparse.Namespace) -> None:
    """For each job the first test digit of each class, the transformer's windows on it, and what it read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [_seen(job, digits, arguments) for job in jobs]
    maps = rows[0][2].shape[1]
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": PALE}):
        size = (11, 1.06 * len(jobs) * (1 + maps))
        figure, panels = plt.subplots((1 + maps) * len(jobs), 10, figsize=size, squeeze=False)
        for row, (job, (pixels, outlines, read)) in enumerate(zip(jobs, rows, strict=True)):
            block = panels[(1 + maps) * row : (1 + maps) * (row + 1)]
            for column in range(10):
                _show_input(block[0, column], pixels[column], outlines[column])
                for k in range(maps):
                    _show(block[1 + k, column], read[column, k])
                    block[1 + k, column].spines[:].set(color=ACCENTS[k % len(ACCENTS)], linewidth=1.2)
            label = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
            block[0, 0].set_ylabel(f"{job.settings['scene']}\ninput", **label)
            kind = job.settings["model"].replace(" ", "\n").replace("_", " ")
            block[1, 0].set_ylabel(f"read by\n{kind}", **label)
        figure.subplots_adjust(left=0.11, right=0.995, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05)
        harness.save_figure(figure, path)
        plt.close(figure)


@torch.no_grad()
def _seen(job: Job, digits: Digits, arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Ten test scenes (10, C, H, W), their windows' outlines (10, K, points, 2), what was read (10, K, C, h, w)."""
    training = make(job, digits, arguments.sampler)
    training.run(job.file(arguments.out / "checkpoints"))
    (transformer,), scene = transformers(training.model.eval()), study_of(job).scenes[job.settings["scene"]]
    scenes = held_out(digits, scene, "test")
    # The first test digit of each class: shown as they come, not chosen.
    first = torch.stack([(digits.test.labels == c).nonzero()[0, 0] for c in range(10)])
    pixels = scenes.pixels[first]
    read, parameters = transformer(pixels, return_parameters=True)
    outlines = window(transformer.map(parameters), pixels.shape[-1])
    if read.dim() == 4:
        read, outlines = read.unsqueeze(1), outlines.unsqueeze(1)
    return pixels.cpu(), outlines, read.cpu()


def _show(axes: Any, pixels: Tensor) -> None:
    """One channel as ink, two as two inks."""
    ink = pixels.unsqueeze(-1)  # (C, H, W, 1)
    colours = torch.tensor([[1.0, 1.0, 1.0]] if len(pixels) == 1 else [[0.1, 0.6, 0.9], [0.8, 0.4, 0.0]])
    axes.imshow((1 - (ink * colours[:, None, None]).sum(0)).clamp(0, 1).numpy())
    axes.set(xticks=[], yticks=[])


def _show_input(axes: Any, pixels: Tensor, outlines: Tensor, margin: int = 4) -> None:
    """A scene with its windows; a thick line is the upper edge, which shows what is taken to be up."""
    _show(axes, pixels)
    for k, outline in enumerate(outlines):
        colour, edge = ACCENTS[k % len(ACCENTS)], len(outline) // 4
        axes.plot(*outline.T.tolist(), color=colour, linewidth=1.2)
        axes.plot(*outline[: edge + 1].T.tolist(), color=colour, linewidth=3)
    side = pixels.shape[-1]
    axes.set(xlim=(-margin, side - 1 + margin), ylim=(side - 1 + margin, -margin))


def window(transform: tri_stn.transforms.Transform, side: int, steps: int = 12) -> Tensor:
    """Where the output's outline lies in the input, (N, [K,] 4 × steps + 1, 2) in pixels, upper edge first."""
    # The outline of a grid whose outermost points are the output's corners.
    grid = sampling_grid(transform, (steps + 1, steps + 1), torch.zeros(1, 1, side, side), True).detach().cpu()
    rows, columns = grid.movedim(-3, 0), grid.movedim(-2, 0)
    edges = [rows[0][..., :-1, :], columns[-1][..., :-1, :], rows[-1].flip(-2)[..., :-1, :], columns[0].flip(-2)]
    return ((torch.cat(edges, -2) + 1) * side - 1) / 2
