"""The speed and the memory that the package is to reach, as data, and what a results file says of each.

Run ``python -m bench targets [RESULTS.json]``. Only rows of a GPU count, but for the targets of the CPU path, and only
those whose result matched the fp64 truth; every row that a target is about has to meet it, so what is shown is the
worst one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .records import OURS, Group, Record, Results, groups

MEGABYTE = 10**6
LARGE = 256 * MEGABYTE
"""Bytes of a tensor from which memory alone decides."""
FLOAT32, BFLOAT16, SIXTEEN = ("float32",), ("bfloat16",), ("bfloat16", "float16")

EAGER, COMPILE = ("eager",), ("compile",)
FIXED = "deterministic"
"""Under what name a deterministic row of tri_stn stands beside the default one."""

Value = Callable[[Record, Sequence[Record]], float | None]
"""What a row of tri_stn measured, next to those that the target holds it against; None where it did not."""


@dataclass(frozen=True)
class Target:
    what: str
    choose: Callable[[Record], bool]
    """Whether a row of tri_stn is one that the target is about."""
    value: Value
    bound: float
    unit: str
    """"%", "×" or "bytes"."""
    at_most: bool = False
    against: tuple[str, ...] = ()
    """How the names of the providers begin whose rows of the same work the value takes as well, at least one."""
    covers: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """(dtype, layout) that must have been measured."""
    variants: dict[str, Callable[[Record], bool]] = field(default_factory=dict)
    """Other kinds of rows that must have been measured, by name."""

    @property
    def words(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {_show(self.bound, self.unit)}"

    def meets(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def of(self, group: Group) -> float | None:
        """The value of a group of rows; None where a row that it takes is missing or not right."""
        ours = group.ours
        others = [row for name, row in group.rows.items() if name.startswith(self.against) and _right(row)]
        return self.value(ours, others) if ours and _right(ours) and (others or not self.against) else None


@dataclass(frozen=True)
class Verdict:
    target: Target
    status: str
    """"met", "not met" or "not measured"."""
    measured: str
    """The worst row's value."""
    detail: str


# --- which rows ---------------------------------------------------------------------------------------


def _steps(record: Record) -> list[float]:
    """Input pixels per output pixel along each axis, at both ends of the range that maps are drawn from."""
    scale = record.transform.get("scale")
    if not isinstance(scale, (list, tuple)) or len(record.size) != len(record.input_size):
        return []
    return [s * i / o for s in scale for i, o in zip(record.input_size, record.size, strict=True)]


def _angles(record: Record) -> tuple[float, float]:
    low, high = record.transform.get("angle") or (0.0, 0.0)
    return low, high


def _within(values: Sequence[float], low: float, high: float) -> bool:
    return bool(values) and all(low <= value <= high for value in values)


def _affine(record: Record) -> bool:
    return record.kind == "affine" and len(record.size) == 2


def _upright(record: Record) -> bool:
    return _within(_angles(record), -2, 2)


def near_identity(record: Record) -> bool:
    return _within(_steps(record), 0.98, 1.02) and _upright(record)


def rotated_by_30(record: Record) -> bool:
    return _within(_steps(record), 0.98, 1.02) and _within([abs(a) for a in _angles(record)], 28, 32)


def shrunk_by_2(record: Record) -> bool:
    return _within(_steps(record), 1.9, 2.1) and _upright(record)


def zoomed_by_2(record: Record) -> bool:
    return _within(_steps(record), 0.475, 0.525) and _upright(record)


def _large_forward(record: Record) -> bool:
    plain = _affine(record) and record.params.get("mode", "bilinear") == "bilinear"
    return plain and record.direction == "forward" and min(record.tensor_bytes) >= LARGE


def _adjoint(record: Record) -> bool:
    """A backward pass for the image and the map, with zeros padding; not a point of a sweep."""
    zeros = record.params.get("padding_mode", "zeros") == "zeros"
    both = "input" in record.gradients and len(record.gradients) >= 2
    return _affine(record) and record.direction == "backward" and zeros and both and not record.sweep


def _step(record: Record) -> bool:
    return record.direction == "both"


def _dense_step(record: Record) -> bool:
    return _step(record) and not record.parametric and len(record.size) == 2


def _small_step(record: Record) -> bool:
    """The batch of digits of the paper, with the host's part of the time."""
    digits = (record.params.get("batch"), record.channels, record.input_size) == (1024, 1, (28, 28))
    return digits and ("wall" in record.direction or _step(record))


def _any(record: Record) -> bool:
    return True


# --- what they measured ------------------------------------------------------------------------------


def fraction(ours: Record, others: Sequence[Record]) -> float | None:
    return ours.fraction


def speedup(ours: Record, others: Sequence[Record]) -> float:
    """How many times as long the best of the others takes."""
    return min(row.median for row in others) / ours.median


def slowdown(ours: Record, others: Sequence[Record]) -> float:
    """How many times as long as ours the others take, at worst."""
    return max(row.median for row in others) / ours.median


