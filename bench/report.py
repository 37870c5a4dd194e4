"""What the command line shows: aligned tables, and progress with or without rich."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need to be; numbers to the right, words to the left."""
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = [all(row[i][:1] in "0123456789-" for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [list(headers), ["─" * w for w in widths], *cells]))


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same as a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def track(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Pass the items on, showing how many of them have come: a bar in a terminal with rich, lines elsewhere."""
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        for done, item in enumerate(items, 1):
            if done == total or done % max(1, total // 20) == 0:
                print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)
            yield item
        return
    from rich.console import Console
    from rich.progress import Progress

    # No thread that refreshes: the items may come from processes that are forked while the bar is shown.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(title, total=total)
        progress.refresh()
        for item in items:
            progress.update(task, advance=1, refresh=True)
            yield item
