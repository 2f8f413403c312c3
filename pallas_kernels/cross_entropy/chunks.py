"""Per-token functions of linear heads' logits, chunked over tokens: values, and gradients that never hold all logits.

Two forms. `weighted_sum` makes the gradients while the logits of a chunk exist, and its backward pass only scales them:
three matrix products a head. `each` lets every token have a cotangent of its own, known only in the backward pass,
which makes the logits of each chunk again: four products.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cross_entropy.vocabulary import Vocabulary

Tree = TypeVar("Tree")
Arrays = tuple[Array, ...]
Heads = tuple[tuple[Float[Array, "tokens d_model"], Float[Array, "d_model vocab"]], ...]


class Measured(NamedTuple):
    """What a measure finds in one chunk."""

    values: Arrays  # [tokens] each, differentiable
    notes: Arrays  # [tokens] each, not differentiable
    pull: Callable[[Arrays], Arrays]  # cotangents of the values -> cotangents of the logits of each head


@dataclass(frozen=True)
class Measure(ABC):
    """A function of the logits of one or more heads, token by token."""

    vocabulary: Vocabulary
    soft_caps: tuple[float | None, ...]

    @abstractmethod
    def of(self, logits: Arrays, data: Arrays) -> Measured:
        """Measure a chunk: capped logits [tokens, vocab] of each head, and whatever else belongs to its tokens."""

    def chunk(self, heads: Heads, data: Arrays) -> Measured:
        """`of` the heads' logits, with a `pull` that goes on to hidden @ kernel before the cap."""
        raw = tuple(jnp.dot(h, w, preferred_element_type=wide(h)) for h, w in heads)
        logits = tuple(cap * jnp.tanh(x / cap) if cap else x for x, cap in zip(raw, self.soft_caps, strict=True))
        measured = self.of(logits, data)

        def pull(cotangents: Arrays) -> Arrays:
            grads = zip(measured.pull(cotangents), logits, self.soft_caps, strict=True)
            return tuple(g * (1 - jnp.square(x / cap)) if cap else g for g, x, cap in grads)

        return measured._replace(pull=pull)


def weighted_sum(
    measure: Measure, chunk: int | None, heads: Heads, data: Arrays, weights: Float[Array, " tokens"]
) -> tuple[Float[Array, ""], Arrays, Arrays]:
    """sum_i weights_i value_i of a measure with one value, then its values and notes, through which no gradient flows.

    Differentiable in the heads and the weights. With `chunk` at most that many tokens' logits exist at a time; None
    takes all tokens at once.
    """
    vocabulary = measure.vocabulary
    heads, data, weights = vocabulary.spread((heads, data, weights.astype(wide(weights))))
    total, values, notes = summed(measure, chunk, heads, data, weights)
    return vocabulary.gather(total), vocabulary.gather(values), notes


def each(measure: Measure, chunk: int | None, heads: Heads, data: Arrays) -> tuple[Arrays, Arrays]:
    """The values of every token, differentiable in the heads, and the notes, through which no gradient flows."""
    heads, data = measure.vocabulary.spread((heads, data))
    values, notes = separate(measure, chunk, heads, data)
    return measure.vocabulary.gather(values), notes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(
    measure: Measure, chunk: int | None, heads: Heads, data: Arrays, weights: Float[Array, " tokens"]
) -> tuple[Float[Array, ""], Arrays, Arrays]:
    """`weighted_sum`, each device its share, for callers that do not differentiate."""
    values, notes = separate(measure, chunk, heads, data)
    return jnp.sum(weights * values[0]), values, notes


def summed_forward(
    measure: Measure, chunk: int | None, heads: Heads, data: Arrays, weights: Float[Array, " tokens"]
) -> tuple[tuple[Float[Array, ""], Arrays, Arrays], tuple[Heads, Array, Heads]]:
    """`summed`, with the gradient of the sum."""
    values, notes, grads = sweep(measure, chunk, heads, data, (weights,))
    return (jnp.sum(weights * values[0]), values, notes), (grads, values[0], heads)


