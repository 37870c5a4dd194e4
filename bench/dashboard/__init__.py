"""One page, in one file, of what was measured. Run ``python -m bench dashboard``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from tri_stn.files import obstacle

from ..records import Results, ResultsError, read, shelf
from ..results import RESULTS, write_whole


def write(paths: Sequence[Path], out: Path, png: bool, wanted: dict[str, str | None]) -> list[Path]:
    """Write index.html, and PNG files if asked for; the paths of what was written.

    `wanted` is what the filter is set to first: "device", "dtype" and "direction", each a name or None.
    Raises ResultsError, with a sentence, for files that are none and for a choice of which nothing is there.
    """
    from .images import FILES, write_images
    from .page import page
    from .series import Choice, choices, first_choice, newest

    if why := obstacle(*[out / file for file in ("index.html", *(FILES if png else ()))]):
        raise ResultsError(why)
    files = load(paths)
    choice = first_choice(newest(files))
    if any(wanted.values()):
        fits = [
            c for c in choices(newest(files).values()) if all(v in (None, getattr(c, k)) for k, v in wanted.items())
        ]
        if not fits:
            asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value)
            raise ResultsError(f"Nothing was measured of {asked}.")
        device = choice and choice.device
        choice = min(fits, key=lambda c: (c.device != device, c.dtype != "float32", c.direction != "both", c))
    names = [str(path) for path in paths]
    words = ["python", "-m", "bench", "dashboard", *names, "--out", "DIR", *(["--png"] if png else [])]
    for name, value in wanted.items():
        words += [f"--{name}", value] if value else []
    written = [out / "index.html"]
    write_whole(written[0], page(files, shlex.join(words), choice))
    if png and isinstance(choice, Choice):
        written += write_images(files, choice, out)
    return written


def load(paths: Sequence[Path]) -> list[Results]:
    """The files, and those in the folders, oldest first; what the shelf has where none are named."""
    found: list[Path] = []
    for path in paths or [RESULTS]:
        found += shelf(path) if path.is_dir() else [path] if paths else []
    if not found:
        where = " or ".join(map(str, paths)) or "bench/results"
        raise ResultsError(f"There are no results in {where}: python -m bench makes some.")
    return sorted(map(read, found), key=lambda file: file.datetime)
