"""Pictures for learners, and for the README: ``python -m tri_stn gallery --out DIR``.

One file draws one picture: ``draw(photo, path)``, with settings that tests make small. The page and the colours are in
`page`, the photograph in `photograph`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ..files import obstacle

PICTURES = {
    "coordinates": "coordinates.png",
    "mapping": "mapping.png",
    "interpolation": "interpolation.png",
    "antialias": "antialias.png",
    "transforms": "transforms.png",
    "sampling_points": "sampling_points.png",
    "training": "training.gif",
}
"""What each picture is called, and its file; the one that takes longest is the last."""

PACKAGES = ("matplotlib", "numpy", "PIL", "rich", "sklearn")


class GalleryError(Exception):
    """What the user can put right, in one sentence."""


def draw(
    names: Sequence[str],
    out: Path,
    pixels: Tensor | None = None,
    device: torch.device | str = "cpu",
    report: Callable[[Path], AbstractContextManager[object]] = nullcontext,
) -> list[Path]:
    """Draw the pictures of these names, or all for none.

    Args:
        names: keys of `PICTURES`.
        out: the folder to write to; made if there is none.
        pixels: a photograph (1, C, H, W) from 0 to 1; C is 1 to 4: grey, grey and alpha, RGB, RGBA. By default
            scikit-learn's photograph of a pagoda.
        device: where tri_stn runs.
        report: makes a context from a file's path, inside which it is drawn, such as `progress_line`.

    Returns:
        The files, in the order of `PICTURES`.

    Raises:
        GalleryError: a name is not known, a package is missing, the photograph is too small, or the folder cannot be
            written to. A picture is written whole or not at all.
    """
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise GalleryError(f"There is no picture {unknown[0]!r}; the gallery has {', '.join(PICTURES)}.")
    chosen = {name: out / file for name, file in PICTURES.items() if not names or name in names}
    if why := obstacle(*chosen.values()):
        raise GalleryError(why)
    _check_packages()
    from .photograph import bundled, prepare

    photo = bundled() if pixels is None else prepare(pixels)
    photo = photo.to(device)
    written = []
    for name, file in chosen.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            with report(file), _one_thread():
                importlib.import_module(f".{name}", __package__).draw(photo, file)
        except OSError as error:
            raise GalleryError(f"{file} could not be written: {error.strerror or error}.") from error
        written.append(file)
    return written


@contextmanager
def progress_line(path: Path) -> Iterator[None]:
    """A report for people: one line for each picture."""
    from rich.console import Console
    from rich.markup import escape

    console, start = Console(), perf_counter()
    with console.status(f"drawing {escape(path.name)}"):
        yield
    kilobytes = path.stat().st_size / 1000
    console.print(f"{escape(str(path))}: {kilobytes:.0f} kB, {perf_counter() - start:.1f} s", highlight=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain little from threads, and lose much when cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            name = {"PIL": "Pillow", "sklearn": "scikit-learn"}.get(package, error.name)
            raise GalleryError(
                f"The gallery needs {name}, which is not installed: pip install tri_stn[demo]."
            ) from error
