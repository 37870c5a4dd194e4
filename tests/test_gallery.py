"""The gallery: every picture is whole and legible, what it counts is right, and what is wrong gets a sentence."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import tri_stn
from tri_stn import gallery
from tri_stn.__main__ import main
from tri_stn.files import write_whole
from tri_stn.gallery import mapping, photograph, sampling_points, training, transforms
from tri_stn.gallery.page import Page
from tri_stn.transforms import Transform

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

QUICK = {"training": {"steps": 2, "frames": 2}}


@pytest.fixture(autouse=True)
def on_the_cpu_path(monkeypatch):
    """Pictures are too large for Triton's interpreter, and the kernels have tests of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gallery._one_thread():
        yield


@pytest.fixture(scope="module")
def photo():
    """Waves: no two pixels alike."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 72), torch.linspace(0, 1, 90), indexing="ij")
    return photograph.Photo(torch.stack([x, y, 0.5 + 0.5 * torch.sin(40 * x * y)])[None])


def texts(figure):
    """Everything written on a page, with the box it fills."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            yield text.get_text(), text.get_window_extent(renderer)


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_every_picture_is_whole_and_its_words_do_not_collide(name, photo, tmp_path, monkeypatch):
    pages, make = [], Page.__init__
    monkeypatch.setattr(Page, "__init__", lambda self, *size: (make(self, *size), pages.append(self))[0])
    path = tmp_path / gallery.PICTURES[name]
    importlib.import_module(f"tri_stn.gallery.{name}").draw(photo, path, **QUICK.get(name, {}))
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written beside it
    with Image.open(path) as image:
        image.load()
        assert image.size == (pages[0].width, pages[0].height)
        assert len(image.convert("RGB").getcolors(2**24)) > 8  # something is drawn
    boxes = list(texts(pages[0].figure))
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= pages[0].width and box.y0 >= 0 and box.y1 <= pages[0].height, text
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, two)


def test_holes_and_overlaps_of_a_known_map():
    """Three times as large, every third pixel is hit; a third of the size, nine land on each."""
    # A map goes from one normalised square to the other, so on three times the pixels the identity enlarges.
    larger = mapping.landings(tri_stn.Affine(torch.eye(2, 3)[None]), (4, 4), (12, 12))
    expected = torch.zeros(12, 12, dtype=torch.long)
    expected[1::3, 1::3] = 1
    assert torch.equal(larger, expected)
    smaller = mapping.landings(tri_stn.Affine(torch.eye(2, 3)[None]), (12, 12), (4, 4))
    assert torch.equal(smaller, torch.full((4, 4), 9))


def test_landings_of_a_turn_are_those_of_a_loop_over_pixels():
    height, width, angle, zoom = 9, 12, 33.0, 1.1
    forward = mapping.content_map(angle, zoom, (height, width)).inverse()
    cos, sin = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
    expected = torch.zeros(height, width, dtype=torch.long)
    for row, column in itertools.product(range(height), range(width)):
        x, y = column - (width - 1) / 2, row - (height - 1) / 2
        # Counter-clockwise as seen, with y downwards.
        to_x, to_y = round(cos * x + sin * y + (width - 1) / 2), round(-sin * x + cos * y + (height - 1) / 2)
        if 0 <= to_x < width and 0 <= to_y < height:
            expected[to_y, to_x] += 1
    assert torch.equal(mapping.landings(forward, (height, width), (height, width)), expected)
    assert (expected > 1).any() and (expected[3:6, 4:8] == 0).any()  # or the picture would show nothing


def test_sampling_points_are_those_of_affine_grid():
    theta = torch.tensor([[[0.7, 0.4, -0.3], [-0.2, 0.9, 1.1]]])
    expected = F.affine_grid(theta, (1, 1, 3, 5), align_corners=False).view(-1, 2)
    # Read bilinearly between -8 and 8 in fp32: a few roundings of 8.
    assert torch.allclose(sampling_points.looked_at(tri_stn.Affine(theta), (3, 5)), expected, atol=1e-5)
    corners = sampling_points.outline(tri_stn.Affine(theta), 2)[:2]
    expected = F.affine_grid(theta, (1, 1, 2, 2), align_corners=True)[0, 0]
    assert torch.allclose(corners, expected, atol=1e-5)


