"""compare, targets and dashboard, on small files of made-up numbers: device "test device", which nobody has."""

import itertools
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch

from bench import compare, records, results, targets
from bench.__main__ import main
from bench.dashboard import series
from bench.workloads import WORKLOADS, Maps, Workload

LARGE = 64, 3, (1024, 1024), (1024, 1024)
SHIFT = (0.4 / 1024, 1.6 / 1024)
IDENTITY = Workload("identity", *LARGE, Maps((1, 1), shift=SHIFT))
FORWARD, BOTH = ("forward",), ("both",)


def row(workload, direction, provider, milliseconds, spread=0.02, **options):
    """A row with times around a median, a floor of one millisecond and no peak memory."""
    times = [milliseconds * 1e-3 * (1 + spread * step / 5) for step in range(-5, 6)]
    options = {"match": True, "floor": 1e-3, "bytes": 10**9, "peak_bytes": 0, "errors": {"output": 1e-6}} | options
    return results.Row(workload, provider, direction, times=times, **options)


def untimed(workload, direction, provider, reason, failed=False):
    return results.Row(workload, provider, direction, reason=reason, failed=failed)


def made_up(path, rows, device="test device", commit="aaaa", date="2001-01-01T00:00:00+00:00"):
    """A file as `python -m bench` writes it."""
    about = results.describe(torch.device("cpu"), results.Commit(commit, False), "python -m bench --made-up", 1e12)
    about["machine_info"] |= {"device": device, "threads": None}
    results.write(path, about | {"datetime": date}, rows)
    return path


def by_pytest_benchmark(path, medians, brand="test processor"):
    """A file as `pytest --benchmark-json` writes it, but for fields that nobody reads."""
    rows = [
        {
            "group": None,
            "name": name,
            "fullname": f"test_user.py::{name}",
            "params": None,
            "extra_info": {},
            "stats": {"median": median, "q1": median * 0.99, "q3": median * 1.01, "iqr": median * 0.02},
        }
        for name, median in medians.items()
    ]
    about = {"machine_info": {"cpu": {"brand_raw": brand}}, "commit_info": {"id": "bbbb", "dirty": False}}
    path.write_text(json.dumps(about | {"datetime": "2001-01-01", "version": "5", "benchmarks": rows}))
    return path


def run(capsys, *words):
    """Exit status and what was printed."""
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out + err


# --- compare ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "status", "says"),
    [
        ({"milliseconds": 1.0}, 0, "Nothing changed"),
        ({"milliseconds": 1.03, "spread": 0.001}, 0, "Nothing changed"),  # beyond the spread, not the threshold
        ({"milliseconds": 1.2, "spread": 0.5}, 0, "Nothing changed"),  # beyond the threshold, within the spread
        ({"milliseconds": 1.2}, 1, "slower"),
        ({"milliseconds": 0.8}, 0, "faster"),
        ({"milliseconds": 1.0, "peak_bytes": 2**20}, 1, "more memory"),
        ({"milliseconds": 1.0, "peak_bytes": 2**10}, 0, "Nothing changed"),
    ],
)
def test_only_what_is_beyond_the_noise_is_a_regression(tmp_path, capsys, after, status, says):
    a = made_up(tmp_path / "a.json", [row(IDENTITY, "both", "tri_stn", 1.0)])
    b = made_up(tmp_path / "b.json", [row(IDENTITY, "both", "tri_stn", **after)])
    found, text = run(capsys, "compare", a, b)
    assert (found, says in text) == (status, True), text


def test_a_wrong_result_is_a_regression_and_others_slowness_is_none(tmp_path, capsys):
    before = [row(IDENTITY, "both", name, 1.0) for name in ("tri_stn", "eager")]
    a = made_up(tmp_path / "a.json", before)
    b = made_up(tmp_path / "b.json", [before[0], row(IDENTITY, "both", "eager", 9.0)])
    status, text = run(capsys, "compare", a, b)
    assert (status, "slower" in text) == (0, True)
    broken = untimed(IDENTITY, "both", "tri_stn", "The result is too far from the fp64 truth.", failed=True)
    b = made_up(tmp_path / "b.json", [broken, before[1]])
    status, text = run(capsys, "compare", a, b)
    assert (status, "broke" in text) == (1, True)


