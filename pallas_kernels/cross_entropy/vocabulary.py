"""Sums over a vocabulary that lies whole on every device, or in equal parts over a mesh axis inside `shard_map`."""

from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Tree = TypeVar("Tree")
AxisName = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Vocabulary:
    """The last axis of logits. With `axis_name`, device i of that axis holds entries [i, i + 1) * (local size)."""

    axis_name: AxisName = None

    def sum(self, x: Float[Array, "tokens local"]) -> Float[Array, " tokens"]:
        """Sum over the whole vocabulary."""
        local = jnp.sum(x, axis=-1)
        return local if self.axis_name is None else jax.lax.psum(local, self.axis_name)

    def max(self, x: Float[Array, "tokens local"]) -> Float[Array, " tokens"]:
        """Maximum over the whole vocabulary."""
        local = jnp.max(x, axis=-1)
        return local if self.axis_name is None else jax.lax.pmax(local, self.axis_name)

    def size(self, x: Float[Array, "tokens local"]) -> int:
        """Entries of the whole vocabulary."""
        return x.shape[-1] if self.axis_name is None else x.shape[-1] * jax.lax.axis_size(self.axis_name)

    def hits(self, x: Float[Array, "tokens local"], targets: Int[Array, " tokens"]) -> Bool[Array, "tokens local"]:
        """True at each token's target: a comparison, not an index, so that a partitioner has nothing to gather."""
        start = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * x.shape[-1]
        return start + jnp.arange(x.shape[-1])[None, :] == targets[:, None]

    def softmax(
        self, logits: Float[Array, "tokens local"]
    ) -> tuple[Float[Array, "tokens local"], Float[Array, " tokens"], Float[Array, " tokens"], Float[Array, " tokens"]]:
        """exp(logits - top), its sum, the log-sum-exp and top, the largest logit: one exponential an entry."""
        top = self.max(logits)
        above = jnp.exp(logits - top[:, None])
        total = self.sum(above)
        return above, total, top + jnp.log(total), top

    def log_softmax(self, logits: Float[Array, "tokens local"]) -> Float[Array, "tokens local"]:
        """logits minus their log-sum-exp."""
        return logits - self.softmax(logits)[2][:, None]

    def share(self, tree: Tree) -> Tree:
        """What every device knows, kept by the first of them only: `gather` is the inverse."""
        if self.axis_name is None:
            return tree
        first = jax.lax.axis_index(self.axis_name) == 0
        return jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree)

    def gather(self, tree: Tree) -> Tree:
        """Sum shares over the devices. Differentiated outside the custom gradient, where jax keeps the books."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)

    def spread(self, tree: Tree) -> Tree:
        """Mark every array of `tree` as different on each device, so that gradients may be partial sums.

        Transposed, the mark is the sum over the devices of those parts, made in float32. That holds for `shard_map`
        with and without `check_vma`. Axes over which any one of the arrays differs (data parallel) are marked on all.
        """
        names = (
            () if self.axis_name is None else (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name
        )
        axes = set(names).union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

        def mark(x: Array) -> Array:
            missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
            if not missing:
                return x
            wide = jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            return jax.lax.pcast(x.astype(wide), missing, to="varying").astype(x.dtype)

        return jax.tree.map(mark, tree)
