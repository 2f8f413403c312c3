"""RWKV-4 time mixing: a softmax over the past per channel, whose weights fade by a constant factor of the channel."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llmjax.nn.initializers import Init, Initializer
from llmjax.nn.linear import Linear, parameter
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import causal_convolution
from llmjax.nn.sites import site
from pallas_kernels.segments import marks

Form = Literal["recurrent", "parallel"]
NOTHING = -1e30
"""Exponent of an empty sum; finite, so that differences of two are not NaN."""


@dataclass(frozen=True)
class RWKV4(Mixer):
    """o_t = (sum_{j<t} e^{-(t-1-j) w + k_j} v_j + e^{u + k_t} v_t) / (the same of ones), y = (sigmoid(r) * o) W_out.

    r, k and v read mu x_t + (1 - mu) x_{t-1}, with a mu for each; w > 0 and u are one number a channel.
    Peng et al. 2023 (2305.13048); beside it stands `ChannelMixing`.
    """

    d_inner: int | None = None
    """channels; None is d_model"""
    form: Form = "recurrent"
    """token by token, or an associative scan; equal up to rounding"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return RWKV4Module(self, d_model, layers, init, name=name)

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`token` `[batch, 1, d_model]`, the last one; `numerator`, `denominator`, `exponent` `[batch, d_inner]`."""
        zeros = jnp.zeros((batch, self.d_inner or d_model), jnp.float32)
        token = jnp.zeros((batch, 1, d_model), dtype)
        return {"token": token, "exponent": zeros + NOTHING, "numerator": zeros, "denominator": zeros}

    def matmul_params(self, d_model: int) -> int:
        """Weights of key, value, receptance and output."""
        return 4 * d_model * (self.d_inner or d_model)

    def mixing_flops(self, d_model: int, length: int) -> float:
        """About 20 operations a channel."""
        return 20 * (self.d_inner or d_model)


class RWKV4Module(nn.Module):
    """Owns `key`, `value`, `receptance`, their `_mix`, `decay` (log w), `bonus` (u), `out`; sites r, k, v, z."""

    config: RWKV4
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, after the tokens that it holds."""
        c, init = self.config, self.initializer
        width = c.d_inner or self.d_model
        before, token = token_shift(x, context.segment_ids, None if state is None else state["token"])

        def project(name: str, mix: Initializer) -> Float[Array, "batch length d_inner"]:
            mixed = lerp(before, x, parameter(self, name + "_mix", mix, (self.d_model,), ("d_model",)))
            return Linear((self.d_model,), (width,), ("d_model", "d_inner"), init.kernel(self.d_model), name=name)(
                mixed
            )

        k = site(self, "k", project("key", ramp(0.5)))
        v = site(self, "v", project("value", ramp(0.5, 0.15)))
        r = site(self, "r", jax.nn.sigmoid(project("receptance", ramp(0.25))))
        decay = parameter(self, "decay", initial_decay, (width,), ("d_inner",))
        bonus = parameter(self, "bonus", initial_bonus, (width,), ("d_inner",))
        past = None if state is None else (state["exponent"], state["numerator"], state["denominator"])
        z, final = wkv(k, v, -jnp.exp(decay.astype(jnp.float32)), bonus, context.segment_ids, past, c.form)
        z = site(self, "z", r * z)
        y = Linear((width,), (self.d_model,), ("d_inner", "d_model"), init.residual(width, self.layers), name="out")(z)
        if state is not None:
            state = {"token": token, **dict(zip(("exponent", "numerator", "denominator"), final, strict=True))}
        return y, state


def token_shift(
    x: Float[Array, "batch length d_model"],
    segment_ids: Int[Array, "batch length"] | None,
    last: Float[Array, "batch 1 d_model"] | None,
) -> tuple[Float[Array, "batch length d_model"], Float[Array, "batch 1 d_model"]]:
    """The token before each, of those present in the same document (zeros before the first), and the last one."""
    before_only = jnp.zeros((2, x.shape[-1]), x.dtype).at[0].set(1)
    before, latest = causal_convolution(x, before_only, initial_state=last, segment_ids=segment_ids)
    return before, latest if last is None else latest.astype(last.dtype)


def lerp(
    before: Float[Array, "batch length d_model"], x: Float[Array, "batch length d_model"], mix: Float[Array, " d_model"]
) -> Float[Array, "batch length d_model"]:
    """mix x + (1 - mix) before."""
    return before + (x - before) * mix


