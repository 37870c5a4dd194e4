"""What each figure shows, as plain numbers: files of results → series of points.

Each series belongs to one device, dtype and direction, so that a page can show or hide it. The figures of the page
and the PNG files are drawn from the same series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..compare import same_work, slower
from ..records import OURS, Record, Results, groups


class Choice(NamedTuple):
    """What the filter is set to."""

    device: str
    dtype: str
    direction: str


@dataclass
class Series:
    choice: Choice
    name: str
    """A provider, or what else the legend says."""
    x: list[float | str] = field(default_factory=list)
    y: list[float | str] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    """The end of the spread below a value; empty where there is no spread."""
    high: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """For each point, what stands beside it in words."""
    marked: list[bool] = field(default_factory=list)
    """For each point, whether it is a regression."""
    group: str = ""
    """Which of several small plots it belongs to."""


def newest(files: Iterable[Results]) -> dict[str, Results]:
    """The latest file of each device; GPUs first, then what was measured last."""
    latest = {file.device: file for file in sorted(files, key=lambda f: f.datetime)}
    return dict(sorted(latest.items(), key=lambda item: (item[1].gpu, item[1].datetime), reverse=True))


def device_label(file: Results) -> str:
    return file.device if file.gpu else f"CPU: {file.device.removeprefix('cpu ')}"


def choices(files: Iterable[Results]) -> list[Choice]:
    return sorted({_choice(file, record) for file in files for record in file.records})


def first_choice(files: dict[str, Results]) -> Choice | None:
    """What the page shows when it opens: a GPU where there is one, a training step in fp32."""
    for device, file in files.items():
        have = {(r.dtype, r.direction) for r in file.right}
        order = sorted(have, key=lambda c: (c[0] != "float32", c[1] != "both", c))
        if order:
            return Choice(device, *order[0])
    return None


def _choice(file: Results, record: Record) -> Choice:
    return Choice(file.device, record.dtype, record.direction)


class _Book:
    """Series by choice, name and group, made when first asked for."""

    def __init__(self) -> None:
        self.series: dict[tuple[Choice, str, str], Series] = {}

    def __call__(self, choice: Choice, name: str, group: str = "") -> Series:
        return self.series.setdefault((choice, name, group), Series(choice, name, group=group))

    def all(self) -> list[Series]:
        return list(self.series.values())


# --- one file of each device --------------------------------------------------------------------------


def speedups(file: Results) -> list[Series]:
    """How many times as long the others take; x the factor, y the workload."""
    book = _Book()
    for group in groups(file.right):
        ours = group.ours
        for name, row in group.rows.items():
            if ours is None or ours.sweep or name in (OURS, "copy"):
                continue
            series = book(_choice(file, row), name)
            (low, high), (our_low, our_high) = row.spread, ours.spread
            series.x.append(row.median / ours.median)
            series.y.append(row.label)
            series.low.append(low / our_high)
            series.high.append(high / our_low)
            series.notes.append(f"{seconds(ours.median)} against {seconds(row.median)}")
    return book.all()


def rooflines(file: Results) -> list[Series]:
    """The share of a copy's bandwidth against the time that a copy of as many bytes takes."""
    book = _Book()
    for row in file.right:
        if row.floor and row.fraction is not None and row.provider != "copy":
            series = book(_choice(file, row), row.provider)
            low, high = row.spread
            series.x.append(row.floor * 1e3)
            series.y.append(row.fraction * 100)
            series.low.append(row.floor / high * 100)
            series.high.append(row.floor / low * 100)
            series.notes.append(f"{row.label}: {seconds(row.median)}, a copy {seconds(row.floor)}")
    return book.all()


def memory(file: Results) -> list[Series]:
    """Peak memory beyond input, output and gradients, MiB; x the memory, y the workload."""
    book = _Book()
    for row in file.right:
        if row.peak_bytes is not None and not row.sweep:
            series = book(_choice(file, row), row.provider)
            series.x.append(row.peak_bytes / 2**20)
            series.y.append(row.label)
            series.notes.append(f"{row.peak_bytes:,} bytes")
    return book.all()