def test_files_of_pytest_benchmark_are_compared(tmp_path, capsys):
    a = by_pytest_benchmark(tmp_path / "a.json", {"test_one": 1e-3, "test_two": 1e-3})
    assert run(capsys, "compare", a, a)[0] == 0
    b = by_pytest_benchmark(tmp_path / "b.json", {"test_one": 2e-3, "test_three": 1e-3})
    status, text = run(capsys, "compare", a, b)
    assert (status, "2.00×" in text, "1 only in A, 1 only in B" in text) == (1, True, True), text


def test_what_cannot_be_compared_is_refused_with_a_sentence(tmp_path, capsys):
    good = made_up(tmp_path / "a.json", [row(IDENTITY, "both", "tri_stn", 1.0)])
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"benchmarks": [{"stats": {"median": 1}}]}')
    other = replace(IDENTITY, name="other")
    files = {
        "not a JSON file": tmp_path / "text.json",
        "not a results file": tmp_path / "list.json",
        "cannot be read": tmp_path / "absent.json",
        "understood": tmp_path / "odd.json",
        "no row in common": made_up(tmp_path / "c.json", [row(other, "both", "tri_stn", 1.0)]),
        "do not compare": made_up(tmp_path / "d.json", [row(IDENTITY, "both", "tri_stn", 1.0)], "another test device"),
    }
    for words, path in files.items():
        status, text = run(capsys, "compare", good, path)
        assert (status, words in text) == (2, True), (words, text)


def test_a_workload_that_was_changed_under_its_name_is_not_compared():
    one, two = ({"name": "x", "channels": channels, "seed": channels} for channels in (1, 2))
    a, b = (records.Record("x", fields, "tri_stn", "both", True, {}, {}) for fields in (one, two))
    assert not compare.same_work(a, b)
    assert compare.same_work(a, replace(b, params={"name": "x", "channels": 1, "seed": 9, "new": True}))


