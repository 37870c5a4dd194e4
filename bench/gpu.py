"""All that a GPU is needed for, in one call of under nine minutes: tests, benchmark, memory check.

Each part is a process with a time limit of its own, writes a log, and may fail without stopping the
others. Nothing is installed and no network is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .report import table

TOTAL_SECONDS = 520
"""For all parts together; what is left of nine minutes is for starting and stopping."""
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""
    """Why it cannot run on this machine."""


@dataclass(frozen=True)
class Outcome:
    part: str
    status: str
    seconds: float
    log: str

    @property
    def failed(self) -> bool:
        return not self.status.startswith(("passed", "skipped"))


def parts(out: Path, commit: str | None) -> list[Part]:
    """The parts in order: what says whether the rest can be believed comes first."""
    python = [sys.executable, "-m"]
    tests = ["pytest", "tests", "-m", "gpu", "-q", "--color=no", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]  # most of their time is compilation, on the host
    bench = ["bench", "--device", "cuda", "--out", str(out), "--time-limit", "210"]
    sanitizer = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "1"]
    return [
        Part("tests", [*python, *tests, f"--junitxml={out / 'tests.xml'}"], 210),
        Part("bench", [*python, *bench, *(["--commit", commit] if commit else [])], 250),
        Part(
            "sanitizer",
            [*sanitizer, *python, "bench.smoke"],
            60,
            # Torch's allocator hands out parts of large blocks, inside which no access is out of bounds.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "" if shutil.which(SANITIZER) else f"{SANITIZER} is not on the PATH",
        ),
    ]


def main(out: Path, commit: str | None = None) -> int:
    """Run all parts. Exit status 0 if all passed, 1 if one failed, 2 without a CUDA device."""
    if not torch.cuda.is_available():
        print("There is no CUDA device that torch can use here, and python -m bench gpu needs one.", file=sys.stderr)
        return 2
    if out.exists() and not out.is_dir():
        print(f"--out takes a folder; {out} is a file.", file=sys.stderr)
        return 2
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run(parts(out, commit), out, TOTAL_SECONDS)
    for outcome in outcomes:
        if outcome.failed:
            print(f"\n── the end of {outcome.log} ──")
            print(*(out / outcome.log).read_text(errors="replace").splitlines()[-30:], sep="\n")
    print()
    print(
        table(("part", "status", "seconds", "log"), ((o.part, o.status, f"{o.seconds:.0f}", o.log) for o in outcomes))
    )
    return int(any(outcome.failed for outcome in outcomes))


def run(parts: list[Part], out: Path, total_seconds: float) -> list[Outcome]:
    """Run the parts one after another, each within its own time and all within the total."""
    stop = time.monotonic() + total_seconds
    outcomes = []
    for part in parts:
        left = min(part.seconds, stop - time.monotonic())
        if part.unavailable:
            outcome = Outcome(part.name, f"skipped: {part.unavailable}", 0, "")
        elif left < 5:
            outcome = Outcome(part.name, "no time left", 0, "")
        else:
            print(f"{part.name}: running, for at most {left:.0f} s", flush=True)
            outcome = _run_part(part, out, left)
        print(f"{part.name}: {outcome.status}", flush=True)
        outcomes.append(outcome)
    return outcomes


def _run_part(part: Part, out: Path, seconds: float) -> Outcome:
    log = f"{part.name}.log"
    start = time.monotonic()
    with (out / log).open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | part.environment,
            cwd=Path(__file__).parents[1], start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its children: compilers, a checked process
            process.wait()
            status = f"stopped after {seconds:.0f} s"
    return Outcome(part.name, status, time.monotonic() - start, log)
