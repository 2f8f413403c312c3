"""What every transformer model is made of: embeddings with positions, a repeated pattern of blocks, a last norm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.auxiliary import LOSSES, METRICS
from llmjax.nn.block import Block, BlockModule
from llmjax.nn.distance import DistanceBias
from llmjax.nn.initializers import GPT2Init, Init
from llmjax.nn.linear import parameter
from llmjax.nn.mixer import Cache, Context, Distance
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.positions import Positions
from llmjax.nn.reversible import ReversibleModule, branches_of, reversible
from llmjax.nn.sites import CAPTURED, INTERVENTIONS, site
from llmjax.parallel.layout import from_zigzag, halves, to_zigzag
from llmjax.parallel.mesh import constrained
from llmjax.parallel.pipeline import POLICIES, pipelined, stages


@dataclass(frozen=True)
class Stack:
    """norm(blocks(dropout(embedding_norm(x + positions)))), x the embeddings of tokens. Base of the models."""

    d_model: int = 128
    """width of the residual stream"""
    layers: int = 4
    """number of blocks, a multiple of the pattern's length; 0 for embeddings that go straight to the head"""
    pattern: tuple[Block, ...] = (Block(),)
    """the blocks that are repeated; parameters are stacked over the repeats"""
    norm: Norm | None = RMSNorm()
    """normalisation after the last block; None for post-norm stacks"""
    positions: Positions | None = None
    """absolute positions added to the embeddings; None where attention rotates, or for no positions"""
    embedding_norm: Norm | None = None
    """normalisation of the embeddings (BERT, 1810.04805; BLOOM, 2211.05100)"""
    distance: DistanceBias | None = None
    """a bias of the scores by distance, one table for the attention of all layers (T5, ALiBi)"""
    dropout: float = 0.0
    """probability that a feature of an embedding is dropped in training"""
    initializer: Init = GPT2Init()
    """distribution of the initial weights"""
    remat: Literal["none", "dots", "attention", "full", "reversible"] = "none"
    """what the backward pass keeps, the most first: all, products with weights and the results of attention kernels,
    these results and block inputs, block inputs, or not even those, which reversible blocks get back from their outputs
    (float32 advised: rounding does not cancel exactly); the rest is computed again"""
    unroll: int = 8
    """repeats laid out in one step of the scan: short stacks run faster on CPU fully unrolled; 1 where remat is on"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other, blocks and their mixers included."""
        for name, least in (("d_model", 1), ("layers", 0), ("unroll", 1)):
            if getattr(self, name) < least:
                yield name, f"must be at least {least}"
        if not self.pattern:
            yield "pattern", "must hold at least one Block"
        elif self.layers % len(self.pattern):
            yield "layers", f"must be a multiple of the pattern's length {len(self.pattern)}"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must be at least 0 and below 1"
        for i, block in enumerate(self.pattern):
            yield from ((f"pattern.{i}.{field}", why) for field, why in block.problems_at(self.d_model))
        yield from wiring_problems(self.pattern, self.remat)
        if self.distance is not None:
            yield from distance_problems(self.pattern)
        for field, why in () if self.positions is None else self.positions.problems_at(self.d_model):
            yield f"positions.{field}", why

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated."""
        return self.layers // len(self.pattern)

    def empty_state(self, batch: int, length: int, dtype: DTypeLike) -> dict[str, Any]:
        """Decode state before any token: `slot` (tokens stored), `positions` `[batch, length]`, `blocks` stacked."""
        layer = {str(i): b.mixer.init_state(self.d_model, batch, length, dtype) for i, b in enumerate(self.pattern)}
        return {
            "slot": jnp.zeros((), jnp.int32),
            "positions": jnp.full((batch, length), -1, jnp.int32),
            "blocks": jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeats, *a.shape)), layer),
        }

    def matmul_params(self) -> int:
        """Weights of all blocks that multiply each token."""
        return self.repeats * sum(block.matmul_params(self.d_model) for block in self.pattern)

    def mixing_flops(self, length: int) -> float:
        """Forward FLOPs per token of all mixing in rows (and memories) of `length`."""
        total = 0.0
        for block in self.pattern:
            total += block.mixer.mixing_flops(self.d_model, length)
            total += block.cross.mixing_flops(self.d_model, length) if block.cross is not None else 0
        return self.repeats * total

    def uneven(self, length: int) -> bool:
        """Whether late tokens have more to do than early ones, in layers that let tokens stand in any order."""

        def grows(block: Block) -> bool:
            some, more = (block.mixer.mixing_flops(self.d_model, n) for n in (length, 2 * length))
            return not block.sees_future() and more > 1.5 * some

        return all(block.any_order() for block in self.pattern) and any(map(grows, self.pattern))

    def cache_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of context costs, over all layers, beyond a long context."""
        far = 2**20
        near, twice = (sum(b.mixer.state_bytes(self.d_model, n, dtype) for b in self.pattern) for n in (far, 2 * far))
        return self.repeats * (twice - near) // far


