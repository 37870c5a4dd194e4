"""The command line: ``python -m bench``, and after it nothing, or one of the commands that its ``--help`` lists."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tri_stn.files import obstacle

if TYPE_CHECKING:
    from .records import Results
    from .results import Row


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.main(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 1


def _parser() -> argparse.ArgumentParser:
    from .providers import PROVIDERS
    from .resources import ARCHITECTURES
    from .workloads import DIRECTIONS

    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare tri_stn with what people use today.")
    parser.set_defaults(main=_bench)
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument("--workload", action="append", metavar="TEXT", help="only workloads with this in their name")
    parser.add_argument("--sweeps", action="store_true", help="also the sweeps over size, channels, scale and angle")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="only these providers")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="only these directions")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--variant", choices=("full", "few", "small"), help="default: full on cuda, small on the CPU")
    parser.add_argument("--seconds", type=_positive, metavar="S", help="timing of one row, about")
    parser.add_argument(
        "--time-limit", type=_positive, metavar="S", help="leave out rows that would come after so long"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there of this device and commit")
    parser.add_argument("--commit", metavar="ID", help="name of the commit, where there is no git checkout")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results, for a run of everything")

    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")
    gpu = commands.add_parser(
        "gpu", help="tests, memory checks and benchmark on one GPU; nine minutes, then again to go on"
    )
    gpu.set_defaults(main=_gpu)
    gpu.add_argument("--out", type=Path, metavar="DIR", required=True, help="where logs and results go")
    gpu.add_argument("--commit", metavar="ID", help="name of the commit, where there is no git checkout")

    resources = commands.add_parser("resources", help="what each kernel costs on each architecture; needs no GPU")
    resources.set_defaults(main=_resources)
    kernels = ("gather", "walk", "scatter", "reduce")
    resources.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    resources.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only these architectures")
    resources.add_argument("--kernel", action="append", choices=kernels, help="only these kernels")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    resources.add_argument("--dtype", action="append", choices=dtypes, help="default: float32 and bfloat16")

    host = commands.add_parser("host", help="what Python and Triton take to start a small step; needs no GPU")
    host.set_defaults(main=_host)

    traffic = commands.add_parser("traffic", help="sectors and lines that warps and programs touch; needs no GPU")
    traffic.set_defaults(main=_traffic)
    traffic.add_argument("name", metavar="WORKLOAD", help="all workloads with this in their name")
    traffic.add_argument("--tile", action="append", type=_block, metavar="WxH", help="default: what the kernels take")
    traffic.add_argument("--programs", type=int, default=256, metavar="N", help="how many are counted (default: 256)")
    traffic.add_argument("--markdown", action="store_true", help="print the table as Markdown")

    precision = commands.add_parser("precision", help="error against fp64 by dtype and image width, beside torch's")
    precision.set_defaults(main=_precision)
    precision.add_argument("--width", action="append", type=int, metavar="PIXELS", help="only these image widths")
    precision.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    precision.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    precision.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    _add_readers(commands)
    return parser


def _add_readers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that measure nothing, and read what was measured."""
    from .compare import RULE, THRESHOLD

    compare = commands.add_parser(
        "compare",
        help="what changed between two results files beyond the noise; exit status 1 on a regression",
        description="What changed from A to B, files of python -m bench or of pytest --benchmark-json.",
        epilog=RULE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.set_defaults(main=_compare)
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument("--threshold", type=_share, default=THRESHOLD, metavar="SHARE", help=f"default: {THRESHOLD}")

    targets = commands.add_parser(
        "targets",
        help="each target of speed and memory: met, not met or not measured; exit status 0 when all are met",
        description="What a results file says of each target. Only rows of a GPU whose result matched fp64 count.",
    )
    targets.set_defaults(main=_targets)
    targets.add_argument(
        "results", type=Path, nargs="?", metavar="RESULTS.json", help="default: the newest committed one of a GPU"
    )

    dashboard = commands.add_parser(
        "dashboard",
        help="one HTML page, in one file, of everything that was measured",
        description="Write index.html, which needs no network. pip install 'tri_stn[dashboard]' brings the plots.",
    )
    dashboard.set_defaults(main=_dashboard)
    dashboard.add_argument(
        "results", type=Path, nargs="*", metavar="RESULTS", help="files or folders; default: bench/results"
    )
    dashboard.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the page goes")
    dashboard.add_argument("--png", action="store_true", help="also speedup.png, roofline.png, memory.png, history.png")
    for name, example in (("device", "its name"), ("dtype", "as float32"), ("direction", "as both")):
        dashboard.add_argument(f"--{name}", metavar="NAME", help=f"what the page opens with and --png shows, {example}")


def _share(text: str) -> float:
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"takes a share, such as 0.05; got {text}.")
    return number


