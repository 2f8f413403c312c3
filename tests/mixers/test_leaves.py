"""Every leaf of a mixer, a mask, an expert layer or a stack is alive: another value makes another program.

The sweep over whole experiments (tests/test_dead_leaves.py) runs one decoder; here is what it has no place for. Two
configs are told apart by the jaxprs of initialisation, of the whole pass and of a decoding step, constants included.
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
from llmjax.nn.mixer import Mixer
from llmjax.nn.moe import MoE
from llmjax.nn.router import ExpertChoice, TopK
from llmjax.nn.t5_bias import T5Bias
from tests.mixers.cases import CASES, D_MODEL, INIT
from tests.nn.test_visual_tokens import GATED, INJECTED
from tests.test_dead_leaves import changed

LENGTH = 24
PLAIN = Block(Attention(rope=None), None)
EXEMPT = {
    "form": "another way to the same numbers: jaxprs differ where a length calls for it (tests/nn/test_mixers.py)",
    "rope.sections": "matters only where positions have several axes (tests/nn/test_rope.py)",
}


def decoder(**fields):
    return Decoder(vocab=19, d_model=D_MODEL, layers=2, unroll=1, initializer=INIT, **fields)


def moe(**fields):
    return decoder(pattern=(Block(Attention(rope=None), MoE(experts=4, **fields)),))


STACKS = {
    "capacity": (moe(router=TopK(k=2), capacity=1.5, shared=1, z_loss=0.1), "pattern.0.mlp"),
    "bias": (moe(router=TopK(k=2), bias_rate=0.1, balance_loss=0.0), "pattern.0.mlp"),
    "choice": (
        Encoder(vocab=19, d_model=D_MODEL, layers=1, pattern=(Block(mlp=MoE(experts=4, router=ExpertChoice())),)),
        "pattern.0.mlp",
    ),
    "distance": (decoder(pattern=(PLAIN,), distance=T5Bias()), "distance"),
    "encoder": (
        Encoder(vocab=19, d_model=D_MODEL, layers=1, pattern=(Block(Attention(causal=False, rope=None)),)),
        "",
    ),
    "encoder and decoder": (
        EncoderDecoder(
            vocab=19,
            encoder=Tower(d_model=D_MODEL, layers=1, pattern=(Block(Attention(causal=False, rope=None)),)),
            decoder=Tower(d_model=D_MODEL, layers=1, pattern=(Block(Attention(rope=None), cross=CrossAttention()),)),
        ),
        "",
    ),
    "images at tokens": (INJECTED, ""),
    "images between layers": (GATED, ""),
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
    model = decoder(pattern=(Block(config, None),)) if isinstance(config, Mixer) else config
    if isinstance(config, Mixer) and config.sees_future():
        model = Encoder(vocab=19, d_model=D_MODEL, layers=1, pattern=(Block(config, None),), initializer=INIT)
    validate(model)
    module, example = model.build(), model.example()
    example |= {name: jnp.zeros((1, LENGTH), jnp.int32) for name in ("tokens", "source") if name in example}
    key = jax.random.key(0)
    params = meta.unbox(jax.eval_shape(lambda: module.init(key, **model.example())["params"]))
    found = [digest(lambda: module.init(key, **model.example()))]
    found.append(digest(lambda p: module.apply({"params": p}, **example, method="features"), params))
    if isinstance(config, Mixer) and not config.sees_future():
        state = jax.eval_shape(lambda: model.init_state(1, 2 * LENGTH, jnp.float32))
        found.append(digest(lambda p, s: module.apply({"params": p}, example["tokens"][:, :1], state=s), params, state))
    return tuple(found)


def dead(config, under):
    """The leaves below `under` for which no valid value makes another program."""
    base = program(config)
    paths = [p for p in leaves(config) if p.startswith(under) and p.removeprefix(under).lstrip(".") not in EXEMPT]
    return [path for path in paths if not any(differs(base, other) for other in changed(config, path))]


def differs(base, other):
    """Whether the other config is one of this width, and not the same program."""
    try:
        return program(other) != base
    except ValueError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("name", list(CASES))
def test_every_leaf_of_a_mixer_is_alive(name):
    masked = name.startswith("mask-")
    assert dead(CASES[name], "mask" if masked else "") == []


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

    assert dead(Forgetful(), "unread") == ["unread"]
