"""The table of errors against fp64: that it can be made, and what it must show."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from bench import precision
from bench.__main__ import main

ROUNDED = [s for s in precision.SETTINGS if s.name != "fp32"]


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """Not the interpreter, which would take minutes for images of these widths."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("setting", ROUNDED, ids=lambda s: s.name)
def test_no_16_bit_error_is_above_that_of_torch(setting, width):
    """In fp32 both round a few times at the size of the image, and either may be ahead."""
    ours, theirs = (asdict(precision.measure(setting, width, p, torch.device("cpu"))) for p in ("tri_stn", "torch"))
    assert {name for name, error in ours.items() if isinstance(error, float) and error > theirs[name]} == set()


@pytest.mark.parametrize("setting", precision.SETTINGS, ids=lambda s: s.name)
def test_errors_are_those_of_fp32_and_one_rounding(setting):
    row = precision.measure(setting, 64, "tri_stn", torch.device("cpu"))
    assert row.other_pixels_forward == row.other_pixels_backward == 0
    allowed = torch.finfo(setting.dtype).eps + 2 * 64 * torch.finfo(torch.float32).eps
    assert max(row.output_max, row.grad_input_max, row.grad_theta_max) <= allowed


def test_a_fifth_of_a_pixel_is_noticed(monkeypatch):
    """The measure of what is read is right: moved by 0.2 pixels, a fifth of the samples have other neighbours."""
    moved = 0.2 * 2 / 64

    def sample(image, theta, size):
        return precision.tri_stn_sample(image, theta + theta.new_tensor([[0, 0, moved], [0, 0, 0]]), size)

    monkeypatch.setitem(precision.PROVIDERS, "moved", sample)
    row = precision.measure(precision.SETTINGS[0], 64, "moved", torch.device("cpu"))
    assert row.other_pixels_forward == row.other_pixels_backward == pytest.approx(0.2, abs=0.05)
    assert row.output_max > 0.05


def test_command_says_where_it_ran(tmp_path, capsys):
    file = tmp_path / "precision.json"
    command = ["precision", "--width", "16", "--device", "cpu", "--markdown", "--json", str(file)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["device"] in shown and "(cpu)" in shown
    assert len(written["rows"]) == precision.count([16]) == shown.count("| 16 |")


def test_command_refuses_what_it_cannot_do(capsys):
    assert main(["precision", "--width", "1"]) == 2
    assert "at least 2 pixels" in capsys.readouterr().err
