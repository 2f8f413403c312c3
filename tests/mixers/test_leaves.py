"""Every leaf of an expert layer, a distance bias or cross-attention is alive: another value makes another program.

The sweep over whole experiments (tests/test_dead_leaves.py) runs one decoder; here is what it has no place for. Two
configs are told apart by the jaxprs of initialisation and of the whole pass, constants included.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.config import leaves, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.decoder import Decoder
from llmjax.nn.encoder import Encoder
from llmjax.nn.encoder_decoder import EncoderDecoder, Tower
from llmjax.nn.moe import MoE
from llmjax.nn.router import ExpertChoice, TopK
from llmjax.nn.t5_bias import T5Bias
from tests.mixers.cases import D_MODEL, INIT
from tests.test_dead_leaves import changed

LENGTH = 24
PLAIN = Block(Attention(rope=None), None)


def decoder(**fields):
    return Decoder(vocab=19, d_model=D_MODEL, layers=2, unroll=1, initializer=INIT, **fields)


def moe(**fields):
    return decoder(pattern=(Block(Attention(rope=None), MoE(experts=8, **fields)),))


STACKS = {
    "capacity": (moe(router=TopK(k=2, groups=2), capacity=1.5, shared=1, z_loss=0.1), "pattern.0.mlp"),
    "bias": (moe(router=TopK(k=2, groups=2), bias_rate=0.1, balance_loss=0.0), "pattern.0.mlp"),
    "choice": (
        Encoder(
            vocab=19,
            d_model=D_MODEL,
            layers=1,
            pattern=(Block(mlp=MoE(experts=4, router=ExpertChoice(), balance_loss=0.0)),),
        ),
        "pattern.0.mlp.router",
    ),
    "distance": (decoder(pattern=(PLAIN,), distance=T5Bias()), "distance"),
    "encoder": (
        Encoder(vocab=19, d_model=D_MODEL, layers=1, pattern=(Block(Attention(causal=False, rope=None)),)),
        "pattern.0.mixer.causal",
    ),
    "encoder and decoder": (
        EncoderDecoder(
            vocab=19,
            encoder=Tower(d_model=D_MODEL, layers=1, pattern=(Block(Attention(causal=False, rope=None)),)),
            decoder=Tower(d_model=D_MODEL, layers=1, pattern=(Block(Attention(rope=None), cross=CrossAttention()),)),
        ),
        "decoder.pattern.0.cross",
    ),
}


def digest(function, *arguments):
    """The jaxpr and its constants."""
    closed = jax.make_jaxpr(function)(*arguments)
    constants = b"".join(
        np.asarray(c).tobytes() for c in closed.consts if not jax.dtypes.issubdtype(c.dtype, jax.dtypes.prng_key)
    )
    return hashlib.sha256(str(closed).encode() + constants).hexdigest()


def program(config):
    """What tells two configs apart."""
    validate(config)
    module, example = config.build(), config.example()
    example |= {name: jnp.zeros((1, LENGTH), jnp.int32) for name in ("tokens", "source") if name in example}
    init = lambda: module.init(jax.random.key(0), **config.example())
    params = meta.unbox(jax.eval_shape(init)["params"])
    return digest(init), digest(lambda p: module.apply({"params": p}, **example, method="features"), params)


def dead(config, under):
    """The leaves below `under` for which no valid value makes another program."""
    base = program(config)
    paths = [path for path in leaves(config) if path.startswith(under)]
    assert paths
    return [path for path in paths if not any(differs(base, other) for other in changed(config, path))]


def differs(base, other):
    """Whether the other config is one of this width, and not the same program."""
    try:
        return program(other) != base
    except ValueError:
        return False


@pytest.mark.parametrize("name", list(STACKS))
def test_every_leaf_of_a_stack_is_alive(name):
    assert dead(*STACKS[name]) == []


def test_a_dead_leaf_is_found():
    """The test can fail."""

    @dataclasses.dataclass(frozen=True)
    class Forgetful(Attention):
        """Attention that forgot its option."""

        unread: float = 1.0
        """read by nobody"""

    model = decoder(pattern=(Block(Forgetful(rope=None), None),))
    assert dead(model, "pattern.0.mixer.unread") == ["pattern.0.mixer.unread"]
