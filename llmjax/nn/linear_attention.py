"""Linear attention: softmax's kernel becomes a product of features, and the past a state of fixed size."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.features import EluPlusOne, FeatureMap, Identity
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scans import gated_linear_attention
from llmjax.nn.sites import site

Form = Literal["chunked", "recurrent", "quadratic"]
KERNELS: dict[Form, str] = {"chunked": "xla", "recurrent": "reference", "quadratic": "quadratic"}
"""Which implementation of `gated_linear_attention` computes a form."""


@dataclass(frozen=True)
class LinearAttention(Mixer):
    """o_t = S_t^T phi(q_t) / (z_t^T phi(q_t)), S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t).

    Katharopoulos et al. 2020 (2006.16236); with random features the Performer (Choromanski et al. 2020, 2009.14794).
    """

    heads: int = 4
    """heads"""
    head_dim: int | None = None
    """features a head, before the map; None is d_model / heads"""
    features: FeatureMap = EluPlusOne()
    """phi"""
    normalised: bool = True
    """whether weights sum to one; without, o_t = S_t^T phi(q_t)"""
    causal: bool = True
    """whether a token sees only itself and the past"""
    rope: Rope | None = None
    """rotary positions of queries and keys, before the map: with softmax features an estimate of rotary attention"""
    form: Form = "chunked"
    """chunked and recurrent are linear in the length, quadratic is the attention matrix; equal up to rounding"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return LinearAttentionModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict each other."""
        if self.heads < 1:
            yield "heads", "must be at least 1"
        if self.normalised and isinstance(self.features, Identity):
            yield (
                "normalised",
                "divides by sums of any sign with Identity features: set it to False, or change features",
            )
        if self.rope is not None and self.head_dim is not None:
            yield from ((f"rope.{field}", why) for field, why in self.rope.problems_at(self.head_dim))

    def problems_at(self, d_model: int) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the model's width."""
        if self.head_dim is None and self.heads > 0:
            if d_model % self.heads:
                yield "heads", f"does not divide d_model={d_model}: change it, or give head_dim"
            elif self.rope is not None:
                found = self.rope.problems_at(d_model // self.heads)
                yield from ((f"rope.{field}", why) for field, why in found)

    def sees_future(self) -> bool:
        """Where it is not causal."""
        return not self.causal

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(head_dim, features of a key, columns of the state)."""
        head_dim = self.head_dim or d_model // self.heads
        return head_dim, self.features.size(head_dim), head_dim + self.normalised

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`state` `[batch, heads, features, head_dim]`, S; its last column is z where weights are normalised."""
        _, features, columns = self.sizes(d_model)
        return {"state": jnp.zeros((batch, self.heads, features, columns), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of the four projections."""
        return 4 * d_model * self.heads * self.sizes(d_model)[0]

    def mixing_flops(self, d_model: int, length: int) -> float:
        """State written and read (twice where both directions count), or the matrix."""
        _, features, columns = self.sizes(d_model)
        flops = linear_flops(self.form, self.heads, features, columns, length)
        return flops if self.causal else 2 * flops


def linear_flops(form: Form, heads: int, key_dim: int, value_dim: int, length: int) -> float:
    """Forward FLOPs per token: 2 key_dim value_dim to write and to read a state, or the lower half of a matrix."""
    if form == "quadratic":
        return heads * (key_dim + value_dim) * (length + 1)
    return 4 * heads * key_dim * value_dim


class LinearAttentionModule(nn.Module):
    """Owns `query`, `key`, `value`, `out`; sites q, k, v (before the map), z (heads' output)."""

    config: LinearAttention
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds. Raises where that is not causal."""
        c, initial = self.config, None
        if state is not None:
            if not c.causal:
                raise NotImplementedError("linear attention that sees later tokens cannot go on from a state")
            initial = state["state"]
        head_dim, _, _ = c.sizes(self.d_model)
        kernel, axes = self.initializer.kernel(self.d_model), ("d_model", "heads", "head_dim")
        q, k, v = (
            Linear((self.d_model,), (c.heads, head_dim), axes, kernel, name=n)(x) for n in ("query", "key", "value")
        )
        if c.rope is not None:
            q, k = rotate(q, context.positions, c.rope), rotate(k, context.positions, c.rope)
        q, k, v = site(self, "q", q), site(self, "k", k), site(self, "v", v)
        q = c.features.up_to_factor(q) if c.normalised else c.features.features(q)
        arrays = (q, c.features.features(k), v, context.segment_ids, initial)
        z, final = linear_attention(*arrays, normalised=c.normalised, causal=c.causal, form=c.form)
        z = site(self, "z", z)
        residual = self.initializer.residual(c.heads * head_dim, self.layers)
        y = Linear((c.heads, head_dim), (self.d_model,), ("heads", "head_dim", "d_model"), residual, name="out")(z)
        return y, state if state is None else {"state": final}


def linear_attention(
    query: Float[Array, "batch length heads features"],
    key: Float[Array, "batch length heads features"],
    value: Float[Array, "batch length heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None = None,
    initial_state: Float[Array, "batch heads features columns"] | None = None,
    *,
    normalised: bool = True,
    causal: bool = True,
    form: Form = "chunked",
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads features columns"]]:
    """Values weighed by products of features, over their sum where `normalised`; and the state after the last token.

    The sum of weights is one more column of values, all ones. Where it is 0, so are all weights and the output. Not
    causal is the causal sum and, from the end backwards, the sum of what comes after. Sums are float32, the output is
    in the dtype of `value`.
    """
    wide = value.astype(jnp.float32)
    if normalised:
        wide = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1)
    summed = partial(gated_linear_attention, implementation=KERNELS[form])
    out, state = summed(query, key, wide, initial_state=initial_state, segment_ids=segment_ids)
    if not causal:
        turned = (jnp.flip(x, 1) for x in (query, key, wide))
        ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
        later, _ = summed(*turned, bonus=jnp.zeros(key.shape[2:]), segment_ids=ids)
        out = out + jnp.flip(later, 1)
    if normalised:
        total = out[..., -1:]
        out = out[..., :-1] / jnp.where(total == 0, 1, total)
    return out.astype(value.dtype), state
