"""Every kernel with every combination of stages, compiled for every architecture: its machine code.

Compiling needs Triton without its interpreter, so it happens in processes of its own, in parallel;
Triton's cache makes the second run quick.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.resources import ARCHITECTURES, all_cases

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("resources") / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "resources", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads(file.read_text())


def offenders(rows, wrong):
    return [f"{row['kernel']} {row['stages']} {row['arch']}: {row}" for row in rows if wrong(row)]


def test_every_combination_compiles_everywhere(rows):
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert len(rows) == len(all_cases())


def test_nothing_spills(rows):
    """Registers hold everything: no spill instruction, no stack frame, no local or scratch memory."""
    assert offenders(rows, lambda row: row["spills"] or row["local_bytes"]) == []


def test_only_the_scatter_has_atomics(rows):
    """And the reduction onto the many numbers of a chain, whose programs share slots."""
    allowed = {id(row) for row in rows if row["kernel"] == "reduce" and ("[" in row["stages"] or "+d" in row["stages"])}
    assert allowed
    assert offenders(rows, lambda r: r["atomics"] and r["kernel"] != "scatter" and id(r) not in allowed) == []
    assert all(row["atomics"] for row in rows if row["kernel"] == "scatter")


def test_no_compare_and_swap_loop(rows):
    """Scalar 16-bit atomics become one on every architecture; nothing here may."""
    assert offenders(rows, lambda row: row["cas_loops"]) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_channels_last_loads_are_wide(rows, arch):
    """32 channels beside each other are read by 128-bit loads, or 64-bit for bicubic, which holds fewer."""
    kernels = [r for r in rows if r["arch"] == arch and "channels_last" in r["stages"]]
    kernels = [r for r in kernels if "float64" not in r["stages"] and "C=" not in r["stages"]]
    assert kernels
    allowed = {True: {"64", "128"}, False: {"128"}}
    assert offenders(kernels, lambda row: not allowed["bicubic" in row["stages"]] & set(row["load_widths"])) == []
    assert offenders(kernels, lambda row: "16" in row["load_widths"]) == []


@pytest.mark.parametrize(
    "kernel,stages,most",
    [
        ("gather", "affine 2-D bilinear", 80),
        ("walk", "affine 2-D bilinear zeros", 128),
        ("reduce", "affine 2-D bilinear", 128),
        ("scatter", "affine 2-D bilinear", 168),
        ("gather", "", 128),
        ("walk", "", 168),
        ("reduce", "", 168),
        ("gather", "affine 2-D bilinear border float32 contiguous tangent", 80),
        ("walk", "affine 2-D bilinear border float32 contiguous +theta tangent", 168),
        ("gather", "supersample", 128),
        ("walk", "supersample", 168),
        ("scatter", "supersample", 168),
        ("scatter", "affine 2-D bilinear border float32 contiguous +theta large", 168),
        ("reduce", "affine 2-D bilinear border float32 contiguous large", 128),
        ("reduce", "affine 2-D bilinear border bfloat16 channels_last large", 128),
        ("reduce", "affine 2-D bilinear border float32 contiguous tangent large", 168),
        ("reduce", "supersample=0 large", 128),
        ("reduce", "large", 240),  # 235 in 3-D on sm_80: a homography's sixteen gradients, held from tile to tile
        ("scatter", "large", 240),  # 221, and 225 under Triton 3.6: two programs of 4 warps fit up to 255
        ("reduce", "supersample", 176),  # 173 in 3-D, which hold a matrix's twelve gradients from sample to sample
    ],
)
def test_register_budget(rows, kernel, stages, most):
    """Registers per thread bound the warps that a multiprocessor holds: 128 let it hold sixteen."""
    budgeted = [r for r in rows if r["kernel"] == kernel and r["arch"].startswith("sm_") and stages in r["stages"]]
    budgeted = [r for r in budgeted if "float64" not in r["stages"] and "int64" not in r["stages"]]
    budgeted = [r for r in budgeted if ("tangent" in r["stages"]) == ("tangent" in stages)]
    for word in ("supersample", "large"):
        budgeted = [r for r in budgeted if (word in r["stages"]) == (word in stages)]
    assert budgeted
    assert offenders(budgeted, lambda row: row["registers"] > most) == []
