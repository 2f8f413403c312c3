"""Variants of attention in transformers beside ours: DeepSeek-V2 and V3, DiffLlama, Reformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.diffllama import modeling_diffllama
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from llmjax.nn.differential import DifferentialAttention
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.lsh_attention import by_sorting, hashes
from llmjax.nn.mixer import Context
from llmjax.nn.mla import MLA
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import YaRN
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 3e-6
"""One layer of float32: some tens of terms a sum, a few units of 6e-8 each."""
D, HEADS, LENGTH = 24, 3, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module, seed=0):
    """The module with every parameter normal, and its parameters."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, parameter.shape).astype(np.float32)))
    return module.eval(), {name: p.detach().numpy() for name, p in module.named_parameters()}


def run(mixer, params, x):
    module = mixer.build(D, 1, GPT2Init())
    context = Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    return jax.jit(lambda params, x: module.apply({"params": params}, x, context)[0])(params, x)


def causal_mask():
    return torch.triu(torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min), diagonal=1)[None, None]


RANK, Q_RANK, NOPE, ROPE, VALUE = 10, 12, 8, 4, 6
SIZES = {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
SHAPE = {"hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}


def mla_params(found):
    """Ours from theirs: their kv_a makes latent and rotary part, their kv_b keys and values of each head."""

    def heads(name, width):
        return np.transpose(found[name].reshape(HEADS, width, -1), (2, 0, 1))

    down, up = found["kv_a_proj_with_mqa.weight"].T, heads("kv_b_proj.weight", NOPE + VALUE)
    params = {
        "latent_down": {"kernel": down[:, :RANK]},
        "rotary": {"kernel": down[:, RANK:]},
        "norm": {"scale": found["kv_a_layernorm.weight"]},
        "key_up": {"kernel": up[..., :NOPE]},
        "value_up": {"kernel": up[..., NOPE:]},
        "out": {"kernel": found["o_proj.weight"].T.reshape(HEADS, VALUE, D)},
    }
    if "q_proj.weight" in found:
        return {**params, "query": {"kernel": heads("q_proj.weight", NOPE + ROPE)}}
    query = {
        "query_down": {"kernel": found["q_a_proj.weight"].T},
        "query_norm": {"scale": found["q_a_layernorm.weight"]},
        "query_up": {"kernel": heads("q_b_proj.weight", NOPE + ROPE)},
    }
    return {**params, **query}


@pytest.mark.parametrize("q_rank", [Q_RANK, None])
@pytest.mark.parametrize("interleaved", [True, False])
def test_deepseek_v3(q_rank, interleaved):
    """With YaRN, whose magnitude stands in the scale: both forms equal theirs."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}
    yarn["original_max_position_embeddings"] = 64
    config = transformers.DeepseekV3Config(
        **SIZES, **SHAPE, q_lora_rank=q_rank, rope_interleave=interleaved, rope_parameters=yarn
    )
    config._attn_implementation = "eager"
    theirs, found = randomised(modeling_deepseek_v3.DeepseekV3Attention(config, 0))
    x = normal(2, LENGTH, D)
    rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    angles = rotary(torch.from_numpy(x), torch.arange(LENGTH)[None])
    expected = theirs(torch.from_numpy(x), angles, causal_mask())[0].detach().numpy()
    layout = "interleaved" if interleaved else "half"
    for form in ("expanded", "absorbed"):
        mixer = MLA(
            **dict(heads=HEADS, kv_rank=RANK, q_rank=q_rank, nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE),
            rope=Rope(layout=layout, scaling=YaRN(4.0, 64, magnitude=1.0)),
            scale=theirs.scaling,
            form=form,
        )
        assert relative_error(run(mixer, mla_params(found), x), expected) < TOLERANCE


def test_deepseek_v2():
    config = transformers.DeepseekV2Config(**SIZES, **SHAPE, q_lora_rank=Q_RANK)
    config._attn_implementation = "eager"
    theirs, found = randomised(modeling_deepseek_v2.DeepseekV2Attention(config, 0))
    x = normal(2, LENGTH, D)
    rotary = modeling_deepseek_v2.DeepseekV2RotaryEmbedding(config)
    angles = rotary(torch.from_numpy(x), torch.arange(LENGTH)[None])
    expected = theirs(torch.from_numpy(x), causal_mask(), position_embeddings=angles)[0].detach().numpy()
    sizes = dict(heads=HEADS, kv_rank=RANK, q_rank=Q_RANK, nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE)
    mixer = MLA(**sizes, norm=RMSNorm(eps=1e-6))
    assert relative_error(run(mixer, mla_params(found), x), expected) < TOLERANCE


@pytest.mark.parametrize("layer", [0, 3])
def test_diffllama(layer):
    """Their head i is ours 2 i below the half and 2 i + 1 above it; value features likewise. Their norm has no scale.

    The difference of two nearly equal maps costs a digit.
    """
    heads, kv_heads, width = 4, 2, 6
    config = transformers.DiffLlamaConfig(
        hidden_size=D, num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, head_dim=width
    )
    config._attn_implementation = "eager"
    theirs, found = randomised(modeling_diffllama.DiffLlamaAttention(config, layer))
    x = normal(2, LENGTH, D)
    angles = modeling_diffllama.DiffLlamaRotaryEmbedding(config)(torch.from_numpy(x), torch.arange(LENGTH)[None])
    expected = theirs(torch.from_numpy(x), angles, causal_mask())[0].detach().numpy()

    def pairs(name, count):
        kernel = found[name].T.reshape(D, 2, count // 2, width)
        return np.swapaxes(kernel, 1, 2).reshape(D, count, width)

    params = {
        "query": {"kernel": pairs("q_proj.weight", heads)},
        "key": {"kernel": pairs("k_proj.weight", kv_heads)},
        "value": {"kernel": pairs("v_proj.weight", kv_heads).reshape(D, kv_heads // 2, 2 * width)},
        "out": {"kernel": found["o_proj.weight"].T.reshape(heads // 2, 2 * width, D)},
        "norm": {"scale": np.ones(2 * width, np.float32)},
        "weight_query": np.stack([found["lambda_q1"], found["lambda_q2"]]),
        "weight_key": np.stack([found["lambda_k1"], found["lambda_k2"]]),
    }
    mixer = DifferentialAttention(heads=2, kv_heads=1, head_dim=width, initial=theirs.lambda_init)
    assert relative_error(run(mixer, params, x), expected) < 3 * TOLERANCE


@pytest.fixture(scope="module")
def reformer():
    """Their attention, with chunks as long as the sequence, on hashes of three rounds."""
    config = transformers.ReformerConfig(
        **dict(hidden_size=D, num_attention_heads=HEADS, attention_head_size=8, is_decoder=True, axial_pos_embds=False),
        **dict(num_hashes=3, num_buckets=6, hash_seed=5, lsh_attn_chunk_length=LENGTH),
    )
    module, found = randomised(LSHSelfAttention(config, 0))
    x = normal(2, LENGTH, D)
    q, v = ((x @ found[f"{name}.weight"].T).reshape(2, LENGTH, HEADS, 8) for name in ("query_key", "value"))
    return module, x, q, v


@evidence("A18", oracle="transformers LSHSelfAttention in one chunk", code="llmjax.nn.lsh_attention")
def test_reformer_in_one_chunk(reformer, evidence):
    """Shared queries and keys, one bucket: a token sees itself where there is nothing else."""
    module, x, q, v = reformer
    expected = module(torch.from_numpy(x)).hidden_states.detach().numpy().reshape(v.shape)
    codes, ids = np.zeros((2, LENGTH, HEADS, 1), np.int32), np.zeros((2, LENGTH), np.int32)
    evidence.record(
        relative_error(jax.jit(by_sorting, static_argnums=4)(q, v, codes, ids, LENGTH), expected), TOLERANCE
    )


@evidence("A18", oracle="transformers LSHSelfAttention, its hashes", code="llmjax.nn.lsh_attention")
def test_reformer_hashes(reformer, evidence):
    """From the rotations that they draw; theirs of different rounds are 6 apart."""
    module, _, q, _ = reformer
    theirs = module._hash_vectors(torch.from_numpy(np.swapaxes(q, 1, 2).copy()), 3, None).numpy()
    torch.manual_seed(5)
    rotations = torch.randn((HEADS, 8, 3, 3)).numpy()
    ours = np.moveaxis(np.asarray(hashes(q, rotations)), 1, 3) + 6 * np.arange(3)[:, None]
    evidence.record(np.abs(ours.reshape(theirs.shape) - theirs).max(), 0)
