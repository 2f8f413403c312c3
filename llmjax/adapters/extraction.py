"""A LoRA out of two full checkpoints: the best of its rank for what fine-tuning changed."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS
from llmjax.adapters.lora import LoRA
from llmjax.adapters.spectra import energy, matrix
from llmjax.config import ConfigError
from llmjax.nn.model import Params, flat, unflat


def extracted(model: Adapted, base: Params, tuned: Params) -> tuple[Params, dict[str, Float[Array, "..."]]]:
    """Parameters of `model`, a base with one LoRA, that come nearest those of a tuned base, and the energy captured.

    Of D = tuned - base = U S V^T, s A B is the truncation to the rank, which no matrix of that rank comes nearer to in
    the Frobenius or the spectral norm (Eckart and Young 1936, Mirsky 1960); the root of S goes to each of A and B. The
    energy |s A B|^2 / |D|^2 is by path, for each layer. Raises ConfigError where the adapter is not a single LoRA.
    """
    if len(model.adapters) != 1 or type(model.adapters[0]) is not LoRA:
        raise ConfigError("adapters: what fine-tuning changed is extracted into one LoRA")
    adapter, leaves, new = model.adapters[0], flat(base), flat(tuned)
    result: dict[str, Any] = dict(leaves)
    captured = {}
    for place, p in adapter.found(model.base).items():
        path, rank = f"{place}/{p.leaf}", adapter.rank
        change = matrix(new[path].astype(jnp.float32) - leaves[path].astype(jnp.float32), p)
        u, values, v = jnp.linalg.svd(change, full_matrices=False)
        roots, stack = jnp.sqrt(values[..., :rank] / adapter.scale), change.shape[:-2]
        a, b = u[..., :rank] * roots[..., None, :], roots[..., None] * v[..., :rank, :]
        result[f"{place}/{ADAPTERS}/{adapter.name}/a"] = a.reshape(*stack, *p.inputs, rank)
        result[f"{place}/{ADAPTERS}/{adapter.name}/b"] = b.reshape(*stack, rank, *p.outputs)
        captured[path] = energy(values)[..., rank - 1]
    return unflat(result), captured
