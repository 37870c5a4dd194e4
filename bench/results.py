"""A row of results, and the file that keeps them: one JSON per device and commit.

The file has the fields of pytest-benchmark's, so that ``pytest-benchmark compare FILE`` reads it;
what is ours is under ``extra_info``. Rows without times stand apart, under ``not_timed``.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tri_stn import files

from .workloads import Workload

RESULTS = Path(__file__).parent / "results"
NO_TIME = "There was no time left for it."
"""The reason of a row that waits for a run with --resume."""
UNNAMED = "A run goes on only where a commit names all files: commit the changes, or give a name by --commit ID."


@dataclass(frozen=True)
class Row:
    workload: Workload
    provider: str
    direction: str
    match: bool | None = None
    """Whether the result is as close to the fp64 truth as it must be; None if there was no result."""
    reason: str = ""
    """Why there are no times."""
    failed: bool = False
    """Whether that reason is a fault, rather than something that this machine cannot do."""
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    times: Sequence[float] = ()
    """Seconds of each call."""
    wall: Sequence[float] = ()
    """On a GPU, where the device takes less than a millisecond: seconds of a call with the host's part."""
    bytes: int = 0
    """The least that must go through memory."""
    floor: float = 0.0
    """Seconds that a copy of as many bytes takes on this device, measured in the same run."""
    mode: str = ""
    """The provider's fastest, where it has several."""
    peak_bytes: int | None = None
    """Memory beyond the input, the output and their gradients; None where it was not measured."""

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.direction}/{self.provider}"

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def fraction_of_floor(self) -> float:
        return self.floor / self.median

    def to_json(self) -> dict[str, Any]:
        w = asdict(self.workload) | {"provider": self.provider, "direction": self.direction}
        row = {
            "group": f"{self.workload}/{self.direction}",
            "name": self.name,
            "fullname": f"bench/workloads.py::{self.name}",
            "param": self.name,
            "params": w,
        }
        extra: dict[str, Any] = {
            "match": self.match,
            "errors": _finite(self.errors),
            "limits": _finite(self.limits),
        }
        if self.mode:
            extra["mode"] = self.mode
        if not self.times:
            return row | {"reason": self.reason, "failed": self.failed, "extra_info": extra}
        extra |= {
            "bytes": self.bytes,
            "floor": self.floor,
            "fraction_of_floor": self.fraction_of_floor,
            "peak_bytes": self.peak_bytes,
        }
        if self.wall:
            extra["wall"] = stats(self.wall)
        return row | {"stats": stats(self.times), "extra_info": extra}


def stats(times: Sequence[float]) -> dict[str, Any]:
    """What pytest-benchmark keeps of a series of seconds, and the 20th and 80th percentiles."""
    q1, _, q3 = statistics.quantiles(times, n=4, method="inclusive")
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    mean, spread = statistics.fmean(times), statistics.stdev(times)
    reach = 1.5 * (q3 - q1)
    outliers = [sum(abs(t - mean) > spread for t in times), sum(not q1 - reach <= t <= q3 + reach for t in times)]
    return {
        "median": statistics.median(times), "q1": q1, "q3": q3, "iqr": q3 - q1, "p20": p20, "p80": p80,
        "min": min(times), "max": max(times), "mean": mean, "stddev": spread, "ops": 1 / mean,
        "outliers": ";".join(map(str, outliers)), "rounds": len(times), "iterations": 1,
    }  # fmt: skip


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


# --- the file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commit:
    id: str
    dirty: bool | None
    """Whether the files differ from the commit; None where that cannot be known."""

    @classmethod
    def named(cls, id: str | None) -> Commit:
        """The commit of that name, or else the checkout's."""
        return cls(id, None) if id else cls.of_checkout()

    @classmethod
    def of_checkout(cls) -> Commit:
        """The commit of the checkout that this file lies in; "unknown" outside of one."""
        here = Path(__file__).parent
        try:
            commit = _git(here, "rev-parse", "--short=10", "HEAD")
            return cls(commit, bool(_git(here, "status", "--porcelain", "--untracked-files=no")))
        except (OSError, subprocess.CalledProcessError):
            return cls("unknown", None)


def _git(folder: Path, *command: str) -> str:
    result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:  # Linux; elsewhere torch and Python know the architecture alone
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = ""
    # Machines of one name may differ in their vectors, and so several times in their speed.
    return " ".join(["cpu", *model.split(), platform.machine(), torch.backends.cpu.get_cpu_capability()])


def describe(device: torch.device, commit: Commit, command: str, copy_bandwidth: float) -> dict[str, Any]:
    """Where, when and of what a file of results was made."""
    about = {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "copy_bandwidth": copy_bandwidth,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "machine_info": about,
        "commit_info": {"id": commit.id, "dirty": commit.dirty},
        "datetime": now,
        "version": _version("pytest-benchmark"),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def file_name(device: torch.device, commit: Commit) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{slug}-{commit.id}.json"


def identity(about: dict[str, Any]) -> dict[str, Any]:
    """What two runs share whose rows may stand in one file: the device, the versions and the commit."""
    machine = {name: value for name, value in about["machine_info"].items() if name != "copy_bandwidth"}
    return machine | {"commit": about["commit_info"]["id"], "dirty": bool(about["commit_info"]["dirty"])}


def continues(about: dict[str, Any]) -> bool:
    """Whether an earlier run of the same identity was of the same files, as far as can be known."""
    return about["commit_info"]["id"] != "unknown" and not about["commit_info"]["dirty"]


def earlier(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, as JSON, that a run like the one described left in the file; none where it has another's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        same = continues(about) and identity(document) == identity(about)
        return [*document["benchmarks"], *document["not_timed"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(path: Path, about: dict[str, Any], rows: Iterable[Row | dict[str, Any]]) -> None:
    """Write a file of results; one that was there stays whole until the new one is. Rows may be JSON already."""
    found = [row if isinstance(row, dict) else row.to_json() for row in rows]
    document = about | {
        "complete": not any(map(waits, found)),
        "benchmarks": [row for row in found if "stats" in row],
        "not_timed": [row for row in found if "stats" not in row],
    }
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def waits(row: dict[str, Any]) -> bool:
    """Whether a row, as JSON, is still to be measured."""
    return row.get("reason") == NO_TIME


def write_whole(path: Path, content: str | bytes) -> None:
    """Write all of a file, text as UTF-8, or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    files.write_whole(path, lambda temporary: temporary.write_bytes(data))
