"""mLSTM (xLSTM): linear attention with an exponential input gate and a forget gate, normalised by what was written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.linear_attention import KERNELS, Form, linear_flops
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import layer_norm
from llmjax.nn.scans import gated_linear_attention
from llmjax.nn.sites import site
from pallas_kernels.segments import marks

FORGET = -1e30
"""Log decay of a reset; finite, so that sums of several stay numbers."""


@dataclass(frozen=True)
class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t^T q_t|, 1).

    i_t = exp(x w_i + b_i), f_t = sigmoid(x w_f + b_f), one number a head, q scaled by 1 / sqrt(key_dim);
    y = (sigmoid(x W_o) * norm(h)) W_out. Cell: Beck et al. 2024 (2405.04517); layer: xLSTM 7B (2503.13427).
    """

    heads: int = 4
    """heads"""
    key_dim: int | None = None
    """features of a query and key; None is d_model / (2 heads) (xLSTM 7B)"""
    value_dim: int | None = None
    """features of a value; None is d_model / heads"""
    soft_cap: float | None = 15.0
    """gates' pre-activations become cap tanh(x / cap) (xLSTM 7B: 15)"""
    form: Form = "chunked"
    """chunked and recurrent are linear in the length, quadratic is the parallel form; equal up to rounding"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MLSTMModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        if self.soft_cap is not None and self.soft_cap <= 0:
            yield "soft_cap", "must be above 0, or None"

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.heads > 0 and self.key_dim is None and d_model % (2 * self.heads):
            yield "heads", f"twice does not divide d_model={d_model}: change it, or give key_dim"
        elif self.heads > 0 and self.value_dim is None and d_model % self.heads:
            yield "heads", f"does not divide d_model={d_model}: change it, or give value_dim"

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(key_dim, value_dim) with the defaults filled in."""
        return self.key_dim or d_model // (2 * self.heads), self.value_dim or d_model // self.heads

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`state` `[batch, heads, key_dim, value_dim + 1]`, C and in the last column n, over e^`exponent`."""
        key_dim, value_dim = self.sizes(d_model)
        state = jnp.zeros((batch, self.heads, key_dim, value_dim + 1), jnp.float32)
        return {"state": state, "exponent": jnp.zeros((batch, self.heads), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of query and key, of value, gate and output, and of the two gates of a head."""
        key_dim, value_dim = self.sizes(d_model)
        return d_model * self.heads * (2 * key_dim + 3 * value_dim + 2)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """State written and read, or the matrix."""
        key_dim, value_dim = self.sizes(d_model)
        return linear_flops(self.form, self.heads, key_dim, value_dim + 1, length)


