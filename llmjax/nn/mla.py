"""Multi-head latent attention: keys and values are made from one small vector a token, and only that is cached."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.attention import store
from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear, Matrix
from llmjax.nn.masks import AttentionMask, Full
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.norms import Norm, RMSNorm
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.scores import scores_of
from llmjax.nn.sites import site

Form = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True)
class MLA(Mixer):
    """c = norm(x W_c), k_h = [c K_h; rope(x W_r)], v_h = c V_h, q_h = [n_h; rope(r_h)] = q W_h; softmax(q k^T scale) v.

    The rotary part of the key is shared by all heads. n_h (c K_h)^T = (n_h K_h^T) c^T: absorbed into the query, K_h
    leaves one key [c; rope(x W_r)] and one value c for all heads, and V_h comes after the attention. DeepSeek-V2
    (2405.04434, section 2.1, appendix C); the sizes are its own.
    """

    heads: int = 128
    """heads"""
    kv_rank: int = 512
    """features of the latent c that keys and values are made from"""
    q_rank: int | None = 1536
    """features of the normalised latent that queries are made from; None makes them from x (DeepSeek-V2-Lite)"""
    nope_dim: int = 128
    """features a head of queries and keys without position"""
    rope_dim: int = 64
    """features a head of queries, and of the one key, that turn with position"""
    value_dim: int = 128
    """features a head of values"""
    causal: bool = True
    """whether a token sees only itself and the past"""
    mask: AttentionMask = Full()
    """which keys a token sees, beside causality and documents"""
    rope: Rope = Rope(layout="interleaved")
    """how the rotary part turns"""
    norm: Norm = RMSNorm()
    """normalisation of the latents"""
    scale: float | None = None
    """factor of the scores; None is 1 / sqrt(nope_dim + rope_dim) (DeepSeek multiplies it by YaRN's magnitude^2)"""
    form: Form = "auto"
    """what is computed, with equal results; auto takes the one of fewer FLOPs: absorbed to decode, else expanded"""
    implementation: str | None = None
    """kernel of `pallas_kernels.attention`; None takes the best that fits"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MLAModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes without meaning."""
        for name in ("heads", "kv_rank", "nope_dim", "value_dim"):
            if getattr(self, name) < 1:
                yield name, "must be at least 1"
        if self.q_rank is not None and self.q_rank < 1:
            yield "q_rank", "must be at least 1, or None for queries made from x"
        if self.rope_dim < 2 or self.rope_dim % 2:
            yield "rope_dim", "must be even and at least 2"
        else:
            yield from ((f"rope.{field}", why) for field, why in self.rope.problems_at(self.rope_dim))

    def sees_future(self) -> bool:
        """Where it is not causal."""
        return not self.causal

    def any_order(self) -> bool:
        """Where its mask allows it."""
        return self.mask.any_order()

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether so many queries over so many keys are made in the absorbed form."""
        if self.form != "auto":
            return self.form == "absorbed"
        projected = self.kv_rank * (self.nope_dim + self.value_dim)
        absorbed = queries * projected + queries * keys * 2 * self.kv_rank
        return absorbed < keys * projected + queries * keys * (self.nope_dim + self.value_dim)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """An empty cache: `latent`, c and the turned key, `[batch, length, 1, kv_rank + rope_dim]` of `dtype`."""
        return {"latent": jnp.zeros((batch, length, 1, self.kv_rank + self.rope_dim), dtype)}

    def matmul_params(self, d_model: int) -> int:
        """Weights of all projections; K and V multiply each token once in either form."""
        turned = self.heads * (self.nope_dim + self.rope_dim)
        query = d_model * turned if self.q_rank is None else self.q_rank * (d_model + turned)
        latent = d_model * (self.kv_rank + self.rope_dim)
        return (
            query + latent + self.heads * (self.kv_rank * (self.nope_dim + self.value_dim) + self.value_dim * d_model)
        )

    def mixing_flops(self, d_model: int, length: int) -> float:
        """2 heads (features of a key + of a value) for every key that a query sees."""
        features = self.nope_dim + self.value_dim
        if self.absorbs(length, length):
            features = 2 * self.kv_rank
        return 2 * self.heads * (features + self.rope_dim) * self.mask.keys_seen(length, self.causal)


class MLAModule(nn.Module):
    """Owns the projections to and from the latents, and their norms.

    `query` or `query_down`, `query_norm` and `query_up`; `latent_down`, `norm`, `rotary`, `key_up`, `value_up`, `out`.
    Sites q (before absorption, its rotary part turned), latent (what is cached), z (heads' output).
    """

    config: MLA
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, over the cached tokens too."""
        c = self.config
        q, latent = self.project_query(x, context), self.project_latent(x, context)
        if state is not None and context.cache is not None:
            state = {"latent": store(state["latent"], latent, context.cache.slot)}
            latent = state["latent"].astype(q.dtype)
        kernel, axes = self.initializer.kernel(c.kv_rank), ("rank", "heads", "head_dim")
        key_up = Matrix((c.kv_rank,), (c.heads, c.nope_dim), axes, kernel, name="key_up")()
        value_up = Matrix((c.kv_rank,), (c.heads, c.value_dim), axes, kernel, name="value_up")()
        scale = 1 / math.sqrt(c.nope_dim + c.rope_dim) if c.scale is None else c.scale
        rules = dict(scale=scale, causal=c.causal, implementation=c.implementation)
        if c.absorbs(q.shape[1], latent.shape[1]):
            q = jnp.concatenate([absorb(q[..., : c.nope_dim], key_up), q[..., c.nope_dim :]], axis=-1)
            z = c.mask.attend(scores_of(q, latent, latent[..., : c.kv_rank], context, **rules))
            z = jnp.einsum("blhr,rhd->blhd", z, value_up)
        else:
            k, v = expand(latent, key_up, value_up)
            z = c.mask.attend(scores_of(q, k, v, context, **rules))
        z = site(self, "z", z)
        residual = self.initializer.residual(c.heads * c.value_dim, self.layers)
        inputs, axes = (c.heads, c.value_dim), ("heads", "head_dim", "d_model")
        return Linear(inputs, (self.d_model,), axes, residual, name="out")(z), state

    def project_query(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length heads head_dim"]:
        """[n; rope(r)], nope_dim and rope_dim features a head."""
        c, inputs, axis, name = self.config, self.d_model, "d_model", "query"
        if c.q_rank is not None:
            kernel = self.initializer.kernel(self.d_model)
            x = Linear((self.d_model,), (c.q_rank,), ("d_model", "rank"), kernel, name="query_down")(x)
            x, inputs, axis, name = c.norm.build("query_norm")(x), c.q_rank, "rank", "query_up"
        axes, kernel = (axis, "heads", "head_dim"), self.initializer.kernel(inputs)
        q = Linear((inputs,), (c.heads, c.nope_dim + c.rope_dim), axes, kernel, name=name)(x)
        turned = rotate(q[..., c.nope_dim :], context.positions, c.rope)
        return site(self, "q", jnp.concatenate([q[..., : c.nope_dim], turned], axis=-1))

    def project_latent(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length 1 features"]:
        """[c; rope(x W_r)], kv_rank and rope_dim features."""
        c, kernel, axes = self.config, self.initializer.kernel(self.d_model), ("d_model", "rank")
        latent = c.norm.build("norm")(Linear((self.d_model,), (c.kv_rank,), axes, kernel, name="latent_down")(x))
        turned = Linear((self.d_model,), (c.rope_dim,), ("d_model", "head_dim"), kernel, name="rotary")(x)
        turned = rotate(turned[:, :, None], context.positions, c.rope)
        return site(self, "latent", jnp.concatenate([latent[:, :, None], turned], axis=-1))


def absorb(
    query: Float[Array, "batch length heads nope_dim"], key_up: Float[Array, "kv_rank heads nope_dim"]
) -> Float[Array, "batch length heads kv_rank"]:
    """n_h K_h^T: what the latents themselves are scored with."""
    return jnp.einsum("blhn,rhn->blhr", query, key_up)


def expand(
    latent: Float[Array, "batch source 1 features"],
    key_up: Float[Array, "kv_rank heads nope_dim"],
    value_up: Float[Array, "kv_rank heads value_dim"],
) -> tuple[Float[Array, "batch source heads head_dim"], Float[Array, "batch source heads value_dim"]]:
    """Keys [c K_h; turned], the turned part repeated over heads, and values c V_h."""
    rank, heads = key_up.shape[:2]
    c, turned = latent[:, :, 0, :rank], latent[..., rank:]
    turned = jnp.broadcast_to(turned, (*turned.shape[:2], heads, turned.shape[-1]))
    key = jnp.concatenate([jnp.einsum("bsr,rhn->bshn", c, key_up), turned], axis=-1)
    return key, jnp.einsum("bsr,rhd->bshd", c, value_up)
