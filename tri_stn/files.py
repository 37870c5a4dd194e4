"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file of another name beside it, then rename that."""
    temporary = _beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def obstacle(*files: Path) -> str:
    """Why `write_whole` cannot write the first of these that it cannot, even if folders are made for it: a sentence;
    empty where there is none. It is tried, before work that would be lost, and leaves nothing.
    """
    return next(filter(None, map(_obstacle, files)), "")


def _obstacle(file: Path) -> str:
    made: list[Path] = []
    try:
        if file.exists() and not file.is_file():  # a device would be replaced
            return f"Nothing can be written to {file}: it is {'a folder' if file.is_dir() else 'no file'}."
        missing = [parent for parent in file.parents if not os.path.lexists(parent)]
        there = file.parents[len(missing)]
        if not there.is_dir():
            return f"Nothing can be written to {file}: {there} is not a folder."
        for parent in reversed(missing):
            if not parent.is_dir():  # "new/.." is one, once there is "new"
                parent.mkdir()
                made.append(parent)
        _beside(file).touch()
        _beside(file).unlink()
    except OSError as error:
        return f"Nothing can be written to {file}: {error.strerror}."
    finally:
        for parent in reversed(made):
            parent.rmdir()
    return ""


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
