"""RWKV channel mixing: an MLP with squared ReLU that reads each token and the one before it."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.rwkv4 import lerp, ramp, token_shift
from llmjax.nn.sites import site


@dataclass(frozen=True)
class ChannelMixing(Mixer):
    """y = sigmoid(r W_r) * (max(k W_k, 0)^2 W_v), r and k each mu x_t + (1 - mu) x_{t-1}.

    Peng et al. 2023 (2305.13048). It remembers a token, which feed-forward layers do not: a block of RWKV is
    `Block(RWKV4(), mlp=None)`, then `Block(ChannelMixing(), mlp=None)`.
    """

    d_ff: int | None = None
    """hidden width; None is 4 d_model"""
    gate: bool = True
    """whether sigmoid(r W_r) multiplies the result (RWKV-4 to RWKV-6; RWKV-7 has none)"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return ChannelMixingModule(self, d_model, layers, init, name=name)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`token` `[batch, 1, d_model]`, the last one."""
        return {"token": jnp.zeros((batch, 1, d_model), dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of key and value, and of the gate."""
        return d_model * (2 * (self.d_ff or 4 * d_model) + self.gate * d_model)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Three operations for each mix of two tokens."""
        return 3 * (1 + self.gate) * d_model


class ChannelMixingModule(nn.Module):
    """Owns `key`, `key_mix`, `value`, perhaps `receptance`, `receptance_mix`; site `hidden` is what `value` reads."""

    config: ChannelMixing
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Apply the layer; with a `state`, after the token that it holds."""
        c, init, d_model = self.config, self.initializer, self.d_model
        d_ff = c.d_ff or 4 * d_model
        before, token = token_shift(x, context.segment_ids, None if state is None else state["token"])

        def project(name: str, outputs: int, axis: str) -> Float[Array, "batch length outputs"]:
            mixed = lerp(before, x, parameter(self, name + "_mix", ramp(0.5), (d_model,), ("d_model",)))
            return Linear((d_model,), (outputs,), ("d_model", axis), init.kernel(d_model), name=name)(mixed)

        hidden = site(self, "hidden", jnp.square(jax.nn.relu(project("key", d_ff, "d_ff"))))
        residual = init.residual(d_ff, self.layers)
        y = Linear((d_ff,), (d_model,), ("d_ff", "d_model"), residual, name="value")(hidden)
        if c.gate:
            y = jax.nn.sigmoid(project("receptance", d_model, "d_inner")) * y
        return y, state if state is None else {"token": token}
