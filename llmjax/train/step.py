"""One update, as a pure function of (state, batch, learning rate, step, seed), and its ahead-of-time compilation.

The learning rate, the step and the seed are arguments, so that none of them recompiles anything. Keys are folded in
from (seed, step, microbatch): a resumed run draws what the uninterrupted one would have drawn.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt

from llmjax.nn.auxiliary import LOSSES, METRICS, over_layers
from llmjax.nn.metric import Metric, add
from llmjax.nn.model import Params, merged
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.parallel.mesh import batch_sharding, replicated
from llmjax.train.config import Train
from llmjax.train.loss_scale import keep_if, scale_loss, unscale
from llmjax.train.optimizers.base import set_learning_rate
from llmjax.train.state import Plan, State

Metrics = dict[str, Metric]


def apply_of(module: nn.Module) -> Apply:
    """The module as the function that objectives take: parameters and inputs in, output out; a key turns on dropout.

    Features hold the losses and metrics that layers hand out; logits come without them.
    """

    def apply(
        params: Params,
        *inputs: Array,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
        **named: Array | None,
    ) -> Any:
        if method != "features":
            return run(module, params, inputs, named, key, method)[0]
        (features, _), collected = run(module, params, inputs, named, key, method, [LOSSES, METRICS])
        losses = over_layers(jnp.sum, collected.get(LOSSES, {}))
        return features.replace(losses=losses, metrics=over_layers(jnp.mean, collected.get(METRICS, {})))

    return apply


def run(
    module: nn.Module,
    params: Params,
    inputs: Sequence[Array],
    named: Mapping[str, Array | None],
    key: PRNGKeyArray | None,
    method: str,
    mutable: list[str] | Literal[False] = False,
) -> Any:
    """The module's (output, state), and the `mutable` collections if there are any; inputs of None are left out."""
    options: dict[str, Any] = {name: x for name, x in named.items() if x is not None}
    options |= dict(deterministic=key is None, method=method, mutable=mutable)
    return module.apply({"params": params}, *inputs, rngs=None if key is None else {"dropout": key}, **options)


