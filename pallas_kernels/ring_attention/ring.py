"""The ring: keys and values travel from shard to shard while each shard's queries work on those at hand.

Hop t finds on shard r the keys of shard r - t. They are sent on before the work on them begins and nothing in that work
depends on the sending, so that a compiler which overlaps can; the loop is a scan, because an unrolled ring is scheduled
with all sends first. What is sent are the keys and values as the implementation reads them, and int32 marks beside them
only where positions or segments were given. Liu et al. 2023 (2310.01889).
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.mask import Rule, Seen
from pallas_kernels.attention.vjp import Operands, named
from pallas_kernels.ring_attention.layout import Layout, positions_of

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Ring:
    """The static part of a call."""

    axis_name: str
    shards: int
    layout: Layout
    hops: int
    """how often keys are sent on: at most shards - 1"""
    rule: Rule
    steps: ModuleType
    """the implementation: what is done at each hop"""
    config: Any


class Block(NamedTuple):
    """The keys and values at hand, as they travel."""

    keys: Any
    marks: tuple[Int[Array, "batch local_length"] | None, Int[Array, "batch local_length"] | None]
    """positions and segments; None where the layout tells them"""


def send(ring: Ring, x: Tree, distance: int = 1) -> Tree:
    """`x` of shard r arrives at shard r + distance."""
    steps = [(r, (r + distance) % ring.shards) for r in range(ring.shards)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, ring.axis_name, steps), x)


def block_of(ring: Ring, operands: Operands, seen: Seen) -> Block:
    """This shard's keys and values, ready to travel."""
    positions, segments = (None if pair is None else pair[1] for pair in seen)
    return Block(ring.steps.travelling(operands.key, operands.value, seen, ring.config), (positions, segments))


def seen_at(ring: Ring, block: Block, hop: Array | int, seen: Seen, lengths: tuple[int, int]) -> Seen:
    """Positions and segments of this shard's queries and of the keys that are here at hop `hop`."""
    here = jax.lax.axis_index(ring.axis_name)
    own, theirs = seen.positions[0] if seen.positions else None, block.marks[0]
    if own is None or theirs is None:
        sides = zip((here, (here - hop) % ring.shards), lengths)
        own, theirs = (jnp.asarray(positions_of(at, ring.shards, n, ring.layout))[None] for at, n in sides)
    ids = block.marks[1]
    return Seen((own, theirs), None if ids is None or seen.segments is None else (seen.segments[0], ids))


def varying(tree: Tree, *others: Any, axes: tuple[str, ...] = ()) -> Tree:
    """`tree` marked as different on each device, over `axes` and every axis that an array of `others` differs over.

    Loops and conditionals want such marks to agree. Transposed, a mark is the sum over devices, made in float32: the
    gradient of what all devices share.
    """
    wanted = set(axes).union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(others)))

    def mark(x: Array) -> Array:
        missing = tuple(sorted(wanted - jax.typeof(x).manual_axis_type.varying))
        if not missing:
            return x
        wide = jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.lax.pcast(x.astype(wide), missing, to="varying").astype(x.dtype)

    return jax.tree.map(mark, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def around(ring: Ring, operands: Operands, seen: Seen) -> tuple[Array, Array]:
    """Output [batch, length, heads, value_dim] in value's dtype and log-sum-exp [batch, length, heads], float32."""
    query, key, value, _, sinks = operands
    queries, state = ring.steps.begin(query, key, value, sinks, seen, ring.config)

    def work(block: Block, hop: Array | int, state: Any) -> Any:
        tokens = seen_at(ring, block, hop, seen, (query.shape[1], key.shape[1]))
        return ring.steps.attend(queries, block.keys, tokens, state, ring.rule, ring.config)

    def step(carry: tuple[Block, Any], hop: Array) -> tuple[tuple[Block, Any], None]:
        block, state = carry
        following = send(ring, block)
        return (following, work(block, hop, state)), None

    carry = (block_of(ring, operands, seen), varying(state, queries))
    if ring.hops:
        carry, _ = jax.lax.scan(step, carry, jnp.arange(ring.hops))
    out, lse = ring.steps.finish(work(carry[0], ring.hops, carry[1]), query.shape[1])
    return out.astype(value.dtype), lse


def save(ring: Ring, operands: Operands, seen: Seen) -> tuple[tuple[Array, Array], tuple]:
    """The forward pass, and what the backward pass needs."""
    out, lse = named(around(ring, operands, seen))
    return (out, lse), (operands, seen, out, lse)


def back(ring: Ring, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    """A second way around: the gradients of keys and values, float32, follow their keys one hop behind.

    What a hop adds to them is not yet there when it begins: it sends on what the hop before made, and adds its own to
    what arrives. After the last hop they go home in one step.
    """
    operands, seen, out, lse = saved
    query, key, sinks = operands.query, operands.key, operands.sinks
    d_out, d_lse = cotangents
    delta = jnp.einsum("btnd,btnd->btn", d_out.astype(lse.dtype), out.astype(lse.dtype)) - d_lse
    # Rows without keys have lse -inf: their cotangent means nothing.
    delta = jnp.where(lse > -jnp.inf, delta, 0.0)
    rows, d_query = ring.steps.begin_gradients(query, key, lse, delta, d_out, seen, ring.config)

    def work(block: Block, hop: Array | int, d_query: Array) -> tuple[Array, Any]:
        tokens = seen_at(ring, block, hop, seen, (query.shape[1], key.shape[1]))
        return ring.steps.gradients(rows, block.keys, tokens, d_query, ring.rule, ring.config)

    def add(x: Any, y: Any) -> Any:
        return jax.tree.map(jnp.add, x, y)

    def step(carry: tuple[Block, Any, Array], hop: Array) -> tuple[tuple[Block, Any, Array], None]:
        block, d_keys, d_query = carry
        following, arriving = send(ring, block), send(ring, d_keys)
        d_query, d_here = work(block, hop, d_query)
        return (following, add(arriving, d_here), d_query), None

    block = block_of(ring, operands, seen)
    d_keys = jax.tree.map(lambda x: jnp.zeros_like(x, lse.dtype), block.keys)
    carry = (block, *varying((d_keys, d_query), rows))
    if ring.hops:
        carry, _ = jax.lax.scan(step, carry, jnp.arange(ring.hops))
    block, d_keys, d_query = carry
    arriving = send(ring, d_keys) if ring.hops else d_keys
    d_query, d_here = work(block, ring.hops, d_query)
    d_keys = add(arriving, d_here)
    d_keys = send(ring, d_keys, -ring.hops) if ring.hops else d_keys
    grads = ring.steps.finish_gradients(d_query, d_keys, query, key)
    d_query, d_key, d_value = (d.astype(x.dtype) for d, x in zip(grads, operands))
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(lse.dtype) - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return Operands(d_query, d_key, d_value, None, d_sinks), None


around.defvjp(save, back)
