"""Where nothing can be written, a command says so before it begins, in one line, and leaves nothing."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

from tri_stn import files

COMMANDS = {
    "bench": "bench.__main__ --device cpu --workload mnist_28 --out {folder}",
    "gpu": "bench.__main__ gpu --out {folder}",
    "resources": "bench.__main__ resources --kernel gather --arch sm_90 --json {file}",
    "precision": "bench.__main__ precision --device cpu --width 2 --json {file}",
    "dashboard": "bench.__main__ dashboard --out {folder}",
    "demo": "bench.demo --device cpu --epochs 1 --out {file}",
    "crops": "bench.experiments.crops --device cpu --quick --out {folder}",
    "gallery": "tri_stn.__main__ gallery --device cpu coordinates --out {folder}",
    "warp": "tri_stn.__main__ warp --device cpu {input} {file}",
}


def begin_and_stop(command: str, capsys: pytest.CaptureFixture[str], **places: Path) -> str:
    """What a command prints to stderr that ends with exit status 2."""
    module, *words = (word.format(**places) for word in command.split())
    try:
        status = importlib.import_module(module).main(words)
    except SystemExit as stop:  # argparse's
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2, printed
    return printed.err


@pytest.mark.parametrize("place", ["behind a file", "behind a broken link", "a folder's name", "too long a name"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_impossible_place_is_refused_before_the_work(command, place, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (4, 4)).save(tmp_path / "in.png")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "out.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    parent = {
        "behind a file": tmp_path / "in.png" / "new",
        "behind a broken link": tmp_path / "link",
        "a folder's name": tmp_path,
        "too long a name": tmp_path / ("long" * 64),
    }[place]
    if place == "a folder's name" and "{folder}" in COMMANDS[command]:
        pytest.skip("makes the names of its files itself")
    err = begin_and_stop(COMMANDS[command], capsys, input=tmp_path / "in.png", file=parent / "out.png", folder=parent)
    lines = [line for line in err.splitlines() if not re.match("usage: | ", line)]  # argparse adds those
    assert len(lines) == 1 and f"Nothing can be written to {parent}" in lines[0], err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_obstacle_is_what_writing_meets(tmp_path):
    """In folders that are there, that would be made, and that neither is possible for."""
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    fine = [tmp_path / "new", tmp_path / "file", tmp_path / "a" / "b" / "new", tmp_path / "a" / ".." / "b" / "new"]
    before = sorted(tmp_path.rglob("*"))
    assert files.obstacle(*fine) == ""
    assert files.obstacle(*fine, tmp_path / "pipe").endswith("pipe: it is no file.")
    assert files.obstacle(tmp_path / ("n" * 250)).endswith("File name too long.")  # with what write_whole adds to it
    if os.geteuid():  # root may
        assert files.obstacle(tmp_path / "closed" / "new").endswith("Permission denied.")
        assert files.obstacle(tmp_path / "closed" / "a" / "new").endswith("Permission denied.")
    if sys.platform == "linux":
        assert files.obstacle(Path("/proc/new/file")).startswith("Nothing can be written to /proc/new/file: ")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"
