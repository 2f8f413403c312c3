"""What every model config offers to training, decoding and planning."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.softmax_mixture import Mixture, log_mixture

Params = Any
"""A plain pytree of nested dictionaries of arrays."""


@struct.dataclass
class Features:
    """The last hidden states and the head that turns them into logits: soft_cap(hidden @ kernel), or a `mixture`.

    `ahead` are states from which the same head predicts the tokens after the next one. `losses` are terms that layers
    add to the objective's mean loss (summed over layers), `metrics` what they report beside it (means over layers);
    both are empty where no layer has any.
    """

    hidden: Float[Array, "batch length d_model"]
    kernel: Float[Array, "d_model vocab"]
    soft_cap: float | None = struct.field(pytree_node=False, default=None)
    mixture: Mixture | None = None
    ahead: Float[Array, "depth batch length d_model"] | None = None
    losses: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)
    metrics: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Base of the model configs."""

    def build(self) -> nn.Module:
        """The Linen module."""
        raise NotImplementedError

    def example(self) -> dict[str, Any]:
        """The smallest input that initialises every parameter."""
        return {"tokens": jnp.zeros((1, 1), jnp.int32)}

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw float32 parameters."""
        return draw(self, key)

    def boxed(self) -> Params:
        """Abstract parameters that carry the logical names of their axes; no memory is used."""
        module, example = self.build(), self.example()
        return jax.eval_shape(lambda key: module.init(key, **example)["params"], jax.random.key(0))

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters; no memory is used."""
        return meta.unbox(self.boxed())

    def logical_axes(self) -> Params:
        """For each parameter the PartitionSpec of its logical axis names."""
        return nn.get_partition_spec(self.boxed())

    def num_params(self) -> int:
        """Number of parameters, exactly."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract()))

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        """Empty decode state for `batch` sequences of up to `length` tokens."""
        raise NotImplementedError

    def generates(self) -> bool:
        """Whether it continues a text from its beginning alone."""
        return True

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of one training step per token (forward and backward) in sequences of `length`."""
        raise NotImplementedError

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of decode state that one more token of context costs."""
        raise NotImplementedError


@partial(jax.jit, static_argnums=0)
def draw(model: Model, key: PRNGKeyArray) -> Params:
    """Initial parameters, compiled once for each config."""
    return meta.unbox(model.build().init(key, **model.example())["params"])


def readout(features: Features) -> Float[Array, "batch length vocab"]:
    """soft_cap(hidden @ kernel) in float32; of a mixture the log-probabilities, which are logits too."""
    if features.mixture is not None:
        return log_mixture(features.hidden, features.kernel, features.mixture, features.soft_cap)
    logits = jnp.einsum("bld,dv->blv", features.hidden, features.kernel, preferred_element_type=jnp.float32)
    if features.soft_cap is None:
        return logits
    return features.soft_cap * jnp.tanh(logits / features.soft_cap)