class MLSTMModule(nn.Module):
    """Owns `query`, `key`, `value`, `input`, `forget` and their `_bias`, `gate`, `norm_scale`, `out`.

    Sites q, k, v, log_input (log i), log_forget (log f), z (before `out`).
    """

    config: MLSTM
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, kernel = self.config, self.initializer.kernel(self.d_model)
        key_dim, value_dim = c.sizes(self.d_model)

        def heads(name: str, size: int) -> Float[Array, "batch length heads size"]:
            return Linear((self.d_model,), (c.heads, size), ("d_model", "heads", "head_dim"), kernel, name=name)(x)

        q, k, v = (
            site(self, "q", heads("query", key_dim)),
            site(self, "k", heads("key", key_dim)),
            heads("value", value_dim),
        )
        v = site(self, "v", v)
        log_input = site(self, "log_input", self.gate("input", x))
        log_forget = site(self, "log_forget", jax.nn.log_sigmoid(self.gate("forget", x)))
        memory, exponent = (None, None) if state is None else (state["state"], state["exponent"])
        z, memory, exponent = mlstm(q, k, v, log_input, log_forget, context.segment_ids, memory, exponent, c.form)
        scale = parameter(self, "norm_scale", jax.nn.initializers.ones, (c.heads, value_dim), ("heads", "head_dim"))
        z = site(self, "z", layer_norm(z, scale, None, 1e-6) * jax.nn.sigmoid(heads("gate", value_dim)))
        residual = self.initializer.residual(c.heads * value_dim, self.layers)
        y = Linear((c.heads, value_dim), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"state": memory, "exponent": exponent}

    def gate(self, name: str, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length heads"]:
        """Pre-activation of a gate, float32. Forget gates begin open, at biases from 3 to 6; input gates at -10."""
        c, axes = self.config, ("d_model", "heads")
        initial = forget_bias if name == "forget" else jax.nn.initializers.constant(-10.0)
        bias = parameter(self, name + "_bias", initial, (c.heads,), ("heads",))
        y = Linear((self.d_model,), (c.heads,), axes, self.initializer.kernel(self.d_model), name=name)(x) + bias
        y = y.astype(jnp.float32)
        return y if c.soft_cap is None else c.soft_cap * jnp.tanh(y / c.soft_cap)


def forget_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """From 3 to 6 over the heads (the released code)."""
    return jnp.linspace(3, 6, shape[0], dtype=dtype)


def mlstm(
    query: Float[Array, "batch length heads key_dim"],
    key: Float[Array, "batch length heads key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_input: Float[Array, "batch length heads"],
    log_forget: Float[Array, "batch length heads"],
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads key_dim columns"] | None = None,
    initial_exponent: Float[Array, "batch heads"] | None = None,
    form: Form = "chunked",
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads key_dim columns"], Array]:
    """The h of `MLSTM`; and after the last token (C, n) over e^m, and m.

    The exponent m_t = max(m_{t-1} + log f_t, log i_t) keeps exponentials at most 1. With it the cell is gated linear
    attention, whose decay is f_t e^(m_{t-1} - m_t) and whose keys are i_t e^(-m_t) k_t; the bound 1 becomes e^(-m_t).
    h does not depend on m, so no gradient flows through it. The output is in the dtype of `value`, all else float32.
    """
    before, exponent = running_maximum(log_input, log_forget, segment_ids, initial_exponent)
    wide, level = value.astype(jnp.float32), jax.lax.stop_gradient(exponent)
    decay = log_forget + jax.lax.stop_gradient(before) - level
    written = key.astype(jnp.float32) * jnp.exp(log_input - level)[..., None]
    out, state = gated_linear_attention(
        query,
        written,
        jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1),
        decay,
        scale=1 / math.sqrt(key.shape[-1]),
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation=KERNELS[form],
    )
    bound = jnp.exp(-jnp.minimum(level, 80.0))[..., None]  # beyond 80 the bound is far below any sum
    out = out[..., :-1] / jnp.maximum(jnp.abs(out[..., -1:]), bound)
    return out.astype(value.dtype), state, exponent[:, -1]


def running_maximum(
    log_input: Float[Array, "batch length heads"],
    log_forget: Float[Array, "batch length heads"],
    segment_ids: Int[Array, "batch length"] | None,
    initial: Float[Array, "batch heads"] | None,
) -> tuple[Float[Array, "batch length heads"], Float[Array, "batch length heads"]]:
    """m_{t-1} and m_t = max(m_{t-1} + log f_t, log i_t) for every token; m begins at 0 in each document."""
    begin = jnp.zeros_like(log_input[:, 0]) if initial is None else initial
    reset, found = jnp.zeros(log_input.shape[:2], bool)[..., None], marks(segment_ids)
    if found is not None:
        present, reset = found.present[..., None], found.reset[..., None]
        log_input, log_forget = jnp.where(present, log_input, FORGET), jnp.where(present, log_forget, 0)

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    forget = jnp.where(reset, FORGET, log_forget)
    least = jnp.where(reset, jnp.maximum(log_input, log_forget), log_input)
    forget = jnp.concatenate([jnp.zeros_like(begin)[:, None], forget], axis=1)
    least = jnp.concatenate([begin[:, None], least], axis=1)
    exponent = jax.lax.associative_scan(join, (forget, least), axis=1)[1]
    return jnp.where(reset, 0, exponent[:, :-1]), exponent[:, 1:]
