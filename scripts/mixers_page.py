"""The page of `scripts.compare_mixers`: its tables, what came out of the classic claims, and its picture."""

import math
from collections.abc import Iterator
from typing import Any

from llmjax.report.plots import COLOURS, INK, PAPER, RULE

Results = dict[str, Any]
HIGH, LOW = 0.9, 0.5
"""Accuracies that count as able and as unable."""


def page(results: Results) -> str:
    """The page as markdown."""
    setting = results["setting"]
    tasks = "\n".join(f"- {name}: `{task}`" for name, task in setting["tasks"].items())
    left_out = "\n".join(f"- {name}: {why}" for name, why in results["left_out"].items())
    return f"""# Sequence mixers

Every mixer that a decoder can use, on synthetic tasks that tell mixers apart. Made by
`python -m scripts.compare_mixers`, which measured each number, in float32 on a CPU: {environments(results)}.

Each model is {setting["layers"]} layers of width {setting["width"]} that hold a mixer and no feed-forward layer,
trained on rows of {setting["length"]} tokens, {setting["batch"]} a step, for {setting["steps"]} steps of AdamW at
{setting["rate"]:g}, or until {setting["done"]:.1%} of the held-out answers are right (the accuracy).
One seed, and the same rate for all: a mixer that needs another one, or longer, is shown below what it can do.

{tasks}

![Recall by state; text beyond the trained length; the course of training](mixers.png)

## What came out

{"".join(f"- {line}{chr(10)}" for line in verdicts(results))}
## Accuracy

{accuracies(results)}

## Cost

State: bytes that decoding keeps for one sequence, both layers, float32. FLOPs: of training, a token, of the whole model
(`model.flops_per_token`). Speed: tokens a second, forward and backward, of one layer (the first one of a pair) on one
row{timed(results)}.

{costs(results)}

## State and recall

DeltaNet with ever larger keys, on the same recall task: what a state has no room for is lost.

{sizes(results)}

## Beyond the trained length

Attention with tokens placed in different ways, trained on the bytes of Python's documentation in rows of
{setting["tested"][0]}, tested on held-out text in longer ones: bits per byte, less is better.

{positions(results)}

## Left out

{left_out}
"""


def timed(results: Results) -> str:
    """When, and on how many cores, layers were timed."""
    found = {(r["timed"]["date"], r["timed"]["cores"]) for r in results["mixers"].values() if "timed" in r}
    return "".join(f"; {date}, {cores} cores" for date, cores in sorted(found))


def environments(results: Results) -> str:
    """The different (date, versions, cores) of all records."""
    found = [
        record["environment"] for section in ("mixers", "sizes", "positions") for record in results[section].values()
    ]
    shown = (", ".join(f"{name} {value}" for name, value in environment.items()) for environment in found)
    return "; ".join(dict.fromkeys(shown)) or "nothing yet"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grows(record: dict[str, Any]) -> bool:
    """Whether the state of a longer sequence is larger."""
    return len(set(record["state_bytes"].values())) > 1


