"""Curves of one run or of several laid over each other, drawn by matplotlib without a display."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.report.history import Series, finite

INK, PAPER, RULE = "#1c2430", "#ffffff", "#d8dde5"
COLOURS = ("#2563ab", "#d1702a", "#2e8b57", "#9b4a97", "#b3393f", "#5c6773", "#c7a02c", "#3aa6a6")


class Curve(NamedTuple):
    """One metric on a panel."""

    metric: str
    label: str


class Panel(NamedTuple):
    """What a picture shows; its name is that of its file."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]


PANELS = (
    Panel("loss", "Loss", "nats per token", (Curve("loss", "training"), Curve("val_nll", "held out"))),
    Panel(
        "bits_per_byte",
        "Bits per byte",
        "bits per UTF-8 byte",
        (Curve("bits_per_byte", "training"), Curve("val_bits_per_byte", "held out")),
    ),
    Panel("learning_rate", "Learning rate", "", (Curve("learning_rate", "learning rate"),)),
    Panel("throughput", "Throughput", "tokens per second", (Curve("tokens_per_second", "training"),)),
    Panel("norms", "Norms", "", (Curve("grad_norm", "gradient"), Curve("update_norm", "update"))),
)


def save(runs: Mapping[str, Mapping[str, Series]], folder: str | Path) -> list[Path]:
    """Draw every panel that has data as `folder/<name>.png`; `runs` maps a label to a run's history."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for panel in drawable(runs):
        path = Path(folder) / f"{panel.name}.png"
        figure(panel, runs).savefig(path, dpi=160)
        written.append(path)
    return written


def svg(panel: Panel, runs: Mapping[str, Mapping[str, Series]]) -> str:
    """The panel as SVG text, with its letters kept as text."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
        figure(panel, runs).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def drawable(runs: Mapping[str, Mapping[str, Series]]) -> list[Panel]:
    """The panels for which some run has a finite point."""
    return [panel for panel in PANELS if any(lines(panel, history) for history in runs.values())]


def lines(panel: Panel, history: Mapping[str, Series]) -> list[tuple[Curve, Series]]:
    """The panel's curves that have finite points."""
    known = [(curve, finite(history[curve.metric])) for curve in panel.curves if curve.metric in history]
    return [(curve, series) for curve, series in known if series.steps]


def figure(panel: Panel, runs: Mapping[str, Mapping[str, Series]]) -> Any:
    """One panel as a matplotlib figure: a colour a curve, or a colour a run where there are several."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    picture = Figure(figsize=(4.8, 3.1), layout="constrained", facecolor=PAPER)
    axes = picture.subplots()
    several, drawn = len(runs) > 1, []
    for number, (label, history) in enumerate(runs.items()):
        for index, (curve, series) in enumerate(lines(panel, history)):
            colour = COLOURS[(number if several else index) % len(COLOURS)]
            name = f"{label}, {curve.label}" if several and len(panel.curves) > 1 else label if several else curve.label
            held_out = curve.metric.startswith("val_")
            marker = "o" if held_out or len(series.steps) == 1 else ""
            dashes = "--" if held_out and several else "-"
            axes.plot(*series, dashes, marker=marker, markersize=3.5, color=colour, linewidth=1.4, label=name)
            drawn.append(series.values)
    decorate(axes, panel, drawn)
    return picture


def decorate(axes: Any, panel: Panel, drawn: list[list[float]]) -> None:
    """Title, axes and legend; limits that a spike in the first steps does not flatten."""
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.set_ylabel(panel.unit, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    if panel.name == "throughput" and drawn:
        axes.set_ylim(bottom=0, top=1.1 * max(map(max, drawn)))
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
