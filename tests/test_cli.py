"""The command line: what it does to a picture's content, what it keeps, and how it refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tri_stn.__main__ import affine_theta

ROOT = Path(__file__).parents[1]
# The suite may run under Triton's interpreter; users of the command do not.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# Importing torch takes seconds: one process runs all of a test's commands.
DRIVER = """
import contextlib, io, json, sys
from tri_stn.__main__ import main
results = []
for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(command)
    results.append((status, stderr.getvalue()))
print(json.dumps(results))
"""


def warp(*commands: list[object]) -> list[tuple[int, str]]:
    """Run `warp IN OUT …` for each, on the CPU; exit status and stderr of each."""
    arguments = [["warp", *map(str, command), "--device", "cpu"] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(arguments), capture_output=True, text=True, cwd=ROOT,
        env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


def picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Noise: equal to itself in no other position. Alpha, where there is one, is never 0."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype, endpoint=True)
    if channels in (2, 4):
        array[..., -1] |= 1
    return array[..., 0] if channels == 1 else array


def save(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array).save(path)
    return path


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_identity_keeps_pixels_and_channels_exactly(tmp_path: Path) -> None:
    arrays = [picture(13, 22, channels) for channels in (1, 2, 3, 4)] + [picture(13, 22, 1, np.uint16)]
    pairs = [(save(a, tmp_path / f"in{i}.png"), tmp_path / f"out{i}.png") for i, a in enumerate(arrays)]
    assert warp(*([*pair] for pair in pairs)) == [(0, "")] * len(pairs)
    for array, (_, out) in zip(arrays, pairs, strict=True):
        result = load(out)
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result, array)


def test_content_moves_as_documented(tmp_path: Path) -> None:
    square, wide = picture(33, 33), picture(30, 50)
    a, b = save(square, tmp_path / "square.png"), save(wide, tmp_path / "wide.png")
    out = [tmp_path / f"{i}.png" for i in range(5)]
    results = warp(
        [a, out[0], "--rotate", 90],
        [b, out[1], "--rotate", 90],
        [b, out[2], "--translate", 0.2, 0.1],
        [b, out[3], "--size", 100, 60, "--mode", "nearest"],
        [a, out[4], "--rotate", -90, "--align-corners"],
    )
    assert results == [(0, "")] * 5
    np.testing.assert_array_equal(load(out[0]), np.rot90(square))
    # In a wide picture the middle square turns as a square would: nothing is stretched.
    turned = load(out[1])
    np.testing.assert_array_equal(turned[:, 10:40], np.rot90(wide[:, 10:40]))
    assert not turned[:, :10].any() and not turned[:, 40:].any()
    moved = load(out[2])  # a fifth of 50 to the right, a tenth of 30 down
    np.testing.assert_array_equal(moved[3:, 10:], wide[:-3, :-10])
    assert not moved[:3].any() and not moved[:, :10].any()
    np.testing.assert_array_equal(load(out[3]), wide.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(load(out[4]), np.rot90(square, -1))


def test_exif_orientation_is_applied_and_transparent_edges_keep_their_colour(tmp_path: Path) -> None:
    array = picture(10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    red = np.zeros((20, 20, 4), np.uint8)
    red[5:15, 5:15] = (255, 0, 0, 255)
    save(red, tmp_path / "red.png")
    results = warp(
        [tmp_path / "turned.png", tmp_path / "upright.png"],
        [tmp_path / "red.png", tmp_path / "diamond.png", "--rotate", 45],
    )
    assert results == [(0, "")] * 2
    np.testing.assert_array_equal(load(tmp_path / "upright.png"), np.rot90(array, -1))
    diamond = load(tmp_path / "diamond.png")
    seen = diamond[diamond[..., 3] > 0]
    assert (seen[:, 3] < 255).any()  # soft edges
    assert (seen[:, :3] == (255, 0, 0)).all()


def test_errors_are_one_sentence_with_status_2_and_leave_no_file(tmp_path: Path) -> None:
    good, deep, out = save(picture(4, 4), tmp_path / "good.png"), tmp_path / "deep.png", tmp_path / "out.png"
    alpha, grey16 = save(picture(4, 4, 4), tmp_path / "alpha.png"), tmp_path / "grey16.png"
    save(picture(4, 4, 1, np.uint16), grey16)
    long = save(np.zeros((1, 2**24 + 1), np.uint8), tmp_path / "long.png")
    write_deep_colour_png(deep)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none.png", out], "There is no file"),
        ([text, out], "not an image"),
        ([tmp_path, out], "could not be read"),
        ([deep, out], "more than 8 bits"),
        ([good, tmp_path / "no" / "out.png"], "There is no folder"),
        ([good, tmp_path / "out.xyz"], "extension must be one of"),
        ([alpha, tmp_path / "out.jpg"], "hold no transparency"),
        ([grey16, tmp_path / "out.webp"], "8 bits per channel"),
        ([good, out, "--scale", 0], "scale must be positive"),
        ([good, out, "--size", 0, 4], "--size must be positive"),
        ([good, out, "--size", 2**24 + 1, 1], "--size must be at most 16777216 pixels along an axis"),
        ([good, out, "--size", 2**14, 2**14 + 1], "and 268435456 in all; got 16384 16385"),
        ([long, out], f"The size of {long} must be at most 16777216 pixels along an axis"),
    ]
    for (status, stderr), (command, expected) in zip(warp(*(c for c, _ in cases)), cases, strict=True):
        assert status == 2, command
        assert expected in stderr and stderr.startswith("tri_stn: ") and stderr.count("\n") == 1, stderr
    assert sorted(tmp_path.iterdir()) == before


def test_module_is_a_command(tmp_path: Path) -> None:
    source, out = save(picture(6, 8), tmp_path / "in.png"), tmp_path / "out.png"
    for given, status in ((source, 0), (tmp_path / "none.png", 2)):
        command = [sys.executable, "-m", "tri_stn", "warp", str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)
        assert done.returncode == status
        assert bool(done.stderr) == bool(status)
        assert out.exists() != bool(status)
        out.unlink(missing_ok=True)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(40, 60), (31, 31)])
def test_theta_is_the_inverse_of_what_happens_to_the_content(size: tuple[int, int], align_corners: bool) -> None:
    """Move a content point by hand, in pixels; theta must send it back to where it came from."""
    theta = affine_theta(90, 0.5, 45, (0.25, -0.1), size=size, align_corners=align_corners)
    assert theta.shape == (1, 2, 3)
    x, y = 7.0, 4.0  # pixels from the centre, y down
    x, y = 0.5 * x, 0.5 * y
    x, y = x - y, y  # the upper half leans to the right
    x, y = y, -x  # counter-clockwise as seen
    x, y = x + 0.25 * size[1], y - 0.1 * size[0]
    half_height, half_width = ((s - align_corners) / 2 for s in size)
    found = theta[0] @ torch.tensor([x / half_width, y / half_height, 1.0], dtype=torch.float64)
    expected = torch.tensor([7 / half_width, 4 / half_height], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # fp64 throughout


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": -1.0}, {"shear": 90.0}, {"rotate": float("nan")}, {"translate": (0.0, 1e999)}]
)
def test_theta_refuses_what_has_no_inverse(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        affine_theta(**options, size=(4, 4))


def write_deep_colour_png(path: Path) -> None:
    """One RGB pixel of 16 bits per channel, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + b"\x12\x34" * 3)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
