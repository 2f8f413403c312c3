"""Linear attention's relatives in transformers beside ours, on the same random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, torch_recurrent_gated_delta_rule
from transformers.models.xlstm import modeling_xlstm

from llmjax.config import with_
from llmjax.models import mapping, rwkv
from llmjax.nn.delta_net import GatedDeltaNet, unit
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Context
from llmjax.nn.mlstm import MLSTM
from llmjax.nn.norms import RMSNorm
from llmjax.nn.retention import retention
from pallas_kernels.gated_delta_rule import gated_delta_rule
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 5e-6
"""One layer of float32: sums of some tens of terms, twice one after the other, and a normalisation."""
D, LENGTH, HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM, TAPS = 16, 13, 4, 2, 6, 5, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module, seed=0):
    """The module with every parameter normal."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, parameter.shape).astype(np.float32)))
    return module.eval()


def weights_of(module):
    """Every parameter by name; matrices transposed, as ours multiply from the right."""
    arrays = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return {name.removesuffix(".weight"): x.T if x.ndim == 2 else x for name, x in arrays.items()}


def run(module, x):
    """What a torch module makes of `x`, without its other results."""
    with torch.no_grad():
        out = module(torch.from_numpy(x))
    return (out[0] if isinstance(out, tuple) else out).numpy()


def ours(mixer, params, x):
    """What our mixer makes of `x` with given kernels and vectors."""
    context = Context(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    module = mixer.build(x.shape[-1], 1, GPT2Init())
    return jax.jit(lambda x: module.apply({"params": params}, x, context)[0])(x)


def kernels(**arrays):
    return {name: {"kernel": x} for name, x in arrays.items()}


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
@evidence("B05", oracle="transformers RwkvModel", code="llmjax.nn.rwkv4")
def test_rwkv4(form, evidence):
    """The whole model: time mixing, then channel mixing, each after a LayerNorm and added to the stream."""
    config = transformers.RwkvConfig(
        vocab_size=11,
        hidden_size=D,
        attention_hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        rescale_every=0,
    )
    model = randomised(transformers.RwkvModel(config))
    tokens = np.random.default_rng(1).integers(0, 11, (2, LENGTH))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens), use_cache=False).last_hidden_state.numpy()
    decoder = rwkv.from_hf_config(config.to_dict() | {"tie_word_embeddings": True})
    weights = {f"rwkv.{name}": x.numpy() for name, x in model.state_dict().items()}
    params = mapping.import_weights(weights, decoder, rwkv.FAMILY)
    decoder = with_(decoder, "pattern.0.mixer.form", form)
    run = jax.jit(lambda params: decoder.build().apply({"params": params}, tokens, method="features")[0].hidden)
    evidence.record(relative_error(run(params), theirs), 4 * TOLERANCE)  # four layers


def split_taps(taps, heads):
    """The three convolutions of one: `[taps, heads, dim]` each."""
    taps = taps[:, 0].T
    cuts = np.cumsum([KEY_HEADS * KEY_DIM] * 2)
    return [x.reshape(TAPS, n, -1) for x, n in zip(np.split(taps, cuts, axis=1), heads, strict=True)]


def delta_net(form="chunked", **options):
    sizes = dict(heads=HEADS, key_heads=KEY_HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM, taps=TAPS)
    return GatedDeltaNet(**sizes, **options, form=form)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_olmo_hybrid_gated_delta_net(form):
    """Separate projections, and beta up to 2."""
    config = transformers.OlmoHybridConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
    )
    module, x = randomised(OlmoHybridGatedDeltaNet(config, 0)), normal(2, LENGTH, D)
    w = weights_of(module)
    by_head = {"query": ("q", KEY_HEADS), "key": ("k", KEY_HEADS), "value": ("v", HEADS), "gate": ("g", HEADS)}
    params = kernels(**{name: w[f"{p}_proj"].reshape(D, heads, -1) for name, (p, heads) in by_head.items()})
    params |= kernels(write=w["b_proj"], decay=w["a_proj"], out=w["o_proj"].reshape(HEADS, VALUE_DIM, D))
    taps = split_taps(module.conv1d.weight.detach().numpy(), (KEY_HEADS, KEY_HEADS, HEADS))
    params |= dict(zip(("query_taps", "key_taps", "value_taps"), taps, strict=True))
    params |= {"decay_bias": w["dt_bias"], "decay_rate": w["A_log"], "norm": {"scale": w["o_norm"]}}
    mixer = delta_net(form, negative=True, norm=RMSNorm(eps=1e-5))
    assert relative_error(ours(mixer, params, x), run(module, x)) < TOLERANCE


