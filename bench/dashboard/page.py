"""Files of results → one HTML file that needs nothing else: plots, filter, targets, commands, and what is missing."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import Results
from ..targets import judge
from . import figures, series
from .series import Choice, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go

Draw = Callable[[Sequence[Series]], "go.Figure"]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    words: str
    make: Callable[[Results], list[Series]]
    draw: Draw
    categories: bool = False
    """Whether y is workloads, so that the height follows from how many are shown."""


SECTIONS = (
    Section(
        "speedup", "Speed-up",
        "How many times as long other samplers take as tri_stn, on the same tensors in the same run. Bars are ratios "
        "of medians; the whiskers go from the other's 20th percentile against tri_stn's 80th to the opposite. To "
        "the right of the dotted line tri_stn is faster.",
        series.speedups, figures.speedup, True,
    ),
    Section(
        "roofline", "Against a plain copy",
        "Each point is a workload: the share of a large copy's bandwidth that it reaches, counting only the bytes that "
        "must be moved. Small work, at the left, is bound by launching it. Dotted: a copy.",
        series.rooflines, figures.roofline,
    ),
    Section(
        "memory", "Memory", "The most in use during a call, beyond the input, the output and their gradients.",
        series.memory, figures.memory, True,
    ),
    Section(
        "error", "Error against fp64",
        "The largest error of each tensor, relative to the largest number in it. Results with no error at all have no "
        "place on this axis. What was too far from the truth is not timed, and is listed under “Not measured”.",
        series.errors, figures.error, True,
    ),
)  # fmt: skip

SWEEP_WORDS = "Median time, with the spread, where one thing is varied. Dotted: a copy of as many bytes."
HISTORY_WORDS = (
    "tri_stn's time at each commit of which there are results, as a share of its time at the first. A red cross is a "
    "regression: slower than at the commit before by more than the noise, by the rule of python -m bench compare. "
    "“+” is a commit with changes that were not committed."
)


def page(files: Sequence[Results], command: str, choice: Choice | None = None) -> str:
    """The whole document. `choice` is what the filter is set to first."""
    from plotly.offline import get_plotlyjs

    newest = series.newest(files)
    chosen = choice or series.first_choice(newest)
    body = [_head(files, newest), _filter(newest, chosen)]
    for section in SECTIONS:
        found = [s for file in newest.values() for s in section.make(file)]
        body.append(_section(section.id, section.title, section.words, [("", found)], section.draw, section.categories))
        body.append(_commands(newest.values(), command))
    sweeps = [s for file in newest.values() for s in series.sweeps(file)]
    titles = dict.fromkeys(s.group for s in sweeps)
    parts = [(title, [s for s in sweeps if s.group == title]) for title in titles]
    body += [_section("sweeps", "Sweeps", SWEEP_WORDS, parts, figures.sweep), _commands(newest.values(), command)]
    past = series.history(files)
    body += [
        _section("history", "History", HISTORY_WORDS, [("", past)], figures.history),
        _regressions(past),
        _commands(files, command),
    ]
    body += [_targets(newest), _missing(newest)]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">\n<title>tri_stn: what was measured</title>',
        f"<style>\n{(HERE / 'page.css').read_text(encoding='utf-8')}</style>",
        "<script>window.PlotlyConfig = {MathJaxConfig: 'local'};</script>",
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>",
        *body,
        f"<script>\n{(HERE / 'page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _head(files: Sequence[Results], newest: dict[str, Results]) -> str:
    lines = ["<h1>tri_stn: what was measured</h1>"]
    if not any(file.gpu for file in files):
        lines.append(
            '<p class="notice">On a GPU: <strong>not measured</strong>. What is below was measured on a CPU.</p>'
        )
    for device, file in newest.items():
        about = [file.versions, f"commit {file.commit}{' with changes' if file.dirty else ''}", file.datetime[:10]]
        if not file.complete:
            about.append("the run was stopped before its end")
        variants = {record.params.get("variant") for record in file.records}
        if "small" in variants:
            about.append("workloads marked small are scaled down, and their times say nothing about the full ones")
        if "few" in variants:
            about.append("workloads marked few have fewer images than the full ones, and all else as it is there")
        text = f"<strong>{_text(series.device_label(file))}</strong>: {_text('; '.join(filter(None, about)))}."
        lines.append(f'<p class="quiet" {_for(device)}>{text}</p>')
    return "\n".join(lines)


def _filter(newest: dict[str, Results], chosen: Choice | None) -> str:
    found = series.choices(newest.values())
    labels = {device: series.device_label(file) for device, file in newest.items()}
    options = {
        "device": list(newest),
        "dtype": sorted({c.dtype for c in found}, key=lambda d: (d != "float32", d)),
        "direction": sorted({c.direction for c in found}, key=lambda d: (d != "both", d)),
    }
    boxes = []
    for name, values in options.items():
        marked = getattr(chosen, name) if chosen else None
        items = "".join(
            f'<option value="{_text(value)}"{" selected" if value == marked else ""}>'
            f"{_text(labels.get(value, _DIRECTIONS.get(value, value)))}</option>"
            for value in values
        )
        boxes.append(f'<label>{name}<select id="{name}">{items}</select></label>')
    return f"<form>{''.join(boxes)}</form>"


_DIRECTIONS = {
    "both": "both: forward and backward",
    "forward": "forward",
    "backward": "backward",
    "double": "double backward",
}


def _section(
    id: str, title: str, words: str, parts: Sequence[tuple[str, list[Series]]], draw: Draw, categories: bool = False
) -> str:
    lines = [f'<section id="{id}">\n<h2>{title}</h2>\n<p class="quiet">{_text(words)}</p>']
    parts = [(name, found) for name, found in parts if found]
    if not parts:
        lines.append('<div class="empty">Not measured.</div>')
    for number, (name, found) in enumerate(parts):
        figure = draw(found)
        heading = f"<h3>{_text(name)}</h3>" if name else ""
        lines.append(
            f'<figure data-name="{id}"{" data-categories=1" if categories else ""}>{heading}'
            f'{_plot(figure, f"{id}-{number}")}<div class="empty" hidden>Not measured for this choice.</div></figure>'
        )
    return "\n".join(lines) + "\n</section>"


def _plot(figure: go.Figure, id: str) -> str:
    """A place for a plot and its numbers, which the page's script reads."""
    numbers = figure.to_json().replace("</", "<\\/")  # else a text in it could end the element
    return f'<div class="plot" id="{id}"></div><script type="application/json">{numbers}</script>'