def summed_backward(
    measure: Measure,
    chunk: int | None,
    kept: tuple[Heads, Array, Heads],
    cotangents: tuple[Float[Array, ""], Arrays, Arrays],
) -> tuple[Heads, None, Array]:
    """Scale the gradients that the forward pass made; what comes back for values and notes is dropped."""
    grads, value, heads = kept
    scale = cotangents[0]
    return jax.tree.map(lambda g, x: (g * scale).astype(x.dtype), grads, heads), None, value * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def separate(measure: Measure, chunk: int | None, heads: Heads, data: Arrays) -> tuple[Arrays, Arrays]:
    """Values and notes of all tokens; of the values, each device its share."""
    hiddens, kernels = zip(*heads, strict=True)

    def step(carry: None, part: tuple[Arrays, Arrays]) -> tuple[None, tuple[Arrays, Arrays]]:
        measured = measure.chunk(tuple(zip(part[0], kernels, strict=True)), part[1])
        return carry, (measure.vocabulary.share(measured.values), measured.notes)

    _, found = jax.lax.scan(step, None, split(chunk, (hiddens, data)))
    return join(found, hiddens[0].shape[0])


def separate_forward(
    measure: Measure, chunk: int | None, heads: Heads, data: Arrays
) -> tuple[tuple[Arrays, Arrays], tuple[Heads, Arrays]]:
    """`separate`; the backward pass starts from the arguments again."""
    return separate(measure, chunk, heads, data), (heads, data)


def separate_backward(
    measure: Measure, chunk: int | None, kept: tuple[Heads, Arrays], cotangents: tuple[Arrays, Arrays]
) -> tuple[Heads, None]:
    """Make the logits of each chunk again and pull the cotangents of its tokens through them."""
    heads, data = kept
    _, _, grads = sweep(measure, chunk, heads, data, cotangents[0])
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, heads), None


summed.defvjp(summed_forward, summed_backward)
separate.defvjp(separate_forward, separate_backward)


def sweep(
    measure: Measure, chunk: int | None, heads: Heads, data: Arrays, cotangents: Arrays
) -> tuple[Arrays, Arrays, Heads]:
    """Values, notes, and the gradient in the heads of sum_i cotangents_i values_i, in at least float32.

    The gradient of the logits is rounded to hidden's dtype, as a matrix product of that dtype takes it; products are
    summed over vocabulary and chunks in float32. Gradients that nobody uses are removed by the compiler.
    """
    hiddens, kernels = zip(*heads, strict=True)

    def step(carry: Arrays, part: tuple[Arrays, Arrays, Arrays]) -> tuple[Arrays, tuple[Arrays, Arrays, Arrays]]:
        h, d, c = part
        measured = measure.chunk(tuple(zip(h, kernels, strict=True)), d)
        grads = [g.astype(x.dtype) for g, x in zip(measured.pull(c), h, strict=True)]
        products = [functools.partial(jnp.einsum, preferred_element_type=wide(x)) for x in h]
        hidden_grads = tuple(p("tv,dv->td", g, w) for p, g, w in zip(products, grads, kernels, strict=True))
        carry = tuple(k + p("td,tv->dv", x, g) for k, p, x, g in zip(carry, products, h, grads, strict=True))
        return carry, (measure.vocabulary.share(measured.values), measured.notes, hidden_grads)

    start = tuple(jnp.zeros_like(w, wide(w)) for w in kernels)
    start, hiddens, kernels, data, cotangents = measure.vocabulary.spread((start, hiddens, kernels, data, cotangents))
    kernel_grads, found = jax.lax.scan(step, start, split(chunk, (hiddens, data, cotangents)))
    values, notes, hidden_grads = join(found, hiddens[0].shape[0])
    return values, notes, tuple(zip(hidden_grads, kernel_grads, strict=True))


def wide(x: Array) -> jnp.dtype:
    """The dtype in which products of `x` are summed: float32, or float64 where `x` is that."""
    return jnp.promote_types(x.dtype, jnp.float32)


def split(chunk: int | None, tree: Tree) -> Tree:
    """[tokens, ...] -> [chunks, at most `chunk`, ...]; the chunks are equal, padded with zeros where they must be.

    Chunk j takes the tokens j, j + chunks, j + 2 chunks, ...: a batch that is split over devices gives every device its
    part of every chunk.
    """
    tokens = jax.tree.leaves(tree)[0].shape[0]
    count = 1 if chunk is None else max(1, -(-tokens // chunk))
    size = -(-tokens // count)

    def of(x: Array) -> Array:
        padded = jnp.pad(x, [(0, count * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(padded.reshape(size, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(of, tree)


def join(tree: Tree, tokens: int) -> Tree:
    """Undo `split` for every array of a tree."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:tokens], tree)
