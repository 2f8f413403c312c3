"""BOFT: orthogonal finetuning by a product of butterfly factors. Liu et al. 2023 (2311.06243)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Boxes, Call, ProjectionAdapter, boxed
from llmjax.nn.model import Model
from llmjax.nn.projections import Projection


@dataclass(frozen=True)
class BOFT(ProjectionAdapter):
    """W' = B_(m-1) ... B_1 B_0 W diag(s), B_i = P_i diag(R_i1, R_i2, ...) P_i^T, R = (I + Q)(I - Q)^-1, Q skew.

    P_i brings together the halves of blocks that stand 2^(i-1) blocks apart (P_0 = I), so that m factors turn
    2^(m-1) blocks of features together with m / 2^(m-1) times the numbers of an OFT of blocks of that size. One factor
    is OFT with a scale s of the outputs. Q = 0 and s = 1 at the start change nothing. Q is the skew part of a whole
    matrix, as in peft, whose Q has the other sign; peft has more than one factor on CUDA only.
    """

    block: int = 4
    """features that turn together in a factor; times 2^(factors - 1) it divides the inputs"""
    factors: int = 1
    """m: how many factors follow each other"""

    def start(self, key: PRNGKeyArray, projection: Projection, kernel: Float[Array, "..."]) -> Boxes:
        """Zeros whose skew parts are the Q `[factors, blocks, block, block]`, and ones of the shape of the outputs."""
        shape = (self.factors, math.prod(projection.inputs) // self.block, self.block, self.block)
        return {
            "skew": boxed(jnp.zeros(shape), *(None,) * 4),
            "scale": boxed(jnp.ones(projection.outputs), *projection.output_axes),
        }

    def turns(self, params: Any) -> Float[Array, "factors blocks block block"]:
        """R - I = 2 Q (I - Q)^-1 of every block, float32."""
        whole = params["skew"].astype(jnp.float32)
        q = (whole - whole.mT) / 2
        return jnp.linalg.solve(jnp.eye(self.block) - q, 2 * q)

    def step(
        self, x: Float[Array, "... features"], turn: Float[Array, "blocks block block"], level: int
    ) -> Float[Array, "... features"]:
        """x B of the factor `level`: x + x P diag(R - I) P^T."""
        lead, apart = x.shape[:-1], 2**level
        pair, part = (2, self.block // 2) if level else (1, self.block)
        sides = x.reshape(*lead, -1, pair, apart, part).swapaxes(-3, -2)
        moved = jnp.einsum("...ni,nij->...nj", sides.reshape(*lead, -1, self.block), turn.astype(x.dtype))
        return x + moved.reshape(*lead, -1, apart, pair, part).swapaxes(-3, -2).reshape(x.shape)

    def weight(
        self, params: Any, kernel: Float[Array, "..."], projection: Projection, shared: Any
    ) -> Float[Array, "..."]:
        """B_(m-1) ... B_0 W diag(s), as (W^T B_0^T ... B_(m-1)^T)^T."""
        columns, turns = kernel.reshape(math.prod(projection.inputs), -1).T, self.turns(params)
        for level in range(self.factors):
            columns = self.step(columns, turns[level].mT, level)
        return columns.T.reshape(kernel.shape) * params["scale"].astype(kernel.dtype)

    def output(self, call: Call, x: Float[Array, "..."], projection: Projection) -> Float[Array, "..."]:
        """(x B_(m-1) ... B_0) W diag(s) + b, the matrix left as it is: y + (s - 1) (y - b)."""
        turned, turns = x.reshape(*x.shape[: x.ndim - len(projection.inputs)], -1), self.turns(call.params)
        for level in reversed(range(self.factors)):
            turned = self.step(turned, turns[level], level)
        y = call.make(turned.reshape(x.shape))
        bias = meta.unbox(call.module.get_variable("params", "bias")) if projection.bias else 0
        return y + (call.params["scale"] - 1).astype(y.dtype) * (y - bias)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Targets that are not there, and inputs that blocks turned together do not divide."""
        yield from super().problems_in(model)
        together = self.block * 2 ** (self.factors - 1)
        for path, p in self.found(model).items():
            if (inputs := math.prod(p.inputs)) % together:
                yield "block", f"times 2^(factors - 1), {together}, does not divide the {inputs} inputs of {path}"
                return

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        yield from super().problems()
        if self.block < 2:
            yield "block", "must be at least 2: one feature cannot turn"
        if self.factors < 1:
            yield "factors", "must be at least 1"
        if self.factors > 1 and self.block % 2:
            yield "block", "must be even where factors exchange halves of blocks"
