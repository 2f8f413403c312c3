"""Small models and every projection adapter, found by type, with parameters that change something."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.adapters import Adapted, ProjectionAdapter
from llmjax.config import subclasses
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.model import flat, unflat
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm

ATTENTION = Block(mixer=Attention(heads=2, kv_heads=1, bias=True), mlp=GLU(d_ff=12), norm=RMSNorm())
"""Grouped queries, biases, three matrices in the feed-forward layer."""
EXPERTS = Block(mixer=Mamba(d_state=4), mlp=MoE(experts=3, expert=MLP(d_ff=8)))
"""A state-space mixer and a mixture of experts."""
MODELS = {
    "attention": Decoder(vocab=11, d_model=8, layers=2, pattern=(ATTENTION,), remat="full"),
    "mamba and experts": Decoder(vocab=11, d_model=8, layers=2, pattern=(EXPERTS,)),
}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6)).astype(np.int32)

SMALL = {
    "BOFT": {"block": 2, "factors": 2, "targets": "blocks/.*/(?!step)[a-z]+$"},
    "OFT": {"block": 2, "targets": "blocks/.*/(?!step)[a-z]+$"},
    "OLoRA": {"rank": 1, "alpha": 1.0},
    "PiSSA": {"rank": 1, "alpha": 1.0},
}
"""Fields that make a method fit the models, rank 2 where it has one and there is no other.

B of OLoRA has rows of length 1, and A and B of PiSSA are as long as W: at a scale of 16 noise makes matrices of entries
near 10, whose logits float32 knows to 1e-4 only (in float64 the two forms agree).
"""
METHODS = subclasses(ProjectionAdapter)
"""Every method that changes matrices, by name."""


def small(method: str, **changes) -> ProjectionAdapter:
    """A method of a rank that fits the models."""
    cls = METHODS[method]
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**({"rank": 2} if "rank" in fields else {}) | SMALL.get(method, {}) | changes)


@cache
def base_params(model):
    """The base's parameters."""
    return model.init(jax.random.key(0))


@cache
def adapted_params(model: Adapted):
    """Parameters of an adapted model, those of the adapters as they start."""
    return jax.jit(model.init)(jax.random.key(1), base_params(model.base))


def shaken(model: Adapted, params, std: float = 0.3):
    """The parameters, normal noise added to those of the adapters that train."""
    random = np.random.default_rng(0)

    def one(path, x):
        here = "adapters/" in path and model.trains(path)
        return x + jnp.asarray(random.normal(0, std, x.shape), x.dtype) if here else x

    return unflat({path: one(path, x) for path, x in flat(params).items()})


@cache
def logits_of(model):
    """A compiled function from parameters to logits."""
    return jax.jit(lambda params: model.build().apply({"params": params}, TOKENS)[0])
