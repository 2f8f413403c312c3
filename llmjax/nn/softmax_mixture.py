"""Mixture of softmaxes: a head whose log-probabilities are not bound to the rank of one hidden vector."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import parameter


@dataclass(frozen=True)
class SoftmaxMixture:
    """p(v | h) = sum_k softmax_k(h P) softmax_v(tanh(h W_k) E). Yang et al. 2017 (1711.03953), section 2.3.

    The log-probabilities of one softmax over N contexts are a matrix of rank at most d_model + 1; of the mixture there
    is no such bound.
    """

    components: int = 10
    """softmaxes K (the paper: 15 on Penn Treebank); the head's cost is K times that of one"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A mixture of nothing."""
        if self.components < 1:
            yield "components", "must be at least 1"

    def build(self, d_model: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module; its call takes nothing and gives the `Mixture`."""
        return SoftmaxMixtureModule(self, d_model, init, name=name)

    def matmul_params(self, d_model: int, vocab: int) -> int:
        """Weights that multiply each token, the table of the vocabulary once a component."""
        return self.components * d_model * (1 + d_model + vocab)


@flax.struct.dataclass
class Mixture:
    """The parameters: `prior` P and `latent` W."""

    prior: Float[Array, "d_model components"]
    latent: Float[Array, "d_model components d_model"]


class SoftmaxMixtureModule(nn.Module):
    """Owns `prior` and `latent`."""

    config: SoftmaxMixture
    d_model: int
    initializer: Init

    @nn.compact
    def __call__(self) -> Mixture:
        """The parameters."""
        count, d_model, kernel = self.config.components, self.d_model, self.initializer.kernel(self.d_model)
        prior = parameter(self, "prior", kernel, (d_model, count), ("d_model", None))
        latent = parameter(self, "latent", kernel, (d_model, count, d_model), ("d_model", None, None))
        return Mixture(prior, latent)


def log_mixture(
    hidden: Float[Array, "... d_model"],
    kernel: Float[Array, "d_model vocab"],
    mixture: Mixture,
    soft_cap: float | None = None,
) -> Float[Array, "... vocab"]:
    """log p of every token of the vocabulary, float32; with `soft_cap` the logits of each softmax are capped."""
    wide = jnp.float32
    prior = jnp.einsum("...d,dk->...k", hidden, mixture.prior, preferred_element_type=wide)
    latent = jnp.tanh(jnp.einsum("...d,dke->...ke", hidden, mixture.latent))
    logits = jnp.einsum("...ke,ev->...kv", latent, kernel, preferred_element_type=wide)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    joint = jax.nn.log_softmax(prior)[..., None] + jax.nn.log_softmax(logits)
    return jax.nn.logsumexp(joint, axis=-2)
