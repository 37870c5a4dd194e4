"""The demo runs from one command and delivers what it promises, however short the training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_one_epoch_prints_the_table_and_writes_the_picture(tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "120"}
    command = [sys.executable, "-m", "bench.demo", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for row in ("test error, %", "seconds per epoch", "affine_grid + grid_sample", "tri_stn.warp", "MiB"):
        assert row in done.stdout, done.stdout
    counts = re.search(r"plain CNN ([\d,]+), with the transformer ([\d,]+)", done.stdout)
    assert counts is not None, done.stdout
    plain, transformer = (int(count.replace(",", "")) for count in counts.groups())
    assert abs(plain - transformer) <= 0.05 * transformer  # or the comparison would not be one of equals
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]  # nothing half-written beside it