def test_qwen3_next_gated_delta_net():
    """One projection for each group of heads, cut into query, key, value and gate; two value heads a key head."""
    config = transformers.Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
    )
    module, x = randomised(Qwen3NextGatedDeltaNet(config, 0)), normal(2, LENGTH, D)
    w, each = weights_of(module), HEADS // KEY_HEADS
    grouped = w["in_proj_qkvz"].reshape(D, KEY_HEADS, -1)
    q, k, v, z = np.split(grouped, np.cumsum([KEY_DIM, KEY_DIM, each * VALUE_DIM]), axis=-1)
    b, a = np.split(w["in_proj_ba"].reshape(D, KEY_HEADS, -1), 2, axis=-1)
    params = kernels(query=q, key=k, value=v.reshape(D, HEADS, -1), gate=z.reshape(D, HEADS, -1))
    params |= kernels(write=b.reshape(D, -1), decay=a.reshape(D, -1), out=w["out_proj"].reshape(HEADS, VALUE_DIM, D))
    taps = split_taps(module.conv1d.weight.detach().numpy(), (KEY_HEADS, KEY_HEADS, HEADS))
    params |= dict(zip(("query_taps", "key_taps", "value_taps"), taps, strict=True))
    params |= {"decay_bias": w["dt_bias"], "decay_rate": w["A_log"], "norm": {"scale": w["norm"]}}
    assert relative_error(ours(delta_net(), params, x), run(module, x)) < TOLERANCE


def test_gated_delta_rule():
    """The rule by itself, from a state, with the final state."""
    q, k = normal(2, LENGTH, HEADS, KEY_DIM), normal(2, LENGTH, HEADS, KEY_DIM, seed=1)
    v, g = normal(2, LENGTH, HEADS, VALUE_DIM, seed=2), -np.abs(normal(2, LENGTH, HEADS, seed=3))
    beta, state = 1 / (1 + np.exp(normal(2, LENGTH, HEADS, seed=4))), normal(2, HEADS, KEY_DIM, VALUE_DIM, seed=5)
    tensors = (torch.from_numpy(x) for x in (q, k, v, g, beta, state))
    theirs = torch_recurrent_gated_delta_rule(*tensors, output_final_state=True, use_qk_l2norm_in_kernel=True)
    rule = functools.partial(gated_delta_rule, scale=KEY_DIM**-0.5)
    out, final = jax.jit(rule)(unit(q), unit(k), v, beta, g, initial_state=state)
    assert relative_error(out, theirs[0].numpy()) < TOLERANCE
    assert relative_error(final, theirs[1].numpy()) < TOLERANCE


@evidence("B13", oracle="transformers MiniMaxLightningAttention", code="llmjax.nn.retention")
def test_lightning_attention(evidence):
    """Constant decays: the module between its projections, in blocks of 4 tokens; gate, norm and output taken out."""
    config = transformers.MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D // HEADS,
        num_hidden_layers=2,
        block_size=4,
        layer_types=["linear_attention", "full_attention"],
    )
    module, x = randomised(MiniMaxLightningAttention(config, 0)), normal(2, LENGTH, D)
    module.norm = torch.nn.Identity()
    with torch.no_grad():
        module.output_gate.weight.zero_()  # a gate of a half
        module.out_proj.weight.copy_(2 * torch.eye(D))
        theirs = module(torch.from_numpy(x), None, None)[0].numpy().reshape(2, LENGTH, HEADS, -1)
        projected = module.act_fn(module.qkv_proj(torch.from_numpy(x))).numpy()
    q, k, v = np.split(projected.reshape(2, LENGTH, HEADS, -1), 3, axis=-1)
    slope = module.slope_rate.numpy().ravel()
    out, _ = jax.jit(retention)(q * np.sqrt(np.float32(D // HEADS)), k, v, -slope)
    evidence.record(relative_error(out, theirs), TOLERANCE)


@pytest.mark.skipif(modeling_xlstm.external_xlstm, reason="the layer is another package's, with kernels of its own")
@pytest.mark.parametrize("form", ["chunked", "recurrent", "quadratic"])
def test_mlstm(form):
    """The layer of xLSTM 7B, without the 1e-6 that transformers adds to the normaliser."""
    config = transformers.xLSTMConfig(
        hidden_size=D,
        num_heads=2,
        num_hidden_layers=1,
        chunk_size=4,
        eps=0.0,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
    )
    module, x = randomised(modeling_xlstm.xLSTMLayer(config)), normal(2, LENGTH, D)
    w = weights_of(module)
    params = kernels(
        **{name: w[short].reshape(D, 2, -1) for name, short in (("query", "q"), ("key", "k"), ("value", "v"))}
    )
    params |= kernels(gate=w["ogate_preact"].reshape(D, 2, -1), out=w["out_proj"].reshape(2, -1, D))
    params |= kernels(input=w["igate_preact"], forget=w["fgate_preact"])
    params |= {"input_bias": w["igate_preact.bias"], "forget_bias": w["fgate_preact.bias"]}
    params |= {"norm_scale": w["multihead_norm"].reshape(2, -1)}
    assert relative_error(ours(MLSTM(heads=2, form=form), params, x), run(module, x)) < TOLERANCE
