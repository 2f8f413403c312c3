"""The config of the training loop."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmjax.train.early_stopping import EarlyStopping
from llmjax.train.ema import Ema
from llmjax.train.precision import Precision
from llmjax.train.ramp import BatchRamp


@dataclass(frozen=True)
class Train:
    """How long to train and in which precision, and what is measured, logged and saved on the way."""

    steps: int = 1000
    """Optimizer updates."""
    accumulate: int = 1
    """Microbatches whose gradients make one update; a divisor of the batch size."""
    ramp: BatchRamp | None = None
    """How batches grow to their size by microbatches, of which `accumulate` make a whole one; None for whole ones."""
    precision: Precision = Precision()
    """Dtypes of the forward and backward pass."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the hosts' memory between updates (Ren et al. 2021, 2101.06840; the paged ones
    of QLoRA, 2305.14314): their bytes less on the devices, and their way there and back in every update."""
    ema: Ema | None = None
    """Moving average of the parameters, to evaluate and sample with; None for the parameters themselves."""
    log_every: int = 10
    """Updates between lines of metrics; each line averages over them."""
    eval_every: int = 200
    """Updates between evaluations on held-out text, with one more at the end; 0 for none at all."""
    eval_batches: int | None = None
    """Held-out batches in an evaluation; None for all of them."""
    checkpoint_every: int = 200
    """Updates between checkpoints, with one more at the end; 0 for only that one."""
    keep_last: int = 2
    """Newest checkpoints kept; the one before the last is there in case the last is damaged."""
    keep_best: int = 1
    """Checkpoints of lowest held-out loss kept beside them, written whenever it falls; 0 for none."""
    early_stopping: EarlyStopping | None = None
    """When to stop before `steps` because the held-out loss no longer falls."""
    stop_after_bad: int = 10
    """Updates in a row with a NaN or infinite loss or gradient (each is skipped) after which the run fails."""
    tensorboard: bool = False
    """Also write TensorBoard events, to `tensorboard/` in the run directory; needs the extra `track`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, why it is wrong and what would be right)."""
        for name in ("steps", "accumulate", "log_every", "keep_last", "stop_after_bad"):
            if getattr(self, name) < 1:
                yield name, "is below 1: use at least 1"
        for name in ("eval_every", "checkpoint_every", "keep_best"):
            if getattr(self, name) < 0:
                yield name, "is negative: use 0 for none"
        if self.ramp is not None and self.accumulate == 1:
            yield "ramp", "grows batches by microbatches: set train.accumulate to how many make a whole one"
        if self.eval_batches is not None and self.eval_batches < 1:
            yield "eval_batches", "is below 1: use None for all held-out batches, or train.eval_every=0 for none"
        if self.early_stopping is not None and self.eval_every == 0:
            yield "early_stopping", "never sees a held-out loss with train.eval_every=0: evaluate, or drop it"
