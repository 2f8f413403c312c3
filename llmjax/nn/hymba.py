"""Hymba's hybrid heads: attention and a selective state-space model read the same token side by side."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention, AttentionModule, store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mamba import Mamba, MambaModule
from llmjax.nn.masks import AttentionMask, Full
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.scores import scores_of
from llmjax.nn.sites import site


@dataclass(frozen=True)
class Hymba(Mixer):
    """y = (norm(attention heads) + norm(Mamba's heads)) / 2 W_out. Dong et al. 2024 (2411.13676), section 2.1.

    Both branches have d_inner = ssm.expand d_model features, and a learned scale in their norm. The paper's meta tokens
    are learned tokens before every document: a matter of the model's input, not of a layer.
    """

    heads: int = 4
    """query heads, of d_inner / heads features"""
    kv_heads: int | None = None
    """key and value heads, a divisor of heads; None is heads"""
    mask: AttentionMask = Full()
    """which keys a token sees (the paper: a window in all but three layers)"""
    rope: Rope | None = Rope()
    """rotary positions of the attention heads"""
    ssm: Mamba = Mamba()
    """the state-space heads: Mamba without its output projection"""
    norm: Norm = RMSNorm()
    """normalisation of each branch before their mean"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return HymbaModule(self, d_model, layers, init, name=name)

    def attention(self, d_model: int) -> Attention:
        """The attention branch as an `Attention` of its own."""
        head_dim = self.ssm.sizes(d_model)[0] // self.heads
        return Attention(heads=self.heads, kv_heads=self.kv_heads, head_dim=head_dim, mask=self.mask, rope=self.rope)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Heads that contradict each other."""
        return Attention(heads=self.heads, kv_heads=self.kv_heads).problems()

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the inner width."""
        return dataclasses.replace(self.attention(d_model), head_dim=None).problems_at(self.ssm.sizes(d_model)[0])

    def distance_heads(self) -> int | None:
        """The attention heads, where they hold no other positions."""
        return self.heads if self.rope is None else None

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """The states of both branches, `attention` and `ssm`."""
        branches = {"attention": self.attention(d_model), "ssm": self.ssm}
        return {name: branch.init_state(d_model, batch, length, dtype) for name, branch in branches.items()}

    def matmul_params(self, d_model: int) -> int:
        """Those of both branches, with one output projection."""
        both = self.attention(d_model).matmul_params(d_model) + self.ssm.matmul_params(d_model)
        return both - d_model * self.ssm.sizes(d_model)[0]

    def mixing_flops(self, d_model: int, length: int) -> float:
        """Those of both branches."""
        return self.attention(d_model).mixing_flops(d_model, length) + self.ssm.mixing_flops(d_model, length)


class HymbaModule(nn.Module):
    """Owns `attention`, `ssm`, a norm of each, and `out`; site z is what `out` reads."""

    config: Hymba
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too."""
        c, shared = self.config, (self.d_model, self.layers, self.initializer)
        d_inner, _ = c.ssm.sizes(self.d_model)
        branches = {
            "attention": AttentionHeads(c.attention(self.d_model), *shared, name="attention"),
            "ssm": MambaModule(c.ssm, *shared, readout=False, name="ssm"),
        }
        outputs, states = [], {}
        for name, branch in branches.items():
            z, states[name] = branch(x, context, None if state is None else state[name])
            outputs.append(c.norm.build(f"{name}_norm")(z))
        z = site(self, "z", sum(outputs[1:], outputs[0]) / len(outputs))
        residual = self.initializer.residual(d_inner, self.layers)
        y = Linear((d_inner,), (self.d_model,), ("d_inner", "d_model"), residual, name="out")(z)
        return y, None if state is None else states


class AttentionHeads(AttentionModule):
    """The heads of an attention layer without its output projection; sites q, k, v, z."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_inner"], State]:
        """The outputs of all heads, side by side."""
        c = self.config
        q, k, v = self.project(x, context)
        if state is not None and context.cache is not None:
            slot = context.cache.slot
            state = {"key": store(state["key"], k, slot), "value": store(state["value"], v, slot)}
            k, v = state["key"].astype(q.dtype), state["value"].astype(q.dtype)
        rules = dict(scale=1 / math.sqrt(q.shape[-1]), causal=c.causal, sinks=None, soft_cap=None, implementation=None)
        z = site(self, "z", c.mask.attend(scores_of(q, k, v, context, **rules)))
        return z.reshape(*x.shape[:2], -1), state
