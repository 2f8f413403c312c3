"""Single parts of transformers' GPT-2 and LLaMA beside ours, on the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llmjax.nn.attention import Attention
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import GLU, MLP, activation
from llmjax.nn.norms import LayerNorm, RMSNorm, layer_norm, rms_norm
from llmjax.nn.rope import Rope, rotate
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 2e-6
"""One layer of float32: some tens of terms a sum, a few units of 6e-8 each."""
D, FF, HEADS, KV_HEADS, LENGTH = 24, 40, 4, 2, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module, seed=0):
    """The module with every parameter normal."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, parameter.shape).astype(np.float32)))
    return module.eval()


def tensors(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def llama_config(**changes):
    base = {"hidden_size": D, "intermediate_size": FF, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config = transformers.LlamaConfig(**(base | changes))
    config._attn_implementation = "eager"
    return config


def gpt2_config(**changes):
    config = transformers.GPT2Config(**({"n_embd": D, "n_head": HEADS, "n_positions": 32} | changes))
    config._attn_implementation = "eager"
    return config


def causal_mask():
    return torch.triu(torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min), diagonal=1)[None, None]


@evidence("A29", oracle="transformers LlamaRotaryEmbedding", code="llmjax.nn.rope")
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary(base, evidence):
    """A float32 angle of 4,000 radians is good to 2^-13 radians; those below 100 to 2^-18."""
    head_dim, positions = 16, np.array([[0, 1, 2, 3, 50, 700, 3999]])
    x = normal(1, positions.size, HEADS, head_dim)
    rope = {"rope_type": "default", "rope_theta": base}
    rotary = LlamaRotaryEmbedding(llama_config(head_dim=head_dim, rope_parameters=rope))
    cos, sin = rotary(torch.from_numpy(x), torch.from_numpy(positions))
    theirs, _ = apply_rotary_pos_emb(*(torch.from_numpy(x).transpose(1, 2),) * 2, cos, sin)
    ours = rotate(jnp.asarray(x), jnp.asarray(positions), Rope(base=base))
    near = positions[0] < 100
    theirs = theirs.transpose(1, 2).numpy()
    evidence.record(np.abs(np.asarray(ours) - theirs)[:, near].max(), 5e-6)
    evidence.record(np.abs(np.asarray(ours) - theirs).max(), 5e-4)


@evidence("A31", oracle="transformers LlamaRMSNorm", code="llmjax.nn.norms")
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size, evidence):
    x = normal(2, LENGTH, D) * np.float32(size)
    module = randomised(LlamaRMSNorm(D, eps=1e-6))
    ours = rms_norm(jnp.asarray(x), tensors(module)["weight"], 1e-6)
    evidence.record(relative_error(ours, module(torch.from_numpy(x)).detach().numpy()), TOLERANCE)


@evidence("A30", oracle="torch LayerNorm", code="llmjax.nn.norms")
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm(offset, evidence):
    """An offset of 100 standard deviations costs two digits."""
    x = normal(2, LENGTH, D) + np.float32(offset)
    module = randomised(torch.nn.LayerNorm(D, eps=1e-5))
    ours = layer_norm(jnp.asarray(x), tensors(module)["weight"], tensors(module)["bias"], 1e-5)
    evidence.record(relative_error(ours, module(torch.from_numpy(x)).detach().numpy()), TOLERANCE * (1 + offset))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(RMSNorm(eps=1e-6), LlamaRMSNorm(D, eps=1e-6)), (LayerNorm(), torch.nn.LayerNorm(D))]
)
def test_norms_of_bfloat16(ours, theirs):
    """Statistics in float32, result in bfloat16: within one step of 2^-8 of torch's."""
    x = normal(2, LENGTH, D)
    params = jax.tree.map(jnp.asarray, {"params": {"scale": np.ones(D, np.float32)}})
    if isinstance(ours, LayerNorm):
        params["params"]["bias"] = jnp.zeros(D)
    y = ours.build().apply(params, jnp.asarray(x, jnp.bfloat16))
    reference = theirs.to(torch.bfloat16)(torch.from_numpy(x).to(torch.bfloat16)).detach().float().numpy()
    assert y.dtype == jnp.bfloat16
    assert relative_error(y.astype(jnp.float32), reference) < 2**-8


ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "gelu_quick": "quick_gelu", "relu2": "relu2", "silu": "silu"}