def _positive(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"takes a number of seconds above zero; got {text}.")
    return number


def _block(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) * int(height) in (32, 64, 128, 256, 512)):
        raise argparse.ArgumentTypeError(f"takes a tile such as 16x8, of 32 to 512 pixels, a power of two; got {text}.")
    return int(width), int(height)


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from . import results
    from .measure import copy_bandwidth
    from .providers import PROVIDERS
    from .report import track
    from .run import Settings, left_out, plan, remaining, run
    from .workloads import DIRECTIONS, SWEEPS, WORKLOADS

    # A name picks from all.
    every = WORKLOADS + SWEEPS if arguments.sweeps or arguments.workload or arguments.list else WORKLOADS
    chosen = [w for w in every if not arguments.workload or any(text in str(w) for text in arguments.workload)]
    if not chosen:
        return _refuse("No workload has that in its name; python -m bench --list names them all.")
    if arguments.list:
        print(*chosen, sep="\n")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("There is no CUDA device that torch can use here.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = device.type == "cpu"
    if arguments.variant == "small" or (on_cpu and not arguments.variant):
        torch.set_num_threads(1)  # so little work does not feed more, and waiting for them is what would be timed
        chosen = [workload.small() for workload in chosen]
        print("Scaled-down workloads: these times say nothing about the full ones.")
    elif arguments.variant == "few":
        chosen = [workload.few() for workload in chosen]
        print("Fewer images than in the full workloads, and all else as it is there.")

    # A part of the benchmark must not take the place of the whole on the results' shelf.
    partial = arguments.workload or arguments.provider or arguments.direction
    folder = arguments.out or (None if partial else results.RESULTS)
    commit = results.Commit.named(arguments.commit)
    path = folder / results.file_name(device, commit) if folder else None
    if path and (why := obstacle(path)):
        return _refuse(why)

    seconds = arguments.seconds or 0.05
    limit = arguments.time_limit or (150 if on_cpu else 420)
    bandwidth = copy_bandwidth(device, seconds)
    print(
        f"{results.device_name(device)}: a large copy moves {bandwidth / 1e9:.1f} GB/s, read and written.", flush=True
    )
    settings = Settings(device, tuple(arguments.direction or DIRECTIONS), seconds, limit, bandwidth)
    about = results.describe(device, commit, _command(arguments), bandwidth)
    jobs = plan(chosen, [PROVIDERS[name] for name in arguments.provider or PROVIDERS])
    known: list[dict[str, Any]] = []
    if path and arguments.resume:
        known = [row for row in results.earlier(path, about) if not results.waits(row)]
        print(f"{len(known)} rows are there from before.{'' if results.continues(about) else f' {results.UNNAMED}'}")
    # By name, as JSON, made once: a file of thousands of rows is written again and again.
    found = {row.name: row.to_json() for job in jobs for row in left_out(job, settings.directions, results.NO_TIME)}
    found |= {row["name"]: row for row in known}
    jobs = remaining(jobs, {name for name, row in found.items() if results.waits(row)}, settings.directions)

    rows: list[Row] = []
    written = time.monotonic()
    try:
        for new in track(run(jobs, settings), len(jobs), "bench"):
            rows += new
            found |= {row.name: row.to_json() for row in new}
            if path and time.monotonic() - written > 15:  # a run that is killed keeps nearly all of it
                results.write(path, about, found.values())
                written = time.monotonic()
    finally:
        if path:
            results.write(path, about, found.values())
    _print_rows(rows)
    if waiting := sum(map(results.waits, found.values())):
        print(f"{waiting} of {len(found)} rows wait, for want of time; --resume goes on with them.")
    if path:
        print(f"Results are in {path}.")
    return int(any(row.get("failed") for row in found.values()))


def _print_rows(rows: list[Row]) -> None:
    from .report import table

    timed = [
        (
            row.workload,
            row.direction,
            row.provider,
            f"{row.median * 1e3:.4g}",
            f"{row.floor * 1e3:.3g}",
            f"{row.fraction_of_floor:.0%}",
            "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.2f}",
        )
        for row in rows
        if row.times
    ]
    if timed:
        print(table(("workload", "direction", "provider", "ms", "floor ms", "of floor", "peak MiB"), timed))
    left_out: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.times:
            left_out.setdefault((row.provider, row.reason), []).append(row)
    for (provider, reason), group in left_out.items():
        names = ", ".join(sorted({str(row.workload) for row in group}))
        print(f"{'FAILED' if group[0].failed else 'not run'}: {provider}, {len(group)} rows ({names}): {reason}")


def _command(arguments: argparse.Namespace) -> str:
    """The command that would repeat this run, without the paths of this machine."""
    words = ["python", "-m", "bench"]
    for option in ("workload", "provider", "direction", "device", "variant", "seconds", "time_limit"):
        value = getattr(arguments, option)
        for item in value if isinstance(value, list) else [value] if value else []:
            words += [f"--{option.replace('_', '-')}", str(item)]
    words += ["--sweeps"] * arguments.sweeps + ["--resume"] * arguments.resume
    return shlex.join(words)


def _gpu(arguments: argparse.Namespace) -> int:
    from . import gpu

    return gpu.main(arguments.out, arguments.commit)


def _resources(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from . import resources
    from .report import table, track
    from .results import write_whole

    if arguments.json and (why := obstacle(arguments.json)):
        return _refuse(why)
    todo = [
        (case, arch)
        for case, arch in resources.all_cases()
        if (not arguments.kernel or case.kernel in arguments.kernel)
        and (not arguments.dtype or case.dtype in arguments.dtype)
        and (not arguments.arch or arch in arguments.arch)
    ]
    rows = list(track(resources.measure_all(todo), len(todo), "kernels compiled"))
    if arguments.json:
        write_whole(arguments.json, resources.to_json(rows) + "\n")
    columns = [field.name for field in fields(resources.Resources)]
    print(table(columns, ([_cell(getattr(row, column)) for column in columns] for row in rows)))
    return 0


def _host(_: argparse.Namespace) -> int:
    from . import host
    from .report import table

    print(table(host.HEADERS, host.measure()))
    return 0


def _traffic(arguments: argparse.Namespace) -> int:
    from . import traffic
    from .report import markdown, table
    from .workloads import SWEEPS, WORKLOADS

    if arguments.programs < 1:
        return _refuse(f"--programs takes at least 1; got {arguments.programs}.")
    chosen = [w for w in WORKLOADS + SWEEPS if arguments.name in str(w) and not w.deterministic]
    if not chosen:
        return _refuse("No workload has that in its name; python -m bench --list names them all.")
    if arguments.tile and (volumes := [w for w in chosen if len(w.size) != 2]):
        return _refuse(f"--tile is for images; {volumes[0]} is of volumes, whose tiles are as they are.")
    print("Counted, not measured: no time follows from these numbers.")
    for workload in chosen:
        blocks = arguments.tile or [None]
        try:
            rows = [row for block in blocks for row in traffic.count(workload, block, arguments.programs)]
        except NotImplementedError as instruction:
            return _refuse(f"{workload} needs an instruction that is not emulated: {instruction}.")
        print(f"\n{workload}\n")
        print((markdown if arguments.markdown else table)(traffic.HEADERS, map(traffic.cells, rows)))
    return 0


def _precision(arguments: argparse.Namespace) -> int:
    import torch

    from . import precision
    from .report import markdown, table, track
    from .results import device_name, write_whole

    widths = tuple(arguments.width or precision.WIDTHS)
    if min(widths) < 2:
        return _refuse(f"--width takes at least 2 pixels; got {min(widths)}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("There is no CUDA device that torch can use here.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.json and (why := obstacle(arguments.json)):
        return _refuse(why)
    rows = list(track(precision.measure_all(device, widths), precision.count(widths), "precision"))
    name = f"{device_name(device)} ({device.type}), torch {torch.__version__}"
    if arguments.json:
        write_whole(arguments.json, precision.to_json(rows, name) + "\n")
    print(f"Measured on {name}. Errors are relative to the largest number of each tensor in fp64.\n")
    print((markdown if arguments.markdown else table)(precision.HEADERS, map(precision.cells, rows)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import compare
    from .records import ResultsError, read

    try:
        text, status = compare(read(arguments.before), read(arguments.after), arguments.threshold)
    except ResultsError as sentence:
        return _refuse(str(sentence))
    print(text)
    return status


def _targets(arguments: argparse.Namespace) -> int:
    from .records import ResultsError, read, shelf
    from .report import table
    from .results import RESULTS
    from .targets import judge

    try:
        if arguments.results:
            results: Results | None = read(arguments.results)
        else:
            on_gpu = [file for file in map(read, shelf(RESULTS, committed=True)) if file.gpu]
            results = max(on_gpu, key=lambda file: file.datetime, default=None)
    except ResultsError as sentence:
        return _refuse(str(sentence))
    if results is None:
        print("There are no results of a GPU in bench/results: nothing is measured.\n")
    else:
        not_gpu = "" if results.gpu else " These are no results of a GPU: they say what the CPU path does."
        print(f"{results.name}: {results.device}, commit {results.commit}, {results.versions}.{not_gpu}\n")
    verdicts = judge(results)
    cells = [(v.status, v.target.words, v.measured, v.target.what, v.detail) for v in verdicts]
    print(table(("verdict", "target", "measured", "what", "rows"), cells))
    counts = [f"{sum(v.status == status for v in verdicts)} {status}" for status in ("met", "not met", "not measured")]
    print(f"\n{', '.join(counts)}.")
    return int(any(v.status != "met" for v in verdicts))


def _dashboard(arguments: argparse.Namespace) -> int:
    import importlib.util

    from .dashboard import write
    from .records import ResultsError

    for package, needed in (("plotly", True), ("matplotlib", arguments.png)):
        if needed and importlib.util.find_spec(package) is None:
            return _refuse(f"The dashboard needs {package}: pip install 'tri_stn[dashboard]'.")
    choice = {name: getattr(arguments, name) for name in ("device", "dtype", "direction")}
    try:
        written = write(arguments.results, arguments.out, arguments.png, choice)
    except ResultsError as sentence:
        return _refuse(str(sentence))
    except OSError as error:
        return _refuse(f"Nothing can be written to {arguments.out}: {error.strerror or error}.")
    print(*(f"Wrote {path}." for path in written), sep="\n")
    return 0


def _cell(value: object) -> object:
    """Load widths as bits × count, instructions as those of each level of loops."""
    if isinstance(value, dict):
        return " ".join(f"{bits}×{count}" for bits, count in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else value


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
