"""The experiments: their data, trainings that stop and go on, both samplers, and tables that say how it came out."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tri_stn
from bench.experiments import addition, classification, crops, digits, harness
from bench.experiments.data import ADDITION, CLUTTERED, DISTORTIONS, SIDE, Images, fixed_scenes, homography, load_digits
from bench.experiments.samplers import torch_warp
from bench.experiments.training import Cost, Training, loss_difference


@pytest.fixture(autouse=True)
def on_the_cpu_path(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# --- data --------------------------------------------------------------------------------------------


def write_idx(path: Path, values: Tensor) -> None:
    content = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """A folder in MNIST's form, with few digits; some files gzipped."""
    for part, count, ending in (("train", 24, ".gz"), ("t10k", 10, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", torch.randint(256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.arange(count) % 10)
    return tmp_path


def test_mnist_is_read_from_its_own_files(mnist):
    found = load_digits(mnist)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [22, 2, 10]
    assert found.test.pixels.shape == (10, 1, 28, 28) and found.test.labels.tolist() == list(range(10))
    raw = (mnist / "t10k-images-idx3-ubyte").read_bytes()
    assert found.test.pixels[0, 0, 0, 5].item() == pytest.approx(raw[16 + 5] / 255)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda path: path.unlink(), "no t10k-images"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
        (lambda path: path.write_bytes(b"PNG"), "not a whole idx file"),
        (lambda path: write_idx(path, torch.zeros(10, 9, 9, dtype=torch.long)), "28 × 28"),
    ],
)
def test_what_is_not_mnist_is_a_sentence(mnist, damage, message):
    damage(mnist / "t10k-images-idx3-ubyte")
    with pytest.raises((OSError, ValueError), match=message):
        load_digits(mnist)


def test_no_digit_is_in_two_parts():
    found = load_digits()
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1157, 240, 400]
    rows = torch.cat([part.pixels.flatten(1) for part in (found.train, found.validation, found.test)])
    assert len(torch.unique(rows, dim=0)) == 1797


SCENES = {**DISTORTIONS, "addition": ADDITION, "cluttered": CLUTTERED}


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_always_the_same_and_grow_from_the_digit_itself(name):
    scene, images = SCENES[name], load_digits().validation[:20]
    made = fixed_scenes(images, scene, 2, seed=1)
    assert made.pixels.shape == (40, scene.channels, scene.canvas, scene.canvas)
    assert torch.equal(made.pixels, fixed_scenes(images, scene, 2, seed=1).pixels)
    assert not torch.equal(made.pixels, fixed_scenes(images, scene, 2, seed=2).pixels)
    assert made.labels.min() >= 0 and made.labels.max() < scene.classes
    easy = scene.make(images, torch.Generator().manual_seed(0), 0.0).pixels[:, :1]
    margin = (scene.canvas - SIDE) // 2
    inside = easy[..., margin : margin + SIDE, margin : margin + SIDE]
    torch.testing.assert_close(inside, images.pixels, atol=1e-4, rtol=0)  # of fp32 coordinates, times 60 pixels
    assert (easy.sum((1, 2, 3)) - inside.sum((1, 2, 3))).abs().max() < 1e-3


def test_sums_are_of_the_two_digits_and_clutter_leaves_the_digit():
    images = load_digits().validation[:30]
    pairs = ADDITION.make(images, torch.Generator().manual_seed(0), 0.0)
    nearest = torch.cdist(pairs.pixels[:, 1, 7:35, 7:35].flatten(1), images.pixels.flatten(1)).argmin(1)
    assert torch.equal(pairs.labels, images.labels + images.labels[nearest])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    cluttered = CLUTTERED.make(images, generators[0], 1.0).pixels
    alone = CLUTTERED.make(images, generators[1], 0.04).pixels  # no pieces yet
    assert cluttered.sum() > 1.5 * alone.sum() and cluttered.max() <= 1


def test_homographies_take_four_points_to_four_others():
    targets, sources = torch.rand(2, 3, 4, 2)
    matrix = homography(targets, sources).double()
    moved = torch.cat([targets.double(), torch.ones(3, 4, 1)], -1) @ matrix.mT
    torch.testing.assert_close(moved[..., :2] / moved[..., 2:], sources.double(), atol=1e-3, rtol=0)  # matrix in fp32


# --- samplers ----------------------------------------------------------------------------------------

