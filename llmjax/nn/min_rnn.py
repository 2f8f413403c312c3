"""minGRU and minLSTM: recurrent networks whose gates see only the token, so that a parallel scan trains them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llmjax.nn.initializers import Init
from llmjax.nn.linear import Linear
from llmjax.nn.mixer import Context, Mixer, State
from llmjax.nn.scans import linear_recurrence
from llmjax.nn.sites import site
from pallas_kernels.linear_recurrence.registry import BACKENDS


@dataclass(frozen=True)
class MinRNN(Mixer, ABC):
    """y = h W_out with h_t = keep_t h_{t-1} + write_t h~_t. Feng et al. 2024 (2410.01201).

    The paper also gives a scan of logarithms, against overflow of a scan made of quotients of cumulative products;
    `linear_recurrence` has no quotients.
    """

    expand: int = 1
    """hidden features for each of d_model"""
    positive: bool = True
    """whether the candidate h~ is g(x W), g(x) = x + 1/2 for x >= 0, else sigmoid(x) (appendix B), and not x W"""
    implementation: str | None = None
    """kernel of `pallas_kernels.linear_recurrence`; None takes the best that fits"""

    gates: ClassVar[tuple[str, ...]]
    """Names of the gates' projections."""

    @abstractmethod
    def keep_and_write(
        self, *gates: Float[Array, "batch length hidden"]
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"]]:
        """The factors of the last state and of the candidate, from the gates before their sigmoid."""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MinRNNModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.expand < 1:
            yield "expand", "must be at least 1"
        if self.implementation is not None and self.implementation not in BACKENDS:
            yield "implementation", f"is no linear recurrence: use one of {', '.join(BACKENDS)}, or None"

    def init_state(self, d_model: int, batch: int, length: int, dtype: DTypeLike) -> State:
        """`h` `[batch, hidden]`, float32 zeros."""
        return {"h": jnp.zeros((batch, self.expand * d_model), jnp.float32)}

    def matmul_params(self, d_model: int) -> int:
        """The gates', the candidate's and the output projection."""
        return (len(self.gates) + 2) * self.expand * d_model * d_model

    def mixing_flops(self, d_model: int, length: int) -> float:
        """3 for each feature: the candidate's factor, and the update."""
        return 3 * self.expand * d_model


@dataclass(frozen=True)
class MinGRU(MinRNN):
    """h_t = (1 - z_t) h_{t-1} + z_t h~_t with z_t = sigmoid(x_t W_z + b)."""

    gates: ClassVar[tuple[str, ...]] = ("update",)

    def keep_and_write(
        self, *gates: Float[Array, "batch length hidden"]
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"]]:
        """(1 - z, z)."""
        (z,) = gates
        return jax.nn.sigmoid(-z), jax.nn.sigmoid(z)


@dataclass(frozen=True)
class MinLSTM(MinRNN):
    """h_t = f / (f + i) h_{t-1} + i / (f + i) h~_t with f, i = sigmoid(x_t W + b)."""

    gates: ClassVar[tuple[str, ...]] = ("forget", "input")

    def keep_and_write(
        self, *gates: Float[Array, "batch length hidden"]
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"]]:
        """f / (f + i) is the sigmoid of log f - log i, which divides nothing."""
        forget, write = gates
        ratio = jax.nn.log_sigmoid(forget) - jax.nn.log_sigmoid(write)
        return jax.nn.sigmoid(ratio), jax.nn.sigmoid(-ratio)


class MinRNNModule(nn.Module):
    """Owns a projection for each gate, `candidate` and `out`; sites keep (the last state's factor), z (the states)."""

    config: MinRNN
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context, state: State = None
    ) -> tuple[Float[Array, "batch length d_model"], State]:
        """Mix along the length; with a `state`, from there on."""
        c = self.config
        hidden = c.expand * self.d_model
        arguments = ((self.d_model,), (hidden,), ("d_model", "d_inner"), self.initializer.kernel(self.d_model), True)
        keep, write = c.keep_and_write(*(Linear(*arguments, name=name)(x).astype(jnp.float32) for name in c.gates))
        candidate = Linear(*arguments, name="candidate")(x).astype(jnp.float32)
        if c.positive:
            candidate = jnp.where(candidate >= 0, candidate + 0.5, jax.nn.sigmoid(candidate))
        start = None if state is None else state["h"]
        h, last = linear_recurrence(
            site(self, "keep", keep),
            write * candidate,
            initial_state=start,
            segment_ids=context.segment_ids,
            implementation=c.implementation,
        )
        z = site(self, "z", h.astype(x.dtype))
        residual = self.initializer.residual(hidden, self.layers)
        y = Linear((hidden,), (self.d_model,), ("d_inner", "d_model"), residual, name="out")(z)
        return y, None if state is None else {"h": last}
