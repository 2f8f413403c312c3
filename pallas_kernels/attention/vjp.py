"""The gradient that all blockwise implementations share: output and log-sum-exp are all that the forward pass keeps.

With s_ij the scores, lse_i = log(sum_j exp(s_ij) + exp(sink)), P_ij = exp(s_ij - lse_i) and out_i = sum_j P_ij v_j:

    delta_i = sum_d d_out_id out_id - d_lse_i,   dS_ij = P_ij (d_out_i . v_j - delta_i),
    d_sink = -sum_i exp(sink - lse_i) delta_i

(Dao et al. 2022, 2205.14135; the log-sum-exp's own gradient enters through delta alone.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.mask import Rule, Seen

ATTENTION = "attention"
"""The name of what the forward pass keeps, for policies of rematerialisation."""


class Operands(NamedTuple):
    """What gradients flow to."""

    query: Float[Array, "batch query_length heads head_dim"]
    key: Float[Array, "batch key_length kv_heads head_dim"]
    value: Float[Array, "batch key_length kv_heads value_dim"]
    bias: Float[Array, "#batch #heads #query_length #key_length"] | None
    sinks: Float[Array, " heads"] | None


class Visible(NamedTuple):
    """What no gradient flows to."""

    seen: Seen
    dense: Bool[Array, "#batch #heads #query_length #key_length"] | None


class Kernel(NamedTuple):
    """A forward and a backward pass, hashable so that they may be static.

    forward(operands, visible, rule, config) gives out [batch, query_length, heads, value_dim] and lse [batch, heads,
    query_length]; backward(operands, visible, lse, delta, d_out, rule, config) the gradients of query, key, value and,
    where there is one, bias.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array, Array | None]]
    rule: Rule
    config: object


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(kernel: Kernel, operands: Operands, visible: Visible) -> tuple[Array, Array]:
    """Output and log-sum-exp of `kernel`, differentiable in every operand once."""
    return kernel.forward(operands, visible, kernel.rule, kernel.config)


def named(results: tuple[Array, Array]) -> tuple[Array, Array]:
    """Output and log-sum-exp under the name by which `jax.checkpoint_policies` may keep them, `ATTENTION`."""
    out, lse = results
    return checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)


def save(kernel: Kernel, operands: Operands, visible: Visible) -> tuple[tuple[Array, Array], tuple]:
    """The forward pass, and what the backward pass needs."""
    out, lse = named(kernel.forward(operands, visible, kernel.rule, kernel.config))
    return (out, lse), (operands, visible, out, lse)


def gradients(kernel: Kernel, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    """The backward pass around the kernel's own."""
    operands, visible, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.einsum("btnd,btnd->bnt", d_out.astype(lse.dtype), out.astype(lse.dtype)) - d_lse
    # Rows without keys have lse -inf: their cotangent means nothing.
    delta = jnp.where(lse > -jnp.inf, delta, 0.0)
    grads = kernel.backward(operands, visible, lse, delta, d_out, kernel.rule, kernel.config)
    sinks = operands.sinks
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(lse.dtype)[None, :, None] - lse)
        d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    return Operands(*grads, d_sinks), None


blockwise.defvjp(save, gradients)