TRANSFORMS = {
    "affine": lambda *n: tri_stn.Affine(torch.randn(*n, 2, 3)),
    "attention": lambda *n: tri_stn.Attention(torch.rand(*n), torch.rand(*n, 2)),
    "projective": lambda *n: tri_stn.Projective(torch.eye(3) + 0.1 * torch.randn(*n, 3, 3)),
    "spline": lambda *n: tri_stn.ThinPlateSpline(torch.rand(5, 2), torch.rand(*n, 5, 2)),
    "lattice": lambda *n: tri_stn.FreeForm(0.2 * torch.randn(*n, 4, 5, 2)),
    "displacement": lambda *n: tri_stn.Displacement(0.2 * torch.randn(*n, 6, 7, 2)),
    "pixels": lambda *n: tri_stn.Displacement(torch.randn(*n, 6, 7, 2), unit="pixel"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("maps", [(), (3,)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_torchs_sampler_reads_the_same(name, maps, align_corners):
    images, transform = torch.rand(2, 3, 9, 8), TRANSFORMS[name](2, *maps)
    options = {"padding_mode": "border", "align_corners": align_corners}
    expected = tri_stn.warp(images, transform, (6, 7), **options)
    # fp32 coordinates, by two roads; a spline through random points bends hard.
    torch.testing.assert_close(torch_warp(images, transform, (6, 7), **options), expected, atol=1e-3, rtol=0)


# --- trainings ---------------------------------------------------------------------------------------


def small_training(steps: int = 8) -> Training:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def batch(step: int) -> Tensor:
        return torch.rand(4, 3, generator=torch.Generator().manual_seed(step))

    return Training(model, batch, lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean(), steps, 0.1)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole, shares = small_training(), []
    whole.run(report=shares.append)
    assert shares[-1] == 1.0 and whole.losses[-1] < whole.losses[0]
    stopped, file = small_training(), tmp_path / "folder" / "checkpoint.pt"
    monkeypatch.setattr("bench.experiments.training.SAVE_EVERY", 0.0)

    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(file, stop)
    again = small_training()
    again.run(file)
    assert again.losses == whole.losses and torch.equal(again.model.weight, whole.model.weight)
    assert [path.name for path in file.parent.iterdir()] == ["checkpoint.pt"]
    finished = small_training()
    finished.run(file)
    assert torch.equal(finished.model.weight, whole.model.weight)


def test_a_loss_that_is_not_finite_stops_the_training():
    training = small_training()
    training.loss = lambda model, x: model(x).sum() * float("nan")
    with pytest.raises(FloatingPointError, match="step 1"):
        training.run()


def test_other_settings_have_another_checkpoint(tmp_path):
    one, other = (harness.Job("R FCN", {"seed": 0, "epochs": n}).file(tmp_path) for n in (1, 2))
    assert one != other and one == harness.Job("R FCN", {"epochs": 1, "seed": 0}).file(tmp_path)


def test_losses_are_compared_step_by_step():
    costs = {"tri_stn": Cost(1, 1, [2.0, 1.0, 0.5]), "torch": Cost(1, 1, [2.0, 1.1, 0.5])}
    assert loss_difference(costs) == pytest.approx(0.05)
    assert "DO NOT AGREE" in harness.agreement(costs)


def test_beats_means_by_more_than_both_spreads():
    assert classification.beats([1.0], [2.0]) and not classification.beats([2.0], [2.0])
    assert classification.beats([1.0, 1.2, 1.1], [2.0, 2.2, 2.1])
    assert not classification.beats([1.0, 2.0, 1.5], [2.0, 2.2, 2.1])


@pytest.mark.parametrize("study", [digits.STUDY, addition.STUDY])
def test_twins_have_as_many_parameters(study):
    for settings in (study.quick, study.full):
        for scene in study.scenes.values():
            for model in settings.models:
                built = classification.build(model, scene, settings, study.parallel, None)
                budget = settings.fully_connected if "FCN" in model else settings.convolutional
                assert 0.9 * budget < classification.count_parameters(built) <= budget


def test_outlines_follow_the_output_around():
    """Of the identity: the image's own edge, upper edge first."""
    outline = classification.window(tri_stn.Affine(torch.eye(2, 3)[None]), 8, steps=2)[0]
    low, high = -0.5, 7.5
    corners = outline[::2].tolist()
    assert corners == [[low, low], [high, low], [high, high], [low, high], [low, low]]


# --- commands ----------------------------------------------------------------------------------------


def test_digits_end_to_end(tmp_path, capsys, monkeypatch):
    """One short training of two models: table, picture, results; and a second call that finds all of it done."""
    monkeypatch.setattr(harness, "_cores", lambda: 1)  # in this process
    monkeypatch.setattr(classification, "load_digits", few_digits)
    arguments = ["--quick", "--epochs", "2", "--scenes", "R", "--models", "FCN", "ST-FCN affine", "--device", "cpu"]
    arguments += ["--out", str(tmp_path)]
    status = classification.main(digits.STUDY, arguments)
    printed = capsys.readouterr().out
    assert "| ST-FCN affine |" in printed and "(1.2)" in printed and "agree" in printed
    (result,) = tmp_path.glob("digits-quick-tri_stn-*.json")
    document = json.loads(result.read_text())
    assert {row["model"] for row in document["rows"]} == {"FCN", "ST-FCN affine"}
    assert status == (0 if document["ordering_held"] and document["costs"]["losses_agree"] else 1)
    assert document["costs"]["losses_agree"]
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Training, "step", None)  # nothing is left to learn …
    monkeypatch.setattr(classification, "costs", lambda *_: {n: Cost(1, 1, [1.0]) for n in ("tri_stn", "torch")})
    classification.main(digits.STUDY, arguments)
    once, twice = (text.split("## Test")[1].split("## Sampler")[0] for text in (printed, capsys.readouterr().out))
    assert once == twice
    assert not list(tmp_path.rglob(".*"))


def few_digits(mnist: Path | None = None):
    found = load_digits(mnist)
    return type(found)(
        found.name, *(Images(p.pixels[:80], p.labels[:80]) for p in (found.train, found.validation, found.test))
    )


def test_crops_end_to_end(tmp_path, capsys):
    arguments = [
        "--quick",
        "--side",
        "32",
        "--images",
        "1",
        "--windows",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert crops.main(arguments) == 0
    assert "| 2 | torch |" in capsys.readouterr().out
    assert len(list(tmp_path.glob("crops-quick-*"))) == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--epochs", "0"], "at least 1"),
        (["--mnist", "nowhere"], "no train-images"),
        (["--seeds", "1", "1"], "twice"),
        (["--device", "tpu9"], "not available"),
    ],
)
def test_wrong_arguments_are_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        classification.main(digits.STUDY, arguments)
    assert message in capsys.readouterr().err