def ramp(power: float, offset: float = 0.0) -> Initializer:
    """(i / n)^power + offset for feature i of n: the released code's mixes in the middle of a stack."""

    def initial(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
        return ((jnp.arange(shape[-1]) / shape[-1]) ** power + offset).astype(dtype)

    return initial


def initial_decay(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """log w from -5 to 3 over the channels: from half-lives of 100 tokens to none."""
    return (-5 + 8 * (jnp.arange(shape[-1]) / max(shape[-1] - 1, 1)) ** 1.35).astype(dtype)


def initial_bonus(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """log 0.3 and a zigzag of -1/2, 0, 1/2 over the channels."""
    return (jnp.log(0.3) + 0.5 * ((jnp.arange(shape[-1]) + 1) % 3 - 1)).astype(dtype)


class Sums(NamedTuple):
    """e^exponent (numerator, denominator): sums over a span of tokens, seen from its last; `decay` over the span."""

    decay: Float[Array, "..."]
    exponent: Float[Array, "..."]
    numerator: Float[Array, "..."]
    denominator: Float[Array, "..."]


def join(first: Sums, second: Sums) -> Sums:
    """The sums over two spans that follow each other. They do not depend on the exponent, so no gradient does."""
    faded = first.exponent + second.decay
    exponent = jax.lax.stop_gradient(jnp.maximum(faded, second.exponent))
    one, other = jnp.exp(faded - exponent), jnp.exp(second.exponent - exponent)
    numerator = one * first.numerator + other * second.numerator
    return Sums(first.decay + second.decay, exponent, numerator, one * first.denominator + other * second.denominator)


def wkv(
    key: Float[Array, "batch length channels"],
    value: Float[Array, "batch length channels"],
    log_decay: Float[Array, " channels"],
    bonus: Float[Array, " channels"],
    segment_ids: Int[Array, "batch length"] | None = None,
    initial: tuple[Float[Array, "batch channels"], ...] | None = None,
    form: Form = "recurrent",
) -> tuple[Float[Array, "batch length channels"], tuple[Float[Array, "batch channels"], ...]]:
    """The o of `RWKV4`, and (exponent, numerator, denominator) of the sums after the last token.

    Exponents are kept apart from the sums that they scale, so that no key overflows. Everything is float32, the output
    is in the dtype of `value`. Where nothing has been seen the output is 0.
    """
    k, v = key.astype(jnp.float32), value.astype(jnp.float32)
    zeros, found = jnp.zeros_like(k), marks(segment_ids)
    present, forget = jnp.ones_like(k, bool), zeros
    if found is not None:
        present, forget = found.present[..., None], jnp.where(found.reset[..., None], NOTHING, zeros)
    level = jax.lax.stop_gradient(k)
    weight = jnp.where(present, jnp.exp(k - level), 0)
    token = Sums(jnp.where(present, log_decay, 0) + forget, jnp.where(present, level, NOTHING), weight * v, weight)
    first = (zeros[:, 0] + NOTHING, zeros[:, 0], zeros[:, 0]) if initial is None else initial
    before, after = SCANS[form](Sums(zeros[:, 0], *first), token)
    now = token._replace(decay=forget, exponent=token.exponent + jax.lax.stop_gradient(bonus))
    own = jnp.exp(bonus - jax.lax.stop_gradient(bonus))
    now = now._replace(numerator=own * now.numerator, denominator=own * now.denominator)
    seen = join(before, now)
    out = seen.numerator / jnp.where(seen.denominator == 0, 1, seen.denominator)
    return out.astype(value.dtype), tuple(after[1:])


def recurrent(first: Sums, tokens: Sums) -> tuple[Sums, Sums]:
    """The sums before each token, and after the last, one token after the other."""

    def step(sums: Sums, token: Sums) -> tuple[Sums, Sums]:
        return join(sums, token), sums

    after, before = jax.lax.scan(step, first, jax.tree.map(partial(jnp.moveaxis, source=1, destination=0), tokens))
    return jax.tree.map(partial(jnp.moveaxis, source=0, destination=1), before), after


def parallel(first: Sums, tokens: Sums) -> tuple[Sums, Sums]:
    """The same in a number of steps that grows with the logarithm of the length."""
    spans = jax.tree.map(lambda one, rest: jnp.concatenate([one[:, None], rest], axis=1), first, tokens)
    sums = jax.lax.associative_scan(join, spans, axis=1)
    return jax.tree.map(lambda x: x[:, :-1], sums), jax.tree.map(lambda x: x[:, -1], sums)


SCANS: dict[Form, Callable[[Sums, Sums], tuple[Sums, Sums]]] = {"recurrent": recurrent, "parallel": parallel}
