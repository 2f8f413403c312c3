"""`fit`: the training loop. It loses no step, waits for no step, and repeats itself bit by bit.

After every step the state of the run is (state on the devices, Progress on the host); a checkpoint holds both. All
else (batches, keys, learning rates) is a function of the step, so a resumed run continues as if it had never stopped.
Several processes run it as one: each with its own rows of every batch, the first one alone with the run's directory.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.config import ConfigError, InputError
from llmjax.nn.model import merged
from llmjax.parallel import hosts
from llmjax.train import checkpoint
from llmjax.train.early_stopping import EarlyStoppingState
from llmjax.train.errors import RunError, disk_full
from llmjax.train.evaluate import Evaluator, Sums, add_to, averaged, means
from llmjax.train.experiment import Experiment
from llmjax.train.log import MetricsLog
from llmjax.train.prefetch import Feed, Prefetch
from llmjax.train.process import StopSignals, facts, locked, use_compilation_cache
from llmjax.train.ramp import Ramped
from llmjax.train.state import plan
from llmjax.train.step import Compiled, Metrics, Step, apply_of
from llmjax.train.throughput import Rate, mfu

Report = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """What the loop itself remembers; plain numbers, kept in every checkpoint."""

    step: int = 0
    """Updates made."""
    tokens: float = 0.0
    """Target tokens trained on."""
    skipped: int = 0
    """Updates skipped because something was not finite."""
    seconds: float = 0.0
    """Time spent training, without compilation and evaluation."""
    window: Sums = field(default_factory=dict)
    """Sums of the metrics since the last line of the log."""
    stopping: EarlyStoppingState = field(default_factory=EarlyStoppingState)
    """What early stopping has seen."""
    val: dict[str, float] = field(default_factory=dict)
    """The last held-out metrics."""
    val_step: int = -1
    """When they were measured."""
    best: float = float("inf")
    """Lowest held-out loss so far."""
    fingerprint: str = ""
    """Of the data."""

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Progress":
        """From what `asdict` made of one, through JSON."""
        window = {name: (total, count) for name, (total, count) in saved["window"].items()}
        return cls(**saved | {"window": window, "stopping": EarlyStoppingState(*saved["stopping"])})


def ignore(event: dict[str, Any]) -> None:
    """Report nothing."""
    del event


def fit(experiment: Experiment, run_dir: str | Path, *, report: Report = ignore) -> dict[str, Any]:
    """Train, or go on training, in `run_dir`; returns the run's figures.

    `report` gets a dictionary for everything that happens, its kind under `event`: compile, resume, start, log, eval,
    checkpoint, warning, stop; those of log and eval are the lines of metrics.jsonl. On SIGTERM or SIGINT (of any
    process) the run is saved at the next step and `fit` returns with `stopped="signal"`.

    Raises:
        InputError: the experiment and the data, the checkpoint found, or the processes do not fit together.
        RunError: the disk is full, the loss was not finite for `train.stop_after_bad` steps in a row, or another
            process was lost.
    """
    folder = Path(run_dir)
    use_compilation_cache()
    try:
        with contextlib.ExitStack() as stack:
            hosts.on_first(lambda: take(folder, stack))
            if hosts.several():
                hosts.require_same(facts(experiment))
            stack.enter_context(experiment.mesh.in_force())
            signals = stack.enter_context(StopSignals())
            trainer = stack.enter_context(contextlib.closing(Trainer(experiment, folder, report)))
            return trainer.run(signals)
    except Exception as error:
        if hosts.lost(error):
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"another host is lost ({reason}): run all hosts again, they go on from the last checkpoint"
            ) from error
        if not isinstance(error, OSError) or not disk_full(error):
            raise
        raise RunError(f"the disk is full: cannot write to {folder} ({error}); free space, then run again") from error


def take(folder: Path, stack: contextlib.ExitStack) -> None:
    """Make the run's directory and hold it until `stack` is left."""
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder))