def test_every_transform_is_shown():
    public = {name: getattr(tri_stn, name) for name in tri_stn.__all__}
    classes = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Transform)}
    assert set(transforms.CODE) == classes - {"Grid"} | {"The input"}  # a stored grid has no form of its own


def test_training_starts_from_the_whole_canvas():
    scenes = training.Scenes(torch.Generator().manual_seed(0))
    index = torch.arange(training.HELD_OUT)
    shots = list(training.train(scenes, scenes.scattered(index), index[:10], 2, 2, torch.device("cpu")))
    assert [shot.step for shot in shots] == [0, 2]
    edge = training.CANVAS - 0.5
    whole = torch.tensor([[-0.5, -0.5], [edge, -0.5], [edge, edge], [-0.5, edge]])
    assert torch.allclose(shots[0].corners, whole.expand(10, 4, 2), atol=1e-4)  # a rounding of 48 pixels
    assert all(0 <= shot.error <= 100 and len(shot.answers) == 10 for shot in shots)
    assert not torch.equal(shots[1].corners, shots[0].corners)  # and moves


def test_photographs_of_every_kind(tmp_path):
    grey = photograph.prepare(torch.full((1, 1, 50, 60), 0.25))
    assert grey.pixels.shape == (1, 3, 50, 60)
    clear = photograph.prepare(torch.tensor([0.2, 0.4, 0.6, 0.0]).view(1, 4, 1, 1).expand(1, 4, 50, 60))
    assert torch.equal(clear.pixels, torch.ones(1, 3, 50, 60))  # what is transparent shows the white page
    large = photograph.prepare(torch.rand(1, 3, 400, 1000, generator=torch.Generator().manual_seed(0)))
    assert large.size == (256, 640)
    with pytest.raises(gallery.GalleryError, match="at least 48 pixels along each side; this one is 60 × 20"):
        photograph.prepare(torch.zeros(1, 3, 20, 60))


def test_the_command(tmp_path, capsys):
    """Draws what is named, into a folder that it makes; refuses the rest in a sentence."""
    photo, small, text = tmp_path / "photo.png", tmp_path / "small.png", tmp_path / "text.png"
    Image.effect_noise((80, 60), 64).save(photo)
    Image.effect_noise((20, 60), 64).save(small)
    text.write_text("no picture")
    out = tmp_path / "new" / "folder"

    def run(*arguments):
        status = main(["gallery", "--device", "cpu", *map(str, arguments)])
        return status, capsys.readouterr()

    status, printed = run("--out", out, "--photo", photo, "interpolation", "coordinates")
    assert status == 0 and "interpolation.png" in printed.out.replace("\n", "")
    assert sorted(path.name for path in out.iterdir()) == ["coordinates.png", "interpolation.png"]
    for arguments, sentence in (
        (("--out", out, "nope"), "There is no picture 'nope'; the gallery has coordinates, mapping,"),
        (("--out", photo, "coordinates"), f"Nothing can be written to {photo / 'coordinates.png'}: {photo} is not"),
        (("--out", out, "--photo", tmp_path / "none.png"), f"There is no file {tmp_path / 'none.png'}."),
        (("--out", out, "--photo", text), f"{text} is not an image that Pillow can read."),
        (("--out", out, "--photo", small), "The photograph needs at least 48 pixels along each side"),
    ):
        status, printed = run(*arguments)
        assert status == 2 and printed.err.startswith(f"tri_stn: {sentence}")
    (out / "mapping.png").mkdir()
    status, printed = run("--out", out, "--photo", photo, "mapping")
    assert status == 2 and f"Nothing can be written to {out / 'mapping.png'}: it is a folder." in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["coordinates.png", "interpolation.png", "mapping.png"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("while writing")

    with pytest.raises(RuntimeError, match="while writing"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package,name", [("matplotlib", "matplotlib"), ("PIL", "Pillow"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named(package, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(gallery.GalleryError, match=rf"needs {name}, .*: pip install tri_stn\[demo\]"):
        gallery.draw(["coordinates"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_stays_light():
    """No drawing library until something is drawn."""
    code = "import sys, tri_stn.__main__, tri_stn.gallery; print({'matplotlib', 'PIL', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
