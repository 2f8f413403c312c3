"""OFT: the inputs of a matrix turned by rotations of blocks of features. 2306.07280; on the inputs: 2506.19847."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, ProjectionAdapter, boxed
from llmjax.nn.model import Model
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class OFT(ProjectionAdapter):
    """W' = R W, R = diag(R_1, R_2, ...) with R_i = (I + Q_i)(I - Q_i)^-1, Q_i skew. Qiu et al. 2023 (Cayley's form).

    R is orthogonal: angles between the columns of W stay. Q = 0 at the start changes nothing.
    """

    block: int = 32
    """features that turn together; divides the inputs"""
    terms: int | None = None
    """None for the inverse itself; n for I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1) in its place (peft has 5), orthogonal only
    where Q is small"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """Zeros: the entries of each Q above its diagonal, row by row."""
        count = math.prod(projection.inputs) // self.block
        return {"skew": boxed(jnp.zeros((count, self.block * (self.block - 1) // 2)), None, None)}

    def turn(self, params: Any) -> Float[Array, "blocks block block"]:
        """R - I, float32: 2 Q (I - Q)^-1, or the series."""
        upper = jnp.zeros((params["skew"].shape[0], self.block, self.block))
        rows, columns = jnp.triu_indices(self.block, 1)
        upper = upper.at[:, rows, columns].set(params["skew"].astype(jnp.float32))
        q = upper - upper.mT
        if self.terms is None:
            return jnp.linalg.solve(jnp.eye(self.block) - q, 2 * q)
        power, total = q, jnp.zeros_like(q)
        for _ in range(self.terms - 2):
            total, power = total + 2 * power, power @ q
        return total + power

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """R W."""
        rows = kernel.reshape(-1, self.block, kernel.size // math.prod(projection.inputs))
        return kernel + jnp.einsum("nij,njo->nio", self.turn(params).astype(kernel.dtype), rows).reshape(kernel.shape)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """(x R) W + b, the matrix left as it is."""
        lead = x.shape[: x.ndim - len(projection.inputs)]
        parts = x.reshape(*lead, -1, self.block)
        turned = jnp.einsum("...ni,nij->...nj", parts, self.turn(call.params).astype(x.dtype)).reshape(x.shape)
        return call.make(x + turned)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Targets that are not there, and inputs that blocks do not divide."""
        yield from super().problems_in(model)
        for path, p in self.found(model).items():
            if math.prod(p.inputs) % self.block:
                yield "block", f"does not divide the {math.prod(p.inputs)} inputs of {path}"
                return

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.block < 2:
            yield "block", "must be at least 2: one feature cannot turn"
        if self.terms is not None and self.terms < 2:
            yield "terms", "must be at least 2, or None for the inverse itself"
