"""One softmax attention of one layer: its arrays, who the tokens are, and the rules that every mask shares."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.nn.mixer import Context, Distance
from llmjax.parallel.mesh import Names, per_device, sequence_axis
from pallas_kernels.attention import attention
from pallas_kernels.ring_attention import context_attention
from pallas_kernels.ring_attention import registry as ring
from pallas_kernels.ring_attention.layout import Layout


@flax.struct.dataclass
class Tokens:
    """Where tokens stand: positions in their document (-1: absent), documents (None: all in one), who is a prefix."""

    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None = None
    prefix: Bool[Array, "batch length"] | None = None


@flax.struct.dataclass
class Scores:
    """softmax(cap(q k^T scale) + bias) v over the keys that causality, documents and a mask let through.

    `aligned`: queries and keys are the same tokens in the same order. Differences of their indices are then those of
    their positions, unless devices share the sequence in another `layout` than contiguous parts. A sink is one more
    score per head, without a value.
    """

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch source kv_heads head_dim"]
    value: Float[Array, "batch source kv_heads value_dim"]
    queries: Tokens
    keys: Tokens
    distance: Distance | None = None
    sinks: Float[Array, " heads"] | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    aligned: bool = flax.struct.field(pytree_node=False, default=True)
    layout: Layout = flax.struct.field(pytree_node=False, default="contiguous")
    soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)

    def run(
        self,
        window: tuple[int | None, int | None] | None = None,
        mask: Bool[Array, "#batch #heads length source"] | None = None,
        residual: bool = False,
    ) -> Any:
        """Output `[batch, length, heads, value_dim]`; with `residual` also its log-sum-exp `[batch, length, heads]`.

        `window` is (left, right) in positions; `mask` is true where a key may be seen, beside the shared rules.
        """
        query, key, bias = self.query, self.key, None
        if self.distance is not None:
            ends = (self.queries.positions, self.keys.positions)
            past_only = self.causal and self.keys.prefix is None
            fold = self.distance.config.fold
            query, key, bias = fold(self.distance.table, query, key, *ends, self.scale, past_only)
        options: dict[str, Any] = dict(scale=self.scale, is_causal=self.causal, local_window_size=window)
        options |= dict(logits_soft_cap=self.soft_cap, implementation=self.implementation)
        axis = self._axis() if bias is None and mask is None else None
        # A ring makes positions of its layout; where keys are gathered instead, rearranged tokens need theirs.
        positions = self._positions(indices=axis is not None or self.layout == "contiguous")
        arrays = (query, key, self.value, bias, mask, self.sinks, *self._segments(), *positions)
        length, whole = "length" if axis else None, query.shape[1]

        def kernel(*arrays: Array | None) -> Any:
            over = None if arrays[0] is None or arrays[0].shape[1] == whole else axis
            return attend(arrays, residual, None if over is None else (over, self.layout), **options)

        heads_of, tokens = ("batch", length, "kv_heads", None), ("batch", length)
        names = (*3 * (heads_of,), of_scores(bias), of_scores(mask), ("kv_heads",), *4 * (tokens,))
        return per_device(kernel, names, (heads_of, heads_of[:3]) if residual else heads_of, *arrays)

    def seen_at(self) -> tuple[Int[Array, "batch length"], Int[Array, "batch source"]]:
        """Positions of queries and keys for causality: a prefix counts as seen from the document's beginning."""
        keys, prefix = self.keys.positions, self.keys.prefix
        return self.queries.positions, keys if prefix is None else jnp.where(prefix & (keys >= 0), 0, keys)

    def _axis(self) -> str | None:
        """The mesh axis over which keys travel: of whole sequences that attend to themselves, by a kernel that can."""
        able = self.implementation is None or self.implementation in ring.BACKENDS
        return sequence_axis() if able and self.aligned else None

    def _positions(self, indices: bool) -> tuple[Array | None, Array | None]:
        """Positions, where `indices` are not those of tokens in a row or do not say enough."""
        return (None, None) if indices and self.aligned and self.keys.prefix is None else self.seen_at()

    def _segments(self) -> tuple[Array | None, Array | None]:
        """Documents of queries and keys, given where there are several or where tokens are absent."""
        queries, keys = self.queries.segment_ids, self.keys.segment_ids
        if queries is None and keys is None:
            return None, None
        return present(self.queries, queries), present(self.keys, keys)


def present(tokens: Tokens, ids: Int[Array, "batch length"] | None) -> Int[Array, "batch length"]:
    """Segment ids, -1 where a token is absent."""
    ids = jnp.zeros_like(tokens.positions) if ids is None else ids
    return jnp.where(tokens.positions < 0, -1, ids)


def of_scores(x: Array | None) -> Names:
    """Logical names of an array that broadcasts to `[batch, heads, length, source]`."""
    sizes = (1, 1) if x is None else x.shape[:2]
    return (*(name if size > 1 else None for name, size in zip(("batch", "kv_heads"), sizes, strict=True)), None, None)


def attend(arrays: tuple[Array | None, ...], residual: bool, split: tuple[str, Layout] | None, **options: Any) -> Any:
    """`attention` with its arrays in the order in which a mesh splits them; `split`: the sequence's axis and layout."""
    query, key, value, bias, mask, sinks, *pairs = arrays
    segments, positions = both(pairs[0], pairs[1]), both(pairs[2], pairs[3])
    assert query is not None
    assert key is not None
    assert value is not None
    options |= dict(segment_ids=segments, positions=positions, sinks=sinks, return_residual=residual)
    if split is not None:
        return context_attention(query, key, value, axis_name=split[0], layout=split[1], **options)
    return attention(query, key, value, bias, mask, **options)


def both(queries: Array | None, keys: Array | None) -> tuple[Array, Array] | None:
    """The pair that `attention` takes."""
    return None if queries is None or keys is None else (queries, keys)


def scores_of(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch source kv_heads head_dim"],
    value: Float[Array, "batch source kv_heads value_dim"],
    context: Context,
    **options: Any,
) -> Scores:
    """Self-attention in `context`: over the call's own tokens, or over the cache that holds them too."""
    queries = Tokens(context.positions, context.segment_ids, context.prefix)
    keys, cache = queries, context.cache
    if cache is not None:
        prefix = None
        if context.prefix is not None:
            prefix = jnp.zeros(cache.positions.shape, bool)
            prefix = jax.lax.dynamic_update_slice_in_dim(prefix, context.prefix, cache.slot, axis=1)
        queries, keys = Tokens(context.positions), Tokens(cache.positions, None, prefix)
    return Scores(
        query, key, value, queries, keys, context.distance, aligned=cache is None, layout=context.layout, **options
    )


def dense(scores: Scores) -> Bool[Array, "batch length source"]:
    """The shared rules written out: presence, documents and causality. For masks that kernels do not know."""
    queries, keys = present(scores.queries, scores.queries.segment_ids), present(scores.keys, scores.keys.segment_ids)
    seen = (queries[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, None, :]
    if not scores.causal:
        return seen
    query, key = scores.seen_at()
    return seen & (query[:, :, None] >= key[:, None, :])
