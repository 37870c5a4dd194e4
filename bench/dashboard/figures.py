"""Series → figures of plotly, one trace per series; the page shows and hides them by their `meta`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .series import FLOOR, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = {"tri_stn": "#0f8b8d", "eager": "#e07a1f", "compile": "#8661c1", "cudnn": "#c1436d", "kornia": "#5b8c2a"}
"""Tell apart on white and on black, and by most people who see few colours: the symbols differ as well."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")
REST = "#7b8794"
WHISKER = "#808a94"
LINES = ("#0f8b8d", "#e07a1f", "#8661c1", "#c1436d", "#5b8c2a", "#3f72c9", "#a8741a", "#7b8794")


def colour(name: str) -> str:
    return next((shade for provider, shade in COLOURS.items() if name.startswith(provider)), REST)


def speedup(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for s in series:
        longest = max(float(x) for other in series if other.choice == s.choice for x in other.x)
        figure.add_bar(
            x=s.x, y=_labels(s), error_x=_spread(s.x, s.low, s.high), orientation="h", name=s.name,
            marker_color=colour(s.name), customdata=s.notes,
            text=[f"{value:.3g}×" for value in s.x], textangle=0, insidetextanchor="start", cliponaxis=False,
            insidetextfont={"color": "#ffffff", "size": 12}, constraintext="none",
            # Inside, where the whiskers do not cross it; outside of bars that are too short for it.
            textposition=["inside" if float(x) > 0.3 * longest else "outside" for x in s.x],
            hovertemplate=f"%{{y}}<br>{s.name} takes %{{x:.3g}} times as long<br>%{{customdata}}<extra></extra>",
            **_of(s),
        )  # fmt: skip
    figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=REST)
    # A bar has no beginning on a logarithmic axis, so that the axis is linear.
    figure.update_xaxes(title="times as long as tri_stn", rangemode="tozero")
    return _finish(figure, categories=True)


def roofline(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, s in enumerate(series):
        figure.add_scatter(
            x=s.x, y=s.y, error_y=_spread(s.y, s.low, s.high), mode="markers", name=s.name, customdata=s.notes,
            marker={"color": colour(s.name), "size": 9, "symbol": _symbol(series, i)},
            hovertemplate=f"{s.name}, %{{customdata}}<br>%{{y:.3g}} % of a copy<extra></extra>", **_of(s),
        )  # fmt: skip
    figure.add_hline(y=100, line_width=1.5, line_dash="dot", line_color=REST)  # 100 %: a copy
    figure.update_xaxes(title="time of a copy of as many bytes, ms", type="log")
    figure.update_yaxes(title="% of a copy", type="log")
    return _finish(figure)


def memory(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for s in series:
        figure.add_bar(
            x=s.x, y=_labels(s), orientation="h", name=s.name, marker_color=colour(s.name), customdata=s.notes,
            text=["none" if value == 0 else f"{value:.3g}" for value in s.x], textposition="outside", cliponaxis=False,
            hovertemplate=f"%{{y}}<br>{s.name}: %{{x:.4g}} MiB (%{{customdata}})<extra></extra>", **_of(s),
        )  # fmt: skip
    figure.update_xaxes(title="MiB", rangemode="tozero")
    return _finish(figure, categories=True)


def sweep(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, s in enumerate(series):
        limit = s.name == FLOOR
        figure.add_scatter(
            x=s.x, y=s.y, error_y=_spread(s.y, s.low, s.high), name=s.name, customdata=s.notes,
            mode="lines" if limit else "lines+markers",
            line={"color": colour(s.name), "dash": "dot" if limit else "dash" if "," in s.name else "solid"},
            marker={"size": 8, "symbol": _symbol(series, i)},
            hovertemplate=f"{s.name}, %{{customdata}}<extra></extra>", **_of(s),
        )  # fmt: skip
    values = [x for s in series for x in s.x if not isinstance(x, str)]
    log = min(values) > 0 and max(values) >= 4 * min(values)
    figure.update_xaxes(title=series[0].group, type="log" if log else "linear")
    if log:
        ticks = sorted(set(values))
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(title="ms", type="log")
    return _finish(figure)


def error(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    tensors = ["output", "grad_input", "grad_theta"]
    figure = go.Figure()
    for s in series:
        tensor = s.name.rpartition(", ")[2]
        symbol = SYMBOLS[tensors.index(tensor) if tensor in tensors else 3]
        figure.add_scatter(
            x=[None if x == 0 else x for x in s.x], y=_labels(s), mode="markers", name=s.name, customdata=s.notes,
            marker={"color": colour(s.name), "size": 9, "symbol": symbol},
            hovertemplate=f"%{{y}}<br>{s.name}: %{{customdata}}<extra></extra>", **_of(s),
        )  # fmt: skip
    figure.update_xaxes(title="relative error", type="log", exponentformat="power")
    return _finish(figure, categories=True)


def history(series: Sequence[Series]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    order: dict[str, None] = {}
    for i, s in enumerate(series):
        order |= dict.fromkeys(map(str, s.x))
        shade = LINES[_rank(series, i) % len(LINES)]
        figure.add_scatter(
            x=s.x, y=s.y, error_y=_spread(s.y, s.low, s.high), mode="lines+markers", name=s.name, customdata=s.notes,
            line={"color": shade, "width": 1.5},
            marker={
                "color": ["#d11f2f" if worse else shade for worse in s.marked],
                "symbol": ["x" if worse else "circle" for worse in s.marked],
                "size": [13 if worse else 6 for worse in s.marked],
            },
            hovertemplate="%{customdata}<br>%{y:.3f} times the first<extra></extra>", **_of(s),
        )  # fmt: skip
    order = dict.fromkeys(sorted(order, key=lambda x: x.partition("<br>")[2]))
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(order))
    figure.update_yaxes(title="tri_stn's time, first commit = 1")
    return _finish(figure).update_layout(showlegend=False)  # as many lines as workloads: a point says which


def _of(s: Series) -> dict[str, Any]:
    return {"meta": list(s.choice), "legendgroup": s.name, "visible": True}


def _labels(s: Series) -> list[str]:
    """The workloads in two lines, so that the plot keeps its room on a phone."""
    return [str(y).replace(", ", "<br>", 1) for y in s.y]


def _rank(series: Sequence[Series], i: int) -> int:
    """Which series of its choice it is."""
    return sum(s.choice == series[i].choice for s in series[:i])


def _symbol(series: Sequence[Series], i: int) -> str:
    return SYMBOLS[_rank(series, i) % len(SYMBOLS)]


def _spread(values: Sequence[float | str], low: Sequence[float], high: Sequence[float]) -> dict[str, Any] | None:
    if not low:
        return None
    middle = [float(value) for value in values]
    return {
        "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": WHISKER,
        "array": [max(0, h - m) for h, m in zip(high, middle, strict=True)],
        "arrayminus": [max(0, m - b) for b, m in zip(low, middle, strict=True)],
    }  # fmt: skip


def _finish(figure: go.Figure, categories: bool = False) -> go.Figure:
    """The page's own background shows through; its script sets the colour of the text for light and dark."""
    figure.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", barmode="group", bargap=0.25,
        margin={"l": 8, "r": 24, "t": 8, "b": 8}, autosize=True, showlegend=True, dragmode=False, hovermode="closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0}, font={"size": 13},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    if categories:
        figure.update_yaxes(type="category", autorange="reversed", title=None)
    return figure