def ordered(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Mixers whose state grows with the length, then the others, each by name."""
    return sorted(results["mixers"].items(), key=lambda entry: (not grows(entry[1]), entry[0]))


def accuracies(results: Results) -> str:
    """A row a mixer, a column a task."""
    tasks = list(results["setting"]["tasks"])
    rows = [
        [name, "grows" if grows(record) else "fixed", *(f"{record['tasks'][task]['accuracy']:.2f}" for task in tasks)]
        for name, record in ordered(results)
    ]
    return table(["mixer", "state", *tasks], rows)


def costs(results: Results) -> str:
    """A row a mixer: parameters, state, FLOPs and speed at each length."""
    lengths = list(next(iter(results["mixers"].values()), {"state_bytes": {}})["state_bytes"])
    head = [f"{what} at {n}" for what in ("state bytes", "FLOPs/token", "tokens/s") for n in lengths]
    rows = []
    for name, record in ordered(results):
        numbers = [f"{record['state_bytes'][n]:,}" for n in lengths]
        numbers += [f"{record['flops_per_token'][n]:,.0f}" for n in lengths]
        numbers += [thousands(record.get("tokens_per_second", {}).get(n, "not timed")) for n in lengths]
        rows.append([name, f"{record['parameters']:,}", *numbers])
    return table(["mixer", "parameters", *head], rows)


def thousands(value: float | str) -> str:
    """A number with separators; a reason as it is."""
    return value if isinstance(value, str) else f"{value:,.0f}"


def sizes(results: Results) -> str:
    """A row a size."""
    rows = sorted(results["sizes"].values(), key=lambda record: record["state_bytes"])
    return table(["bytes kept", "recall"], [[f"{r['state_bytes']:,}", f"{r['accuracy']:.2f}"] for r in rows])


def positions(results: Results) -> str:
    """A row a way to place tokens, a column a length."""
    lengths = list(next(iter(results["positions"].values()), {"tested": {}})["tested"])
    rows = [[name, *(f"{r['tested'][n]:.2f}" for n in lengths)] for name, r in results["positions"].items()]
    return table(["positions", *lengths], rows)


def verdicts(results: Results) -> Iterator[str]:
    """The classic claims, each with the numbers it stands or falls by, where these were measured."""
    recall = {name: record["tasks"]["recall"]["accuracy"] for name, record in results["mixers"].items()}
    far = {name: list(record["tested"].values()) for name, record in results["positions"].items()}
    by_size = sorted((record["state_bytes"], record["accuracy"]) for record in results["sizes"].values())
    if "Attention" in recall:
        yield claim("Attention recalls", recall["Attention"] >= HIGH, f"accuracy {recall['Attention']:.2f}")
    if len(by_size) > 1:
        (small, poor), (large, rich) = by_size[0], by_size[-1]
        shown = f"{poor:.2f} with {small:,} bytes, {rich:.2f} with {large:,}"
        yield claim("A fixed state does not recall beyond its size", poor < LOW < rich, shown)
    for name in (name for name in recall if name.endswith(", then Attention")):
        alone = recall.get(name.partition(",")[0])
        if alone is not None and alone < HIGH:
            shown = f"{recall[name]:.2f}, {alone:.2f} without attention"
            yield claim(f"A hybrid closes the gap: {name}", recall[name] >= max(HIGH, alone), shown)
    if {"ALiBi", "learned"} <= far.keys():
        shown = ", ".join(f"{name} from {far[name][0]:.2f} to {far[name][-1]:.2f}" for name in ("ALiBi", "learned"))
        holds = far["ALiBi"][-1] <= 1.02 * far["ALiBi"][0] and far["learned"][-1] >= 1.1 * far["learned"][0]
        yield claim("ALiBi extrapolates where learned positions fail", holds, f"bits per byte: {shown}")


def claim(text: str, holds: bool, numbers: str) -> str:
    """One line."""
    return f"{text}: {'came out' if holds else '**did not come out**'} ({numbers})."


# ---- the picture -----------------------------------------------------------------------------------------------------


def figure(results: Results) -> Any:
    """Recall against state, accuracy beyond the trained length, and the course of recall in training."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    picture = Figure(figsize=(13, 4.4), layout="constrained", facecolor=PAPER)
    state, far, course = picture.subplots(1, 3)
    draw_state(state, results)
    draw_far(far, results)
    draw_course(course, results)
    for axes in (state, course):
        axes.set_ylim(-0.03, 1.05)
    for axes in (state, far, course):
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return picture


def draw_state(axes: Any, results: Results) -> None:
    """A point a mixer, and the line of one mixer at several sizes."""
    points: dict[str, tuple[float, float]] = {}
    for name, record in ordered(results):
        held = next(iter(record["state_bytes"].values()))
        accuracy = record["tasks"]["recall"]["accuracy"]
        axes.plot(max(held, 1), accuracy, "o", markersize=4, color=COLOURS[0 if grows(record) else 1])
        points[name] = (math.log10(max(held, 1)), accuracy)
    for name in legible(points, 0.7):
        place = (10 ** points[name][0], points[name][1])
        axes.annotate(name, place, fontsize=5, xytext=(3, 2), textcoords="offset points", color=INK)
    line = sorted((record["state_bytes"], record["accuracy"]) for record in results["sizes"].values())
    axes.plot(*zip(*line), "-", color=COLOURS[2], linewidth=1.2, label="DeltaNet by size") if line else None
    axes.set_xscale("log")
    label(axes, "Recall by state", "bytes of state (first length of the table)")


def draw_far(axes: Any, results: Results) -> None:
    """A curve a way to place tokens."""
    for number, (name, record) in enumerate(results["positions"].items()):
        lengths, values = [int(n) for n in record["tested"]], list(record["tested"].values())
        axes.plot(lengths, values, "o-", markersize=3.5, linewidth=1.4, color=COLOURS[number], label=name)
    axes.set_xscale("log", base=2)
    label(axes, "Text beyond the trained length", "tokens in a row", "bits per byte")


def draw_course(axes: Any, results: Results) -> None:
    """Recall during training: the mixers that ended best and a few others would hide each other, so all are thin."""
    ends: dict[str, tuple[float, float]] = {}
    for name, record in ordered(results):
        steps, values = zip(*record["tasks"]["recall"]["curve"])
        axes.plot(steps, values, "-", linewidth=0.8, color=COLOURS[0 if grows(record) else 1])
        ends[name] = (steps[-1], values[-1])
    for name in legible(ends, 1.0):
        axes.annotate(name, ends[name], fontsize=5, xytext=(2, 0), textcoords="offset points", color=INK)
    label(axes, "Course of recall (blue: the state grows)", "step")


def legible(points: dict[str, tuple[float, float]], width: float) -> list[str]:
    """Names of points that have room for one: none before them lies less than `width` and 0.025 away."""
    kept: list[str] = []
    for name in sorted(points, key=len):
        x, y = points[name]
        if all(abs(x - points[o][0]) > width or abs(y - points[o][1]) > 0.025 for o in kept):
            kept.append(name)
    return kept


def label(axes: Any, title: str, below: str, beside: str = "accuracy") -> None:
    """Title, axis and legend."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(below, fontsize=8, color=INK)
    axes.set_ylabel(beside, fontsize=8, color=INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
