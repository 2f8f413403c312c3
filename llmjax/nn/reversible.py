"""Reversible residual layers: two streams whose inputs follow from their outputs, so that no activation is kept.

    y1 = x1 + mixer(norm(x2)),  y2 = x2 + mlp(norm(y1));      x2 = y2 - mlp(norm(y1)),  x1 = y1 - mixer(norm(x2)).
Kitaev et al. 2020 (2001.04451), section 3; Gomez et al. 2017 (1707.04585). Both streams are d_model wide, so a block
has the parameters of an ordinary one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmjax.config import InputError
from llmjax.nn.auxiliary import LOSSES, METRICS
from llmjax.nn.block import Block
from llmjax.nn.initializers import Init
from llmjax.nn.mixer import Context, State
from llmjax.nn.sites import site

Streams = tuple[Float[Array, "batch length d_model"], Float[Array, "batch length d_model"]]
Layers = tuple[Any, Int[Array, "repeats words"] | None]
"""Variables of all repeats by collection, stacked, and the data of one dropout key a repeat."""
Branch = Callable[[Layers, Float[Array, "batch length d_model"], Context], Float[Array, "batch length d_model"]]
"""What a branch of one repeat adds to a stream, given the other stream."""


class ReversibleModule(nn.Module):
    """Owns `mixer`, `mlp` and their norms, as `BlockModule` does; sites mixer_out, resid_mid, mlp_out, resid_post."""

    config: Block
    d_model: int
    layers: int
    initializer: Init

    def setup(self) -> None:
        """The parts."""
        c, sizes = self.config, (self.d_model, self.layers, self.initializer)
        assert c.mlp is not None
        assert c.norm is not None
        self.mixer, self.mlp = c.mixer.build(*sizes), c.mlp.build(*sizes)
        self.mixer_norm, self.mlp_norm = c.norm.build(), c.norm.build()
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, streams: Streams, context: Context, state: State = None) -> tuple[Streams, State]:
        """Both streams after the block."""
        one, two = streams
        y, state = self.mix(two, context, state)
        one = site(self, "resid_mid", one + y)
        return (one, site(self, "resid_post", two + self.feed(one, context))), state

    def mix(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """mixer(norm(x)), and the mixer's state."""
        y, state = self.mixer(self.mixer_norm(x), context, state)
        return site(self, "mixer_out", self.dropout(y, deterministic=context.deterministic)), state

    def feed(self, x: Float[Array, "batch length d_model"], context: Context) -> Float[Array, "batch length d_model"]:
        """mlp(norm(x))."""
        y = self.mlp(self.mlp_norm(x), context)
        return site(self, "mlp_out", self.dropout(y, deterministic=context.deterministic))


def branches_of(pattern: tuple[Block, ...], d_model: int, layers: int, init: Init) -> tuple[tuple[Branch, Branch], ...]:
    """(mixer, mlp) of every block of the pattern as functions of one repeat's variables."""

    def branch(index: int, method: str, repeat: Layers, x: Array, context: Context) -> Array:
        module = ReversibleModule(pattern[index], d_model, layers, init, parent=None)
        variables = {kind: tree[str(index)] for kind, tree in repeat[0].items() if str(index) in tree}
        rngs = None
        if repeat[1] is not None:
            rngs = {"dropout": jax.random.fold_in(jax.random.wrap_key_data(repeat[1]), 2 * index + (method == "feed"))}
        y, handed = module.apply(variables, x, context, rngs=rngs, method=method, mutable=[LOSSES, METRICS])
        if jax.tree.leaves(handed):
            raise InputError("remat=reversible has no way for the losses that layers hand out: use remat=full")
        return y[0] if method == "mix" else y

    return tuple((partial(branch, i, "mix"), partial(branch, i, "feed")) for i in range(len(pattern)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reversible(pairs: tuple[tuple[Branch, Branch], ...], layers: Layers, streams: Streams, context: Context) -> Streams:
    """The streams after all repeats of a pattern.

    The backward pass keeps nothing but the result: it walks the layers from the last to the first, takes every branch
    off its stream again, and has the branch's gradient from the same evaluation. Peak memory does not depend on depth;
    work is that of full rematerialisation.
    """

    def body(streams: Streams, repeat: Layers) -> tuple[Streams, None]:
        one, two = streams
        for mix, feed in pairs:
            one = one + mix(repeat, two, context)
            two = two + feed(repeat, one, context)
        return (one, two), None

    return jax.lax.scan(body, streams, layers)[0]


def forward(
    pairs: tuple[tuple[Branch, Branch], ...], layers: Layers, streams: Streams, context: Context
) -> tuple[Streams, tuple[Layers, Streams, Context]]:
    """The result, which is all that is kept beside the arguments that are no activations."""
    result = reversible(pairs, layers, streams, context)
    return result, (layers, result, context)


def backward(
    pairs: tuple[tuple[Branch, Branch], ...], kept: tuple[Layers, Streams, Context], cotangents: Streams
) -> tuple[Any, Streams, Any]:
    """Cotangents of layers, streams and context; integers have none."""
    layers, streams, context = kept

    def body(carry: tuple[Streams, Streams, Any], repeat: Layers) -> tuple[tuple[Streams, Streams, Any], Any]:
        (one, two), (d_one, d_two), total = carry
        found = still(repeat)

        def take_off(branch: Branch, stream: Array, other: Array, cotangent: Array) -> tuple[Array, Array]:
            nonlocal found, total
            y, pull = jax.vjp(branch, repeat, other, context)
            d_repeat, d_other, d_context = pull(cotangent)
            found, total = add(found, d_repeat), add(total, d_context)
            return stream - y, d_other

        for mix, feed in reversed(pairs):
            two, more = take_off(feed, two, one, d_two)
            d_one = d_one + more
            one, more = take_off(mix, one, two, d_one)
            d_two = d_two + more
        return ((one, two), (d_one, d_two), total), found

    start = (streams, cotangents, still(context))
    (_, d_streams, d_context), d_layers = jax.lax.scan(body, start, layers, reverse=True)
    return d_layers, d_streams, d_context


reversible.defvjp(forward, backward)


def still(tree: Any) -> Any:
    """Zeros for every array of real numbers, None for the others."""
    return jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def add(total: Any, cotangents: Any) -> Any:
    """The sum where `total` has numbers."""
    return jax.tree.map(lambda t, c: None if t is None else t + c, total, cotangents, is_leaf=lambda t: t is None)