def errors(file: Results) -> list[Series]:
    """The largest error of each tensor against fp64, relative to the largest number in it."""
    book = _Book()
    about = {"forward": ("output",), "backward": ("grad_input", "grad_theta", "grad_grid")}
    for row in file.right:
        for tensor, error in (row.extra.get("errors") or {}).items():
            if error is None or row.sweep or tensor not in about.get(row.direction, (tensor,)):
                continue
            series = book(_choice(file, row), f"{row.provider}, {tensor}")
            series.x.append(error)
            series.y.append(row.label)
            limit = (row.extra.get("limits") or {}).get(tensor)
            series.notes.append(f"{error:.1e}" + (f", allowed {limit:.1e}" if limit else ""))
    return book.all()


def sweeps(file: Results) -> list[Series]:
    """Time along one property, of the workloads of a sweep; `group` says which property, in which unit."""
    lines: dict[tuple[Choice, str, str], list[tuple[float, Record]]] = {}
    for row in file.right:
        if row.sweep in _SWEPT:
            value = _SWEPT[row.sweep][1](row)
            lines.setdefault((_choice(file, row), row.sweep, _with_layout(row)), []).append((value, row))
    book = _Book()
    for (choice, sweep, name), points in lines.items():
        title = _SWEPT[sweep][0]
        for value, row in sorted(points, key=lambda point: point[0]):
            series = book(choice, name, title)
            series.x.append(value)
            series.y.append(row.median * 1e3)
            series.low.append(row.spread[0] * 1e3)
            series.high.append(row.spread[1] * 1e3)
            series.notes.append(f"{row.label}: {seconds(row.median)}")
            if row.provider == OURS and row.floor and row.layout == "contiguous":
                floor = book(choice, FLOOR, title)
                floor.x.append(value)
                floor.y.append(row.floor * 1e3)
                floor.notes.append(f"{row.label}: {seconds(row.floor)}")
    return book.all()


FLOOR = "as long as a copy"

_SWEPT: dict[str, tuple[str, Callable[[Record], float]]] = {
    "size": ("side of the image, pixels", lambda row: row.input_size[-1]),
    "channels": ("channels", lambda row: row.channels),
    "scale": (
        "input pixels per output pixel",
        lambda row: row.transform["scale"][0] * row.input_size[-1] / row.size[-1],
    ),
    "angle": ("angle, degrees", lambda row: row.transform["angle"][0]),
}
"""What is varied, in words, and its value."""


def _with_layout(row: Record) -> str:
    return row.provider if row.layout in ("", "contiguous") else f"{row.provider}, {row.layout}"


# --- all files of a device ----------------------------------------------------------------------------


def history(files: Iterable[Results]) -> list[Series]:
    """tri_stn's time at each commit, as a share of its time at the first; a line per workload."""
    book = _Book()
    last: dict[tuple[Choice, str], tuple[Record, float]] = {}
    for file in sorted(files, key=lambda f: f.datetime):
        for row in file.right:
            if row.provider != OURS or row.sweep:
                continue
            choice = _choice(file, row)
            known = last.get((choice, row.key))
            if known and not same_work(known[0], row):
                known = None
            first = known[1] if known else row.median
            series = book(choice, row.label)
            series.x.append(f"{file.commit}{'+' if file.dirty else ''}<br>{file.datetime[:16].replace('T', ' ')}")
            series.y.append(row.median / first)
            series.low.append(row.spread[0] / first)
            series.high.append(row.spread[1] / first)
            worse = known is not None and slower(known[0], row)
            series.marked.append(worse)
            before = f", {seconds(known[0].median)} before" if known else ""
            series.notes.append(f"{row.label}: {seconds(row.median)}{before}")
            last[choice, row.key] = row, first
    return book.all()


# --- what is missing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    choice: Choice
    row: str
    provider: str
    reason: str


def missing(file: Results) -> Iterator[Missing]:
    """The rows without times, and why."""
    for record in file.records:
        if record.provider != "copy" and (not record.timed or not record.match):  # a copy has no result to compare
            reason = record.reason or (
                "The result was not compared with fp64." if record.timed else "No reason is given."
            )
            yield Missing(_choice(file, record), record.label, record.provider, reason)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
