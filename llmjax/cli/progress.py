"""How a run shows itself: a progress bar on a terminal, one plain line per log interval elsewhere."""

import sys
import time
from typing import Any, Self

from llmjax.cli.text import duration


class Progress:
    """The `report` of `fit`: called with every event of a run."""

    def __init__(self) -> None:
        """Nothing is shown before the first event."""
        self.began, self.first, self.steps = time.monotonic(), 0, 0
        self.bar: Any = None

    def __enter__(self) -> Self:
        """Show events from here on."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away, whatever happened."""
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self.began, self.first, self.steps = time.monotonic(), event["step"], event["steps"]
            if sys.stdout.isatty() and event["step"] < event["steps"]:
                self.bar = bar(event["step"], event["steps"])
        elif kind == "log" and self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=event["step"], shown=figures(event))
        elif kind == "log":
            self.say(f"{self.where(event)}  {figures(event)}  {duration(self.left(event['step']))} left")
        elif kind == "eval":
            self.say(f"{self.where(event)}  held out: {held_out(event)}")
        elif kind == "compile":
            self.say(f"compiled in {event['compile_seconds']:.1f} s")
        elif kind == "resume":
            self.say(f"going on from step {event['step']}")
        elif kind == "warning":
            self.say(f"warning: {event['message']}", error=True)

    def say(self, line: str, error: bool = False) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr if error else sys.stdout, flush=True)

    def where(self, event: dict[str, Any]) -> str:
        """The step, in a column."""
        width = len(str(self.steps))
        return f"step {event['step']:>{width}}/{self.steps}"

    def left(self, step: int) -> float:
        """Seconds to the last step at the pace of this process so far."""
        done = step - self.first
        return (time.monotonic() - self.began) / done * (self.steps - step) if done > 0 else 0.0


def bar(step: int, steps: int) -> Any:
    """A started rich progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    shown = Progress(*columns, speed_estimate_period=600)
    shown.start()
    shown.add_task("train", completed=step, total=steps, shown="")
    return shown


def figures(event: dict[str, Any]) -> str:
    """Loss, bits per byte and speed of a log event, those that it has."""
    shown = [f"loss {event['loss']:.4f}"] if "loss" in event else []
    if event.get("bits_per_byte") is not None:
        shown.append(f"bits/byte {event['bits_per_byte']:.3f}")
    shown.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("mfu") is not None:
        shown.append(f"MFU {event['mfu']:.1%}")
    if event.get("skipped"):
        shown.append(f"skipped {event['skipped']}")
    return "  ".join(shown)


def held_out(event: dict[str, Any]) -> str:
    """The held-out figures of an eval event, those that it has."""
    names = {
        "val_loss": "loss",
        "val_bits_per_byte": "bits/byte",
        "val_accuracy": "accuracy",
        "val_perplexity": "perplexity",
    }
    return "  ".join(f"{label} {event[name]:.4g}" for name, label in names.items() if event.get(name) is not None)
