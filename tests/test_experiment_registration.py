"""The experiment of registration: its heads, its measures, and a run of a few steps from end to end."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("matplotlib")

from bench.experiments import registration
from bench.experiments.registration import QUICK, Registration, dice, folds
from bench.experiments.samplers import SAMPLERS
from bench.experiments.volumes import LABELS, heads

TINY = dataclasses.replace(QUICK, side=16, affine_channels=(4,), channels=(4, 4))


@pytest.fixture(autouse=True)
def on_the_cpu_path(monkeypatch):
    """The kernels have tests of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_heads_are_their_seeds_and_have_every_label():
    some, same, others = heads(3, 16, 5), heads(3, 16, 5), heads(3, 16, 6)
    assert torch.equal(some.volumes, same.volumes) and torch.equal(some.labels, same.labels)
    assert not torch.equal(some.volumes, others.volumes)
    assert some.volumes.shape == some.labels.shape == (3, 1, 16, 16, 16)
    for labels in some.labels:
        assert set(labels.unique().tolist()) == set(range(len(LABELS) + 1))
        for axis in range(1, 4):  # the head lies inside
            assert (labels.index_select(axis, torch.tensor([0, 15])) == 0).all()
    mean = [some.volumes[some.labels == value].mean() for value in range(len(LABELS) + 1)]
    assert mean[0] < mean[4] < mean[2] < mean[3]  # ground, ventricles, grey matter, white matter


def test_dice_counts_overlaps():
    one = torch.tensor([1, 1, 2, 3, 0])
    other = torch.tensor([1, 2, 2, 0, 0])
    assert dice(one, other) == [2 / 3, 2 / 3, 0.0, 0.0]


def test_folds_are_where_the_map_turns_round():
    x = torch.arange(8.0).expand(1, 1, 8, 8, 8)
    zero = torch.zeros_like(x)
    assert folds(torch.cat([-0.9 * x, zero, zero], 1)) == 0
    assert folds(torch.cat([-1.1 * x, zero, zero], 1)) == 1
    assert folds(torch.cat([zero, -2.0 * x, zero], 1)) == 0  # y moves with x: a shear


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_both_maps_in_one_read_what_the_two_read_in_turn(sampler):
    """Of a linear brightness, which reading twice does not blur; inside, where both look at the volume."""
    torch.manual_seed(0)
    model = Registration(TINY, SAMPLERS[sampler])
    torch.nn.init.normal_(model.affine.localisation.network[-1].bias, std=0.3)
    torch.nn.init.normal_(model.unet.last.weight, std=0.03)
    axis = torch.linspace(0, 1, 16)
    ramp = (axis[:, None, None] + 0.5 * axis[:, None] - 0.3 * axis)[None, None]
    found = model(ramp, torch.rand_like(ramp))
    assert found.flow.abs().max() > 0.1
    at_once = registration.tri_stn.warp(ramp, found.transform)
    inside = (slice(None), slice(None), *[slice(4, -4)] * 3)
    torch.testing.assert_close(at_once[inside], found.warped[inside], rtol=0, atol=1e-5)  # fp32's rounding
    assert (at_once - ramp)[inside].abs().max() > 0.01


def test_a_few_steps_from_end_to_end(tmp_path, capsys):
    arguments = ["--quick", "--side", "16", "--steps", "3", "--seeds", "3", "--device", "cpu", "--out", str(tmp_path)]
    status = registration.main(arguments)
    (results,) = tmp_path.glob("registration-quick-tri_stn-*.json")
    document = json.loads(results.read_text())
    assert document["costs"]["losses_agree"]
    assert status == (0 if document["dice_rises"] else 1)
    said = capsys.readouterr().out
    assert said.startswith("# 3-D registration") and results.with_suffix(".md").read_text() in said
    (row,) = document["rows"]
    for part in ("validation", "test"):
        assert list(row[part]["dice"]) == list(registration.STAGES)
        assert all(0 <= value <= 1 for labels in row[part]["dice"].values() for value in labels.values())
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))
    registration.main(arguments)  # goes on from the finished training, and says the same
    assert json.loads(results.read_text())["rows"] == document["rows"]


def test_what_does_not_fit(tmp_path, capsys):
    with pytest.raises(SystemExit):
        registration.main(["--quick", "--side", "8", "--out", str(tmp_path)])
    assert "--side must be at least 16" in capsys.readouterr().err