@dataclass(frozen=True)
class Step:
    """The update of a run. Microbatch m of n takes rows m, m + n, ... so that every device keeps the rows it has."""

    apply: Apply
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    train: Train
    needs_objective: bool = False
    """Whether the optimizer takes the loss of (the first microbatch of) the batch as `obj_fn`."""

    def __call__(
        self,
        state: State,
        batch: Batch,
        learning_rate: Float[Array, ""],
        step: Int[Array, ""],
        seed: UInt[Array, ""],
    ) -> tuple[State, Metrics]:
        """The state after one update, and the metrics of the batch.

        A step whose loss, gradient norm or update norm is not finite leaves parameters, optimizer state and average as
        they are, adds nothing to the metrics, and counts in `skipped` and `bad`; after `train.stop_after_bad` of them
        in a row every step is skipped, so that what went wrong is still there to be looked at.
        """
        if self.train.offload_optimizer:
            state = state._replace(opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device))
        key = jax.random.fold_in(jax.random.key(seed), step)
        gradients, metrics = self.gradients(state, batch, key, step)
        extra = {"obj_fn": self.first_loss(state.frozen, batch, key)} if self.needs_objective else {}
        opt_state = set_learning_rate(state.opt_state, learning_rate)
        updates, opt_state = self.optimizer.update(gradients, opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates)}
        finite = jnp.isfinite(metrics["loss"].total)
        for norm in norms.values():
            finite &= jnp.isfinite(norm)
        good = finite & (state.bad < self.train.stop_after_bad)
        ema, loss_scale = self.train.ema, self.train.precision.loss_scale
        new = State(
            params=params,
            opt_state=opt_state,
            ema=None if ema is None or state.ema is None else ema.update(state.ema, params),
            loss_scale=None,
            bad=jnp.zeros((), jnp.int32),
            frozen=None,
        )
        new = keep_if(good, new, state._replace(loss_scale=None, bad=state.bad + 1, frozen=None))
        new = new._replace(frozen=state.frozen)
        if loss_scale is not None and state.loss_scale is not None:
            new = new._replace(loss_scale=loss_scale.next(state.loss_scale, finite))
        norms["param_norm"] = optax.tree.norm(new.params)
        metrics |= {name: Metric(norm, jnp.ones(())) for name, norm in norms.items()}
        metrics = keep_if(good, metrics, jax.tree.map(jnp.zeros_like, metrics))
        counts = {"skipped": ~good, "bad": new.bad}
        return new, metrics | {name: Metric(x.astype(jnp.float32), jnp.ones(())) for name, x in counts.items()}

    def gradients(self, state: State, batch: Batch, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[PyTree, Metrics]:
        """Gradients of the batch's loss, float32: microbatches count by the weight (`loss.count`) they carry."""
        count = self.train.accumulate
        if count == 1:
            gradients, metrics = self.microbatch(state, batch, jax.random.fold_in(key, 0))
        else:
            gradients, metrics = self.accumulated(state, batch, key, self.due(step, len(batch["tokens"])))
        return gradients if state.loss_scale is None else unscale(state.loss_scale, gradients), metrics

    def due(self, step: Int[Array, ""], rows: int) -> int | Int[Array, ""]:
        """Microbatches of update `step` that hold anything, of a batch of so many rows."""
        if self.train.ramp is None:
            return self.train.accumulate
        counts = self.train.ramp.microbatches(rows, self.train.accumulate)
        return jnp.asarray(counts)[jnp.minimum(step, len(counts) - 1)]

    def accumulated(
        self, state: State, batch: Batch, key: PRNGKeyArray, due: int | Int[Array, ""]
    ) -> tuple[PyTree, Metrics]:
        """sum_m count_m grad_m / sum_m count_m over the first `due` microbatches, one in memory at a time."""

        def body(index: Int[Array, ""], carry: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
            rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), parts)
            gradients, metrics = self.microbatch(state, rows, jax.random.fold_in(key, index))
            weight = metrics["loss"].count
            total = jax.tree.map(lambda s, g: s + weight * g.astype(jnp.float32), carry[0], gradients)
            return total, add(carry[1], metrics)

        parts = microbatches(batch, self.train.accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(self.microbatch, state, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        total, metrics = jax.lax.fori_loop(0, due, body, zeros)
        weight = jnp.maximum(metrics["loss"].count, 1.0)
        return jax.tree.map(lambda g: g / weight, total), metrics

    def microbatch(self, state: State, batch: Batch, key: PRNGKeyArray) -> tuple[PyTree, Metrics]:
        """Gradients of the (scaled) mean loss of some rows, and their metrics."""

        def loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            value, metrics = self.loss(merged(params, state.frozen), batch, key)
            return value if state.loss_scale is None else scale_loss(state.loss_scale, value), metrics

        return jax.grad(loss, has_aux=True)(state.params)

    def loss(self, params: Params, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Metrics]:
        """The objective at float32 `params`, computed in the run's precision."""
        return self.objective.loss(self.apply, self.train.precision.cast_compute(params), batch, key)

    def first_loss(self, frozen: Params, batch: Batch, key: PRNGKeyArray) -> Callable[[Params], Float[Array, ""]]:
        """The loss of the first microbatch as a function of the parameters that train."""
        rows = jax.tree.map(lambda x: x[0], microbatches(batch, self.train.accumulate))
        return lambda params: self.loss(merged(params, frozen), rows, jax.random.fold_in(key, 0))[0]


def microbatches(batch: Batch, count: int) -> dict[str, Array]:
    """The batch as `[count, rows / count, ...]`: microbatch m holds rows m, m + count, ..."""
    return {name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


@dataclass
class Compiled:
    """A step compiled once, before the first batch; `traces` counts how often it was traced."""

    step: Step
    plan: Plan
    mesh: Mesh
    traces: int = 0
    seconds: float = 0.0
    """Time to trace and compile."""
    executable: Any = field(default=None, repr=False)

    def compile(self, batch: Mapping[str, np.ndarray]) -> "Compiled":
        """Trace and compile for batches shaped like `batch`; the state is donated."""
        start = time.perf_counter()
        whole, rows = replicated(self.mesh), batch_sharding(self.mesh)
        jitted = jax.jit(self._counted, donate_argnums=0, out_shardings=(self.plan.shardings, whole))
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()}
        scalars = (jax.ShapeDtypeStruct((), dtype, sharding=whole) for dtype in (np.float32, np.int32, np.uint32))
        with jax.set_mesh(self.mesh):  # kernels ask which chips they are traced for, and how many
            lowered = jitted.lower(self.plan.abstract, shapes, *scalars)
        self.executable = lowered.compile()
        self.seconds = time.perf_counter() - start
        return self

    def __call__(self, state: State, batch: Batch, learning_rate: float, step: int, seed: int) -> tuple[State, Metrics]:
        """Run the step; `state` must not be used again."""
        return self.executable(state, batch, np.float32(learning_rate), np.int32(step), np.uint32(seed))

    def _counted(self, *arguments: Any) -> tuple[State, Metrics]:
        self.traces += 1
        return self.step(*arguments)
