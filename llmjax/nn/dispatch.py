"""Running experts on the tokens that a router gave them: by grouped products without any drop, or in buffers with room
for so many tokens an expert.

The experts are one dense feed-forward layer whose parameters `{projection: {kernel, bias}}` have a leading axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.nn.mlp import DenseFeedForward, Project, Projection
from llmjax.nn.router import Choice, Slots
from llmjax.parallel.mesh import Names, constrained, per_device

Params = dict[str, dict[str, Float[Array, "experts ..."]]]
Table = dict[str, Projection]
TOKEN: Names = ("buffers", "length", None)


def dropless(
    expert: DenseFeedForward, table: Table, params: Params, x: Float[Array, "batch length d_model"], choice: Choice
) -> Float[Array, "batch length d_model"]:
    """y_t = sum_j w_tj expert_{e_tj}(x_t), every pair of them; the sum in float32, the result in x's dtype.

    On a mesh every device runs its own experts (and its part of their hidden width) on the tokens of its part of the
    batch, and the parts are added: tokens stay where they are, or are gathered from the devices that share the experts
    out where a rule splits the batch over those too. Gale et al. 2022 (2211.15841) named it.
    """
    leaves, tree = jax.tree.flatten(params)
    split = {name: {leaf: axes_of(table[name], leaf) for leaf in params[name]} for name in params}
    axes = jax.tree.leaves(split, is_leaf=lambda node: isinstance(node, tuple))

    def part(
        x: Float[Array, "batch length d_model"],
        experts: Int[Array, "batch length k"],
        weights: Float[Array, "batch length k"],
        own: Int[Array, " own"],
        *leaves: Array,
    ) -> Float[Array, "1 1 batch length d_model"]:
        def run(x: Array, group: Array, sizes: Array) -> Array:
            project = grouped(table, jax.tree.unflatten(tree, leaves), group, sizes)
            return project("down", expert.hidden(project, x))

        k = experts.shape[-1]
        pairs = (experts.reshape(-1, k) - own[0], weights.reshape(-1, k))
        return by_expert(run, own.size, x.reshape(-1, x.shape[-1]), *pairs).reshape(1, 1, *x.shape)

    own = jnp.arange(leaves[0].shape[0])
    names = [TOKEN, TOKEN, TOKEN, ("experts",), *axes]
    parts = per_device(part, names, ("experts", "d_ff", *TOKEN), x, choice.experts, choice.weights, own, *leaves)
    return jnp.sum(parts, axis=(0, 1)).astype(x.dtype)


def axes_of(projection: Projection, leaf: str) -> Names:
    """Logical axes of a stacked leaf; d_model is whole, because every device has whole tokens."""
    axes = projection.axes if leaf == "kernel" else projection.axes[1:]
    return ("experts", *(None if name == "d_model" else name for name in axes))


def by_expert(
    run: Callable[[Array, Array, Array], Array],
    experts: int,
    x: Float[Array, "tokens d_model"],
    group: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
) -> Float[Array, "tokens d_model"]:
    """sum_j w_tj run(x_t) in float32, with `run` called once on the pairs sorted by group: rows, groups, group sizes.

    Pairs whose group is not in [0, experts) come last and count as zero.
    """
    tokens, k = group.shape
    flat = group.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    # Rows after the last group are not defined by a grouped product, so neither they nor their gradients may be used.
    taken = (jnp.arange(flat.size) < jnp.sum(sizes))[:, None]
    y = run(jnp.where(taken, x[order // k], 0), flat[order], sizes)
    y = jnp.where(taken, y, 0)[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1)


def grouped(table: Table, params: Params, group: Int[Array, " rows"], sizes: Int[Array, " experts"]) -> Project:
    """Projections of rows that are sorted by expert: `[rows, inputs] -> [rows, outputs]`."""

    def project(name: str, x: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
        kernel = params[name]["kernel"]
        y = jax.lax.ragged_dot(x, kernel, sizes)
        if table[name].bias:
            # Where devices share the inputs out, their results are added: each adds its part of the bias.
            part = kernel.shape[1] / table[name].inputs
            y = y + part * jnp.take(params[name]["bias"], group, axis=0, mode="clip")
        return y

    return project


def fill(choice: Choice, experts: int, capacity: int) -> Slots:
    """Give every expert the first `capacity` pairs of each sequence that chose it, and drop the others.

    First means earlier tokens, and of one token its better experts: what happens to a token never depends on later ones
    (GShard, 2006.16668, places all first choices before any second one).
    """

    def one(choice: Choice) -> Slots:
        length, k = choice.experts.shape
        flat = choice.experts.reshape(-1)
        order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=experts)
        place, start = jnp.arange(capacity), jnp.cumsum(sizes) - sizes
        full = place < sizes[:, None]
        pair = order[jnp.where(full, start[:, None] + place, 0)]
        return Slots(jnp.where(full, pair // k, length), jnp.where(full, choice.weights.reshape(-1)[pair], 0))

    return jax.vmap(one)(choice)


def buffered(
    expert: DenseFeedForward, table: Table, params: Params, x: Float[Array, "batch length d_model"], slots: Slots
) -> Float[Array, "batch length d_model"]:
    """y_t = sum of w expert_e(x_t) over the slots that hold token t; zero for a token that is in none.

    The experts run as one batched product over buffers `[batch, experts, capacity, d_model]`. Where a rule splits the
    batch over the experts' axis too, buffers go to their experts and back, all to all (GShard, 2006.16668).
    """

    def project(name: str, x: Float[Array, "batch experts capacity inputs"]) -> Array:
        y = jnp.einsum("becd,edf->becf", x, params[name]["kernel"])
        return y + params[name]["bias"][:, None] if table[name].bias else y

    rows = jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=0))(x, slots.tokens)
    y = project("down", expert.hidden(project, constrained(rows, ("buffers", "experts", None, None))))
    y = constrained(y, ("buffers", "experts", None, None)).astype(jnp.float32) * slots.weights[..., None]
    zeros = jnp.zeros(x.shape, jnp.float32)
    return jax.vmap(lambda out, index, y: out.at[index].add(y, mode="drop"))(zeros, slots.tokens, y).astype(x.dtype)
