"""Parameters that are kept in another form than an array: what quantised tensors offer to the modules that use them."""

from abc import ABC, abstractmethod
from typing import Self

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Stored(ABC):
    """A pytree node that stands for one parameter, in the parameter's place of the tree.

    Its leaves carry the parameter's stack axis in front where it has one, and what is static describes the parameter
    unstacked: slices of a stack (`lax.scan`) are Stored parameters again.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, the stack axis included."""

    @property
    @abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype that the parameter is handed out in."""

    @abstractmethod
    def astype(self, dtype: DTypeLike) -> Self:
        """The same, handed out in another dtype; what is stored stays."""

    @abstractmethod
    def dense(self) -> Float[Array, "..."]:
        """The parameter as an array."""

    def dot(self, x: Float[Array, "..."], count: int) -> Float[Array, "..."]:
        """Contract the last `count` axes of `x` with the first of the (unstacked) parameter."""
        return jnp.tensordot(x, self.dense(), axes=count)
