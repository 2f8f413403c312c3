"""Entropy of a linear head, and the divergence of two heads, without the full logits of either."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cross_entropy.chunks import Arrays, Measure, Measured, weighted_sum
from pallas_kernels.cross_entropy.linear import CHUNK, check
from pallas_kernels.cross_entropy.vocabulary import AxisName, Vocabulary


def linear_entropy(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    weights: Float[Array, " tokens"],
    *,
    chunk: int | None = CHUNK,
    soft_cap: float | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """sum_i weights_i H_i, and H_i = -sum_v p_iv log p_iv of each token in nats, p = softmax(hidden @ kernel).

    The sum is differentiable in `hidden`, `kernel` and `weights`; no gradient flows through the second result. Chunks,
    soft cap, mesh axis, dtypes and errors are those of `linear_cross_entropy`. Entropy bonus: Williams and Peng 1991;
    Mnih et al. 2016 (1602.01783).
    """
    check(hidden, kernel, soft_cap, chunk)
    check_weights(hidden, weights)
    measure = Entropy(Vocabulary(axis_name), (soft_cap,))
    total, (entropy,), _ = weighted_sum(measure, chunk, ((hidden, kernel),), (), weights)
    return total, entropy


def linear_kl(
    hidden_p: Float[Array, "tokens d_p"],
    kernel_p: Float[Array, "d_p vocab"],
    hidden_q: Float[Array, "tokens d_q"],
    kernel_q: Float[Array, "d_q vocab"],
    weights: Float[Array, " tokens"],
    *,
    chunk: int | None = CHUNK,
    soft_cap_p: float | None = None,
    soft_cap_q: float | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """sum_i weights_i KL_i, and KL(p_i || q_i) = sum_v p_iv log(p_iv / q_iv) of each token in nats.

    p and q are the softmax of two heads over one vocabulary; their widths and soft caps may differ. With the teacher
    as p and the student as q this is the forward KL of distillation (Hinton et al. 2015, 1503.02531), with the student
    as p the reverse KL (Gu et al. 2023, 2306.08543). The sum is differentiable in both heads and `weights`; what would
    be made for a head behind `stop_gradient` is removed by the compiler. No gradient flows through the second result. A
    temperature t divides the hidden states of both heads (uncapped ones); the usual factor t^2 belongs to the weights.
    Chunks, mesh axis, dtypes and errors are those of `linear_cross_entropy`.
    """
    check(hidden_p, kernel_p, soft_cap_p, chunk)
    check(hidden_q, kernel_q, soft_cap_q, chunk)
    if hidden_p.shape[0] != hidden_q.shape[0] or kernel_p.shape[1] != kernel_q.shape[1]:
        shapes = f"{hidden_p.shape} @ {kernel_p.shape} and {hidden_q.shape} @ {kernel_q.shape}"
        raise ValueError(f"p and q are {shapes}: they must have the same tokens and the same vocabulary")
    check_weights(hidden_p, weights)
    measure = Divergence(Vocabulary(axis_name), (soft_cap_p, soft_cap_q))
    heads = ((hidden_p, kernel_p), (hidden_q, kernel_q))
    total, (divergence,), _ = weighted_sum(measure, chunk, heads, (), weights)
    return total, divergence


def check_weights(hidden: Array, weights: Array) -> None:
    """Raise ValueError unless there is one weight a token."""
    if weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights {weights.shape} must be [{hidden.shape[0]}]")


@dataclass(frozen=True)
class Entropy(Measure):
    """The entropy of each token's distribution."""

    def of(self, logits: Arrays, data: Arrays) -> Measured:
        """H = -sum_v p_v log p_v; dH / d logits = -p (log p + H)."""
        (x,) = logits
        log_p = self.vocabulary.log_softmax(x)
        entropy = -self.vocabulary.sum(jnp.exp(log_p) * log_p)

        def pull(cotangents: Arrays) -> Arrays:
            return (jnp.exp(log_p) * (log_p + entropy[:, None]) * -cotangents[0][:, None],)

        return Measured((entropy,), (), pull)


@dataclass(frozen=True)
class Divergence(Measure):
    """KL(p || q) of each token, p the first head's distribution and q the second's."""

    def of(self, logits: Arrays, data: Arrays) -> Measured:
        """KL = sum_v p d + q - p with d = log p - log q; its gradients are p (d - KL) and q - p.

        q - p sums to 0; with it the rounding of the two log-sum-exps, which shifts every d alike, cancels to first
        order. The KL of two heads that are nearly equal is then exact to 1e-7 or so, however large their logits.
        """
        log_p, log_q = (self.vocabulary.log_softmax(x) for x in logits)
        p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
        divergence = self.vocabulary.sum(p * d + (q - p))

        def pull(cotangents: Arrays) -> Arrays:
            scale = cotangents[0][:, None]
            return (p * (d - divergence[:, None]) * scale, (q - p) * scale)

        return Measured((divergence,), (), pull)
