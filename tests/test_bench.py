"""The benchmark's own promises that need no GPU: files whole or absent, runs that go on, parts that fail alone, honest
rows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, measure, results, run, targets
from bench.__main__ import main
from bench.providers import EAGER, PROVIDERS, Provider
from bench.records import shelf
from bench.workloads import SWEEPS, WORKLOADS, make_tensors

CPU = torch.device("cpu")
SMALL = WORKLOADS[0].small()
SETTINGS = run.Settings(CPU, ("forward",), 0.01, 60, 1e9)


def test_a_gpu_run_goes_on_after_a_part_fails_or_hangs(tmp_path):
    python = [sys.executable, "-c"]
    parts = [
        gpu.Part("good", [*python, "print('hello')"], 30),
        gpu.Part("bad", [*python, "raise SystemExit(3)"], 30),
        gpu.Part("slow", [*python, "import time; time.sleep(60)"], 1),
        gpu.Part("absent", ["no-such-program"], 30, skipped="no-such-program is not on the PATH"),
        gpu.Part("last", [*python, "import os; print(os.environ['SETTING'])"], 30, {"SETTING": "on"}),
        gpu.Part("limited", [*python, "import sys; print(sys.argv[1:])"], 75, stops_itself=True),
    ]
    outcomes = list(gpu.run(parts, tmp_path, total_seconds=120))
    assert [o.failed for o in outcomes] == [False, True, True, False, False, False]
    assert "exit status 3" in outcomes[1].status
    assert "stopped after 1 s" in outcomes[2].status
    assert (tmp_path / "good.log").read_text() == "hello\n"
    assert (tmp_path / "last.log").read_text() == "on\n"
    assert (tmp_path / "limited.log").read_text() == "['--time-limit', '15']\n"
    assert [o.status for o in gpu.run(parts[:1], tmp_path, total_seconds=1)] == ["no time left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes on the CUDA device of this machine")
def test_a_gpu_run_without_a_gpu_says_so_and_leaves_nothing(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_further_gpu_run_skips_what_passed_of_the_same_commit_device_and_versions(tmp_path):
    def about(commit, **machine):
        found = results.describe(CPU, results.Commit(*commit), "", 1e9)
        return found | {"machine_info": found["machine_info"] | machine}

    first = about(("abc", False))
    gpu.remember(tmp_path, first, ["tests"])
    assert gpu.passed_before(tmp_path, first | {"datetime": "later"}) == ["tests"]
    assert not shelf(tmp_path)  # what reads the folder's results does not take it for one
    parts = gpu.parts(tmp_path, "abc", ["tests"])
    assert [part.name for part in parts if "passed" in part.skipped] == ["tests"]
    assert [part.name for part in parts if part.stops_itself] == ["bench"] == [parts[-1].name]
    for other in (about(("abd", False)), about(("abc", True)), about(("abc", False), device="another")):
        assert gpu.passed_before(tmp_path, other) == []
        assert results.identity(other) != results.identity(first)
    for unnamed in (about(("abc", True)), about(("unknown", None))):
        gpu.remember(tmp_path / "unnamed", unnamed, ["tests"])
        assert gpu.passed_before(tmp_path / "unnamed", unnamed) == []


def test_the_same_gpu_command_again_gives_its_time_to_what_has_not_passed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "device_name", lambda device: "test device")
    real, status = gpu.parts, {"tests": 0, "sanitizer": 1, "bench": 0}

    def parts(*arguments):
        return [
            replace(part, command=[sys.executable, "-c", f"raise SystemExit({status[part.name]})"],
                    skipped=part.skipped if "passed" in part.skipped else "")
            for part in real(*arguments)
        ]  # fmt: skip

    monkeypatch.setattr(gpu, "parts", parts)
    assert gpu.main(tmp_path, "abc") == 1
    assert "tests: passed" in (text := capsys.readouterr().out) and "Nothing of the benchmark is measured" in text
    status |= {"tests": 1, "sanitizer": 0}  # the tests are not run again
    assert gpu.main(tmp_path, "abc") == 0
    assert re.findall(r"^(\w+): (passed|skipped)", capsys.readouterr().out, re.MULTILINE) == [
        ("tests", "skipped"), ("sanitizer", "passed"), ("bench", "passed"),
    ]  # fmt: skip
    assert gpu.main(tmp_path, "abd") == 1  # another commit: everything


def test_a_gpu_run_says_how_far_it_has_come(tmp_path):
    path, about = tmp_path / "gpu.json", results.describe(CPU, results.Commit("abc", None), "", 1e9)
    assert "cannot be read" in gpu.summary(path, about)
    done = replace(_timed("tri_stn"), match=True)
    waiting = results.Row(SMALL, "eager", "forward", reason=results.NO_TIME)
    results.write(path, about, [done, waiting])
    assert gpu.summary(path, about).startswith("1 of 2 rows are done; targets: 0 met, 0 not met, ")
    assert "same command goes on" in gpu.summary(path, about)
    assert "--commit ID" in gpu.summary(path, results.describe(CPU, results.Commit("abc", True), "", 1e9))
    results.write(path, about, [done])
    assert "Results are in" in gpu.summary(path, about)


# --- the order of rows, and runs that go on ----------------------------------------------------------


def test_rows_that_targets_read_come_first_and_sweeps_last(monkeypatch):
    jobs = run.plan(WORKLOADS + SWEEPS, list(PROVIDERS.values()))
    at = {(str(job.workload), provider.name): i for i, job in enumerate(jobs) for provider in job.providers}
    assert len(at) == len(WORKLOADS + SWEEPS) * len(PROVIDERS)
    first = max(at[str(w), name] for w in WORKLOADS for name in ("tri_stn", "eager"))
    others = [at[str(w), name] for w in WORKLOADS for name in ("copy", "cudnn", "kornia")]
    compiled = {
        w.transform.dense: [
            at[str(v), "compile"] for v in WORKLOADS if v.gradients and v.transform.dense == w.transform.dense
        ]
        for w in WORKLOADS
    }
    assert first < min(others) and max(others) < min(compiled[False])
    assert max(compiled[False]) < min(compiled[True])  # targets about particular workloads, before those about all
    assert max(compiled[True]) < min(at[str(w), name] for w in SWEEPS for name in PROVIDERS)

    # The order follows from the targets alone.
    flow = targets.Target("", lambda r: r.kind == "displacement", targets.speedup, 1, "×", against=("kornia",))
    monkeypatch.setattr(targets, "TARGETS", (flow,))
    job = run.plan(WORKLOADS, list(PROVIDERS.values()))[0]
    assert (job.workload.name, [p.name for p in job.providers]) == ("flow_720p", ["tri_stn", "kornia"])


def _timed(provider, workload=SMALL):
    return results.Row(workload, provider, "forward", times=[1e-3] * 5, bytes=1, floor=1e-4, peak_bytes=0)


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run the command on three workloads and two providers that are never run: names of the jobs, rows of the file."""
    begun = []

    def fake(job, settings):
        begun.append((str(job.workload), *(p.name for p in job.providers)))
        rows = run.left_out(job, settings.directions, "")
        return [replace(_timed(row.provider, job.workload), direction=row.direction, match=True) for row in rows]

    monkeypatch.setattr(run, "_run_job", fake)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: len(begun)))  # a second for each job
    monkeypatch.setattr(measure, "copy_bandwidth", lambda *_: 1e9)

    def call(*words, jobs=10, commit=("--commit", "abc")):
        begun.clear()
        command = ["--device", "cpu", "--workload", "cub_crops", "--provider", "eager", "--provider", "compile"]
        command += ["--direction", "forward", "--out", str(tmp_path), "--time-limit", str(jobs - 0.5)]
        status = main([*command, *commit, *words])
        path = max(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return status, list(begun), json.loads(path.read_text()), capsys.readouterr().out

    return call


def test_a_run_goes_on_where_time_ran_out(bench):
    _, first, document, text = bench(jobs=7)
    every = len(document["benchmarks"]) + len(document["not_timed"])
    assert len(first) == len(document["benchmarks"]) == 7 < every
    assert {row["reason"] for row in document["not_timed"]} == {results.NO_TIME}
    assert (document["complete"], f"{every - 7} of {every} rows wait" in text) == (False, True)

    _, second, document, text = bench("--resume", jobs=every)
    assert not set(first) & set(second)
    assert (len(first) + len(second), len(document["benchmarks"]), document["not_timed"]) == (every, every, [])
    assert document["complete"] and "7 rows are there from before" in text and "wait" not in text

    assert bench("--resume")[1] == []
    assert len(bench(jobs=5)[1]) == 5  # without the word, everything anew
    assert len(bench("--resume", jobs=3, commit=("--commit", "abd"))[1]) == 3  # another commit has a file of its own


def test_a_run_keeps_nothing_of_files_that_no_commit_names(bench, monkeypatch):
    monkeypatch.setattr(results.Commit, "of_checkout", classmethod(lambda cls: cls("abc", True)))
    _, first, _, _ = bench(jobs=3, commit=())
    _, second, document, text = bench("--resume", jobs=3, commit=())
    assert first == second
    assert len(document["benchmarks"]) == 3
    assert results.UNNAMED in text


def test_a_run_that_dies_keeps_its_rows_and_the_next_begins_behind_it(bench, monkeypatch):
    whole = run._run_job

    def broken(job, settings):
        if job.workload.name == "cub_crops_k2":
            raise RuntimeError("an illegal access\nand more")
        return whole(job, settings)

    monkeypatch.setattr(run, "_run_job", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        bench()
    monkeypatch.setattr(run, "_run_job", whole)
    status, begun, document, _ = bench("--resume", jobs=99)
    (dead,) = document["not_timed"]
    assert (status, dead["failed"], dead["reason"]) == (1, True, "The run ended here: RuntimeError: an illegal access")
    assert dead["group"] == "cub_crops_k2-float32-contiguous-small/forward"
    assert begun and (begun[0][0], document["complete"]) != (dead["group"], False)


def test_of_a_provider_s_modes_the_fastest_counts(monkeypatch):
    waits = {"default": 0.004, "quicker": 0.0, "slower": 0.008, "broken": None}

    def build(workload, tensors, mode="default"):
        if waits[mode] is None:
            raise RuntimeError("no such kernel")
        forward = EAGER.build(workload, tensors)

        def slowed():
            time.sleep(waits[mode])
            return forward()

        return slowed

    tensors = make_tensors(SMALL, CPU)
    provider = Provider("modes", lambda *_: None, build, modes=("default", "broken", "quicker", "slower"))
    assert run.fastest(provider, SMALL, tensors, SETTINGS)[1] == "quicker"
    monkeypatch.setattr(run, "TUNING_SECONDS", 0)  # over as soon as the first mode was built
    assert run.fastest(provider, SMALL, tensors, SETTINGS)[1] == "default"
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.fastest(replace(provider, modes=("broken", "default")), SMALL, tensors, SETTINGS)
    assert replace(_timed("modes"), mode="quicker").to_json()["extra_info"]["mode"] == "quicker"
    assert "mode" not in _timed("eager").to_json()["extra_info"]


def test_rows_of_a_cpu_are_timed_in_rounds(monkeypatch):
    """So that what others do on the machine meets all providers."""
    order = []

    def times(call, device, seconds, least=3):
        order.append(call)
        return [float(len(order))]

    monkeypatch.setattr(measure, "times", times)
    providers = (PROVIDERS["tri_stn"], PROVIDERS["eager"])
    (rows,) = run.run([run.Job(SMALL, providers)], run.Settings(CPU, ("forward",), 1e-3, 60, 1e9))
    assert order[:2] * run.ROUNDS == order and len(set(order)) == 2
    assert [row.times for row in rows] == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]


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
    rows = [_timed("tri_stn"), _timed("eager")]
    rows.append(
        replace(rows[0], provider="copy", times=(), reason="an example", match=None, errors={"output": float("nan")})
    )
    path = tmp_path / results.file_name(CPU, results.Commit("abc", False))
    results.write(path, results.describe(CPU, results.Commit("abc", False), "python -m bench", 1e9), rows)
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


def test_a_reader_that_has_gone_ends_a_list_in_silence():
    """As in `python -m bench --list | head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "bench", "--list"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")