def _commands(files: Iterable[Results], command: str) -> str:
    """How to make the figure above again."""
    lines = []
    for file in files:
        at = f" at commit {_text(file.commit)}{' with changes that were not committed' if file.dirty else ''}"
        lines.append(f"<div {_for(file.device)}>Measured by <code>{_text(file.command)}</code>{at}.</div>")
    lines.append(f"<div>Drawn by <code>{_text(command)}</code>.</div>")
    return f"<figcaption>{''.join(lines)}</figcaption>"


def _regressions(past: Sequence[Series]) -> str:
    """The red crosses in words."""
    items = [
        f"<li {_for(*s.choice)}>{_text(str(x).replace('<br>', ', '))}: {_text(note)}</li>"
        for s in past
        for x, note, worse in zip(s.x, s.notes, s.marked, strict=True)
        if worse
    ]
    return f"<ul class=regressions>{''.join(items)}</ul>" if items else ""


def _targets(newest: dict[str, Results]) -> str:
    file = next((file for file in newest.values() if file.gpu), None)
    rows = [
        f"<tr><td>{_text(v.target.what)}</td><td>{_text(v.target.words)}</td><td>{_text(v.measured)}</td>"
        f'<td class="{v.status.replace(" ", "-")}">{v.status}</td></tr>'
        for v in judge(file)
    ]
    where = f"Measured on {file.device}, commit {file.commit}." if file else "No results of a GPU: nothing is measured."
    where += " The worst row decides, and rows count only when their result matched fp64."
    head = "<tr><th>what</th><th>target</th><th>measured</th><th></th></tr>"
    return _table("targets", "Targets", where, head, rows)


def _missing(newest: dict[str, Results]) -> str:
    rows = [
        f"<tr {_for(*m.choice)}><td>{_text(m.row)}</td><td>{_text(m.provider)}</td><td>{_text(m.reason)}</td></tr>"
        for file in newest.values()
        for m in series.missing(file)
    ]
    words = "Rows of this choice without times, and why." if rows else "Every row of these files was measured."
    return _table("missing", "Not measured", words, "<tr><th>workload</th><th>provider</th><th>why</th></tr>", rows)


def _table(id: str, title: str, words: str, head: str, rows: Sequence[str]) -> str:
    body = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    return (
        f'<section id="{id}">\n<h2>{title}</h2>\n<p class="quiet">{_text(words)}</p>\n'
        f"<div class=scroll>{body}</div>\n</section>"
    )


def _for(device: str, dtype: str | None = None, direction: str | None = None) -> str:
    """The attribute by which the page's script shows a line for one choice alone."""
    return f'data-choice="{_text(json.dumps([device, dtype, direction]))}"'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
