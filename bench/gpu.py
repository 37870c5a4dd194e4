"""All that a GPU is needed for, in calls of under nine minutes: tests, memory check, benchmark.

Each part is a process with a time limit of its own, writes a log, and may fail without stopping the
others. A further call skips the parts that passed, and goes on with the rows of the benchmark that are not there yet.
Nothing is installed and no network is needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tri_stn.files import obstacle

from . import records, results
from .report import table
from .targets import judge

TOTAL_SECONDS = 520
"""For all parts together; what is left of nine minutes is for starting and stopping."""
LAST_JOB_SECONDS = 60
"""For what the benchmark is at when its time is over: a workload's tensors, truth and compilations."""
PASSED = "passed"
"""A file of the folder; not named as a file of results is."""
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    stops_itself: bool = False
    """Whether it takes --time-limit SECONDS, after which it begins nothing more."""
    skipped: str = ""
    """Why it does not run."""


@dataclass(frozen=True)
class Outcome:
    part: str
    status: str
    seconds: float
    log: str

    @property
    def failed(self) -> bool:
        return not self.status.startswith(("passed", "skipped"))


def parts(out: Path, commit: str | None, passed: Sequence[str] = ()) -> list[Part]:
    """The parts in order: what says whether the rest can be believed comes first; the last has all the time left."""
    python = [sys.executable, "-m"]
    tests = ["pytest", "tests", "-m", "gpu", "-q", "--color=no", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]  # most of their time is compilation, on the host
    sanitizer = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "1"]
    bench = ["bench", "--device", "cuda", "--sweeps", "--resume", "--out", str(out)]
    bench += ["--commit", commit] if commit else []
    found = [
        Part("tests", [*python, *tests, f"--junitxml={out / 'tests.xml'}"], 210),
        Part(
            "sanitizer",
            [*sanitizer, *python, "bench.smoke"],
            60,
            # Torch's allocator hands out parts of large blocks, inside which no access is out of bounds.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skipped="" if shutil.which(SANITIZER) else f"{SANITIZER} is not on the PATH",
        ),
        Part("bench", [*python, *bench], TOTAL_SECONDS, stops_itself=True),
    ]
    return [replace(part, skipped="it passed in an earlier call") if part.name in passed else part for part in found]


def main(out: Path, commit: str | None = None) -> int:
    """Run all parts. Exit status 0 if all passed, 1 if one failed, 2 without a CUDA device."""
    if why := obstacle(out / PASSED):
        print(why, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("There is no CUDA device that torch can use here, and python -m bench gpu needs one.", file=sys.stderr)
        return 2
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device, of = torch.device("cuda"), results.Commit.named(commit)
    about = results.describe(device, of, "", 0)
    passed = passed_before(out, about)
    outcomes = []
    for outcome in run(parts(out, commit, passed), out, TOTAL_SECONDS):
        outcomes.append(outcome)
        if outcome.status == "passed" and outcome.part != "bench":
            passed.append(outcome.part)
            remember(out, about, passed)
    for outcome in outcomes:
        if outcome.failed and outcome.log:
            print(f"\n── the end of {outcome.log} ──")
            print(*(out / outcome.log).read_text(errors="replace").splitlines()[-30:], sep="\n")
    print()
    print(
        table(("part", "status", "seconds", "log"), ((o.part, o.status, f"{o.seconds:.0f}", o.log) for o in outcomes))
    )
    print(f"\n{summary(out / results.file_name(device, of), about)}")
    return int(any(outcome.failed for outcome in outcomes))


def passed_before(out: Path, about: dict[str, Any]) -> list[str]:
    """The parts that passed in the folder before, of the same device, versions and commit."""
    try:
        earlier = json.loads((out / PASSED).read_text(encoding="utf-8"))
        same = results.continues(about) and earlier["of"] == results.identity(about)
        return list(earlier["passed"]) if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def remember(out: Path, about: dict[str, Any], passed: Sequence[str]) -> None:
    if results.continues(about):
        content = {"of": results.identity(about), "passed": list(passed)}
        results.write_whole(out / PASSED, json.dumps(content, indent=1) + "\n")


def summary(path: Path, about: dict[str, Any]) -> str:
    """How far the benchmark has come, over all calls."""
    try:
        found = records.read(path)
    except records.ResultsError as sentence:
        return f"Nothing of the benchmark is measured: {sentence}"
    waiting = sum(record.reason == results.NO_TIME for record in found.records)
    verdicts = Counter(verdict.status for verdict in judge(found))
    counts = ", ".join(f"{verdicts[status]} {status}" for status in ("met", "not met", "not measured"))
    text = f"{len(found.records) - waiting} of {len(found.records)} rows are done; targets: {counts}.\n"
    if not waiting:
        return f"{text}Results are in {path}."
    return text + ("The same command goes on from here." if results.continues(about) else results.UNNAMED)


def run(parts: list[Part], out: Path, total_seconds: float) -> Iterator[Outcome]:
    """Run the parts one after another, each within its own time and all within the total."""
    stop = time.monotonic() + total_seconds
    for part in parts:
        left = stop - time.monotonic()
        if part.skipped:
            outcome = Outcome(part.name, f"skipped: {part.skipped}", 0, "")
        elif left < 5:
            outcome = Outcome(part.name, "no time left", 0, "")
        else:
            left = min(part.seconds, left)
            print(f"{part.name}: running, for at most {left:.0f} s", flush=True)
            outcome = _run_part(part, out, left)
        print(f"{part.name}: {outcome.status}", flush=True)
        yield outcome


def _run_part(part: Part, out: Path, seconds: float) -> Outcome:
    log = f"{part.name}.log"
    start = time.monotonic()
    limit = ["--time-limit", f"{max(1, seconds - LAST_JOB_SECONDS):.0f}"] if part.stops_itself else []
    with (out / log).open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*part.command, *limit], stdout=file, stderr=subprocess.STDOUT, env=os.environ | part.environment,
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
