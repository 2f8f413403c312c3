"""Folders of adapters that peft writes, read by us, and the other way: the same logits, the same files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from llmjax.adapters import Adapted, LoRA
from llmjax.adapters.peft import load_peft, save_peft
from llmjax.config import InputError
from llmjax.models.hf import load_hf
from llmjax.nn.model import flat
from scripts.golden_models import GPT2, LLAMA, random_model
from tests.adapters.cases import shaken
from tests.evidence import evidence

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 7))

LORA = {
    "gpt2 c_attn": (GPT2, {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 all": (GPT2, {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "llama qv": (LLAMA, {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}),
    "llama all rslora": (LLAMA, {"r": 2, "use_rslora": True, "target_modules": "all-linear"}),
    "llama head and table": (LLAMA, {"r": 2, "target_modules": ["lm_head", "embed_tokens"]}),
    "llama ranks": (
        LLAMA,
        {
            "r": 2,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "llama saved head": (LLAMA, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2 biases": (GPT2, {"r": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: the machine's cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted_by_peft(base_config, options, folder):
    """A random model, saved, and peft's adapter on it with random weights, saved; returns peft's model."""
    base = random_model(base_config, 0)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def logits_of(model, params):
    """Ours."""
    return jax.jit(lambda p: model.build().apply({"params": p}, jnp.asarray(TOKENS))[0])(params)


def torch_logits(model):
    """Theirs."""
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max())


@evidence(
    "G08",
    oracle="peft: logits of folders that it wrote, and its logits of folders that we wrote",
    code="llmjax.adapters.peft",
)
@evidence("G02", oracle="peft LoraModel logits", code="llmjax.adapters.lora")
@pytest.mark.parametrize("name", LORA)
def test_lora_there_and_back(name, tmp_path, evidence):
    """Both sides compute the same from the same files: 1e-5, sums in other orders."""
    base_config, options = LORA[name]
    theirs = adapted_by_peft(base_config, peft.LoraConfig(task_type="CAUSAL_LM", **options), tmp_path)
    expected = torch_logits(theirs)
    base, params = load_hf(tmp_path / "base")
    model, loaded = load_peft(tmp_path / "adapter", base, params)
    evidence.record(relative(logits_of(model, loaded), expected), 1e-5)
    assert relative(logits_of(base, params), expected) > 1e-3
    save_peft(tmp_path / "again", model, loaded)
    written, original = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "adapter"))
    # peft keeps unchanged tables that are adapted beside the adapter.
    original = {key: x for key, x in original.items() if not key.endswith("base_layer.weight")}
    assert written.keys() == original.keys()
    if "rank_pattern" not in options:
        evidence.record(max(np.abs(written[key] - original[key]).max() for key in original), 0)
    again = peft.PeftModel.from_pretrained(random_model(base_config, 0), tmp_path / "again").eval()
    evidence.record(relative(torch_logits(again), expected), 1e-5)


def test_parts_of_a_fused_module_that_differ_get_a_rank_each(tmp_path):
    """Queries and values of GPT-2 with factors of their own are c_attn with three times the rank, of the same scale."""
    random_model(GPT2, 0).save_pretrained(tmp_path / "base")
    base, params = load_hf(tmp_path / "base")
    for stabilised in (False, True):
        model = Adapted(base=base, adapters=(LoRA(rank=2, alpha=5.0, stabilised=stabilised, targets="qv"),))
        params = shaken(model, model.init(jax.random.key(0), params), 0.1)
        save_peft(tmp_path / "out", model, params)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
        theirs = peft.PeftModel.from_pretrained(random_model(GPT2, 0), tmp_path / "out").eval()
        assert relative(logits_of(model, params), torch_logits(theirs)) < 1e-5
        params = load_hf(tmp_path / "base")[1]


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    """Unknown methods, tensors of no module, wrong shapes, adapters that are not there."""
    adapted_by_peft(LLAMA, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), tmp_path)
    base, params = load_hf(tmp_path / "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    text = config.read_text()
    gpt2 = random_model(GPT2, 0)
    gpt2.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is of no module that the base has"):
        load_peft(tmp_path / "adapter", *load_hf(tmp_path / "other"))
    config.write_text(text.replace('"LORA"', '"XLORA"'))
    with pytest.raises(InputError, match="peft_type='XLORA' is not read: LORA"):
        load_peft(tmp_path / "adapter", base, params)
    config.write_text(text)
    model, loaded = load_peft(tmp_path / "adapter", base, params)
    with pytest.raises(InputError, match="no adapter 'other': there are default"):
        save_peft(tmp_path / "out", model, loaded, name="other")
    assert {path.split("/")[-1] for path in flat(loaded) if "adapters/" in path} == {"a", "b"}
