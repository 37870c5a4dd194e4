"""What the experiments share: the command line, trainings side by side, a progress bar, results written whole."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import queue
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tri_stn.files import obstacle

from ..report import markdown
from ..results import Commit, describe, device_name, write_whole
from .samplers import SAMPLERS
from .training import Cost, loss_difference

FOLDER = Path("experiments")
"""Where results and checkpoints go, if --out does not say."""

LOSSES_AGREE = 0.02
"""The samplers' losses over the first steps may differ by this share of the first loss. Both samplers are right to
fp32 rounding; what grows from it in tens of steps of Adam, which divides by the size of a gradient, stays far below
what another sampler (a half-pixel shift, a wrong gradient) makes.
"""


def parser(name: str, doc: str | None, trains: bool = True) -> argparse.ArgumentParser:
    """The arguments that every experiment takes; those of a training only where there is one."""
    result = argparse.ArgumentParser(
        prog=f"python -m bench.experiments.{name}", description=(doc or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = result.add_argument
    add("--quick", action="store_true", help="small models and short trainings, minutes on two CPU cores")
    add(
        "--seeds", type=int, nargs="+", default=[0], help="of weights, batches and training data; one training for each"
    )
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    add("--out", type=Path, default=FOLDER, help="folder of results and checkpoints")
    if not trains:
        result.set_defaults(sampler="both")
        return result
    add("--sampler", choices=list(SAMPLERS), default="tri_stn", help="torch: F.grid_sample on a stored grid")
    add("--restart", action="store_true", help="forget checkpoints; otherwise a run goes on where it stopped")
    return result


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with a device that is there."""
    arguments = parser.parse_args(argv)
    missing = [name for name in ("matplotlib", "rich", "sklearn") if _is_missing(name)]
    if missing:
        parser.error(f"this needs {', '.join(missing)}, which is not installed: pip install -e .[demo]")
    arguments.device = device(parser, arguments.device)
    if why := obstacle(arguments.out / "checkpoints" / "of a job.pt"):
        parser.error(why)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error("--seeds has a seed twice.")
    if arguments.device.type == "cpu":
        # Networks this small gain little from threads, lose much when cores are shared, and repeat exactly on one.
        torch.set_num_threads(1)
    return arguments


def device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of a name, "auto" for a GPU if there is one; where it is not there, the parser says so."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        parser.error(f"device {name!r} is not available here; try --device cpu.")
    return found


def _is_missing(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is None


# --- trainings side by side --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training: a title, and all that decides it, in plain numbers and words."""

    title: str
    settings: dict[str, Any]

    def file(self, folder: Path) -> Path:
        """Its checkpoint; other settings, another file."""
        code = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
        words = "".join(c if c.isalnum() else "-" for c in self.title.lower())
        return folder / f"{words}-{code}.pt"


Work = Callable[[Job, Path, Callable[[float], None]], dict[str, Any]]
"""Trains one job, with a checkpoint and a report of its share done; gives numbers and words. A module's function."""


def run(jobs: Sequence[Job], work: Work, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all jobs, in their order. On the CPU as many at a time as there are cores."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    folder = arguments.out / "checkpoints"
    files = [job.file(folder) for job in jobs]
    if arguments.restart:
        for file in files:
            file.unlink(missing_ok=True)
    columns = (
        BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        shares = [0.0] * len(jobs)

        def report(index: int, share: float) -> None:
            shares[index] = share
            progress.update(task, completed=sum(shares), description=jobs[index].title)

        # A GPU takes one after the other; each CPU core has its own.
        workers = 1 if arguments.device.type != "cpu" else min(len(jobs), _cores())
        if workers <= 1:
            return [
                work(job, file, lambda share, i=i: report(i, share))  # type: ignore[misc]
                for i, (job, file) in enumerate(zip(jobs, files, strict=True))
            ]
        with _reports(report) as channel, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = {
                pool.submit(_in_process, work, job, file, channel, i): i
                for i, (job, file) in enumerate(zip(jobs, files, strict=True))
            }
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_process(work: Work, job: Job, file: Path, channel: Any, index: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return work(job, file, lambda share: channel.put((index, share)))


@contextlib.contextmanager
def _reports(report: Callable[[int, float], None]) -> Iterator[Any]:
    """A channel through which other processes report."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        channel, over = manager.Queue(), threading.Event()

        def listen() -> None:
            while not over.is_set():
                with contextlib.suppress(queue.Empty, EOFError):
                    report(*channel.get(timeout=0.2))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield channel
        finally:
            over.set()
            listener.join()


# --- results -----------------------------------------------------------------------------------------


def about(arguments: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Where, when and of what results were made."""
    where = describe(arguments.device, Commit.of_checkout(), " ".join(command), 0.0)
    del where["machine_info"]["copy_bandwidth"], where["version"]
    return where | {"sampler": arguments.sampler, "seeds": arguments.seeds}


def write_results(
    path: Path, title: str, said: Sequence[str], tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[object]]]],
    document: dict[str, Any],
) -> None:  # fmt: skip
    """``path``.json with everything, ``path``.md with a title, paragraphs, and tables under their headings."""
    lines = [f"# {title}", *said]
    for heading, (headers, rows) in tables.items():
        lines += [f"## {heading}", markdown(headers, rows)]
    write_whole(path.with_suffix(".json"), json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_whole(path.with_suffix(".md"), "\n\n".join(lines) + "\n")


def spread(values: Sequence[float], places: int = 2) -> str:
    """Mean, and with several values their standard deviation."""
    mean = f"{statistics.fmean(values):.{places}f}"
    return f"{mean} ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


def cost_table(costs: dict[str, Cost]) -> tuple[list[str], list[list[object]]]:
    """What each sampler costs in the training."""
    headers = ["sampler", "step, ms", "peak memory of a step, MiB"]
    return headers, [[name, f"{c.milliseconds:.1f}", f"{c.peak_mebibytes:.1f}"] for name, c in costs.items()]


def cost_document(costs: dict[str, Cost]) -> dict[str, Any]:
    """The same for the JSON file, with the verdict on the losses."""
    difference = loss_difference(costs)
    return {
        "samplers": {name: asdict(cost) for name, cost in costs.items()},
        "loss_difference": difference,
        "losses_agree": difference <= LOSSES_AGREE,
    }


def agreement(costs: dict[str, Cost]) -> str:
    """The verdict as a sentence."""
    difference, steps = loss_difference(costs), len(next(iter(costs.values())).losses)
    verdict = "agree" if difference <= LOSSES_AGREE else "DO NOT AGREE"
    return (
        f"The losses of the first {steps} steps with both samplers, from the same seed in fp32, {verdict}: they differ "
        f"by at most {difference:.1e} of the first loss."
    )


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a matplotlib figure, all of it or nothing."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, facecolor="white")
    write_whole(path, data.getvalue())


def stem(name: str, arguments: argparse.Namespace) -> Path:
    """The results' file, without its extension."""
    length = "quick" if arguments.quick else "full"
    return arguments.out / f"{name}-{length}-{arguments.sampler}-{_slug(device_name(arguments.device))}"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
