"""What a file of results says, read back: ours, or pytest-benchmark's own.

A record keeps the workload as the plain fields that the file has, so that files of older and newer commits,
whose workloads have other fields, are read alike.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DENSE = ("grid", "displacement")
"""Kinds of maps with numbers for every output pixel; the others are parametric."""
OURS = "tri_stn"


class ResultsError(ValueError):
    """A file that cannot be read as results; the message is a sentence for people."""


@dataclass(frozen=True)
class Record:
    """One row: a workload, a direction and a provider, or one test of pytest-benchmark."""

    key: str
    """What names the same row in another file."""
    params: dict[str, Any]
    provider: str
    direction: str
    match: bool | None
    """Whether the result was as close to the fp64 truth as it must be; None where nobody looked."""
    stats: dict[str, Any]
    """Empty where nothing was timed."""
    extra: dict[str, Any]
    reason: str = ""
    """Why there are no times."""
    failed: bool = False

    @property
    def timed(self) -> bool:
        return "median" in self.stats

    @property
    def median(self) -> float:
        return self.stats["median"]

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and 80th percentiles of the times; quartiles where the file has no others."""
        low, high = self.stats.get("p20"), self.stats.get("p80")
        return self.stats.get("q1", self.median) if low is None else low, (
            self.stats.get("q3", self.median) if high is None else high
        )

    @property
    def peak_bytes(self) -> int | None:
        return self.extra.get("peak_bytes")

    @property
    def fraction(self) -> float | None:
        """The share of a large copy's bandwidth, measured in the same run."""
        return self.extra.get("fraction_of_floor")

    @property
    def floor(self) -> float | None:
        return self.extra.get("floor") or None

    # --- the workload ---

    @property
    def dtype(self) -> str:
        return self.params.get("dtype", "")

    @property
    def layout(self) -> str:
        return self.params.get("layout", "")

    @property
    def channels(self) -> int:
        return self.params.get("channels", 0)

    @property
    def maps(self) -> int:
        return self.params.get("maps", 1)

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple(self.params.get("gradients", ()))

    @property
    def input_size(self) -> tuple[int, ...]:
        return tuple(self.params.get("input_size", ()))

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.params.get("size", ()))

    @property
    def full(self) -> bool:
        """Not a scaled-down stand-in, nor a few images of it."""
        return self.params.get("variant", "full") == "full"

    @property
    def sweep(self) -> str:
        """What the workloads of its sweep differ in; empty for one that stands for itself."""
        return str(self.params.get("sweep") or "")

    @property
    def transform(self) -> dict[str, Any]:
        """The fields that say how the maps are drawn."""
        found = self.params.get("transform")
        return found if isinstance(found, dict) else {}

    @property
    def kind(self) -> str:
        """The kind of map in lower case; a workload that does not name it draws affine ones."""
        named = self.params.get("kind") or self.transform.get("kind") or ("affine" if self.transform else "")
        return str(named).lower()

    @property
    def parametric(self) -> bool:
        return bool(self.kind) and self.kind not in DENSE

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(self.dtype, 0)

    @property
    def tensor_bytes(self) -> tuple[int, int]:
        """Of the input and of the output."""
        item = self.params.get("batch", 0) * self.channels * self.itemsize
        return item * math.prod(self.input_size), item * self.maps * math.prod(self.size)

    @property
    def grid_bytes(self) -> int:
        """Of the sampling grid that others store, in fp32."""
        return self.params.get("batch", 0) * self.maps * math.prod(self.size) * len(self.size) * 4

    @property
    def label(self) -> str:
        """The workload in words, for people: without its dtype, which stands elsewhere."""
        name = self.params.get("name")
        if not isinstance(name, str):
            return self.key
        parts = [name]
        if self.layout and self.layout != "contiguous":
            parts.append(self.layout)
        parts += [
            word
            for word in ("deterministic", "few", "small")
            if word == self.params.get("variant") or self.params.get(word)
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Results:
    """One file."""

    name: str
    device: str
    gpu: bool
    commit: str
    dirty: bool | None
    datetime: str
    command: str
    complete: bool
    versions: str
    records: tuple[Record, ...]
    """Timed or not."""
    made_by: str = "tri_stn"

    @property
    def timed(self) -> list[Record]:
        return [record for record in self.records if record.timed]

    @property
    def right(self) -> list[Record]:
        """Timed, and their result matched the truth."""
        return [record for record in self.timed if record.match]


@dataclass
class Group:
    """The rows of one workload and direction, by provider."""

    rows: dict[str, Record] = field(default_factory=dict)

    @property
    def ours(self) -> Record | None:
        return self.rows.get(OURS)

    @property
    def any(self) -> Record:
        return self.ours or next(iter(self.rows.values()))


def groups(records: Iterable[Record]) -> list[Group]:
    """Rows that did the same work, together."""
    found: dict[str, Group] = {}
    for record in records:
        found.setdefault(work(record), Group()).rows[record.provider] = record
    return list(found.values())


def work(record: Record) -> str:
    """What two rows share that did the same work, whoever did it."""
    # `second` says what else was measured of a workload, and is no part of this row's work.
    fields = {name: value for name, value in record.params.items() if name not in ("provider", "second")}
    return json.dumps(fields | {"direction": record.direction}, sort_keys=True)


# --- reading ------------------------------------------------------------------------------------------


def read(path: Path) -> Results:
    """A file of results.

    Raises ResultsError, with a sentence, for what is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise ResultsError(f"{path} is not a JSON file.") from None
    benchmarks = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(benchmarks, list):
        raise ResultsError(f"{path} is not a results file: python -m bench and pytest --benchmark-json write those.")
    try:
        records = tuple(record(row) for row in [*benchmarks, *document.get("not_timed", [])])
        about, commit = document.get("machine_info") or {}, document.get("commit_info") or {}
        device = _device(about, benchmarks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} is not a results file that can be understood: {error!r}.") from None
    return Results(
        name=path.name,
        device=device,
        gpu=not device.startswith("cpu"),
        commit=str(commit.get("id", "unknown"))[:10],
        dirty=commit.get("dirty"),
        datetime=str(document.get("datetime", "")),
        command=document.get("command") or "pytest --benchmark-json=FILE",
        complete=document.get("complete", True),
        versions=", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "cuda") if about.get(name)),
        records=records,
        made_by="tri_stn" if "device" in about else "pytest-benchmark",
    )


def record(row: dict[str, Any]) -> Record:
    """A row of a file."""
    extra = row.get("extra_info") or {}
    # A parameter that is no plain value comes as its repr, which has addresses in it.
    params = {
        name: value
        for name, value in (row.get("params") or {}).items()
        if not (isinstance(value, str) and value.startswith("UNSERIALIZABLE"))
    }
    stats = row.get("stats") or {}
    if stats and not float(stats["median"]) > 0:
        raise ValueError(f"the median of {row['name']} is {stats['median']}")
    return Record(
        key=row.get("fullname") or row["name"],
        params=params,
        provider=str(extra.get("provider") or params.get("provider") or ""),
        direction=str(params.get("direction", "")),
        match=extra.get("match"),
        stats=stats,
        extra=extra,
        reason=row.get("reason", ""),
        failed=bool(row.get("failed", False)),
    )


def _device(about: dict[str, Any], benchmarks: list[dict[str, Any]]) -> str:
    if "device" in about:
        threads = about.get("threads")
        return f"{about['device']}, {threads} thread{'s' * (threads != 1)}" if threads else str(about["device"])
    named = {str(extra["device"]) for row in benchmarks if (extra := row.get("extra_info") or {}).get("device")}
    if named:
        return ", ".join(sorted(named))
    cpu = about.get("cpu") or {}
    return f"cpu {cpu.get('brand_raw') or about.get('processor') or about.get('machine') or 'of unknown kind'}"


# --- the shelf ----------------------------------------------------------------------------------------


def shelf(folder: Path, committed: bool = False) -> list[Path]:
    """The results files of a folder; `committed` leaves out what git does not track, where git can be asked."""
    paths = sorted(folder.glob("*.json"))
    if committed and paths:
        try:
            listed = subprocess.run(
                ["git", "ls-files", "-z", "--", "."], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.split("\0")
        except (OSError, subprocess.CalledProcessError):
            return paths
        return [path for path in paths if path.name in listed]
    return paths
