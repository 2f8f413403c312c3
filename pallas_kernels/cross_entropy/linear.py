"""Cross-entropy of a linear head without the full logits: one weighted sum, or every token's own loss."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cross_entropy.chunks import Arrays, Measure, Measured, each, weighted_sum
from pallas_kernels.cross_entropy.vocabulary import AxisName, Vocabulary

CHUNK = 1024


class TokenLosses(NamedTuple):
    """What is known of each token after the loss; each function says through which of them gradients flow."""

    nll: Float[Array, " tokens"]
    lse: Float[Array, " tokens"]
    correct: Bool[Array, " tokens"]


def linear_cross_entropy(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    chunk: int | None = CHUNK,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """sum_i weights_i loss_i, float32, differentiable in `hidden`, `kernel` and `weights`; and each token's terms.

    loss_i = (1 - s) nll_i + s mean_v(lse_i - logits_iv) + z_loss lse_i^2 with s = label_smoothing, nll_i = lse_i -
    logits_i[target_i], lse_i = log sum_v exp(logits_iv), logits = soft_cap * tanh(hidden @ kernel / soft_cap). No
    gradient flows through the terms: `linear_token_losses` is for losses that are no fixed sum over tokens.

    Logits are float32, of at most `chunk` tokens at a time (None: of all at once); their gradients are made with them
    in the forward pass and scaled in the backward pass. Callers who do not differentiate do not pay for them. Each
    chunk reads and writes the kernel's gradient once: on an accelerator, a wide model is faster with longer chunks.
    Targets equal to `ignore_index` have weight 0 (their terms mean nothing). Inside `shard_map`, `axis_name` says over
    which mesh axis the columns of `kernel` are split; targets stay ids of the whole vocabulary. A head's bias is one
    more row of `kernel` whose hidden entry is 1. float64 arguments are computed in float64.

    Label smoothing: Szegedy et al. 2016 (1512.00567). z-loss: Chowdhery et al. 2022 (2204.02311). Gradients in the
    forward pass: Hsu et al. 2024 (2410.10989). Raises ValueError where shapes disagree or a number is out of range.
    """
    check(hidden, kernel, soft_cap, chunk)
    if targets.shape != hidden.shape[:1] or weights.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} and weights {weights.shape} must be [{hidden.shape[0]}]")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 1")
    if ignore_index is not None:
        weights = jnp.where(targets == ignore_index, 0, weights)
    measure = CrossEntropy(Vocabulary(axis_name), (soft_cap,), z_loss, label_smoothing)
    total, _, terms = weighted_sum(measure, chunk, ((hidden, kernel),), (targets,), weights)
    return total, TokenLosses(*terms)


def linear_token_losses(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    *,
    chunk: int | None = CHUNK,
    soft_cap: float | None = None,
    axis_name: AxisName = None,
) -> TokenLosses:
    """nll and lse of each token (see `linear_cross_entropy`), both differentiable in `hidden` and `kernel`; correct.

    For losses that are not linear in the tokens' log-probabilities (DPO, PPO ratios, REINFORCE with a baseline, a
    z-loss of one's own): every token may have its own cotangents, and the backward pass makes the logits of each chunk
    again, a third more products than `linear_cross_entropy`. Raises ValueError where shapes disagree.
    """
    check(hidden, kernel, soft_cap, chunk)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} must be [{hidden.shape[0]}]")
    measure = LogLikelihood(Vocabulary(axis_name), (soft_cap,))
    values, notes = each(measure, chunk, ((hidden, kernel),), (targets,))
    return TokenLosses(*values, *notes)


def check(hidden: Array, kernel: Array, soft_cap: float | None, chunk: int | None) -> None:
    """Raise ValueError where a head's arrays do not fit, or a number is out of range."""
    if hidden.ndim != 2 or kernel.ndim != 2 or kernel.shape[:1] != hidden.shape[1:]:
        raise ValueError(f"hidden has shape {hidden.shape}, kernel {kernel.shape}: expected [tokens, d], [d, vocab]")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}: it must be positive, or None")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1 token, or None for all at once")


@dataclass(frozen=True)
class LogLikelihood(Measure):
    """nll and lse of each token, and whether the target has the largest logit."""

    def of(self, logits: Arrays, data: Arrays) -> Measured:
        """d (a nll + b lse) / d logits = (a + b) softmax - a onehot."""
        (x,), (targets,) = logits, data
        above, total, lse, top = self.vocabulary.softmax(x)
        hit = self.vocabulary.hits(x, targets)
        target = self.vocabulary.sum(jnp.where(hit, x, 0))

        def pull(cotangents: Arrays) -> Arrays:
            a, b = cotangents
            return (above * ((a + b) / total)[:, None] - jnp.where(hit, a[:, None], 0),)

        return Measured((lse - target, lse), (target >= top,), pull)


@dataclass(frozen=True)
class CrossEntropy(LogLikelihood):
    """The loss of each token; its nll, lse and whether the target has the largest logit."""

    z_loss: float
    smoothing: float

    def of(self, logits: Arrays, data: Arrays) -> Measured:
        """(1 - s) nll + s (lse - mean logit) + z lse^2, pulled through nll, lse and the mean."""
        (nll, lse), (correct,), pull_likelihood = super().of(logits, data)
        loss = nll + self.z_loss * jnp.square(lse)
        size = self.vocabulary.size(logits[0])
        if self.smoothing:
            loss += self.smoothing * (lse - self.vocabulary.sum(logits[0]) / size - nll)

        def pull(cotangents: Arrays) -> Arrays:
            (w,) = cotangents
            (grad,) = pull_likelihood(((1 - self.smoothing) * w, (2 * self.z_loss * lse + self.smoothing) * w))
            return (grad - (self.smoothing / size * w)[:, None] if self.smoothing else grad,)

        return Measured((loss,), (nll, lse, correct), pull)
