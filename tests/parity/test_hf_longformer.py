"""Longformer attention of transformers beside ours: window, global tokens, and their own projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from llmjax.nn.initializers import GPT2Init
from llmjax.nn.longformer import LongformerAttention
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mixer import Context
from tests.evidence import evidence

D, HEADS, LENGTH, WINDOW, GLOBALS = 16, 2, 24, 4, 3


@evidence("A11", oracle="transformers LongformerSelfAttention", code="llmjax.nn.longformer")
@pytest.mark.parametrize("packed", [False, True])
def test_longformer(packed, evidence):
    """One layer of float32 with outputs of order 4: some tens of terms a sum. Their window is both sides together."""
    rng = np.random.default_rng(0)
    sizes = {"hidden_size": D, "num_attention_heads": HEADS, "attention_window": [2 * WINDOW], "num_hidden_layers": 1}
    theirs = LongformerSelfAttention(transformers.LongformerConfig(**sizes), 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, parameter.shape).astype(np.float32)))
    x = rng.standard_normal((1, LENGTH, D)).astype(np.float32)
    special = torch.arange(LENGTH)[None] < GLOBALS
    masks = {"attention_mask": 1e4 * special, "is_index_masked": special & False, "is_index_global_attn": special}
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), **masks, is_global_attn=True)[0].numpy()

    found = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    params = {"out": {"kernel": np.eye(D).reshape(HEADS, -1, D), "bias": np.zeros(D)}}
    for name in ("query", "key", "value"):
        for ours, of in ((name, name), (f"global_{name}", f"{name}_global")):
            kernel, bias = found[f"{of}.weight"].T.reshape(D, HEADS, -1), found[f"{of}.bias"].reshape(HEADS, -1)
            params[ours] = {"kernel": kernel, "bias": bias}
    module = LongformerAttention(heads=HEADS, mask=Longformer(WINDOW, GLOBALS)).build(D, 1, GPT2Init())
    context = Context(jnp.arange(LENGTH)[None], jnp.zeros((1, LENGTH), jnp.int32) if packed else None)
    out = jax.jit(lambda params, x: module.apply({"params": params}, x, context)[0])(params, x)
    evidence.record(np.abs(out - expected).max(), 1e-5)