def test_the_help_says_the_rule(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert compare.RULE in capsys.readouterr().out


# --- targets ------------------------------------------------------------------------------------------


def verdict(path, start):
    found = [v for v in targets.judge(records.read(path)) if v.target.what.startswith(start)]
    assert len(found) == 1
    return found[0]


def all_forms(workload):
    return [
        replace(workload, dtype=d, layout=x) for d in ("float32", "bfloat16") for x in ("contiguous", "channels_last")
    ]


FIRST = "forward, affine bilinear, near-identity"


def test_every_row_has_to_meet_a_target(tmp_path):
    rows = [row(w, "forward", "tri_stn", 1.1) for w in all_forms(IDENTITY)]
    assert verdict(made_up(tmp_path / "a.json", rows), FIRST).status == "met"
    rows[2] = row(rows[2].workload, "forward", "tri_stn", 1.25)
    found = verdict(made_up(tmp_path / "b.json", rows), FIRST)
    assert (found.status, found.measured) == ("not met", "80 %")


@pytest.mark.parametrize(
    "how", ["of a CPU", "not compared with fp64", "in one dtype alone", "scaled down", "small tensors"]
)
def test_what_does_not_count_leaves_a_target_unmeasured(tmp_path, how):
    workloads = all_forms(IDENTITY)
    if how == "in one dtype alone":
        workloads = workloads[:2]
    if how == "scaled down":
        workloads = [replace(w, variant="small") for w in workloads]
    if how == "small tensors":
        workloads = [replace(w, batch=1) for w in workloads]
    rows = [row(w, "forward", "tri_stn", 1.1, match=None if "fp64" in how else True) for w in workloads]
    path = made_up(tmp_path / "a.json", rows, "cpu test" if how == "of a CPU" else "test device")
    assert verdict(path, FIRST).status == "not measured"


def test_a_failed_row_is_not_met(tmp_path):
    rows = [row(w, "forward", "tri_stn", 1.1) for w in all_forms(IDENTITY)]
    rows.append(untimed(replace(IDENTITY, name="second"), "forward", "tri_stn", "wrong", failed=True))
    assert verdict(made_up(tmp_path / "a.json", rows), FIRST).status == "not met"


def test_maps_are_told_apart_by_what_they_do(tmp_path):
    """Not by the names of workloads."""
    likes = (targets.near_identity, targets.rotated_by_30, targets.shrunk_by_2, targets.zoomed_by_2)
    maps = (
        (IDENTITY.transform, LARGE),
        (Maps((1, 1), angle=(30, 30)), LARGE),
        (Maps((1, 1)), (64, 3, (1024, 1024), (512, 512))),
        (Maps((0.5, 0.5)), LARGE),
    )
    rows = [row(Workload("x", *shape, m), "forward", "tri_stn", 1.0) for m, shape in maps]
    found = records.read(made_up(tmp_path / "a.json", rows)).records
    assert [[like(record) for like in likes] for record in found] == [[i == j for j in range(4)] for i in range(4)]


def test_speed_is_held_against_the_fastest_row_that_is_right(tmp_path):
    rows = [row(IDENTITY, "both", "tri_stn", 1.0), row(IDENTITY, "both", "compile", 2.5)]
    rows.append(row(IDENTITY, "both", "eager", 0.5, match=False))
    path = made_up(tmp_path / "a.json", rows)
    assert verdict(path, "forward + backward, parametric").measured == "2.5×"
    assert verdict(path, "any workload: against eager").status == "not measured"


def test_memory_is_held_against_torchs_and_against_a_mebibyte(tmp_path):
    small = replace(IDENTITY, gradients=("theta",))
    for peak, status in ((2**21, "met"), (2**21 + 1, "not met")):  # a mebibyte, and a mebibyte of partial sums
        rows = [row(small, "both", "tri_stn", 1.0, peak_bytes=peak), row(small, "both", "eager", 1.0, peak_bytes=2**21)]
        path = made_up(tmp_path / f"{peak}.json", rows)
        assert verdict(path, "peak memory beyond").status == status
        assert verdict(path, "peak memory, any").status == status


def test_the_targets_of_the_cpu_path_are_for_files_of_a_cpu(tmp_path):
    """Where fewer images count, and scaled-down workloads do not."""
    few, small = replace(IDENTITY, batch=2, variant="few"), replace(IDENTITY, variant="small")
    rows = [row(few, "both", "tri_stn", 1.0, peak_bytes=3), row(few, "both", "eager", 0.96, peak_bytes=2)]
    rows += [row(small, "both", "tri_stn", 1.0, peak_bytes=9), row(small, "both", "eager", 0.1, peak_bytes=2)]
    path = made_up(tmp_path / "a.json", rows, "cpu test")
    found = [verdict(path, start) for start in ("on a CPU, any", "on a CPU, grids")]
    assert [(v.status, v.measured) for v in found] == [("met", "0.96×"), ("not met", "1.5×")]
    gpu = targets.judge(records.read(made_up(tmp_path / "b.json", rows)))
    assert not any(v.target in targets.ON_CPU for v in gpu)


def test_targets_are_met_only_when_all_are(tmp_path, capsys):
    status, text = run(capsys, "targets", made_up(tmp_path / "a.json", [row(IDENTITY, "both", "tri_stn", 1.0)]))
    assert status == 1
    assert len(re.findall(r"^(met|not met|not measured)  ", text, re.MULTILINE)) == len(targets.TARGETS)
    cpu = made_up(tmp_path / "b.json", [row(IDENTITY, "both", "tri_stn", 1.0)], "cpu test")
    status, text = run(capsys, "targets", cpu)
    assert (status, f"{len(targets.TARGETS + targets.ON_CPU)} not measured" in text) == (1, True)


def test_the_newest_file_of_a_gpu_is_the_one_without_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert "There are no results of a GPU" in run(capsys, "targets")[1]
    rows = [row(IDENTITY, "both", "tri_stn", 1.0)]
    made_up(tmp_path / "a.json", rows, commit="old", date="2001-01-01")
    made_up(tmp_path / "b.json", rows, commit="new", date="2002-01-01")
    made_up(tmp_path / "c.json", rows, "cpu test", commit="cpu", date="2003-01-01")
    assert "commit new" in run(capsys, "targets")[1]


# --- dashboard ----------------------------------------------------------------------------------------


def test_gpus_come_first_and_then_what_was_measured_last(tmp_path):
    rows = [row(IDENTITY, "both", "tri_stn", 1.0)]
    devices = {"cpu old": "2001", "old": "2002", "cpu new": "2003", "cpu again": "2000", "new": "2004"}
    files = [made_up(tmp_path / f"{d}.json", rows, d, date=f"{year}-01-01") for d, year in devices.items()]
    files.append(made_up(tmp_path / "last.json", rows, "cpu again", date="2005-01-01"))
    found = series.newest(map(records.read, files))
    assert list(found) == ["new", "old", "cpu again", "cpu new", "cpu old"]
    assert series.first_choice(found).device == "new"


def shelf(folder):
    """Two commits of a made-up GPU, the second slower on one workload, and a CPU."""
    rois = next(w for w in WORKLOADS if w.name == "detection_rois")
    workloads = IDENTITY, rois, replace(IDENTITY, layout="channels_last"), replace(IDENTITY, dtype="bfloat16")
    for commit, date, slow in (("aaaa", "2001-01-01T00:00:00", 1), ("bbbb", "2001-01-02T00:00:00", 2)):
        rows = []
        for workload, direction in itertools.product(workloads, ("forward", "both")):
            ours = 1.2 * slow if workload is rois else 1.2
            for provider, time, peak in (("tri_stn", ours, 0), ("eager", 3, 2**28), ("compile", 2, 2**27)):
                errors = {"output": 1e-6 * time, "grad_input": 1e-5}
                rows.append(row(workload, direction, provider, time, 0.1, errors=errors, peak_bytes=peak))
        rows.append(row(IDENTITY, "both", "copy", 1.0, match=None))  # has no result to compare
        rows.append(untimed(rois, "backward", "compile", "A made-up <reason>."))
        made_up(folder / f"{commit}.json", rows, commit=commit, date=date)
    cpu = [row(w.small(), "forward", p, 1.0) for w in (IDENTITY, rois) for p in ("tri_stn", "eager")]
    made_up(folder / "cpu.json", cpu, "cpu test", commit="cccc")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("shelf")
    assert main(["dashboard", str(shelf(folder)), "--out", str(folder / "page")]) == 0
    return folder / "page" / "index.html"


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    text = page.read_text(encoding="utf-8")
    ours = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.DOTALL)  # plotly's own
    assert len(ours) < len(text) / 4
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://""", ours)
    assert "python -m bench --made-up" in ours
    assert "made-up &lt;reason&gt;" in ours


