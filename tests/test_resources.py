"""Every kernel with every combination of stages, and for every architecture with every stage: its machine code.

Compiling needs Triton without its interpreter, so it happens in processes of its own, in parallel;
Triton's cache makes the second run quick.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import pytest

from bench.resources import ARCHITECTURES, SASS, all_cases, amd_instructions, longest_run, nvidia_instructions

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


def test_every_combination_compiles_and_every_stage_everywhere(rows):
    assert len(rows) == len(all_cases())
    found = {arch: set() for arch in ARCHITECTURES}
    for row in rows:
        found[row["arch"]].add((row["kernel"], *row["stages"].split()[2:4]))
    # A walk sees no reflection, and nearest has no gradient of the map to reduce.
    assert len(found["sm_90"]) == 9 + 6 + 9 + 6
    stages = [{(kernel, stage) for kernel, *both in some for stage in both} for some in found.values()]
    assert all(some == stages[0] for some in stages)


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
    """64 channels beside each other are read by 128-bit loads, or 64-bit for bicubic, which holds fewer."""
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
        ("scatter", "2-D bilinear", 168),
        ("scatter", "3-D bilinear", 168),
        ("scatter", "tangent", 248),  # 241 in 3-D and of cubic samples
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
        ("gather", "large", 80),
        ("walk", "large", 168),
        ("walk", "channels_last +theta K=3", 168),
        ("gather", "fill", 128),
        ("walk", "fill", 168),
        ("scatter", "fill", 168),
        ("reduce", "fill", 128),
        ("scatter", "deterministic", 192),  # 183 of 16-bit images in channels_last, two numbers a register as integers
        ("walk", "contiguous +theta K=3", 248),  # 203 in 3-D, and 243 under Triton 3.6: sums held from map to map
        ("reduce", "supersample", 176),  # 173 in 3-D, which hold a matrix's twelve gradients from sample to sample
    ],
)
def test_register_budget(rows, kernel, stages, most):
    """Registers per thread bound the warps that a multiprocessor holds: 128 let it hold sixteen."""
    budgeted = [r for r in rows if r["kernel"] == kernel and r["arch"].startswith("sm_") and stages in r["stages"]]
    budgeted = [r for r in budgeted if "float64" not in r["stages"] and "int64" not in r["stages"]]
    budgeted = [r for r in budgeted if ("tangent" in r["stages"]) == ("tangent" in stages)]
    for word in ("supersample", "large", "K=3", "fill", "deterministic"):
        budgeted = [r for r in budgeted if (word in r["stages"]) == (word in stages)]
    assert budgeted
    assert offenders(budgeted, lambda row: row["registers"] > most) == []


INSTRUCTIONS = {
    "gather affine 2-D bilinear zeros float32 contiguous C=1": "161",
    "gather affine 2-D bilinear zeros float32 contiguous C=3": "197",
    "gather affine 2-D bilinear zeros float32 contiguous C=3 large": "104+118",
    "gather affine 2-D bilinear zeros float32 contiguous": "165+87",
    "gather affine 2-D bilinear zeros float32 channels_last": "321",
    "gather affine 2-D bilinear zeros bfloat16 contiguous C=1": "168",
    "gather affine 2-D bilinear zeros bfloat16 contiguous C=3": "216",
    "gather affine 2-D bilinear zeros bfloat16 contiguous": "164+116",
    "gather affine 2-D bilinear zeros bfloat16 channels_last": "373",
    "walk affine 2-D bilinear zeros float32 contiguous +theta C=1": "453+125+226+288",
    "walk affine 2-D bilinear zeros float32 contiguous +theta C=3": "459+197+85+203",
    "walk affine 2-D bilinear zeros float32 contiguous +theta C=3 large": "359+127+204+84+200",
    "walk affine 2-D bilinear zeros float32 contiguous +theta": "491+254+56+79",
    "walk affine 2-D bilinear zeros float32 channels_last +theta": "458+389+97+102",
    "walk affine 2-D bilinear zeros bfloat16 contiguous +theta C=1": "455+125+230+295",
    "walk affine 2-D bilinear zeros bfloat16 contiguous +theta C=3": "458+199+85+216",
    "walk affine 2-D bilinear zeros bfloat16 contiguous +theta": "501+266+56+91",
    "walk affine 2-D bilinear zeros bfloat16 channels_last +theta": "438+395+89+120",
    "scatter displacement 2-D bilinear zeros float32 contiguous +theta C=3": "395",
}
"""On sm_90, as `python -m bench resources` prints them: outside of loops, then at each level of them."""


@pytest.mark.skipif(not version("triton").startswith("3.9."), reason="the counts are those of Triton 3.9")
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_budget(rows, name):
    """Where memory does not, instructions bound the speed: no level of loops may grow by more than 3 %."""
    (row,) = [r for r in rows if f"{r['kernel']} {r['stages']}" == name and r["arch"] == "sm_90"]
    budget = map(int, INSTRUCTIONS[name].split("+"))
    levels = zip_longest(row["instructions"], budget, fillvalue=0)
    assert [(count, most) for count, most in levels if count > 1.03 * most] == [], row["instructions"]


@pytest.mark.parametrize(
    "name,least",
    [
        ("gather affine 2-D bilinear zeros float32 contiguous C=3", 12),
        ("gather affine 2-D bilinear zeros bfloat16 contiguous C=3", 12),
        ("gather affine 2-D bilinear zeros float32 contiguous", 16),
        ("gather affine 3-D bilinear zeros float32 contiguous", 32),
        ("walk affine 2-D bilinear zeros float32 contiguous +theta C=3", 18),  # and its map and pixel before
        ("scatter displacement 2-D bilinear zeros float32 contiguous +theta C=3", 15),
        ("scatter displacement 2-D bilinear zeros float32 contiguous +theta", 20),
    ],
)
def test_channels_are_loaded_together(rows, name, least):
    """Of up to four channels that lie apart all corners, or a walk's three candidates, and what they are added to:
    memory takes as long for one load as for all of them, and none may stand behind a store.
    """
    found = [r for r in rows if f"{r['kernel']} {r['stages']}" == name]
    assert found
    assert offenders(found, lambda row: row["loads_together"] < least) == []


def test_loads_together_end_at_a_store_or_an_atomic():
    opcodes = ["LDG.E", "FADD", "LDG.E.64", "STG.E", "LDG.E", "LDG.E", "LDS", "LDG.E", "RED.E.ADD", "LDG.E"]
    assert longest_run(opcodes, r"LDG\b", r"(STG|REDG?|ATOMG?)\b") == 3
    assert longest_run([], "LDG", "STG") == 0


NESTED = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/               @P1 BRA 0x110 ;
        /*0040*/                   BSSY B0, 0x70 ;
        /*0050*/              @!P2 BRA 0x70 ;
        /*0060*/               @P1 BRA 0x20 ;
        /*0070*/                   BSYNC B0 ;
        /*0080*/                   FADD R1, R1, R0 ;
        /*0090*/               @P3 LDG.E R2, desc[UR4][R2.64] ;
        /*00a0*/                   FFMA R1, R1, R2, R1 ;
        /*00b0*/               @P3 BRA 0xa0 ;
        /*00c0*/                   BRA.U UP0, 0x20 ;
        /*00d0*/                   NOP ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R1 ;
        /*00f0*/               @P0 BRA 0xd0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   MUFU.RCP R1, R1 ;
        /*0120*/                   BRA 0x40 ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_instructions_are_counted_by_level():
    """An inner loop, a loop beside the outer one, a block behind the end that returns into it, and padding."""
    assert nvidia_instructions(SASS.findall(NESTED)) == [2 + 1 + 2, 9 + 2, 2]


def test_instructions_are_counted_by_level_on_amd():
    """A level is LLVM's own: what counts up may lie before its loop's first block, and belongs to it."""
    code = """
kernel:
.Lfunc_begin0:
; %bb.0:
	s_load_dword s0, s[2:3], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	s_add_i32 s1, s1, 1
	s_nop 0
	s_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
	.loc	1 90 5                          ; walk.py:90:5
	v_mov_b32_e32 v0, 0
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	v_add_u32_e32 v0, 1, v0
	s_cbranch_scc1 .LBB0_3
; %bb.5:                                ;   in Loop: Header=BB0_2 Depth=1
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	s_code_end
"""
    assert amd_instructions(code) == [3, 4, 2]
