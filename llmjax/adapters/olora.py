"""OLoRA: an orthonormal start for LoRA, from the QR decomposition of W. 2406.01775."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.pissa import Residual


@dataclass(frozen=True)
class OLoRA(Residual):
    """B = Q_r^T, A = R_r^T of W^T = Q R: rows of B are orthonormal. Büyükakyüz 2024 (2406.01775)."""

    def factors(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The first rows of R and columns of Q, transposed."""
        q, r = jnp.linalg.qr(kernel.T)
        return r[: self.rank].T, q[:, : self.rank].T