def test_png_files_are_of_one_choice(tmp_path, capsys):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    status, text = run(capsys, "dashboard", shelf(tmp_path), "--out", out, "--png", "--direction", "forward")
    assert status == 0, text
    assert {path.name for path in out.iterdir()} == {
        "index.html", "speedup.png", "roofline.png", "memory.png", "history.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["EMPTY"], "There are no results"),
        (["FILE", "--device", "no such"], "Nothing was measured of device no such"),
        (["BAD"], "not a results file"),
    ],
)
def test_a_dashboard_of_nothing_is_refused_with_a_sentence(tmp_path, capsys, words, says):
    pytest.importorskip("plotly")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    good = made_up(tmp_path / "a.json", [row(IDENTITY, "both", "tri_stn", 1.0)])
    names = {"EMPTY": tmp_path / "empty", "FILE": good, "BAD": tmp_path / "bad.json"}
    status, text = run(capsys, "dashboard", *(names.get(word, word) for word in words), "--out", tmp_path / "out")
    assert (status, says in text) == (2, True), text
    assert not (tmp_path / "out").exists()


def test_a_dashboard_that_cannot_be_written_is_refused_with_a_sentence(tmp_path, capsys):
    """Where the folder would lie in a file, and where another folder has the page's name."""
    pytest.importorskip("plotly")
    good = made_up(tmp_path / "a.json", [row(IDENTITY, "both", "tri_stn", 1.0)])
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    for out in (good / "folder", tmp_path / "out"):
        status, text = run(capsys, "dashboard", good, "--out", out)
        assert (status, text.startswith(f"Nothing can be written to {out}")) == (2, True), text


def test_a_sweep_is_a_line_along_what_it_varies():
    """Whatever else changes with it, as the number of images does."""
    rows = [
        records.Record(
            str(channels),
            {"sweep": "channels", "name": f"c{channels}", "channels": channels, "batch": 64 // channels,
             "dtype": "float32", "layout": "contiguous"},
            provider, "forward", True, {"median": time * channels}, {"floor": 1e-3},
        )
        for channels in (16, 1, 4)
        for provider, time in (("tri_stn", 2e-3), ("eager", 5e-3))
    ]  # fmt: skip
    file = records.Results("x", "test device", True, "aaaa", False, "2001", "", True, "", tuple(rows))
    lines = {s.name: (s.group, s.x, s.y) for s in series.sweeps(file)}
    assert lines == {
        "tri_stn": ("channels", [1, 4, 16], pytest.approx([2, 8, 32])),
        "eager": ("channels", [1, 4, 16], pytest.approx([5, 20, 80])),
        series.FLOOR: ("channels", [1, 4, 16], [1, 1, 1]),
    }
    assert not series.speedups(file)  # which are of workloads that stand for themselves