@evidence("A32", oracle="transformers ACT2FN", code="llmjax.nn.mlp.activation")
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(name, evidence):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    theirs = transformers.activations.ACT2FN[ACTIVATIONS[name]](torch.from_numpy(x)).numpy()
    evidence.record(np.abs(np.asarray(activation(name)(jnp.asarray(x))) - theirs).max(), 2e-6)


@evidence("A33", oracle="transformers GPT2MLP", code="llmjax.nn.mlp")
def test_gpt2_mlp(evidence):
    x = normal(2, LENGTH, D)
    module = randomised(GPT2MLP(FF, gpt2_config(resid_pdrop=0.0)))
    weights = tensors(module)
    params = {
        ours: {"kernel": weights[f"{theirs}.weight"], "bias": weights[f"{theirs}.bias"]}
        for ours, theirs in (("up", "c_fc"), ("down", "c_proj"))
    }
    ours = MLP(d_ff=FF, bias=True).build(D, 1, GPT2Init()).apply({"params": params}, x)
    evidence.record(relative_error(ours, module(torch.from_numpy(x)).detach().numpy()), TOLERANCE)


@evidence("A34", oracle="transformers LlamaMLP", code="llmjax.nn.mlp")
def test_llama_mlp(evidence):
    x = normal(2, LENGTH, D)
    module = randomised(LlamaMLP(llama_config()))
    weights = tensors(module)
    params = {name: {"kernel": weights[f"{name}_proj.weight"].T} for name in ("gate", "up", "down")}
    ours = GLU(d_ff=FF).build(D, 1, GPT2Init()).apply({"params": params}, x)
    evidence.record(relative_error(ours, module(torch.from_numpy(x)).detach().numpy()), TOLERANCE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_attention(kv_heads):
    x, head_dim = normal(2, LENGTH, D), D // HEADS
    config = llama_config(num_key_value_heads=kv_heads)
    module = randomised(LlamaAttention(config, layer_idx=0))
    positions = torch.arange(LENGTH)[None]
    tables = LlamaRotaryEmbedding(config)(torch.from_numpy(x), positions)
    theirs = module(torch.from_numpy(x), position_embeddings=tables, attention_mask=causal_mask())[0].detach().numpy()
    weights = {name: w.T for name, w in tensors(module).items()}
    params = {
        "query": {"kernel": weights["q_proj.weight"].reshape(D, HEADS, head_dim)},
        "key": {"kernel": weights["k_proj.weight"].reshape(D, kv_heads, head_dim)},
        "value": {"kernel": weights["v_proj.weight"].reshape(D, kv_heads, head_dim)},
        "out": {"kernel": weights["o_proj.weight"].reshape(HEADS, head_dim, D)},
    }
    module = Attention(heads=HEADS, kv_heads=kv_heads).build(D, 1, GPT2Init())
    ours, _ = module.apply({"params": params}, x, Context(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))))
    assert relative_error(ours, theirs) < TOLERANCE


def test_gpt2_attention():
    x, head_dim = normal(2, LENGTH, D), D // HEADS
    module = randomised(GPT2Attention(gpt2_config(attn_pdrop=0.0, resid_pdrop=0.0), layer_idx=0))
    theirs = module(torch.from_numpy(x), attention_mask=causal_mask())[0].detach().numpy()
    weights = tensors(module)
    kernels = np.split(weights["c_attn.weight"], 3, axis=1)
    biases = np.split(weights["c_attn.bias"], 3)
    params = {
        name: {"kernel": kernel.reshape(D, HEADS, head_dim), "bias": bias.reshape(HEADS, head_dim)}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    out = {"kernel": weights["c_proj.weight"].reshape(HEADS, head_dim, D), "bias": weights["c_proj.bias"]}
    module = Attention(heads=HEADS, rope=None, bias=True, out_bias=True).build(D, 1, GPT2Init())
    context = Context(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)))
    ours, _ = module.apply({"params": params | {"out": out}}, x, context)
    assert relative_error(ours, theirs) < TOLERANCE
