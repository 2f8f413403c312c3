"""Every sequence mixer at a size that tests in milliseconds, found by type: a new one is tested because it exists.

`CASES` holds each `Mixer` of `llmjax.nn` and each `AttentionMask`, in its default or, where that is too large to show
anything on a dozen tokens, in a smaller variant of `SMALL`.
"""

import dataclasses
from functools import cache, partial
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from llmjax.config import validate
from llmjax.fields import hints, subclasses
from llmjax.nn.attention import Attention
from llmjax.nn.channel_mixing import ChannelMixing
from llmjax.nn.decoder import enter
from llmjax.nn.delta_net import DeltaNet, GatedDeltaNet
from llmjax.nn.differential import DifferentialAttention
from llmjax.nn.features import Hyperbolic, Identity
from llmjax.nn.gla import GLA
from llmjax.nn.hyena import Hyena
from llmjax.nn.hymba import Hymba
from llmjax.nn.hyper_attention import HyperAttention
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.landmark import LandmarkAttention
from llmjax.nn.linear_attention import LinearAttention
from llmjax.nn.linformer import Linformer
from llmjax.nn.longformer import LongformerAttention
from llmjax.nn.lsh_attention import LSHAttention
from llmjax.nn.mamba import Mamba
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.mask_bigbird import BigBird
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mask_longnet import LongNet
from llmjax.nn.mask_moba import MoBA
from llmjax.nn.mask_multiscale import MultiScale
from llmjax.nn.mask_sparse import SparseTransformer
from llmjax.nn.masks import AttentionMask, Chunked, Window
from llmjax.nn.memorizing import MemorizingAttention
from llmjax.nn.min_rnn import MinGRU
from llmjax.nn.mixer import Mixer
from llmjax.nn.mla import MLA
from llmjax.nn.mlstm import MLSTM
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.rope import Rope
from llmjax.nn.rwkv6 import RWKV6
from llmjax.nn.rwkv7 import RWKV7
from llmjax.nn.s4 import S4
from llmjax.nn.s4d import S4D
from llmjax.nn.s5 import S5

D_MODEL = 16
INIT = GPT2Init(std=0.2)

SMALL: dict[type, tuple[Any, ...]] = {
    Attention: (
        Attention(),
        Attention(kv_heads=2, sinks=True, gate=True, soft_cap=3.0, bias=True),
        Attention(causal=False, rope=None),
    ),
    Window: (Window(3),),
    Chunked: (Chunked(3),),
    SparseTransformer: (
        SparseTransformer(stride=3),
        SparseTransformer(pattern="fixed", stride=4, summary=2, heads="separate"),
    ),
    Longformer: (Longformer(window=1, globals=2, dilations=(1, 2)),),
    LongformerAttention: (LongformerAttention(mask=Longformer(window=1, globals=2)),),
    LongNet: (LongNet((4, 8), (1, 2)),),
    BigBird: (BigBird(block=2, globals=1, window=1, random=1, length=16),),
    MoBA: (MoBA(size=2, top_k=2),),
    MultiScale: (MultiScale(block=4),),
    ChannelMixing: (ChannelMixing(d_ff=24),),
    DeltaNet: (DeltaNet(heads=2),),
    GatedDeltaNet: (GatedDeltaNet(key_heads=2, key_dim=4, taps=3, negative=True),),
    GLA: (GLA(heads=2, rank=3),),
    MLSTM: (MLSTM(heads=2),),
    RWKV6: (RWKV6(heads=2, mix_rank=3, decay_rank=3),),
    RWKV7: (RWKV7(heads=2, decay_rank=3, rate_rank=3, gate_rank=3),),
    LinearAttention: (
        LinearAttention(),
        LinearAttention(heads=2, features=Hyperbolic(count=12), rope=Rope()),
        LinearAttention(heads=2, features=Identity(), normalised=False, causal=False),
    ),
    DifferentialAttention: (DifferentialAttention(heads=2), DifferentialAttention(heads=2, kv_heads=1, mask=Window(3))),
    Linformer: (Linformer(heads=2, rank=3, length=16),),
    LSHAttention: (LSHAttention(heads=2, buckets=2, reach=4, rounds=2),),
    LandmarkAttention: (LandmarkAttention(heads=2, block=3), LandmarkAttention(heads=2, block=2, retrieved=1)),
    MemorizingAttention: (MemorizingAttention(heads=2, segment=3, memory=6, retrieved=2),),
    HyperAttention: (HyperAttention(heads=2, block=2, samples=3, planes=3),),
    MLA: (
        MLA(heads=2, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, value_dim=3),
        MLA(heads=2, kv_rank=2, q_rank=None, nope_dim=4, rope_dim=2, value_dim=3, mask=Window(3)),
    ),
    Hyena: (Hyena(filter_length=32, d_filter=8, bands=3),),
    Hymba: (Hymba(heads=2, kv_heads=1, mask=Window(3), ssm=Mamba(d_state=4)),),
    Mamba: (Mamba(d_state=4), Mamba(d_state=3, expand=1, taps=1, dt_rank=5, bias=True, conv_bias=False)),
    Mamba2: (Mamba2(d_state=4, head_dim=8, groups=2, bias=True),),
    MinGRU: (MinGRU(expand=2, positive=False),),
    RGLRU: (RGLRU(), RGLRU(d_inner=24, blocks=4, bias=False)),
    S4: (S4(d_state=8),),
    S4D: (S4D(d_state=8), S4D(d_state=4, initial="real", discretisation="bilinear")),
    S5: (S5(d_state=8, blocks=2, dt_max=1.0),),
}
"""Variants of a class that are tested in place of its default."""


