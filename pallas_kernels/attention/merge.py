"""The operator that joins attention over parts of the keys into attention over all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    outs: Float[Array, "parts *rows value_dim"], lses: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows value_dim"], Float[Array, "*rows"]]:
    """(sum_p exp(lse_p - lse) out_p, lse = log sum_p exp lse_p): attention over the union of disjoint sets of keys.

    `outs` are normalised outputs, `lses` the logarithms of their normalisers, float32 or wider. Associative and
    commutative; a part without keys (out 0, lse -inf) changes nothing, and all parts empty give (0, -inf). A sink must
    be given to one part only. Differentiable. Milakov and Gimelshein 2018 (1805.02867), Liu et al. 2023 (2310.01889).
    """
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    some = top > -jnp.inf
    weights = jnp.exp(jnp.where(some, lses - jnp.where(some, top, 0.0), -jnp.inf))
    total = jnp.where(some, jnp.sum(weights, axis=0), 1.0)
    out = jnp.sum((weights / total)[..., None] * outs.astype(weights.dtype), axis=0)
    return out.astype(outs.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)
