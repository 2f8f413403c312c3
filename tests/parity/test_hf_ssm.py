"""Mamba, Mamba-2 and Griffin's recurrent block of transformers (their slow paths) beside ours, and their caches."""

import itertools

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from llmjax.nn.mamba import Mamba
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.rg_lru import RGLRU
from tests.evidence import evidence
from tests.mixers.cases import forward, in_parts
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 5e-6
"""One layer of float32 on both sides: sums of some tens of terms, then exponentials and a recurrence of 11 tokens."""
D, LENGTH, PROMPT = 16, 11, 4
X = np.random.default_rng(1).normal(size=(2, LENGTH, D)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))


def randomised(module):
    """The module in inference mode with every parameter random, A_log where the library draws it."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = parameter.numpy() if name == "A_log" else 0
            parameter.copy_(torch.from_numpy((centre + rng.normal(0, 0.4, parameter.shape)).astype(np.float32)))
    return module.eval()


def tensors(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(weight, bias=None):
    return {"kernel": weight.T} | ({} if bias is None else {"bias": bias})


def conv(weight, bias):
    return {"kernel": weight[:, 0].T, "bias": bias}


def mamba(bias):
    config = transformers.MambaConfig(
        hidden_size=D, state_size=5, expand=2, conv_kernel=3, time_step_rank=2, num_hidden_layers=1, use_bias=bias
    )
    theirs = randomised(MambaMixer(config, 0))
    t = tensors(theirs)
    up, gate = np.split(t["in_proj.weight"], 2)
    up_bias, gate_bias = np.split(t["in_proj.bias"], 2) if bias else (None, None)
    params = {
        "up": linear(up, up_bias),
        "gate": linear(gate, gate_bias),
        "conv": conv(t["conv1d.weight"], t["conv1d.bias"]),
        "select": linear(t["x_proj.weight"]),
        "step": linear(t["dt_proj.weight"]),
        "dt_bias": t["dt_proj.bias"],
        "A_log": t["A_log"],
        "D": t["D"],
        "out": linear(t["out_proj.weight"], t.get("out_proj.bias")),
    }
    return config, theirs, Mamba(d_state=5, taps=3, dt_rank=2, bias=bias), params


def mamba2(groups):
    sizes = {"hidden_size": D, "state_size": 5, "expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": groups}
    config = transformers.Mamba2Config(**sizes, conv_kernel=4, chunk_size=4, num_hidden_layers=1)
    theirs = randomised(Mamba2Mixer(config, 0))
    t = tensors(theirs)
    gate, up, select, step = np.split(t["in_proj.weight"], np.cumsum([2 * D, 2 * D, 2 * groups * 5]))
    params = {
        "up": linear(up),
        "select": linear(select),
        "gate": linear(gate),
        "step": linear(step),
        "conv": conv(t["conv1d.weight"], t["conv1d.bias"]),
        "dt_bias": t["dt_bias"],
        "A_log": t["A_log"],
        "D": t["D"],
        "norm": t["norm.weight"],
        "out": linear(t["out_proj.weight"]),
    }
    return config, theirs, Mamba2(d_state=5, head_dim=8, groups=groups), params


CASES = {"mamba": (mamba, False), "mamba-bias": (mamba, True), "mamba2": (mamba2, 1), "mamba2-groups": (mamba2, 2)}


@evidence("B09", oracle="transformers MambaMixer", code="llmjax.nn.mamba")
@evidence("B10", oracle="transformers MambaMixer", code="llmjax.nn.mamba")
@pytest.mark.parametrize("name", ["mamba", "mamba-bias"])
def test_mamba(name, evidence):
    check_whole(name, evidence)


@evidence("B12", oracle="transformers Mamba2Mixer", code="llmjax.nn.mamba2")
@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups"])
def test_mamba2(name, evidence):
    check_whole(name, evidence)


def check_whole(name, evidence):
    """Outputs, and the gradients of a fixed combination of them for the input and what the recurrence depends on."""
    make, option = CASES[name]
    _, theirs, ours, params = make(option)
    x = torch.from_numpy(X).requires_grad_()
    y = theirs(x)
    (y * torch.from_numpy(WEIGHTS)).sum().backward()
    mine = forward(ours, params, X, POSITIONS, None)
    evidence.record(relative_error(np.asarray(mine), y.detach().numpy()), TOLERANCE)

    def loss(params, x):
        return (forward(ours, params, x, POSITIONS, None) * WEIGHTS).sum()

    gradients, dx = jax.jit(jax.grad(loss, (0, 1)))(params, X)
    evidence.record(relative_error(np.asarray(dx), x.grad.numpy()), TOLERANCE)
    t = dict(theirs.named_parameters())
    for mine, name in (("A_log", "A_log"), ("D", "D"), ("dt_bias", "dt_bias" if "dt_bias" in t else "dt_proj.bias")):
        evidence.record(relative_error(np.asarray(gradients[mine]), t[name].grad.numpy()), TOLERANCE)
    evidence.record(
        relative_error(np.asarray(gradients["out"]["kernel"]).T, t["out_proj.weight"].grad.numpy()), TOLERANCE
    )


@evidence("B17", oracle="transformers' cached decoding, a prompt and then single tokens", code="llmjax.nn.mamba")
@pytest.mark.parametrize("name", list(CASES))
def test_cached_decoding(name, evidence):
    make, option = CASES[name]
    config, theirs, ours, params = make(option)
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        cuts = [0, PROMPT, *range(PROMPT + 1, LENGTH + 1)]
        parts = [
            theirs(torch.from_numpy(X[:, start:stop]), cache_params=cache) for start, stop in itertools.pairwise(cuts)
        ]
    mine = in_parts(ours, params, X, POSITIONS, cuts=(PROMPT,), room=LENGTH)
    evidence.record(relative_error(np.asarray(mine), torch.cat(parts, dim=1).numpy()), TOLERANCE)


def griffin():
    config = transformers.RecurrentGemmaConfig(
        hidden_size=D, lru_width=D, num_attention_heads=4, num_hidden_layers=1, block_types=["recurrent"]
    )
    theirs = randomised(RecurrentGemmaRecurrentBlock(config, 0))
    t = tensors(theirs)
    params = {
        "up": linear(t["linear_x.weight"], t["linear_x.bias"]),
        "gate": linear(t["linear_y.weight"], t["linear_y.bias"]),
        "conv": conv(t["conv_1d.weight"], t["conv_1d.bias"]),
        "Lambda": t["rg_lru.recurrent_param"],
        "out": linear(t["linear_out.weight"], t["linear_out.bias"]),
    }
    for mine, name in (("recurrence_gate", "recurrent_gate"), ("input_gate", "input_gate")):
        params |= {
            f"{mine}_{part}": t[f"rg_lru.{name}_{other}"] for part, other in (("kernel", "weight"), ("bias", "bias"))
        }
    return theirs, RGLRU(blocks=4), params


def test_griffin():
    """The whole block in one call, and from its cache: a prompt, then single tokens."""
    theirs, ours, params = griffin()
    positions = torch.from_numpy(POSITIONS).long()
    cuts = [0, PROMPT, *range(PROMPT + 1, LENGTH + 1)]
    with torch.no_grad():
        whole, _ = theirs(torch.from_numpy(X), positions, None, use_cache=False)
        parts = [
            theirs(torch.from_numpy(X[:, start:stop]), positions[:, start:stop], None, use_cache=True)[0]
            for start, stop in itertools.pairwise(cuts)
        ]
    assert relative_error(np.asarray(forward(ours, params, X, POSITIONS, None)), whole.numpy()) < TOLERANCE
    mine = in_parts(ours, params, X, POSITIONS, cuts=(PROMPT,), room=LENGTH)
    assert relative_error(np.asarray(mine), torch.cat(parts, dim=1).numpy()) < TOLERANCE