class Trainer:
    """One process's part of a run: everything built, compiled and restored, ready for the next step."""

    def __init__(self, experiment: Experiment, run_dir: Path, report: Report) -> None:
        """Build the pipeline, compile the step, draw or restore the state."""
        self.experiment, self.run_dir, self.report = experiment, run_dir, report
        self.train = experiment.train
        self.log = MetricsLog(run_dir, self.train.tensorboard)
        self.checkpoints = checkpoint.Writer(run_dir, self.train.keep_last, self.train.keep_best)
        self.mesh = experiment.mesh.build()
        self.pipeline = experiment.data.build(experiment.seed)
        rows = experiment.data.batch_size
        first = experiment.data.empty(rows)
        if self.train.ramp is not None:
            self.pipeline = Ramped(self.pipeline, self.train.ramp, first, self.train.accumulate)
        self.feed = Feed(self.pipeline, rows, self.mesh)
        self.check(first)
        self.plan = plan(experiment.model, experiment.optimizer, self.train, self.mesh)
        apply = apply_of(experiment.model.build())
        needs_objective = experiment.optimizer.needs_objective
        step = Step(apply, experiment.objective, self.plan.optimizer, self.train, needs_objective)
        self.seed = experiment.seed % 2**32
        self.compiled = Compiled(step, self.plan, self.mesh).compile(first)
        self.compile_seconds = self.compiled.seconds
        self.report({"event": "compile", "compile_seconds": self.compile_seconds})
        self.evaluator = Evaluator(step, self.mesh)
        average = averaged(experiment.optimizer, self.train.ema)
        self.average = None if average is None else jax.jit(average, out_shardings=self.plan.shardings.model_params)
        self.flops_per_token = experiment.model.flops_per_token(first["tokens"].shape[1])
        self.progress, self.state, self.saved = self.restore()
        self.pending: list[Metrics] = []
        self.votes = hosts.Votes()
        self.rate = Rate()
        self.total = Rate()

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Raise InputError where the parts of the experiment do not fit together."""
        rows, length = batch["tokens"].shape
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        count = self.train.accumulate
        if rows % count:
            divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            raise ConfigError(f"train.accumulate={count} does not divide data.batch_size={rows}: use one of {divisors}")
        if rows // count % parts:
            raise ConfigError(
                f"data.batch_size={rows} in {count} microbatches cannot be split over the {parts} parts of mesh.data x "
                f"mesh.fsdp: use a multiple of {count * parts}"
            )
        if length % self.mesh.shape["context"]:
            raise ConfigError(f"data.length={length} is no multiple of mesh.context={self.mesh.shape['context']}")
        vocab, needed = getattr(self.experiment.model, "vocab", None), self.pipeline.tokenizer.vocab_size
        if vocab is not None and vocab < needed:
            raise ConfigError(f"model.vocab={vocab} is less than the tokenizer's {needed} ids: use at least {needed}")
        if self.train.eval_every:
            next(iter(self.pipeline.eval_batches(1)))

    def restore(self) -> tuple[Progress, Any, int]:
        """Progress, state and step of the newest intact checkpoint, or the beginning (its step is then -1)."""
        fingerprint = self.pipeline.fingerprint
        step = hosts.on_first(self.newest)
        progress = Progress(fingerprint=fingerprint)
        if step < 0:
            state = self.plan.init(self.seed)
        else:
            found = checkpoint.read(checkpoint.place(self.run_dir, step))
            progress = Progress.load(found.progress)
            if not progress.fingerprint:  # parameters that were imported: nothing is known but them
                progress = Progress(fingerprint=fingerprint)
                abstract = self.plan.abstract
                given = merged(found.params(abstract.params), found.frozen(abstract.frozen))
                return progress, self.plan.init(self.seed, given), step
            if progress.fingerprint != fingerprint:
                raise InputError(
                    f"{self.run_dir} was trained on other data (fingerprint {progress.fingerprint}, now "
                    f"{fingerprint}): bring the data back, or give another run directory"
                )
            state = found.state(self.plan.abstract)
            self.report({"event": "resume", "step": step})
        if hosts.first():
            self.checkpoints.set_aside(step)
            self.log.open(max(step, 0))
        return progress, state, step

    def newest(self) -> int:
        """Step of the newest intact checkpoint; -1 where there is none."""
        found = checkpoint.newest(self.run_dir, self.warn)
        return -1 if found is None else found.step

    def publish(self, event: str, line: dict[str, Any]) -> None:
        """Log a line, once for all processes, and report it."""
        if hosts.first():
            self.log.write(line)
        self.report({"event": event, **line})

    def warn(self, message: str) -> None:
        """Report a warning."""
        self.report({"event": "warning", "message": message})

    def run(self, signals: StopSignals) -> dict[str, Any]:
        """Train until something says stop; the last step is saved when this returns."""
        progress = self.progress
        self.report({"event": "start", "step": progress.step, "steps": self.train.steps})
        reason = self.stop_reason(signals)
        if reason is None:
            with Prefetch(self.feed.batch, progress.step, self.train.steps) as batches:
                self.rate.start()
                while reason is None:
                    self.update(batches)
                    if self.due(self.train.log_every):
                        self.write_line()
                    improved = bool(self.train.eval_every) and self.due(self.train.eval_every) and self.evaluate()
                    reason = self.stop_reason(signals)
                    due = bool(self.train.checkpoint_every) and self.due(self.train.checkpoint_every)
                    if due or reason or (improved and self.train.keep_best):
                        self.save()
        if self.saved != progress.step:
            self.save()
        self.checkpoints.wait()
        result = self.result(reason)
        self.report({"event": "stop", **result})
        return result

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.progress.step % every == 0 or self.progress.step == self.train.steps

    def stop_reason(self, signals: StopSignals) -> str | None:
        """Why to stop now, if at all."""
        stopping = self.train.early_stopping
        if self.progress.step >= self.train.steps:
            return "done"
        if stopping is not None and stopping.should_stop(self.progress.stopping):
            return "early_stopping"
        return "signal" if self.votes.cast(signals.received) else None

    def update(self, batches: Prefetch) -> None:
        """Start the next step; returns when the step before it is finished, so that one is always queued."""
        batch = batches.take()
        step = self.progress.step
        self.state, metrics = self.compiled(self.state, batch, self.learning_rate(step), step, self.seed)
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        self.pending.append(metrics)
        self.progress.step += 1
        self.rate.waited += batches.waited
        self.checkpoints.check()

    def learning_rate(self, step: int) -> float:
        """The schedule's rate at update `step`."""
        return self.experiment.optimizer.schedule.value(step, self.train.steps)

    def absorb(self) -> None:
        """Fetch and add up the metrics of the steps since the last time. Raises RunError after too many bad ones."""
        progress, first = self.progress, self.progress.step - len(self.pending)
        host, self.pending = jax.device_get(self.pending), []
        for step, metrics in enumerate(host, first):
            bad, skipped = metrics.pop("bad"), metrics.pop("skipped")
            progress.skipped += int(skipped.total)
            if bad.total >= self.train.stop_after_bad:
                self.fail(step)
            add_to(progress.window, metrics)
            progress.tokens += float(metrics["loss"].count)
            self.rate.tokens += float(metrics["loss"].count)
        seconds = self.rate.lap()
        progress.seconds += seconds

    def write_line(self) -> None:
        """One line of metrics over the steps since the last."""
        self.absorb()
        progress, rate = self.progress, self.rate
        per_second = rate.tokens_per_second
        line = {
            "step": progress.step,
            **means(progress.window),
            "learning_rate": self.learning_rate(progress.step - 1),
            "tokens": progress.tokens,
            "tokens_per_second": per_second,
            "mfu": mfu(per_second, self.flops_per_token, list(self.mesh.devices.flat)),
            "skipped": progress.skipped,
            "data_wait_fraction": rate.waited / rate.seconds if rate.seconds else 0.0,
            "seconds": progress.seconds,
        }
        progress.window = {}
        self.total.add(rate)
        self.rate = Rate()
        self.publish("log", line)
        self.rate.start()

    def evaluate(self) -> bool:
        """Measure the held-out metrics; True where the loss is the lowest so far."""
        self.absorb()
        progress, start = self.progress, time.perf_counter()
        params = self.state.model_params if self.average is None else self.average(self.state)
        values = self.evaluator(params, self.feed.eval_batches(self.train.eval_batches))
        progress.val, progress.val_step = values, progress.step
        if self.train.early_stopping is not None:
            progress.stopping = self.train.early_stopping.update(progress.stopping, progress.step, values["loss"])
        improved = values["loss"] < progress.best
        progress.best = min(progress.best, values["loss"]) if improved else progress.best
        line = {"step": progress.step, **{f"val_{name}": value for name, value in values.items()}}
        line["val_seconds"] = time.perf_counter() - start
        self.publish("eval", line)
        self.rate.start()
        return improved

    def save(self) -> None:
        """Start writing a checkpoint of this step."""
        self.absorb()
        progress = self.progress
        loss = progress.val["loss"] if progress.val_step == progress.step else None
        loss = loss if loss is not None and np.isfinite(loss) else None
        self.checkpoints.save(progress.step, self.state, asdict(progress) | {"stopping": [*progress.stopping]}, loss)
        self.saved = progress.step
        self.report({"event": "checkpoint", "step": progress.step})

    def fail(self, step: int) -> None:
        """Stop because of too many bad steps, the last of them `step`: the state is still as it was before them."""
        from llmjax.train.diagnostics import diagnose

        count = self.train.stop_after_bad
        batch = self.pipeline.batch(step)
        found = diagnose(self.compiled.step, self.experiment.model, self.state, batch, self.seed, step)
        raise RunError(
            f"the loss or its gradient was not finite for {count} steps in a row, up to step {step + 1}: {found}; "
            f"the last checkpoint is step {max(self.saved, 0)}"
        )

    def result(self, reason: str | None) -> dict[str, Any]:
        """The figures of the run."""
        self.total.add(self.rate)
        progress = self.progress
        return {
            "val_bits_per_byte": progress.val.get("bits_per_byte"),
            **{f"val_{name}": value for name, value in progress.val.items() if name != "bits_per_byte"},
            "tokens_per_second": self.total.tokens_per_second,
            "train_seconds": progress.seconds,
            "compile_seconds": self.compile_seconds,
            "steps": progress.step,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "traces": self.compiled.traces,
            "recompiles": self.compiled.traces - 1,
            "stopped": reason,
            "run_dir": str(self.run_dir),
        }

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.checkpoints.close()
        finally:
            self.log.close()