def wall_speedup(ours: Record, others: Sequence[Record]) -> float | None:
    """Like `speedup`, of times that include the host's part."""
    mine, *found = map(_wall, (ours, *others))
    theirs = [wall for wall in found if wall]
    return min(theirs) / mine if mine and theirs else None


def _wall(record: Record) -> float | None:
    return record.median if "wall" in record.direction else (record.extra.get("wall") or {}).get("median")


def memory_beyond_partial_sums(ours: Record, others: Sequence[Record]) -> float | None:
    return None if ours.peak_bytes is None else max(0, ours.peak_bytes - partial_sums(ours))


def memory_share(ours: Record, others: Sequence[Record]) -> float | None:
    """The share of the least that the others need."""
    least = [row.peak_bytes for row in others if row.peak_bytes is not None]
    return max(ours.peak_bytes, 1) / max(min(least), 1) if least and ours.peak_bytes is not None else None


def partial_sums(record: Record) -> int:
    """Bytes that the partial sums of a map's gradient may take: what the row says, else the bound that is documented.

    That is 2**18 numbers, or one set per map where those are more; with a matrix whose image has a gradient
    too, one set more for each tile of the input, of 128 pixels (32 where channels are side by side) and 8 channels.
    """
    if "partial_bytes" in record.extra:
        return record.extra["partial_bytes"]
    if record.direction == "forward" or set(record.gradients) <= {"input"}:
        return 0
    numbers = 12 if len(record.size) == 3 else 6
    maps = record.params.get("batch", 1) * record.maps
    total = max(2**18, maps * numbers)
    if "input" in record.gradients and record.kind == "affine":
        pixels = 32 if record.layout == "channels_last" and record.channels > 4 else 128
        total += maps * numbers * math.ceil(math.prod(record.input_size) / pixels) * math.ceil(record.channels / 8)
    return total * (8 if record.dtype == "float64" else 4)


def _right(record: Record) -> bool:
    return record.timed and bool(record.match)


# --- the table ---------------------------------------------------------------------------------------

_BOTH_LAYOUTS = tuple((dtype, layout) for dtype in (*FLOAT32, *BFLOAT16) for layout in ("contiguous", "channels_last"))
_MANY, _FEW = (lambda r: _adjoint(r) and r.channels >= 16), (lambda r: _adjoint(r) and r.channels <= 4)


def _of(choose: Callable[[Record], bool], dtypes: Sequence[str]) -> Callable[[Record], bool]:
    return lambda record: choose(record) and record.dtype in dtypes


def _rows() -> Iterator[Target]:
    yield Target(
        "forward, affine bilinear, near-identity, large: share of a copy's bandwidth",
        lambda r: _large_forward(r) and near_identity(r),
        fraction, 0.85, "%", covers=_BOTH_LAYOUTS,
    )  # fmt: skip
    for name, like in (("rotation by 30°", rotated_by_30), ("2× shrink", shrunk_by_2), ("2× zoom", zoomed_by_2)):
        yield Target(
            f"the same, {name}",
            lambda r, like=like: _large_forward(r) and like(r),  # type: ignore[misc]
            fraction, 0.65, "%", covers=_BOTH_LAYOUTS,
        )  # fmt: skip
    for rows, channels, floor, fp32, half in ((_MANY, "C ≥ 16", 0.7, 3, 6), (_FEW, "C ≤ 4", 0.45, 2.5, 4)):
        name = f"backward, both gradients, affine, zeros padding, {channels}"
        yield Target(f"{name}: share of the three-tensor floor", rows, fraction, floor, "%")
        yield Target(f"{name}: against eager, fp32", _of(rows, FLOAT32), speedup, fp32, "×", against=EAGER)
        yield Target(f"{name}: against eager, bf16 and fp16", _of(rows, SIXTEEN), speedup, half, "×", against=EAGER)
    yield Target(
        "forward + backward, parametric transforms: against torch.compile",
        lambda r: _step(r) and r.parametric,
        speedup, 2, "×", against=COMPILE,
    )  # fmt: skip
    dense = "dense grid and displacement, forward + backward: against eager"
    both = {"grid": lambda r: r.kind == "grid", "displacement": lambda r: r.kind == "displacement"}
    for name, also, bound in (
        ("fp32 NCHW", lambda r: (r.dtype, r.layout) == ("float32", "contiguous"), 1.2),
        ("bf16", lambda r: r.dtype == "bfloat16", 2),
        ("channels_last, C ≥ 64", lambda r: r.layout == "channels_last" and r.channels >= 64, 3),
    ):
        yield Target(
            f"{dense}, {name}",
            lambda r, also=also: _dense_step(r) and also(r),  # type: ignore[misc]
            speedup, bound, "×", against=EAGER, variants={} if "C ≥ 64" in name else both,
        )  # fmt: skip
    yield Target(
        "3-D, 160×192×224, C 1–32, forward + backward: against eager",
        lambda r: _step(r) and sorted(r.input_size) == [160, 192, 224] and 1 <= r.channels <= 32,
        speedup, 2, "×", against=EAGER,
    )  # fmt: skip
    yield Target(
        "double backward: against torch", lambda r: "double" in r.direction, speedup, 10, "×", against=EAGER
    )  # fmt: skip
    yield Target(
        "small (1024×1×28×28), wall time of a step in eager Python: against eager",
        _small_step, wall_speedup, 1, "×", against=EAGER,
    )  # fmt: skip
    yield Target(
        "peak memory beyond input, output, their gradients and partial sums, parametric transforms",
        lambda r: r.parametric and "double" not in r.direction,
        memory_beyond_partial_sums, 2**20, "bytes", at_most=True,
    )  # fmt: skip
    yield Target(
        "peak memory, any workload: share of torch's",
        _any, memory_share, 1, "×", at_most=True, against=(*EAGER, *COMPILE),
    )  # fmt: skip
    yield Target("any workload: against eager", _any, speedup, 1, "×", against=EAGER)
    yield Target(
        "deterministic mode, parametric transforms: time against the default",
        lambda r: r.parametric and not r.params.get("deterministic"),
        slowdown, 1.05, "×", at_most=True, against=(FIXED,),
    )  # fmt: skip