def variants() -> dict[str, Mixer]:
    """All cases by name."""
    found: dict[str, Mixer] = {}
    for name, cls in subclasses(Mixer).items():
        for i, mixer in enumerate(SMALL.get(cls) or (cls(),)):
            found[name + f"-{i}" * (i > 0)] = mixer
    for name, cls in subclasses(AttentionMask).items():
        for i, mask in enumerate(SMALL.get(cls) or (cls(),)):
            found[f"mask-{name}" + f"-{i}" * (i > 0)] = Attention(mask=mask)
    return found


CASES = variants()
CAUSAL = [name for name, mixer in CASES.items() if not mixer.sees_future()]


def forms(mixer: Mixer) -> list[Mixer]:
    """The mixer in each of its forms, its own first."""
    hint = hints(type(mixer)).get("form")
    literals = [get_args(h) for h in (hint, *get_args(hint)) if get_origin(h) is Literal]
    others = [form for form in (literals or [()])[0] if form != getattr(mixer, "form", None)]
    return [mixer, *(dataclasses.replace(mixer, form=form) for form in others)]


@cache
def params_of(mixer: Mixer, d_model: int = D_MODEL, std: float = 0.1) -> Any:
    """Float32 parameters, shaken so that none is zero; equal for all forms of a mixer."""
    validate(mixer)
    module = mixer.build(d_model, 2, INIT, "mixer")
    context, _ = enter(jnp.zeros((1, 8), jnp.int32), None, None, None)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((1, 8, d_model)), context))
    params = jax.device_get(init(jax.random.key(0))).get("params", {})
    leaves, tree = jax.tree.flatten(meta.unbox(params))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [a + std * random.standard_normal(a.shape).astype(a.dtype) for a in leaves])


def apply(mixer: Mixer, params: Any, x: Any, positions: Any = None, segment_ids: Any = None) -> Any:
    """One call of the mixer on whole sequences `[batch, length, d_model]`."""
    context, _ = enter(x[..., 0], positions, segment_ids, None)
    module = mixer.build(x.shape[-1], 2, INIT, "mixer")
    return module.apply({"params": params}, x, context)[0]


@partial(jax.jit, static_argnames=("mixer",))
def forward(mixer: Mixer, params: Any, x: Any, positions: Any, segment_ids: Any) -> Any:
    """`apply`, compiled."""
    return apply(mixer, params, x, positions, segment_ids)


@partial(jax.jit, static_argnames=("mixer", "cuts", "room"))
def in_parts(mixer: Mixer, params: Any, x: Any, positions: Any, cuts: tuple[int, ...], room: int) -> Any:
    """The same sequences through the decode state: a call for each of the first parts, then token by token."""
    module = mixer.build(x.shape[-1], 2, INIT, "mixer")
    batch = x.shape[0]
    shared = {"slot": jnp.zeros((), jnp.int32), "positions": jnp.full((batch, room), -1, jnp.int32)}

    def call(carry: Any, part: Any) -> Any:
        shared, state = carry
        tokens, where = part
        context, shared = enter(tokens[..., 0], where, None, shared)
        y, state = module.apply({"params": params}, tokens, context, state)
        return (shared, state), y

    carry, outputs, start = (shared, mixer.init_state(x.shape[-1], batch, room, x.dtype)), [], 0
    for stop in cuts:
        carry, y = call(carry, (x[:, start:stop], positions[:, start:stop]))
        outputs, start = [*outputs, y], stop
    rest = (jnp.swapaxes(x[:, start:, None], 0, 1), jnp.swapaxes(positions[:, start:, None], 0, 1))
    _, y = jax.lax.scan(call, carry, rest)
    return jnp.concatenate([*outputs, jnp.swapaxes(y[:, :, 0], 0, 1)], axis=1)
