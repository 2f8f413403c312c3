"""Position encodings of transformers beside ours: rotary embedding with every scaling, BLOOM's ALiBi, T5's buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.t5.modeling_t5 import T5Attention

from llmjax.nn.alibi import ALiBi
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.rope import Rope, rotate
from llmjax.nn.rope_scaling import DynamicNTK, Llama3, LongRoPE, PositionInterpolation, YaRN
from llmjax.nn.t5_bias import T5Bias, buckets_ahead
from tests.evidence import evidence

pytestmark = pytest.mark.parity
HEADS, HEAD_DIM, TRAINED = 2, 32, 64
PLANES = HEAD_DIM // 2
FREQUENCIES = 5e-7
"""Relative error of frequencies: theirs are powers, quotients and sums in float32, some units of 6e-8."""
NEAR = 1e-4
"""Absolute error of turned features: angles of 200 radians in float32 (2e-5), features up to 4, magnitude 1.25."""

SHORT, LONG = (tuple(float(x) for x in np.linspace(1.0, top, PLANES)) for top in (1.5, 40.0))
SCALINGS = {
    "linear": (PositionInterpolation(4.0), {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (DynamicNTK(2.0, TRAINED), {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": (YaRN(8.0, 4096), {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}),
    "yarn long": (YaRN(2.0, 10**6), {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**6}),
    "yarn short": (
        YaRN(40.0, TRAINED, beta_fast=8.0, beta_slow=2.0, magnitude=1.25),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": TRAINED,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
    ),
    "llama3": (
        Llama3(),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "longrope": (
        LongRoPE(SHORT, LONG, 32.0, TRAINED),
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "original_max_position_embeddings": TRAINED,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
    ),
}
ROWS = {"linear": "J20", "dynamic": "J21", "yarn": "J22", "llama3": "J23", "longrope": "A29"}
SOURCE = {"oracle": "transformers ROPE_INIT_FUNCTIONS", "code": "llmjax.nn.rope_scaling"}
CASES = [
    pytest.param(*case, id=name, marks=evidence(ROWS[name.split()[0]], **SOURCE)) for name, case in SCALINGS.items()
]


def llama(parameters, base, **changes):
    sizes = {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS, "max_position_embeddings": TRAINED}
    return transformers.LlamaConfig(**(sizes | changes), rope_parameters={"rope_theta": base} | parameters)


def features(length, seed=0, batch=1):
    return np.random.default_rng(seed).normal(size=(batch, length, HEADS, HEAD_DIM)).astype(np.float32)


def turned_by(apply, tables, x):
    """Their rotation of `x`, in our layout."""
    theirs, _ = apply(*(torch.from_numpy(x).transpose(1, 2),) * 2, *tables)
    return theirs.transpose(1, 2).numpy()


@pytest.mark.parametrize(("scaling", "parameters"), CASES)
@pytest.mark.parametrize(("base", "length"), [(10_000.0, 40), (500_000.0, 200)])
def test_frequencies(scaling, parameters, base, length, evidence):
    """Below and above the trained length; the magnitude is theirs to the last bit of a Python float or nearly."""
    function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    theirs, magnitude = function(llama(parameters, base), torch.device("cpu"), seq_len=length)
    ours, our_magnitude = scaling.frequencies(base, PLANES, jnp.arange(length)[None])
    ours = np.broadcast_to(np.asarray(ours, np.float64), (1, PLANES))[0]
    evidence.record(np.abs(ours / theirs.double().numpy() - 1).max(), FREQUENCIES)
    evidence.record(abs(our_magnitude - magnitude), 1e-12)


@pytest.mark.parametrize(("scaling", "parameters"), CASES)
def test_rotation(scaling, parameters, evidence):
    """One module sees a long sequence, then a short one: theirs goes back to the plain angles, ours has no memory."""
    module = modeling_llama.LlamaRotaryEmbedding(llama(parameters, 10_000.0))
    for length in (200, 40):
        x, where = features(length), np.arange(length)[None]
        tables = module(torch.from_numpy(x), torch.from_numpy(where))
        theirs = turned_by(modeling_llama.apply_rotary_pos_emb, tables, x)
        ours = jax.jit(rotate, static_argnums=2)(x, where, Rope(scaling=scaling))
        evidence.record(np.abs(np.asarray(ours) - theirs).max(), NEAR)


@evidence("A29", oracle="transformers GPTNeoXRotaryEmbedding", code="llmjax.nn.rope")
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_partial_rotation(fraction, evidence):
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    sizes = {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS}
    config = transformers.GPTNeoXConfig(**sizes, rope_parameters=parameters)
    x, where = features(100), np.arange(100)[None]
    tables = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)(torch.from_numpy(x), torch.from_numpy(where))
    theirs = turned_by(modeling_gpt_neox.apply_rotary_pos_emb, tables, x)
    ours = rotate(jnp.asarray(x), jnp.asarray(where), Rope(fraction=fraction))
    evidence.record(np.abs(np.asarray(ours) - theirs).max(), NEAR)


@evidence("A29", oracle="transformers Qwen2VLRotaryEmbedding", code="llmjax.nn.rope")
def test_sections(evidence):
    """Time, height and width of 2 x 20 tokens, their axes in front."""
    parameters = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]}
    sizes = {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS}
    config = transformers.Qwen2VLConfig(text_config=sizes | {"rope_parameters": parameters}).text_config
    x, where = features(20, batch=2), np.random.default_rng(1).integers(0, 200, (2, 20, 3))
    module = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(config)
    tables = module(torch.from_numpy(x), torch.from_numpy(np.moveaxis(where, -1, 0).copy()))
    theirs = turned_by(modeling_qwen2_vl.apply_rotary_pos_emb, tables, x)
    ours = rotate(jnp.asarray(x), jnp.asarray(where), Rope(1_000_000.0, sections=(4, 6, 6)))
    evidence.record(np.abs(np.asarray(ours) - theirs).max(), NEAR)


@evidence("A28", oracle="transformers build_alibi_tensor (BLOOM)", code="llmjax.nn.alibi")
@pytest.mark.parametrize("heads", [1, 3, 8, 12, 16, 71])
def test_alibi(heads, evidence):
    """Theirs is slope j, with padding at the end; ours is the same less its value at the query, float32."""
    there = np.array([[1] * 9, [1] * 6 + [0] * 3])
    theirs = build_alibi_tensor(torch.from_numpy(there), heads, torch.float32).reshape(2, heads, 1, 9).numpy()
    where = jnp.asarray(np.where(there, np.arange(9), -1))
    table, _ = ALiBi().build(heads, GPT2Init()).init_with_output(jax.random.key(0))
    ours = np.asarray(ALiBi().scores(table, where, where, True))
    expected = theirs - np.swapaxes(theirs, 2, 3)
    pairs = np.broadcast_to((there[:, None, :, None] * there[:, None, None] * np.tri(9)) > 0, ours.shape)
    evidence.record(np.abs(ours - expected)[pairs].max(), 1e-6)


@evidence("A27", oracle="transformers T5Attention._relative_position_bucket", code="llmjax.nn.t5_bias")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (32, 256), (16, 64), (8, 20), (64, 1000)])
def test_t5_buckets(buckets, far, causal, evidence):
    ahead = torch.arange(-far, far + 1)
    theirs = T5Attention._relative_position_bucket(ahead, not causal, buckets, far).numpy()
    evidence.record(np.abs(buckets_ahead(buckets, far, causal) - theirs).max(), 0)


@evidence("A27", oracle="transformers T5Attention.compute_bias", code="llmjax.nn.t5_bias")
@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias(causal, evidence):
    """The whole bias of 300 tokens; their causal table gives keys ahead, which are hidden, bucket 0 as well."""
    config = transformers.T5Config(d_model=8, d_kv=4, num_heads=2, is_decoder=causal)
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    theirs = module.compute_bias(300, 300).detach().numpy()
    table = module.relative_attention_bias.weight.detach().numpy().T
    where = jnp.arange(300)[None]
    ours = T5Bias().scores(jnp.asarray(table), where, where, causal)
    evidence.record(np.abs(np.asarray(ours) - theirs).max(), 0)