# --- in a browser -------------------------------------------------------------------------------------

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """Any Chromium of this machine, or the one that `playwright install chromium` fetched."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: pip install playwright"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as p:
        if found is None and not os.path.exists(p.chromium.executable_path):
            pytest.skip(f"There is no browser here: none of {', '.join(BROWSERS)}, and none of playwright's.")
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])  # CI runs as root; the page is ours
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, page):
    """The page, open from disk on a dark phone, and what it should not have done."""
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    troubles = []
    tab.on("console", lambda message: troubles.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    tab.on("request", lambda request: troubles.append(f"request: {request.url}"))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn")
    yield tab, troubles
    tab.close()


@pytest.fixture
def tab(opened, page):
    """The page as it opens; fails if it wrote to the console, raised, or asked for anything but itself."""
    tab, troubles = opened
    choose(tab, device="test device", dtype="float32", direction="both")
    yield tab
    allowed = f"request: {page.as_uri()}", "request: data:"
    assert not [trouble for trouble in troubles if not trouble.startswith(allowed)]


def test_the_page_opens_with_a_training_step_in_fp32_on_the_gpu(opened):
    assert opened[0].evaluate("document.body.dataset.drawn") == "test device | float32 | both"


def choose(tab, **options):
    for name, value in options.items():
        tab.select_option(f"#{name}", value)
    tab.wait_for_function(
        "words => words.every(w => document.body.dataset.drawn.includes(w))", arg=list(options.values())
    )


def shown(tab, plot):
    """The names and the categories of the traces in a plot, as plotly drew them."""
    traces = tab.evaluate("id => document.getElementById(id).data.map(t => [t.name, t.y])", plot)
    return dict(traces)


def test_the_page_draws_and_its_filter_works(tab):
    assert tab.evaluate("document.querySelectorAll('#speedup .bars .point path').length") == 6  # as in the SVG
    assert shown(tab, "speedup-0").keys() == {"eager", "compile"}
    assert set(shown(tab, "speedup-0")["eager"]) == {"identity", "identity<br>channels_last", "detection_rois"}

    choose(tab, dtype="bfloat16")
    assert shown(tab, "speedup-0")["eager"] == ["identity"]
    assert tab.evaluate("document.querySelectorAll('#speedup .bars .point path').length") == 2

    choose(tab, device="cpu test", dtype="float32", direction="forward")
    assert set(shown(tab, "speedup-0")["eager"]) == {"identity<br>small", "detection_rois<br>small"}
    choose(tab, direction="both")
    assert tab.locator("#speedup .empty").is_visible()
    assert not tab.locator("#speedup-0").is_visible()


def test_a_regression_is_marked_and_said(tab):
    symbols = tab.evaluate(
        "document.getElementById('history-0').data.map(t => [t.name, t.marker.symbol[t.marker.symbol.length - 1]])"
    )
    assert dict(symbols) == {"identity": "circle", "identity, channels_last": "circle", "detection_rois": "x"}
    visible = tab.locator("#history ~ .regressions li:visible")
    assert visible.count() == 1
    assert visible.inner_text() == "bbbb, 2001-01-02 00:00: detection_rois: 2.4 ms, 1.2 ms before"


def test_what_was_not_measured_is_said(tab):
    assert not tab.locator("#missing tbody tr:visible").count()
    choose(tab, direction="backward")
    assert "A made-up <reason>." in tab.locator("#missing tbody tr").inner_text()
    assert tab.locator("#speedup .empty").inner_text() == "Not measured for this choice."
    assert tab.locator("#sweeps .empty").inner_text() == "Not measured."


def test_the_page_fits_a_phone_and_dark_surroundings(tab):
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    back, text = tab.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (back, text))
    assert dark < 150 < 600 < light
    ticks = tab.evaluate("getComputedStyle(document.querySelector('#speedup .ytick text')).fill")
    assert ticks == text
