"""Gated linear attention on TPU, one decay a key dimension: the kernels of the delta rule, which then only add.

A token that reads the state before its own write (`bonus`) reads, in the same recurrence a token late, the state after
the write of the token before it. Yang et al. 2023 (2312.06635), Peng et al. 2024 (2404.05892).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule import tpu
from pallas_kernels.gated_linear_attention.call import Call


def refusal(call: Call) -> str | None:
    """Why the kernels cannot make this call, or None."""
    return tpu.refusal(of_one_dtype(call))


def run(
    call: Call,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """The chunked form; what tokens read of themselves by the bonus is left out."""
    length = call.value.shape[1]
    call = of_one_dtype(call if call.bonus is None else late(call))
    gain = jnp.ones(call.value.shape[:3], call.state.dtype) if call.gain is None else call.gain
    out, last = tpu.delta_rule(tpu.tile(call, False), tpu.operands(call, gain))
    return out[:, :length], last


def of_one_dtype(call: Call) -> Call:
    """The same call, with query, key and value in the dtype of their products."""
    dtype = jnp.result_type(call.query, call.key, call.value)
    return call._replace(query=call.query.astype(dtype), key=call.key.astype(dtype), value=call.value.astype(dtype))


def late(call: Call) -> Call:
    """One token more: each is written, and decays, with the next one; a run's first finds nothing of the run before."""
    runs = jnp.pad(call.runs, ((0, 0), (0, 1)), mode="edge")
    first = runs != jnp.pad(runs, ((0, 0), (1, 0)))[:, :-1]

    def delayed(x: Float[Array, "batch length ..."]) -> Float[Array, "batch length+1 ..."]:
        return jnp.pad(x, ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))

    return call._replace(
        query=jnp.pad(call.query, ((0, 0), (0, 1), (0, 0), (0, 0))),
        key=jnp.where(first[:, :, None, None], 0, delayed(call.key)),
        value=delayed(call.value),
        log_decay=delayed(call.log_decay),
        gain=None if call.gain is None else delayed(call.gain),
        runs=runs,
    )
