"""Adapters of peft that are no change of a matrix beside ours, live: logits of random weights, and trainable counts."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from llmjax.adapters import Adapted
from llmjax.adapters.fold import folded
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.p_tuning import PTuning
from llmjax.adapters.prefix import PrefixTuning
from llmjax.adapters.prompt import PromptTuning
from llmjax.config import validate
from llmjax.models import hf
from llmjax.nn.model import flat, unflat
from scripts.golden_models import GPT2, LLAMA, random_model
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
BASES = {"gpt2": GPT2, "llama": LLAMA}
bases = pytest.mark.parametrize("name", BASES)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7))
CAUSAL = "CAUSAL_LM"


def run(name, config, folder):
    """Their logits with random adapter weights, these by name, and our base and its parameters."""
    model = random_model(BASES[name], seed=5)
    model.save_pretrained(folder)
    theirs = peft.get_peft_model(model, config).eval()
    random, own = np.random.default_rng(1), {}
    for path, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.from_numpy(random.normal(0.3, 0.5, parameter.shape).astype(np.float32))
            own[path] = parameter.data.numpy()
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(TOKENS)).logits.numpy()
    return logits[:, -TOKENS.shape[1] :], own, *hf.load_hf(folder)


def ours(model, params, own):
    """Our logits, the parameters in `own` being those given."""
    validate(model)
    leaves = flat(model.init(jax.random.key(0), params))
    assert all(leaves[path].shape == x.shape for path, x in own.items())
    assert {path for path in leaves if model.trains(path)} == set(own)
    params = unflat(leaves | {path: jnp.asarray(x) for path, x in own.items()})
    apply = jax.jit(lambda params: model.build().apply({"params": params}, TOKENS.astype(np.int32))[0])
    return np.asarray(apply(params)), params


def only(own, *words):
    """The one weight whose name holds all the words."""
    (found,) = (x for path, x in own.items() if all(word in path for word in words))
    return found


def linear(own, ours, theirs):
    """A layer of theirs in our names and sides."""
    weight, bias = (only(own, f"{theirs}.{leaf}") for leaf in ("weight", "bias"))
    return {f"{ours}/kernel": weight.T, f"{ours}/bias": bias}


@evidence("G28", oracle="peft IA3", code="llmjax.adapters.ia3")
@bases
def test_ia3(name, tmp_path, evidence):
    """Fused queries, keys and values of GPT-2; keys and values alone of LLaMA; feed-forward activations of both."""
    fused = name == "gpt2"
    targets = ["c_attn", "mlp.c_proj"] if fused else ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(task_type=CAUSAL, target_modules=targets, feedforward_modules=targets[-1:])
    wanted, own, base, params = run(name, config, tmp_path)
    mine = {}
    for word, heads in (("query", base.pattern[0].mixer.heads), ("key", None), ("value", None)):
        rows = heads or base.pattern[0].mixer.kv_heads or base.pattern[0].mixer.heads
        if fused:
            i = ("query", "key", "value").index(word)
            each = [np.split(only(own, f"h.{n}.", "c_attn").ravel(), 3)[i] for n in range(2)]
        elif word == "query":
            continue
        else:
            each = [only(own, f"layers.{n}.", f"{word[0]}_proj").ravel() for n in range(2)]
        mine[f"blocks/0/mixer/{word}/adapters/default/factor"] = np.stack(each).reshape(2, rows, -1)
    down = "mlp.c_proj" if fused else "down_proj"
    layer = "h" if fused else "layers"
    each = [only(own, f"{layer}.{n}.", down).ravel() for n in range(2)]
    mine["blocks/0/mlp/down/adapters/default/factor"] = np.stack(each)
    targets = "/(query|key|value|down)$" if fused else "/(key|value|down)$"
    found, _ = ours(Adapted(base=base, adapters=(IA3(targets=targets),)), params, mine)
    evidence.record(relative_error(found, wanted), 1e-5)
    assert sum(x.size for x in own.values()) == sum(x.size for x in mine.values())


@evidence("G26", oracle="peft PromptTuning", code="llmjax.adapters.prompt")
@bases
def test_prompt_tuning(name, tmp_path, evidence):
    config = peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=4)
    wanted, own, base, params = run(name, config, tmp_path)
    model = Adapted(base=base, adapters=(PromptTuning(count=4),))
    found, _ = ours(model, params, {"embed/adapters/default/prompt": only(own, "embedding")})
    evidence.record(relative_error(found, wanted), 1e-5)


@evidence("G27", oracle="peft PromptEncoder", code="llmjax.adapters.p_tuning")
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning(encoder, tmp_path, evidence):
    """The network that writes the prompt, and the prompt alone."""
    kind = {"encoder_reparameterization_type": encoder.upper(), "encoder_dropout": 0.0, "encoder_num_layers": 2}
    config = peft.PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=4, encoder_hidden_size=6, **kind)
    wanted, own, base, params = run("gpt2", config, tmp_path)
    mine = {"embedding": only(own, "embedding")}
    for i in range(3 if encoder == "mlp" else 2):
        mine |= linear(own, f"mlp_{i}", f"mlp_head.{2 * i}")
    if encoder == "lstm":
        for i in range(2):
            for way, suffix in (("forward", ""), ("backward", "_reverse")):
                for part, short in (("given", "ih"), ("past", "hh")):
                    for leaf, word in (("kernel", "weight"), ("bias", "bias")):
                        (x,) = (x for path, x in own.items() if path.endswith(f".{word}_{short}_l{i}{suffix}"))
                        mine[f"lstm_{i}_{way}/{part}/{leaf}"] = x.T
    model = Adapted(base=base, adapters=(PTuning(count=4, hidden=6, encoder=encoder),))
    found, params = ours(model, params, {f"embed/adapters/default/{path}": x for path, x in mine.items()})
    evidence.record(relative_error(found, wanted), 1e-5)
    after, kept = folded(model, params)
    again = after.build().apply({"params": kept}, TOKENS.astype(np.int32))[0]
    evidence.record(relative_error(np.asarray(again), wanted), 1e-5)


@evidence("G25", oracle="peft PrefixEncoder", code="llmjax.adapters.prefix")
@pytest.mark.parametrize("hidden", [None, 6])
@bases
def test_prefix_tuning(name, hidden, tmp_path, evidence):
    """Keys and values of every layer, grouped ones too, learned or written by a network; positions follow after."""
    kind = {} if hidden is None else {"prefix_projection": True, "encoder_hidden_size": hidden}
    config = peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4, **kind)
    wanted, own, base, params = run(name, config, tmp_path)
    mine = {"prefix": only(own, "embedding")}
    if hidden is not None:
        mine = {"embedding": only(own, "embedding")}
        mine |= linear(own, "into", "transform.0") | linear(own, "out", "transform.2")
    model = Adapted(base=base, adapters=(PrefixTuning(count=4, hidden=hidden),))
    found, _ = ours(model, params, {f"adapters/default/{path}": x for path, x in mine.items()})
    evidence.record(relative_error(found, wanted), 1e-5)


@evidence("G29", oracle="peft LNTuning", code="llmjax.adapters.adapted")
def test_norms_alone(tmp_path, evidence):
    """The same parameters train, in number, and changed in the same way they give the same logits."""
    config = peft.LNTuningConfig(task_type=CAUSAL, target_modules=["ln_1", "ln_2", "ln_f"])
    wanted, own, base, params = run("gpt2", config, tmp_path)
    mine = {}
    for leaf, word in (("scale", "weight"), ("bias", "bias")):
        for norm, short in (("mixer_norm", "ln_1"), ("mlp_norm", "ln_2")):
            each = [only(own, f"h.{n}.{short}", word) for n in range(2)]
            mine[f"blocks/0/{norm}/{leaf}"] = np.stack(each)
        mine[f"norm/{leaf}"] = only(own, "ln_f", word)
    found, _ = ours(Adapted(base=base, trained="norm/(scale|bias)$"), params, mine)
    evidence.record(relative_error(found, wanted), 1e-5)
