"""What changed between two files of results, beyond the noise. Run ``python -m bench compare A.json B.json``."""

from __future__ import annotations

from dataclasses import dataclass

from .records import OURS, Record, Results, ResultsError
from .report import table

THRESHOLD = 0.05
"""The least change of a median that is told: what one run differs from the next by is in neither's spread."""
LEAST_BYTES = 2**16
"""The least growth of peak memory that is told; it has no spread, but allocators round."""

RULE = f"""\
A row is slower where all of this holds, and faster where the opposite does:
  - the 20th percentile of B's times is above the 80th of A's, so that the spreads of the two series do not
    overlap (quartiles, where a file has no such percentiles, as pytest-benchmark's);
  - the medians differ by more than the threshold, {THRESHOLD:.0%} unless --threshold says otherwise, as one run
    differs from the next by what is in neither series.
It needs more memory where its peak grew by more than the threshold and {LEAST_BYTES // 1024} KiB. It broke where it was
timed in A, and in B its result is too far from the truth, or it raised an error.

A row of {OURS} that is slower, needs more memory or broke is a regression; so is one that names no provider, as
those of pytest-benchmark. What other providers do is shown, and is none.

Exit status: 0 without a regression, 1 with one, 2 where the files cannot be compared."""


@dataclass(frozen=True)
class Change:
    key: str
    what: str
    """"slower", "faster", "more memory", "less memory", "broke" or "mended"."""
    before: str
    after: str
    ratio: str
    ours: bool

    @property
    def regression(self) -> bool:
        return self.ours and self.what in ("slower", "more memory", "broke")


def slower(a: Record, b: Record, threshold: float = THRESHOLD) -> bool:
    """Whether B took longer than A, beyond the noise; with the arguments swapped, whether it was faster."""
    return b.spread[0] > a.spread[1] and b.median > a.median * (1 + threshold)


def same_work(a: Record, b: Record) -> bool:
    """Whether two rows of one name agree in all fields that both have; the seed is no part of the work."""
    return all(b.params.get(name, value) == value for name, value in a.params.items() if name != "seed")


def pairs(a: Results, b: Results) -> tuple[list[tuple[Record, Record]], int]:
    """The rows that did the same work in both, and how many have one name but other work."""
    others = {record.key: record for record in b.records}
    common = [(record, others[record.key]) for record in a.records if record.key in others]
    same = [(x, y) for x, y in common if same_work(x, y)]
    return same, len(common) - len(same)


def changes(common: list[tuple[Record, Record]], threshold: float = THRESHOLD) -> list[Change]:
    """What differs beyond the noise; regressions first, then the largest changes."""
    found: list[tuple[float, Change]] = []
    for x, y in common:
        ours = x.provider in (OURS, "")

        def note(what: str, before: object, after: object, ratio: float, x: Record = x, ours: bool = ours) -> None:
            shown = "" if ratio == 1 else f"{ratio:.2f}×"
            found.append((ratio, Change(_short(x.key), what, str(before), str(after), shown, ours)))

        if x.timed and y.timed:
            if slower(x, y, threshold) or slower(y, x, threshold):
                note("slower" if y.median > x.median else "faster", _time(x), _time(y), y.median / x.median)
            before, after = x.peak_bytes, y.peak_bytes
            if before is not None and after is not None:
                large = abs(after - before) > max(LEAST_BYTES, threshold * min(before, after))
                if large:
                    what = "more memory" if after > before else "less memory"
                    note(what, _bytes(before), _bytes(after), max(after, 1) / max(before, 1))
        elif x.timed and y.failed:
            note("broke", _time(x), y.reason, 1)
        elif y.timed and x.failed:
            note("mended", x.reason, _time(y), 1)
    found.sort(key=lambda item: (not item[1].regression, -abs(item[0] - 1)))
    return [change for _, change in found]


def compare(a: Results, b: Results, threshold: float = THRESHOLD) -> tuple[str, int]:
    """What to print, and the exit status.

    Raises ResultsError, with a sentence, where the two cannot be compared.
    """
    if a.device != b.device:
        raise ResultsError(f"{a.name} was measured on {a.device}, {b.name} on {b.device}: their times do not compare.")
    common, other_work = pairs(a, b)
    if not common:
        raise ResultsError(f"{a.name} and {b.name} have no row in common.")
    found = changes(common, threshold)
    bad = sum(change.regression for change in found)
    lines = [
        f"{a.device}",
        f"A  {a.name}: {a.commit}, {a.versions or a.made_by}",
        f"B  {b.name}: {b.commit}, {b.versions or b.made_by}",
        "",
    ]
    if found:
        headers = ("", "what", "A", "B", "B / A", "row")
        cells = [("!" if c.regression else "", c.what, c.before, c.after, c.ratio, c.key) for c in found]
        lines += [table(headers, cells), ""]
    left_out = [f"{other_work} whose workload was changed"] if other_work else []
    only = [(len(x.records) - len(common) - other_work, name) for x, name in ((a, "A"), (b, "B"))]
    left_out += [f"{count} only in {name}" for count, name in only if count]
    lines.append(f"{len(common)} rows compared" + (f"; left out: {', '.join(left_out)}." if left_out else "."))
    beyond = f"{len(found)} change{'s' * (len(found) != 1)} beyond the noise"
    lines.append(f"{beyond}, {bad or 'none'} of them {'regressions' if bad != 1 else 'a regression'}." if found else
                 "Nothing changed beyond the noise.")  # fmt: skip
    return "\n".join(lines), int(bad > 0)


def _short(key: str) -> str:
    return key.removeprefix("bench/workloads.py::")


def _time(record: Record) -> str:
    seconds = record.median
    unit, scale = next(
        (u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)) if seconds * s >= 1 or u == "ns"
    )
    low, high = record.spread
    return f"{seconds * scale:.3g} {unit} ({low * scale:.3g} to {high * scale:.3g})"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
