"""The speed and the memory that the package is to reach, as data, and what a results file says of each.

Run ``python -m bench targets [RESULTS.json]``. Only rows of a GPU count, and only those whose result matched the
fp64 truth; every row that a target is about has to meet it, so what is shown is the worst one.
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

FIXED = "deterministic"
"""Under what name a deterministic row of tri_stn stands beside the default one."""

Value = Callable[[Group], float | None]
"""What a group of rows measured; None where a row that it takes is missing or not right."""


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
    return (record.params.get("batch"), record.channels, record.input_size) == (1024, 1, (28, 28)) and (
        "wall" in record.direction or (_step(record) and "wall" in record.extra)
    )


def _any(record: Record) -> bool:
    return True


# --- what they measured ------------------------------------------------------------------------------


def fraction(group: Group) -> float | None:
    ours = _right(group.ours)
    return ours.fraction if ours else None


def speedup(*names: str) -> Value:
    """How many times as long the best of those providers takes, whose names begin so."""

    def value(group: Group) -> float | None:
        ours = _right(group.ours)
        others = [row.median for name, row in group.rows.items() if name.startswith(names) and _right(row)]
        return min(others) / ours.median if ours and others else None

    return value


def wall_speedup(group: Group) -> float | None:
    """The same, of times that include the host's part."""
    found = [_wall(_right(group.rows.get(name))) for name in ("eager", "tri_stn")]
    return found[0] / found[1] if found[0] and found[1] else None


def _wall(record: Record | None) -> float | None:
    if record is None:
        return None
    return record.median if "wall" in record.direction else (record.extra.get("wall") or {}).get("median")


def memory_beyond_partial_sums(group: Group) -> float | None:
    ours = _right(group.ours)
    return None if ours is None or ours.peak_bytes is None else max(0, ours.peak_bytes - partial_sums(ours))


def memory_against_torch(group: Group) -> float | None:
    """The share of the least that eager torch or torch.compile needs."""
    ours = _right(group.ours)
    torchs = [
        row.peak_bytes for name, row in group.rows.items() if name.startswith(("eager", "compile")) and _right(row)
    ]
    least = [peak for peak in torchs if peak is not None]
    if ours is None or ours.peak_bytes is None or not least:
        return None
    return max(ours.peak_bytes, 1) / max(min(least), 1)


def against_deterministic(group: Group) -> float | None:
    """How many times as long the deterministic mode takes."""
    ours, fixed = _right(group.ours), _right(group.rows.get(FIXED))
    return fixed.median / ours.median if ours and fixed else None


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


def _right(record: Record | None) -> Record | None:
    return record if record is not None and record.timed and record.match else None


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
        yield Target(f"{name}: against eager, fp32", _of(rows, FLOAT32), speedup("eager"), fp32, "×")
        yield Target(f"{name}: against eager, bf16 and fp16", _of(rows, SIXTEEN), speedup("eager"), half, "×")
    yield Target(
        "forward + backward, parametric transforms: against torch.compile",
        lambda r: _step(r) and r.parametric,
        speedup("compile"), 2, "×",
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
            speedup("eager"), bound, "×", variants={} if "C ≥ 64" in name else both,
        )  # fmt: skip
    yield Target(
        "3-D, 160×192×224, C 1–32, forward + backward: against eager",
        lambda r: _step(r) and sorted(r.input_size) == [160, 192, 224] and 1 <= r.channels <= 32,
        speedup("eager"), 2, "×",
    )  # fmt: skip
    yield Target("double backward: against torch", lambda r: "double" in r.direction, speedup("eager"), 10, "×")
    yield Target("small (1024×1×28×28), wall time of a step in eager Python: against eager",
                 _small_step, wall_speedup, 1, "×")  # fmt: skip
    yield Target(
        "peak memory beyond input, output, their gradients and partial sums, parametric transforms",
        lambda r: r.parametric and "double" not in r.direction,
        memory_beyond_partial_sums, 2**20, "bytes", at_most=True,
    )  # fmt: skip
    yield Target("peak memory, any workload: share of torch's", _any, memory_against_torch, 1, "×", at_most=True)
    yield Target("any workload: against eager", _any, speedup("eager"), 1, "×")
    yield Target(
        "deterministic mode, parametric transforms: time against the default",
        lambda r: r.parametric and not r.params.get("deterministic"),
        against_deterministic, 1.05, "×", at_most=True,
    )  # fmt: skip


TARGETS = tuple(_rows())


# --- the verdict --------------------------------------------------------------------------------------


def judge(results: Results | None) -> list[Verdict]:
    """What a file says of each target; nothing is measured where there is no file, or none of a GPU."""
    found = groups(_with_fixed(results)) if results and results.gpu else []
    return [_judge(target, found) for target in TARGETS]


def _with_fixed(results: Results) -> Iterator[Record]:
    """The full workloads' rows; tri_stn's deterministic ones once more, beside the default ones."""
    for record in results.records:
        if record.full:
            yield record
            if record.params.get("deterministic") and record.provider == OURS:
                yield replace(record, params=record.params | {"deterministic": False}, provider=FIXED)


def _judge(target: Target, found: Sequence[Group]) -> Verdict:
    chosen = [group for group in found if target.choose(group.any)]
    values = [(value, group.any) for group in chosen if (value := target.value(group)) is not None]
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
