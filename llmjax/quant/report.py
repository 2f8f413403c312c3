"""What quantisation did: the error of every layer, and the bytes that are left."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from llmjax.nn.model import Model, Params
from llmjax.nn.stored import Stored
from llmjax.quant.formats import rounded
from llmjax.quant.noise import relative_error, sqnr_db
from llmjax.quant.quantize import Quantize, chosen, layout_of
from llmjax.quant.tensor import QTensor


class LayerError(NamedTuple):
    """Error of one parameter, an entry a matrix of its stack."""

    relative: Float[Array, "*stack"]
    """|W - W'| / |W|"""
    sqnr_db: Float[Array, "*stack"]
    """10 log10 |W|^2 / |W - W'|^2"""


class Memory(NamedTuple):
    """What parameters occupy, and the quantised ones among them."""

    bytes: int
    """all of them, scales included"""
    weights: int
    """how many numbers they stand for"""
    quantised_bytes: int
    quantised_weights: int

    @property
    def bits(self) -> float:
        """Bits of a weight, over all parameters."""
        return 8 * self.bytes / self.weights

    @property
    def quantised_bits(self) -> float:
        """Bits of a quantised weight, its share of the scales included."""
        return 8 * self.quantised_bytes / max(1, self.quantised_weights)


def errors(params: Params, quantised: Params) -> dict[str, LayerError]:
    """The error of every quantised parameter, by path; a stack is told apart by layers."""
    dense, stored = flatten_dict(params, sep="/"), flatten_dict(quantised, sep="/")
    return {
        path: _errors(dense[path], tensor.dense(), tensor)
        for path, tensor in stored.items()
        if isinstance(tensor, QTensor)
    }


def _errors(array: Float[Array, "..."], approximation: Float[Array, "..."], tensor: QTensor) -> LayerError:
    both = tensor.layout.transposed(jnp.asarray(array)), tensor.layout.transposed(approximation.astype(jnp.float32))
    return layer_error(*both)


@jax.jit
def layer_error(
    w: Float[Array, "*stack outputs inputs"], approximation: Float[Array, "*stack outputs inputs"]
) -> LayerError:
    """The error of each matrix of a stack."""
    relative, ratio = relative_error, sqnr_db
    for _ in w.shape[:-2]:
        relative, ratio = jax.vmap(relative), jax.vmap(ratio)
    return LayerError(relative(w, approximation), ratio(w, approximation))


def rounding_errors(model: Model, params: Params, config: Quantize) -> dict[str, LayerError]:
    """What rounding to the nearest would cost each projection now; for watching a model in training."""
    flat, found = flatten_dict(params, sep="/"), {}
    for path, projection in chosen(model, config).items():
        form, _ = config.choice(path, projection) or (config.format, None)
        w = layout_of(projection).transposed(flat[f"{path}/{projection.leaf}"])
        found[path] = layer_error(w, rounded(w, form))
    return found


def memory(params: Params) -> Memory:
    """Bytes of the arrays of a tree (or of their shapes alone)."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Stored))
    stored = [node for node in nodes if isinstance(node, Stored)]
    return Memory(nbytes(nodes), sum(map(_numbers, nodes)), nbytes(stored), sum(map(_numbers, stored)))


def nbytes(tree: Params) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _numbers(node: Array | Stored) -> int:
    count = 1
    for axis in node.shape:
        count *= axis
    return count