class StackModule(nn.Module):
    """Base of the models' modules: owns `positions`, `embedding_norm`, `distance`, `blocks` and `norm`.

    Sites embedded and final.
    """

    config: Stack

    def hidden(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """The states of embedded tokens after the last norm, and the layers' decode state; for compact methods."""
        c = self.config
        if c.distance is not None:
            heads = next(filter(None, (b.mixer.distance_heads() for b in c.pattern)))
            table = c.distance.build(heads, c.initializer, "distance")()
            context = replace(context, distance=Distance(table, c.distance))
        if c.positions is not None:
            x = x + c.positions.build(c.d_model, c.initializer, name="positions")(context.positions).astype(x.dtype)
        if c.embedding_norm is not None:
            x = c.embedding_norm.build("embedding_norm")(x)
        x = site(self, "embedded", nn.Dropout(c.dropout, deterministic=context.deterministic)(x))
        if self.balances(x.shape[1], state):
            x = self.balanced(x, context)
        else:
            x, state = self.through_blocks(x, context, state)
        if c.norm is not None:
            x = c.norm.build("norm")(x)
        return site(self, "final", x), state

    def balances(self, length: int, state: dict[str, Any] | None) -> bool:
        """Whether tokens are arranged for their blocks: not where states are kept, or activations read or edited."""
        return state is None and stages() == 1 and not self.watched() and halves(length) and self.config.uneven(length)

    def balanced(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length d_model"]:
        """All blocks over tokens that are arranged so that every device has as much to do."""
        places = (context.positions, context.segment_ids, context.prefix)
        x, (positions, segment_ids, prefix) = to_zigzag((x, places))
        there = replace(context, positions=positions, segment_ids=segment_ids, prefix=prefix, layout="zigzag")
        return from_zigzag(self.through_blocks(x, there, None)[0])

    def through_blocks(
        self, x: Float[Array, "batch length d_model"], context: Context, state: dict[str, Any] | None
    ) -> tuple[Float[Array, "batch length d_model"], dict[str, Any] | None]:
        """All blocks; two streams begin as equals and end as their mean.

        Streams are reconstructed where the backward pass is all that matters: not where states are kept, activations
        are read or edited, or parameters are drawn.
        """
        c = self.config
        if c.layers == 0:
            return x, state
        if c.pattern[0].order != "reversible":
            return self.repeated(x, context, state)
        if c.remat == "reversible" and state is None and not self.watched():
            one, two = reversible(
                branches_of(c.pattern, c.d_model, c.layers, c.initializer), self.stacked(context), (x, x), context
            )
        else:
            (one, two), state = self.repeated((x, x), context, state)
        return (one + two) / 2, state

    def repeated(self, x: Any, context: Context, state: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
        """All repeats of the pattern: a pipeline of stages where the mesh has any, else (and to decode) a scan."""
        body, options = self.body()
        if stages() == 1 or state is not None or self.watched():
            return scanned(self.config, body)(self.config, *options, name="blocks")(x, context, state)
        # What a stage recomputes are repeats, each with the look-up of its layers.
        module = body(replace(self.config, remat="none"), *options, parent=None)
        kinds = [k for k in (LOSSES, METRICS) if self.is_mutable_collection(k)]

        def repeat(layer: Any, x: Any, rows: Context, distance: Distance | None, part: Array) -> tuple[Any, Any]:
            variables, key = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(jax.random.wrap_key_data(key), part)}
            x, rows = jax.tree.map(whole_rows, (x, rows))
            own = replace(rows, distance=distance)
            (x, _), handed = module.apply(variables, x, own, None, rngs=rngs, mutable=kinds)
            return x, handed

        rows = replace(context, distance=None)
        x, handed = pipelined(repeat, self.stacked(context), x, rows, context.distance, self.config.remat)
        for kind, tree in handed.items():
            self.put_variable(kind, "blocks", tree)
        return x, None

    def body(self) -> tuple[type[nn.Module], tuple[Any, ...]]:
        """The module of one repeat, and what it is made from beside the config."""
        return Repeat, ()

    def watched(self) -> bool:
        """Whether parameters are drawn, or activations read or edited: then layers are run as they stand."""
        reading = self.is_mutable_collection(CAPTURED) or INTERVENTIONS in self.variables
        return self.is_initializing() or reading

    def stacked(self, context: Context) -> tuple[Any, Int[Array, "repeats words"] | None]:
        """Variables of all repeats by collection, and the data of one dropout key a repeat (None without dropout)."""
        layers = {kind: tree["blocks"] for kind, tree in self.variables.items() if "blocks" in tree}
        if context.deterministic:
            return layers, None
        return layers, jax.random.key_data(jax.random.split(self.make_rng("dropout"), self.config.repeats))


def whole_rows(x: Array) -> Array:
    """`x` `[batch, length, ...]`, its length whole: in stages XLA aborts on a gather along a split axis."""
    return constrained(x, ("batch", *(None,) * (x.ndim - 1)))


class Repeat(nn.Module):
    """One repeat of the pattern, in the form that nn.scan carries."""

    config: Stack

    @nn.compact
    def __call__(self, x: Any, context: Context, state: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
        """Run the pattern's blocks on the stream (reversible ones: on two); `state` holds one entry a block."""
        c, new = self.config, {}
        for i, block in enumerate(c.pattern):
            name = str(i)
            layer = None if state is None else state[name]
            module = remembering(c, ReversibleModule if block.order == "reversible" else BlockModule)
            x, new[name] = module(block, c.d_model, c.layers, c.initializer, name=name)(x, context, layer)
        return x, None if state is None else new


def scanned(config: Stack, body: type[nn.Module] = Repeat) -> Callable[..., nn.Module]:
    """`body`, scanned over its stacked parameters, sites and states."""
    return nn.scan(
        body,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(nn.broadcast, 0),
        length=config.repeats,
        # Laid out, XLA on CPU would merge what is recomputed with the forward pass again, and nothing would be saved.
        unroll=1 if rematerialises(config) else min(config.unroll, config.repeats),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rematerialises(config: Stack) -> bool:
    """Whether the backward pass computes parts of blocks again, or all of them."""
    return config.remat not in ("none", "reversible")


def remembering(config: Stack, layer: type[nn.Module]) -> type[nn.Module]:
    """`layer`, of which the backward pass keeps what `remat` says."""
    if not rematerialises(config):
        return layer
    # A loop of one turn is none to XLA, which would merge what is computed again with its first computation.
    return nn.remat(layer, policy=POLICIES[config.remat], prevent_cse=config.repeats == 1)


class Table(nn.Module):
    """Owns one matrix called `label`, and returns it."""

    label: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    initial: Callable[..., Float[Array, "rows columns"]]

    @nn.compact
    def __call__(self) -> Float[Array, "rows columns"]:
        """The matrix."""
        return parameter(self, self.label, self.initial, self.shape, self.axes)


def embedding(vocab: int, d_model: int, init: Init, name: str | None = None) -> Table:
    """The module of a table of token embeddings."""
    return Table("embedding", (vocab, d_model), ("vocab", "d_model"), init.embedding(), name=name)


def untied(vocab: int, d_model: int, init: Init, name: str | None = None) -> Table:
    """The module of a head of its own."""
    return Table("kernel", (d_model, vocab), ("d_model", "vocab"), init.kernel(d_model), name=name)


def look_up(
    table: Float[Array, "vocab d_model"], tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length d_model"]:
    """The rows of `tokens`; ids beyond the table read its last row."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def enter(
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"] | None,
    segment_ids: Int[Array, "batch length"] | None,
    state: dict[str, Any] | None,
) -> tuple[Context, dict[str, Any] | None]:
    """The layers' shared context, and the state with these tokens' positions stored."""
    if state is not None and segment_ids is not None:
        raise ValueError("segment_ids belong to packed training batches; decoding takes positions, -1 for padding")
    if positions is not None:
        segment_ids = jnp.where(positions < 0, -1, 0 if segment_ids is None else segment_ids)
    else:
        start = 0 if state is None else state["slot"]
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if state is None:
        return Context(positions, segment_ids), None
    slot = state["slot"]
    stored = jax.lax.dynamic_update_slice_in_dim(state["positions"], positions, slot, axis=1)
    context = Context(positions, segment_ids, Cache(slot, stored))
    return context, {**state, "slot": slot + positions.shape[1], "positions": stored}


def distance_problems(pattern: tuple[Block, ...]) -> Iterator[tuple[str, str]]:
    """Mixers that one table of distance biases does not fit."""
    heads = [block.mixer.distance_heads() for block in pattern]
    if not any(heads):
        yield "distance", "finds no scores to bias: it needs attention with rope=None and soft_cap=None in the pattern"
    for i, count in enumerate(heads):
        rotary = getattr(pattern[i].mixer, "rope", None) is not None
        if rotary or count not in (None, *list(filter(None, heads))[:1]):
            why = "rotates too" if rotary else f"has {count} heads, another mixer of the pattern has other ones"
            yield f"pattern.{i}.mixer", f"{why}: one table of distance biases serves all layers"
        mask = getattr(pattern[i].mixer, "mask", None)
        if mask is not None and not mask.takes_distance():
            yield f"pattern.{i}.mixer.mask", "scores means of keys, which have no one place: set model.distance=None"


def wiring_problems(pattern: tuple[Block, ...], remat: str) -> Iterator[tuple[str, str]]:
    """Blocks of one stream beside blocks of two, and inputs that cannot be got back."""
    reversible = [block.order == "reversible" for block in pattern]
    if any(reversible) and not all(reversible):
        yield f"pattern.{reversible.index(False)}.order", "must be reversible where another block of the pattern is"
    if remat == "reversible" and not all(reversible):
        yield "remat", "needs order=reversible in every block: others do not give their inputs back"


def cross_problems(pattern: tuple[Block, ...], wanted: bool = False) -> Iterator[tuple[str, str]]:
    """Cross-attention where there is no memory; none at all where there is one."""
    reads = [block.cross is not None for block in pattern]
    if wanted and not any(reads):
        yield "pattern", "reads nothing of the encoder: give a Block cross=CrossAttention()"
    for i in () if wanted else (i for i, read in enumerate(reads) if read):
        yield f"pattern.{i}.cross", "reads the states of an encoder, which this stack has none of: use EncoderDecoder"
