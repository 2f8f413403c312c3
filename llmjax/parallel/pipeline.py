"""Pipeline parallelism: a stack of layers in stages, each on devices of its own, and microbatches that pass them.

In each tick every stage runs its layers on the microbatch that it holds and sends the result to the next stage. Stage s
does in tick t what stage 0 did in tick t - s: its item number t - s. GPipe (Huang et al. 2018, 1811.06965) has one
round: item i is microbatch i. The circular (interleaved) schedule (Narayanan et al. 2021, 2104.04473, section 2.2)
gives every stage `rounds` pieces of the stack, and sends a group of as many microbatches as there are stages through
all of them before the next group enters: what the last stage sends reaches the first in the very tick in which it is
due, so nothing waits. The backward pass is the transposed program: the same ticks from the last to the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from llmjax.config import InputError
from llmjax.parallel.mesh import in_force
from pallas_kernels.attention.vjp import ATTENTION

Repeat = Callable[[Any, Any, Any, Any, Int[Array, ""]], tuple[Any, Any]]
"""(one layer's arrays, x, the microbatch's own context, shared context, microbatch) -> (x, scalars handed out)."""


def stages() -> int:
    """Stages of the mesh that the program is traced for."""
    return jax.sharding.get_abstract_mesh().shape.get("stage", 1)


def ticks_of(stages: int, microbatches: int, rounds: int = 1) -> int:
    """Ticks until the last stage is done; in each a stage runs 1 / rounds of its layers."""
    return microbatches * rounds + stages - 1


def bubble_fraction(stages: int, microbatches: int, rounds: int = 1) -> float:
    """The part of a stage's time in which it has nothing to do: (S - 1) / (M v + S - 1) in v rounds."""
    return (stages - 1) / ticks_of(stages, microbatches, rounds)


def place(item: Any, stages: int, rounds: int) -> tuple[Any, Any]:
    """Round and microbatch of an item of a stage's work."""
    group, rest = item // (stages * rounds), item % (stages * rounds)
    return rest // stages, group * stages + rest % stages


def pipelined(repeat: Repeat, layers: Any, x: Any, rows: Any, shared: Any, remat: str = "none") -> tuple[Any, Any]:
    """`repeat` over all layers, by the schedule of the mesh config in force; for traces under a mesh with stages.

    `layers` are arrays `[repeats, ...]`; `x` and `rows` (context that belongs to the rows) are `[batch, ...]`; `shared`
    is what all microbatches see. Returns x and what the layers hand out, `[repeats, ...]`, the mean over microbatches.
    Microbatch m of M has the rows m, m + M, ..., so that every device keeps the rows it has. Of the circular schedule,
    whose stages have layers from all over the stack, the layers are brought to their places at the start of each call.
    Raises InputError where repeats or rows do not come out even.
    """
    count, parts, rounds = stages(), in_force().microbatches, in_force().rounds
    repeats, batch = jax.tree.leaves(layers)[0].shape[0], jax.tree.leaves(x)[0].shape[0]
    if repeats % (count * rounds):
        raise InputError(f"mesh.stage={count} x rounds={rounds} does not divide the {repeats} repeats of the pattern")
    if batch % parts:
        raise InputError(f"mesh.microbatches={parts} does not divide a batch of {batch} rows")
    layers = jax.tree.map(lambda a: a.reshape(rounds, count, -1, *a.shape[1:]), layers)
    x, rows = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (x, rows))
    run = jax.shard_map(
        partial(stage_of, repeat, POLICIES[remat], count),
        in_specs=(P("stage"), P(None, "stage"), P(), P(), P()),
        out_specs=(P("stage"), P(None, "stage")),
        axis_names={"stage"},
        check_vma=False,
    )
    y, handed = run(jnp.arange(count), layers, x, rows, shared)
    y = jax.tree.map(lambda a: a[-1].swapaxes(0, 1).reshape(batch, *a.shape[3:]), y)
    return y, jax.tree.map(lambda a: a.reshape(repeats, *a.shape[3:]), handed)


def stage_of(
    repeat: Repeat, policy: Any, count: int, stage: Int[Array, " 1"], layers: Any, x: Any, rows: Any, shared: Any
) -> tuple[Any, Any]:
    """All ticks of one stage, which has `layers` `[rounds, 1, own, ...]`.

    Returns its results of the last round `[1, parts, ...]` and the means of what its layers hand out.
    """
    rounds, _, own = jax.tree.leaves(layers)[0].shape[:3]
    parts = jax.tree.leaves(x)[0].shape[0]
    items = parts * rounds

    # Layers are looked up within what is recomputed: else the backward pass would keep a copy of them for every tick.
    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def one(index: Int[Array, ""], x: Any, round_: Int[Array, ""], part: Int[Array, ""]) -> tuple[Any, Any]:
        layer = jax.tree.map(lambda a: a[round_, 0, index], layers)
        return repeat(layer, x, jax.tree.map(lambda a: a[part], rows), shared, part)

    def tick(received: Any, time: Int[Array, ""]) -> tuple[Any, Any]:
        item = time - stage[0]
        busy = (item >= 0) & (item < items)
        round_, part = place(jnp.clip(item, 0, items - 1), count, rounds)
        # An idle stage works on real rows, whose result nobody takes: no zeros, whose norms have wild gradients.
        fresh = ~busy | ((stage[0] == 0) & (round_ == 0))
        start = jax.tree.map(lambda new, old: jnp.where(fresh, new[part], old), x, received)
        y, handed = jax.lax.scan(lambda x, index: one(index, x, round_, part), start, jnp.arange(own))
        ring = [(s, (s + 1) % count) for s in range(count)]
        weight = busy * jax.nn.one_hot(round_, rounds) / parts
        handed = jax.tree.map(lambda a: jnp.tensordot(weight, a, axes=0), handed)
        return jax.tree.map(lambda a: jax.lax.ppermute(a, "stage", ring), y), (y, handed)

    zeros = jax.tree.map(lambda a: jnp.zeros_like(a[0]), x)
    _, (ys, handed) = jax.lax.scan(tick, zeros, jnp.arange(ticks_of(count, parts, rounds)))
    last = {place(item, count, rounds): item + count - 1 for item in range(items)}
    final = jnp.array([last[rounds - 1, part] for part in range(parts)])
    return jax.tree.map(lambda a: a[None, final], ys), jax.tree.map(lambda a: jnp.sum(a, axis=0)[:, None], handed)


MOVES = ("convert_element_type", "dynamic_slice", "gather", "reshape", "squeeze", "transpose")


def all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep for the backward pass all that is computed; what is only moved (layers looked up) is moved again."""
    return primitive.name not in MOVES


SAVED = jax.checkpoint_policies.save_only_these_names(ATTENTION)

POLICIES: dict[str, Any] = {
    "none": all_but_moves,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, SAVED
    ),
    "attention": SAVED,
    "full": None,
}
"""What `jax.checkpoint` keeps of a layer beside its inputs, the most first."""
