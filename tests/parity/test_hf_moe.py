"""The sparse layers of transformers' Mixtral, Qwen3-MoE and DeepSeek-V3 beside ours, on the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.router import TopK, balance_loss, load_of
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 3e-6
"""One layer of float32: some tens of terms a sum, a few units of 6e-8 each, and a softmax."""
D, FF, EXPERTS, LENGTH = 24, 16, 8, 11
SIZES = {"hidden_size": D, "num_experts_per_tok": 3}


def mixtral():
    config = transformers.MixtralConfig(intermediate_size=FF, num_local_experts=EXPERTS, **SIZES)
    return MixtralSparseMoeBlock(config), MoE(EXPERTS, GLU(d_ff=FF), TopK(3))


def qwen3(normalise):
    config = transformers.Qwen3MoeConfig(
        moe_intermediate_size=FF, num_experts=EXPERTS, norm_topk_prob=normalise, **SIZES
    )
    return Qwen3MoeSparseMoeBlock(config), MoE(EXPERTS, GLU(d_ff=FF), TopK(3, normalise=normalise))


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        moe_intermediate_size=FF, n_routed_experts=EXPERTS, n_shared_experts=2, n_group=1, topk_group=1, **SIZES
    )
    assert (config.norm_topk_prob, config.routed_scaling_factor) == (True, 2.5)
    router = TopK(3, scores="sigmoid", scale=2.5)
    return DeepseekV3MoE(config), MoE(EXPERTS, GLU(d_ff=FF), router, shared=2, bias_rate=0.001)


def randomised(module):
    """The module with every parameter normal, the correction bias of the choice included."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            scale = 0.2 if name.endswith("bias") else 0.4
            tensor.copy_(torch.from_numpy(rng.normal(0, scale, tensor.shape).astype(np.float32)))
    return module.eval()


def params_of(module):
    """Their weights under our names."""
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    gate, up = np.split(weights["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
    kernels = {"gate": gate, "up": up, "down": weights["experts.down_proj"].swapaxes(1, 2)}
    params = {"router": {"kernel": weights["gate.weight"].T}}
    params["experts"] = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    if "gate.e_score_correction_bias" in weights:
        params["router"]["bias"] = weights["gate.e_score_correction_bias"]
        shared = {name: weights[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down")}
        params["shared"] = {name: {"kernel": kernel} for name, kernel in shared.items()}
    return jax.tree.map(jnp.asarray, params)


CASES = {
    "MixtralSparseMoeBlock": mixtral,
    "Qwen3MoeSparseMoeBlock": lambda: qwen3(normalise=True),
    "Qwen3MoeSparseMoeBlock, not normalised": lambda: qwen3(normalise=False),
    "DeepseekV3MoE": deepseek_v3,
}


@evidence("A35", oracle="transformers Mixtral, Qwen3-MoE and DeepSeek-V3 sparse blocks", code="llmjax.nn.moe")
@pytest.mark.parametrize("name", list(CASES))
def test_sparse_blocks(name, evidence):
    module, config = CASES[name]()
    module = randomised(module)
    x = np.random.default_rng(1).normal(size=(2, LENGTH, D)).astype(np.float32)
    theirs = module(torch.from_numpy(x)).detach().numpy()
    context = Context(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)))
    ours = config.build(D, 1, GPT2Init()).apply({"params": params_of(module)}, jnp.asarray(x), context)
    evidence.record(relative_error(ours, theirs), TOLERANCE)


@evidence("A35", oracle="transformers load_balancing_loss_func / k", code="llmjax.nn.router.balance_loss")
def test_balance_loss(evidence):
    """Theirs counts a token once for each of its k experts, so that an even load costs k."""
    logits = np.random.default_rng(2).normal(size=(2, LENGTH, EXPERTS)).astype(np.float32)
    present = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 4]])
    gates = (torch.from_numpy(logits.reshape(-1, EXPERTS)),)
    theirs = load_balancing_loss_func(gates, EXPERTS, 3, torch.from_numpy(present.astype(np.int64))) / 3
    router = TopK(3)
    load = load_of(router.route(jnp.asarray(logits), jnp.asarray(present), None), EXPERTS)
    ours = balance_loss(router.affinity(jnp.asarray(logits)), load, jnp.asarray(present))
    evidence.record(abs(float(ours) / float(theirs) - 1), TOLERANCE)
