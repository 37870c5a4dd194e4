"""The benchmark's own promises that need no GPU: files whole or absent, parts that fail alone, honest rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import gpu, measure, results, run
from bench.__main__ import main
from bench.providers import EAGER, PROVIDERS, Provider
from bench.workloads import WORKLOADS, make_tensors

CPU = torch.device("cpu")
SMALL = WORKLOADS[0].small()
SETTINGS = run.Settings(CPU, ("forward",), 0.01, 60, 1e9)


def test_a_gpu_run_goes_on_after_a_part_fails_or_hangs(tmp_path):
    python = [sys.executable, "-c"]
    parts = [
        gpu.Part("good", [*python, "print('hello')"], 30),
        gpu.Part("bad", [*python, "raise SystemExit(3)"], 30),
        gpu.Part("slow", [*python, "import time; time.sleep(60)"], 5),
        gpu.Part("absent", ["no-such-program"], 30, unavailable="no-such-program is not on the PATH"),
        gpu.Part("last", [*python, "import os; print(os.environ['SETTING'])"], 30, {"SETTING": "on"}),
    ]
    outcomes = gpu.run(parts, tmp_path, total_seconds=120)
    assert [o.failed for o in outcomes] == [False, True, True, False, False]
    assert "exit status 3" in outcomes[1].status
    assert "stopped after 5 s" in outcomes[2].status
    assert (tmp_path / "good.log").read_text() == "hello\n"
    assert (tmp_path / "last.log").read_text() == "on\n"
    assert [o.status for o in gpu.run(parts[:1], tmp_path, total_seconds=1)] == ["no time left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes on the CUDA device of this machine")
def test_a_gpu_run_without_a_gpu_says_so_and_leaves_nothing(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_gets_no_times():
    wrong = Provider("wrong", lambda *_: None, lambda w, t: lambda: EAGER.build(w, t)() + 1e-3)
    ((row,),) = run.run([run.Job(SMALL, (wrong,))], SETTINGS)
    assert (row.match, row.failed, row.times) == (False, True, ())
    assert row.errors["output"] > row.limits["output"]


def test_a_provider_that_raises_costs_its_own_rows_alone():
    def build(workload, tensors):
        raise RuntimeError("out of luck\nand more")

    broken = Provider("broken", lambda *_: None, build)
    ((first, second),) = run.run([run.Job(SMALL, (broken, EAGER))], SETTINGS)
    assert (first.failed, first.reason) == (True, "broken raised RuntimeError: out of luck")
    assert second.match
    assert second.times


def test_a_pixel_that_nobody_wrote_does_not_match():
    tensors = make_tensors(SMALL, CPU)
    truth = measure.truth(SMALL, tensors)
    result = {name: tensor.clone() for name, tensor in truth.items()}
    result["output"][0, 0, 0, 0] = float("nan")
    limits = measure.limits(SMALL, tensors, {"output": float("nan")})
    errors = measure.errors(result, truth, torch.ones_like(tensors.clear))
    assert not measure.matches(errors, limits, "forward")
    assert measure.matches(errors, limits, "backward")


def test_results_read_as_pytest_benchmark_s(tmp_path, capsys):
    rows = [row for new in run.run(run.plan([SMALL], list(PROVIDERS.values())[:2]), SETTINGS) for row in new]
    rows.append(replace(rows[0], times=(), reason="an example", match=None, errors={"output": float("nan")}))
    path = tmp_path / results.file_name(CPU, results.Commit("abc", False))
    results.write(path, results.describe(CPU, results.Commit("abc", False), "python -m bench", 1e9), rows, True)
    assert path.name.endswith("-abc.json")
    assert len(json.loads(path.read_text())["not_timed"]) == 1
    cli = pytest.importorskip("pytest_benchmark.cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(path)])
        cli.main()
    assert "2 tests" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "results.json"
    results.write_whole(path, "old")
    with pytest.raises(TypeError):
        results.write_whole(path, 1)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
