"""Linear head, softmax and loss, chunked over tokens, with the gradients made in the forward pass."""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Tree = TypeVar("Tree")


class TokenLosses(NamedTuple):
    """What is known of each token after the loss; no gradient flows through it."""

    nll: Float[Array, " tokens"]
    lse: Float[Array, " tokens"]
    correct: Bool[Array, " tokens"]


def linear_cross_entropy(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """sum_i weights_i (nll_i + z_loss lse_i^2), float32, differentiable in `hidden` and `kernel`; each token's terms.

    nll_i = lse_i - logits_i[target_i], lse_i = log sum_v exp(logits_iv), logits = soft_cap(hidden @ kernel) in float32.
    With `chunk`, logits of that many tokens exist at a time and the backward pass only scales gradients that the
    forward pass made (callers who do not differentiate do not pay for them); None keeps all logits. z-loss: Chowdhery
    et al. 2022 (2204.02311). Raises ValueError where the shapes disagree.
    """
    if hidden.ndim != 2 or kernel.shape[:1] != hidden.shape[1:]:
        raise ValueError(f"hidden has shape {hidden.shape}, kernel {kernel.shape}: expected [tokens, d], [d, vocab]")
    if targets.shape != hidden.shape[:1] or weights.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} and weights {weights.shape} must be [{hidden.shape[0]}]")
    if chunk is None:
        loss, terms = losses(hidden, kernel, targets, weights, z_loss, soft_cap)
        return loss, jax.lax.stop_gradient(terms)
    return chunked(hidden, kernel, targets, weights, chunk, z_loss, soft_cap)


def losses(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    z_loss: float,
    soft_cap: float | None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """The definition, with all logits in memory."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    nll = lse - target_logits
    correct = target_logits >= jnp.max(logits, axis=-1)
    loss = jnp.sum(weights * (nll + z_loss * jnp.square(lse)))
    return loss, TokenLosses(nll, lse, correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def chunked(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    chunk: int,
    z_loss: float,
    soft_cap: float | None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """`losses` over chunks of tokens, for callers that do not differentiate."""

    def step(total: Array, part: tuple[Array, ...]) -> tuple[Array, TokenLosses]:
        h, t, w = part
        loss, terms = losses(h, kernel, t, w, z_loss, soft_cap)
        return total + loss, terms

    total, terms = jax.lax.scan(step, jnp.zeros((), jnp.float32), split(chunk, hidden, targets, weights))
    return total, join(terms, hidden.shape[0])


def chunked_forward(
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    chunk: int,
    z_loss: float,
    soft_cap: float | None,
) -> tuple[tuple[Float[Array, ""], TokenLosses], tuple[Array, Array]]:
    """`chunked`, and the gradients of its loss: hidden's chunk by chunk, the kernel's summed in float32."""

    def step(
        carry: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], tuple[Array, TokenLosses]]:
        h, t, w = part
        total, kernel_grad = carry
        loss, terms, logits_grad = loss_and_logits_grad(h, kernel, t, w, z_loss, soft_cap)
        hidden_grad = jnp.einsum("tv,dv->td", logits_grad, kernel).astype(h.dtype)
        kernel_grad += jnp.einsum("td,tv->dv", h, logits_grad, preferred_element_type=jnp.float32)
        return (total + loss, kernel_grad), (hidden_grad, terms)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (total, kernel_grad), (hidden_grad, terms) = jax.lax.scan(step, start, split(chunk, hidden, targets, weights))
    tokens = hidden.shape[0]
    return (total, join(terms, tokens)), (join(hidden_grad, tokens), kernel_grad.astype(kernel.dtype))


def loss_and_logits_grad(
    hidden: Float[Array, "chunk d_model"],
    kernel: Float[Array, "d_model vocab"],
    targets: Int[Array, " chunk"],
    weights: Float[Array, " chunk"],
    z_loss: float,
    soft_cap: float | None,
) -> tuple[Float[Array, ""], TokenLosses, Float[Array, "chunk vocab"]]:
    """Loss, terms and d loss / d (hidden @ kernel) = w [(1 + 2 z lse) softmax - onehot] * d cap, in hidden's dtype."""
    raw = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    logits = raw if soft_cap is None else soft_cap * jnp.tanh(raw / soft_cap)
    top = jnp.max(logits, axis=-1)
    above = jnp.exp(logits - top[:, None])
    total = jnp.sum(above, axis=-1)
    lse = top + jnp.log(total)
    hit = jnp.arange(kernel.shape[1])[None, :] == targets[:, None]
    target_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    nll = lse - target_logits
    grad = above * ((1 + 2 * z_loss * lse) / total)[:, None] - hit
    if soft_cap is not None:
        grad = grad * (1 - jnp.square(logits / soft_cap))
    terms = TokenLosses(nll, lse, target_logits >= top)
    loss = jnp.sum(weights * (nll + z_loss * jnp.square(lse)))
    return loss, terms, (grad * weights[:, None]).astype(hidden.dtype)


def chunked_backward(
    chunk: int,
    z_loss: float,
    soft_cap: float | None,
    gradients: tuple[Array, Array],
    cotangents: tuple[Float[Array, ""], TokenLosses],
) -> tuple[Array, Array, None, None]:
    """Scale the gradients that the forward pass made."""
    scale = cotangents[0]
    hidden_grad, kernel_grad = gradients
    return (hidden_grad * scale).astype(hidden_grad.dtype), (kernel_grad * scale).astype(kernel_grad.dtype), None, None


chunked.defvjp(chunked_forward, chunked_backward)


def split(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[tokens, ...] -> [chunks, chunk, ...], padded with zeros (weight 0)."""
    count = -(-arrays[0].shape[0] // chunk)
    pad = count * chunk - arrays[0].shape[0]
    padded = (jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
    return tuple(a.reshape(count, chunk, *a.shape[1:]) for a in padded)


def join(tree: Tree, tokens: int) -> Tree:
    """Undo `split` for every array of a tree."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], tree)
