"""RWKV-7 (Goose) time mixing: a fading state in which each channel replaces what a key held at a rate of its own."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.delta_net import unit
from llmjax.nn.initializers import Init, Initializer
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.rwkv4 import lerp, token_shift
from llmjax.nn.rwkv6 import falling, group_norm, initial_decay
from llmjax.nn.scans import HEADS, STATE, TOKENS, on_parts
from llmjax.nn.sites import site
from pallas_kernels.context_kernels import turned
from pallas_kernels.segments import marks

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]
constant = jax.nn.initializers.constant
CHUNK = 64
"""Tokens between two states that the gradient keeps."""


@dataclass(frozen=True)
class RWKV7(Mixer):
    """S_t = (diag(w_t) - (a_t * n_t) n_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t, n_t = unit(k * xi).

    a_t = sigmoid(lora(x_a)), w_t = exp(-e^(-1/2) sigmoid(lora(x_w))), k_t = k (1 + (a_t - 1) alpha);
    y = ((groupnorm(o) + (sum of r * k_t * rho) v) * lora(x_g)) W_out. Peng et al. 2025 (2503.14456).

    The state's transition is a diagonal plus a matrix of rank one that is not symmetric: no case of the delta rule. It
    runs token by token; the gradient keeps one state in 64 and computes the others again. The paper's mixing of values
    with those of the first layer is left out: a mixer sees its own layer only.
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head; None is d_model / heads (the released models: 64)"""
    decay_rank: int = 64
    """width between the two matrices of w"""
    rate_rank: int = 64
    """width between the two matrices of a"""
    gate_rank: int = 128
    """width between the two matrices of the gate"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RWKV7Module(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        for name in ("heads", "decay_rank", "rate_rank", "gate_rank"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.heads > 0 and self.head_dim is None and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"

    def size(self, d_model: int) -> int:
        """head_dim with the default filled in."""
        return self.head_dim or d_model // self.heads

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`token` `[batch, 1, d_model]`, the last one, and `state` `[batch, heads, head_dim, head_dim]`, S."""
        size = self.size(d_model)
        token = jnp.zeros((batch, 1, d_model), dtype)
        return {"token": token, "state": jnp.zeros((batch, self.heads, size, size), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of receptance, key, value and output, and of the three pairs of matrices."""
        inner = self.heads * self.size(d_model)
        return 4 * d_model * inner + (self.decay_rank + self.rate_rank + self.gate_rank) * (d_model + inner)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """The state read twice and changed twice."""
        return 8 * self.heads * self.size(d_model) ** 2


class RWKV7Module(nn.Module):
    """Owns `receptance`, `key`, `value`, `out`, pairs `decay_in`, `decay_out` (and `rate`, `gate`), and vectors.

    Sites r, k (as written), v, remove (n), log_decay (log w), rate (a), z (before `out`).
    """

    config: RWKV7
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, size, init = self.config, self.config.size(self.d_model), self.initializer
        last = {"token": None, "state": None} if state is None else state
        before, token = token_shift(x, context.segment_ids, last["token"])

        def mixed(name: str) -> Float[Array, "batch length d_model"]:
            return lerp(x, before, parameter(self, name + "_mix", falling, (self.d_model,), ("d_model",)))

        def heads(name: str) -> Float[Array, "batch length heads head_dim"]:
            axes, kernel = ("d_model", "heads", "head_dim"), init.kernel(self.d_model)
            return Linear((self.d_model,), (c.heads, size), axes, kernel, name=name)(mixed(name))

        def vector(name: str, initial: Initializer) -> Float[Array, "heads head_dim"]:
            return parameter(self, name, initial, (c.heads, size), ("heads", "head_dim"))

        r, k, v = site(self, "r", heads("receptance")), heads("key"), site(self, "v", heads("value"))
        decay = vector("decay", initial_decay) + self.low_rank("decay", mixed("decay"), c.decay_rank, jnp.tanh)
        decay = site(self, "log_decay", -math.exp(-0.5) * jax.nn.sigmoid(decay.astype(jnp.float32)))
        rate = vector("rate", constant(0)) + self.low_rank("rate", mixed("rate"), c.rate_rank)
        rate = site(self, "rate", jax.nn.sigmoid(rate))
        remove = site(self, "remove", unit(k * vector("remove", constant(0.85))))
        k = site(self, "k", k * (1 + (rate - 1) * vector("replace", constant(1))))
        arrays = [(array, (*HEADS, None)) for array in (r, decay, k, v, remove, rate)]
        named = {"segment_ids": (context.segment_ids, TOKENS)}
        z, final = on_parts((wkv7, over_devices), arrays, named, STATE, last["state"], {})
        z = group_norm(self, z) + jnp.sum(r * k * vector("bonus", constant(0)), axis=-1, keepdims=True) * v
        z = site(self, "z", z * self.low_rank("gate", mixed("gate"), c.gate_rank, jax.nn.sigmoid))
        inputs, residual = (c.heads, size), init.residual(c.heads * size, self.layers)
        y = Linear(inputs, (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"token": token, "state": final}

    def low_rank(
        self, name: str, x: Float[Array, "batch length d_model"], rank: int, between: Activation | None = None
    ) -> Float[Array, "batch length heads head_dim"]:
        """f(x A) B."""
        c, init = self.config, self.initializer
        low = Linear((self.d_model,), (rank,), ("d_model", "rank"), init.kernel(self.d_model), name=name + "_in")(x)
        low = low if between is None else between(low)
        outputs, axes = (c.heads, c.size(self.d_model)), ("rank", "heads", "head_dim")
        return Linear((rank,), outputs, axes, init.kernel(rank), name=name + "_out")(low)


def wkv7(
    receptance: Float[Array, "batch length heads head_dim"],
    log_decay: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    remove: Float[Array, "batch length heads head_dim"],
    rate: Float[Array, "batch length heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads head_dim value_dim"] | None = None,
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads head_dim value_dim"]]:
    """S_t = (diag(e^g_t) - (a_t * n_t) n_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t; and the last state.

    g is `log_decay`, n `remove`, a `rate`. States are float32, the output is in the dtype of value. A token with a
    negative segment id leaves the state as it is.
    """
    batch, length, heads, head_dim = key.shape
    tokens = [x.astype(jnp.float32) for x in (receptance, log_decay, key, value, remove, rate)]
    found, size = marks(segment_ids), min(CHUNK, length)
    if found is not None:
        tokens = [jnp.where(found.present[..., None, None], x, 0) for x in tokens]
    tokens.append(jnp.zeros((batch, length), bool) if found is None else found.reset)
    padded = (jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2))) for x in tokens)
    chunks = [jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 0, 2) for x in padded]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, value.shape[-1]), jnp.float32)

    def step(state: Array, token: list[Array]) -> tuple[Array, Array]:
        r, g, k, v, n, a, reset = token
        state = jnp.where(reset[:, None, None, None], 0, state)
        held = jnp.einsum("bhk,bhkv->bhv", n, state)
        state = jnp.exp(g)[..., None] * state - (a * n)[..., None] * held[..., None, :] + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", r, state)

    state, out = jax.lax.scan(jax.checkpoint(partial(jax.lax.scan, step), prevent_cse=False), initial_state, chunks)
    out = jnp.moveaxis(out, 2, 0).reshape(batch, -1, *value.shape[2:])[:, :length]
    return out.astype(value.dtype), state


def over_devices(
    receptance: Float[Array, "batch local_length heads head_dim"],
    log_decay: Float[Array, "batch local_length heads head_dim"],
    key: Float[Array, "batch local_length heads head_dim"],
    value: Float[Array, "batch local_length heads value_dim"],
    remove: Float[Array, "batch local_length heads head_dim"],
    rate: Float[Array, "batch local_length heads head_dim"],
    *,
    axis_name: str,
    segment_ids: Int[Array, "batch local_length"] | None = None,
) -> tuple[Float[Array, "batch local_length heads value_dim"], Float[Array, "batch heads head_dim value_dim"]]:
    """`wkv7` of a sequence that is split over devices, inside `jax.shard_map`."""

    def run(value: Array, state: Array | None) -> tuple[Array, Array]:
        return wkv7(receptance, log_decay, key, value, remove, rate, segment_ids, state)

    return turned(run, value, key.shape[-1], axis_name, segment_ids)
