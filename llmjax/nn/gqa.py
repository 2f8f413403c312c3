"""From multi-head to grouped-query attention: the start of uptraining, made from a trained model's weights."""

from dataclasses import replace
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Float

from llmjax.nn.attention import Attention
from llmjax.nn.model import Params
from llmjax.nn.stack import Stack

S = TypeVar("S", bound=Stack)


def pool_kv_heads(model: S, params: Params, kv_heads: int) -> tuple[S, Params]:
    """The model with `kv_heads` key and value heads in every `Attention` of its pattern, and its parameters.

    Each new head is the mean of a group of old ones, kernels and biases, so that queries keep their group; where the
    heads of a group are equal, the model computes what it did. Ainslie et al. 2023 (2305.13245, section 2.1). Raises
    ValueError where `kv_heads` does not divide the heads there are.
    """
    blocks, pattern = dict(params["blocks"]), list(model.pattern)
    for i, block in enumerate(model.pattern):
        if not isinstance(block.mixer, Attention):
            continue
        old = block.mixer.sizes(model.d_model)[1]
        if kv_heads < 1 or old % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide the {old} of pattern.{i}.mixer")
        pattern[i] = replace(block, mixer=replace(block.mixer, kv_heads=kv_heads))
        layer = blocks[str(i)]
        pooled = {name: mean_of_groups(layer["mixer"][name], kv_heads) for name in ("key", "value")}
        blocks[str(i)] = {**layer, "mixer": {**layer["mixer"], **pooled}}
    return replace(model, pattern=tuple(pattern)), {**params, "blocks": blocks}


def mean_of_groups(projection: Any, groups: int) -> Any:
    """Each array `[..., heads, head_dim]` of a projection with its heads averaged in `groups` of neighbours."""

    def mean(x: Float[Array, "... heads head_dim"]) -> Float[Array, "... groups head_dim"]:
        return x.reshape(*x.shape[:-2], groups, -1, x.shape[-1]).mean(axis=-2)

    return jax.tree.map(mean, projection)