TARGETS = tuple(_rows())

ON_CPU = (
    Target("on a CPU, any workload that is not scaled down: against eager", _any, speedup, 0.95, "×", against=EAGER),
    Target(
        "on a CPU, grids of 16 MiB and more: peak memory, share of torch's",
        lambda r: r.grid_bytes >= 2**24,
        memory_share, 1, "×", at_most=True, against=EAGER,
    ),
)  # fmt: skip
"""What is asked of the path for tensors on the CPU."""


def urgency(record: Record) -> int:
    """How much a row matters that is still to be measured: 2 where a target about such workloads reads it, 1 where
    only targets about all workloads do, 0 where none does.
    """
    reading = [t for t in TARGETS if t.choose(record) and (record.provider == OURS or record.provider in t.against)]
    return max((1 if target.choose is _any else 2 for target in reading), default=0)


# --- the verdict --------------------------------------------------------------------------------------


def judge(results: Results | None) -> list[Verdict]:
    """What a file says of each target; a GPU's are not measured where there is no file, or one of a CPU."""
    found = groups(_with_fixed(results)) if results and results.gpu else []
    verdicts = [_judge(target, found) for target in TARGETS]
    if results and not results.gpu:
        found = groups(record for record in results.records if record.params.get("variant") != "small")
        verdicts += [_judge(target, found) for target in ON_CPU]
    return verdicts


def _with_fixed(results: Results) -> Iterator[Record]:
    """The full workloads' rows; tri_stn's deterministic ones once more, beside the default ones."""
    for record in results.records:
        if record.full:
            yield record
            if record.params.get("deterministic") and record.provider == OURS:
                yield replace(record, params=record.params | {"deterministic": False}, provider=FIXED)


def _judge(target: Target, found: Sequence[Group]) -> Verdict:
    chosen = [group for group in found if target.choose(group.any)]
    values = [(value, group.any) for group in chosen if (value := target.of(group)) is not None]
    ours = [group.ours for group in chosen if group.ours is not None]
    wrong = [row for row in ours if row.failed]
    left_out = [row for row in ours if not row.timed and not row.failed]
    have = {(record.dtype, record.layout) for _, record in values}
    missing = [f"{dtype} {layout}" for dtype, layout in target.covers if (dtype, layout) not in have]
    missing += [name for name, like in target.variants.items() if not any(like(record) for _, record in values)]
    if not values:
        reason = f"none of {len(chosen)} rows has all that it takes" if chosen else ""
        reason = f"failed: {', '.join(sorted({r.label for r in wrong}))}" if wrong else reason
        return Verdict(target, "not measured", "not measured", reason)
    worst, record = (max if target.at_most else min)(values, key=lambda item: item[0])
    met = sum(target.meets(value) for value, _ in values)
    detail = [f"worst: {record.label}, {record.dtype}, {record.direction}", f"{met} of {len(values)} rows meet it"]
    if left_out:
        missing.append(f"{len(left_out)} rows that were not run")
    if missing:
        detail.append(f"not measured: {', '.join(missing)}")
    if (without := len(chosen) - len(values) - len(wrong) - len(left_out)) > 0:
        detail.append(f"{without} rows have nothing to compare with")
    if wrong:
        detail.append(f"failed: {', '.join(sorted({r.label for r in wrong}))}")
    status = "not met" if met < len(values) or wrong else "not measured" if missing else "met"
    return Verdict(target, status, _show(worst, target.unit), "; ".join(detail))


def _show(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value * 100:.3g} %"
    if unit == "×":
        return f"{value:.3g}×"
    return f"{value / 2**20:.3g} MiB"
