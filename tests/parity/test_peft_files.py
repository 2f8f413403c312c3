"""Folders of adapters that peft writes, read by us, and the other way: the same logits, the same files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from llmjax.adapters import Adapted, LoRA
from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.dora import DoRA
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr
from llmjax.adapters.p_tuning import PTuning
from llmjax.adapters.peft import load_peft, save_peft
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.prefix import PrefixTuning
from llmjax.adapters.prompt import PromptTuning
from llmjax.adapters.vera import VeRA
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
    "llama dora": (LLAMA, {"r": 3, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama dora table": (LLAMA, {"r": 3, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "gpt2 dora": (GPT2, {"r": 3, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "llama pissa": (LLAMA, {"r": 3, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "llama olora": (LLAMA, {"r": 3, "init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]}),
}
BIASED = transformers.LlamaConfig(**LLAMA.to_diff_dict() | {"attention_bias": True})
SOME = {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
CAUSAL = "CAUSAL_LM"
CASES = {name: (base, peft.LoraConfig(task_type=CAUSAL, **options)) for name, (base, options) in LORA.items()} | {
    "adalora": (LLAMA, peft.AdaLoraConfig(task_type=CAUSAL, init_r=3, lora_alpha=9, total_step=10, **SOME)),
    "gpt2 adalora": (GPT2, peft.AdaLoraConfig(task_type=CAUSAL, init_r=3, total_step=10, target_modules=["c_attn"])),
    "vera": (LLAMA, peft.VeraConfig(task_type=CAUSAL, r=5, d_initial=0.5, **SOME)),
    "ia3": (
        LLAMA,
        peft.IA3Config(
            task_type=CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "gpt2 ia3": (
        GPT2,
        peft.IA3Config(task_type=CAUSAL, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "loha": (LLAMA, peft.LoHaConfig(task_type=CAUSAL, r=3, alpha=5, **SOME)),
    "lokr": (LLAMA, peft.LoKrConfig(task_type=CAUSAL, r=2, alpha=5, **SOME)),
    "lokr whole": (LLAMA, peft.LoKrConfig(task_type=CAUSAL, r=8, alpha=5, decompose_factor=4, **SOME)),
    "oft": (LLAMA, peft.OFTConfig(task_type=CAUSAL, oft_block_size=4, **SOME)),
    "oft exact": (LLAMA, peft.OFTConfig(task_type=CAUSAL, oft_block_size=4, use_cayley_neumann=False, **SOME)),
    "boft": (LLAMA, peft.BOFTConfig(task_type=CAUSAL, boft_block_size=4, **SOME)),
    "boft factors": (
        BIASED,
        peft.BOFTConfig(task_type=CAUSAL, boft_block_size=2, boft_n_butterfly_factor=3, **SOME),
    ),
    "prompt": (LLAMA, peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=4)),
    "p-tuning": (GPT2, peft.PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=4, encoder_hidden_size=6)),
    "prefix": (LLAMA, peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4)),
    "prefix network": (
        GPT2,
        peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6),
    ),
    "gpt2 norms": (GPT2, peft.LNTuningConfig(task_type=CAUSAL, target_modules=["ln_1", "ln_f"])),
    "llama norms": (LLAMA, peft.LNTuningConfig(task_type=CAUSAL, target_modules=["input_layernorm"])),
}
PLAIN = evidence("G02", oracle="peft LoraModel logits", code="llmjax.adapters.lora")
NETWORKS = {
    "p-tuning": PTuning(count=4, hidden=6),
    "prefix network": PrefixTuning(count=4, hidden=6),
}
"""Methods whose folders lack the network that trained: with it they are these of ours."""
UNCOUNTED = ("gpt2 c_attn", "gpt2 all", "gpt2 biases", "gpt2 dora", "gpt2 adalora", "llama ranks")
"""Where the parts of one module of theirs have each an A, and where ranks differ: these train more numbers here."""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: the machine's cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class BlockDiagonals:
    """What peft compiles for CUDA, and without which it has one factor: blocks `[m, n, b, b]` on diagonals."""

    @staticmethod
    def forward(blocks):
        """Tensors `[m, n b, n b]`."""
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture(autouse=True)
def butterflies(monkeypatch):
    """peft's BOFT with all its factors."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonals)


def adapted_by_peft(base_config, options, folder, shake=0.1):
    """A random model, saved, and peft's adapter on it with random weights, saved; returns peft's model."""
    base = random_model(base_config, 0)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(shake * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def logits_of(model, params):
    """Ours."""
    return jax.jit(lambda p: model.build().apply({"params": p}, jnp.asarray(TOKENS))[0])(params)


def torch_logits(model):
    """Theirs."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max())


@evidence(
    "G08",
    oracle="peft: logits of folders that it wrote, and its logits of folders that we wrote",
    code="llmjax.adapters.peft",
)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[PLAIN] * (name in LORA), id=name) for name in CASES])
def test_there_and_back(name, tmp_path, evidence):
    """Both sides compute the same from the same files: 1e-5, sums in other orders; as many numbers train."""
    base_config, options = CASES[name]
    theirs = adapted_by_peft(base_config, options, tmp_path, 0.3)
    expected = torch_logits(theirs)
    base, params = load_hf(tmp_path / "base")
    model, loaded = load_peft(tmp_path / "adapter", base, params)
    evidence.record(relative(logits_of(model, loaded), expected), 1e-5)
    assert relative(logits_of(base, params), expected) > 1e-3
    if name not in UNCOUNTED:
        whole = Adapted(base=base, adapters=(NETWORKS[name],)) if name in NETWORKS else model
        trained = sum(x.size for path, x in flat(whole.abstract()).items() if whole.trains(path))
        assert trained == theirs.get_nb_trainable_parameters()[0]
    save_peft(tmp_path / "again", model, loaded)
    written, original = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "adapter"))
    # peft keeps unchanged tables that are adapted beside the adapter.
    original = {key: x for key, x in original.items() if not key.endswith("base_layer.weight")}
    assert written.keys() == original.keys()
    if name != "llama ranks":
        evidence.record(max(np.abs(written[key] - original[key]).max() for key in original), 0)
    again = peft.PeftModel.from_pretrained(random_model(base_config, 0), tmp_path / "again").eval()
    evidence.record(relative(torch_logits(again), expected), 1e-5)


def test_parts_of_a_fused_module_that_differ_get_a_rank_each(tmp_path):
    """Parts of GPT-2's c_attn with factors of their own are c_attn with three times the rank, of the same scale."""
    random_model(GPT2, 0).save_pretrained(tmp_path / "base")
    base, given = load_hf(tmp_path / "base")
    every = "/mixer/(query|key|value)$"
    for adapter in (
        LoRA(rank=2, alpha=5.0, targets="qv"),
        LoRA(rank=2, alpha=5.0, stabilised=True, targets="qv"),
        DoRA(rank=2, alpha=5.0, targets=every),
    ):
        model = Adapted(base=base, adapters=(adapter,))
        params = shaken(model, model.init(jax.random.key(0), given), 0.1)
        save_peft(tmp_path / "out", model, params)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
        theirs = peft.PeftModel.from_pretrained(random_model(GPT2, 0), tmp_path / "out").eval()
        assert relative(logits_of(model, params), torch_logits(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (IA3(targets="/(query|value)$"), "c_attn is one module of transformers: IA3 must change all of"),
        (DoRA(rank=2, targets="qv"), "c_attn is one module of transformers: DoRA must change all of"),
        (LoHa(rank=2, targets="attention"), "c_attn is one module of transformers: LOHA must change all of"),
        (AdaLoRA(rank=2, targets="attention"), "c_attn is one module of transformers: ADALORA must change all of"),
        (VeRA(rank=2, targets="qv"), "of such a module VeRA is another function"),
        (LoKr(rank=2, targets="qv"), "of such a module LoKr is another function"),
        (PiSSA(rank=2, targets="qv"), "of such a module PiSSA is another function"),
        (Bottleneck(), "Bottleneck cannot be written for peft"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_what_peft_has_not_is_not_written(adapter, reason, gpt2, tmp_path):
    """Adapters of parts of a fused module in a way that no adapter of the whole is, and methods that are not there."""
    base, given = gpt2
    model = Adapted(base=base, adapters=(adapter,))
    params = shaken(model, model.init(jax.random.key(0), given), 0.1)
    with pytest.raises(InputError, match=reason):
        save_peft(tmp_path, model, params)


def test_parameters_of_the_base_that_peft_cannot_keep(gpt2, tmp_path):
    """A table that is the head too, biases of modules that IA3 changes, anything beside a prompt."""
    base, given = gpt2
    for adapters, trained, reason in (
        ((), "^embed/embedding$", "embed/embedding is the head too"),
        (
            (IA3(targets="/(query|key|value)$"),),
            "/query/bias$",
            "cannot both adapt and keep transformer.h.0.attn.c_attn",
        ),
        ((PromptTuning(count=2),), "norm/scale$", "keeps no parameters of the base beside PromptTuning"),
    ):
        model = Adapted(base=base, adapters=adapters, trained=trained)
        with pytest.raises(InputError, match=reason):
            save_peft(tmp_path, model, model.init(jax.random.key(0), given))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Config and parameters of the base."""
    folder = tmp_path_factory.mktemp("gpt2")
    random_model(GPT2, 0).save_pretrained(folder)
    return load_hf(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_written_as_what_they_wrote(name, gpt2, tmp_path):
    """A prompt and a prefix with the networks that train them, of which peft is given the result."""
    model = Adapted(base=gpt2[0], adapters=(NETWORKS[name],))
    params = shaken(model, model.init(jax.random.key(0), gpt2[1]), 0.1)
    save_peft(tmp_path, model, params)
    theirs = peft.PeftModel.from_pretrained(random_model(GPT2, 0), tmp_path).eval()
    assert relative(logits_of(model, params), torch_logits(theirs)) < 1e-5


def test_a_base_that_another_adapter_changed(tmp_path):
    """Beside PiSSA no other adapter has the base that peft would put it on."""
    random_model(LLAMA, 0).save_pretrained(tmp_path)
    base, given = load_hf(tmp_path)
    model = Adapted(base=base, adapters=(PiSSA(rank=2, targets="q"), LoRA(name="other", rank=2, targets="q")))
    with pytest.raises(InputError, match="default has moved a part of the base into itself, which other would lack"):
        save_peft(tmp_path, model, model.init(jax.random.key(0), given), "other")


def test_features_in_another_order(tmp_path):
    """Of a base that pairs neighbours peft has queries and keys in another order: blocks and caches differ."""
    random_model(LLAMA, 0).save_pretrained(tmp_path)
    base, _ = load_hf(tmp_path)
    mixer = base.pattern[0].mixer
    turned = replace(mixer, rope=replace(mixer.rope, layout="interleaved"))
    base = replace(base, pattern=(replace(base.pattern[0], mixer=turned),))
    for adapter, reason in (
        (LoKr(rank=2, targets="qv"), "or in another order: of such a module LoKr is another function"),
        (PrefixTuning(count=2), "the features of its keys stand in another order than those of model.layers.0"),
    ):
        model = Adapted(base=base, adapters=(adapter,))
        with pytest.raises(InputError, match=reason):
            save_peft(tmp_path, model, model.init(jax.random.key(0)))


def test_layers_that_have_no_adapter(tmp_path):
    """Of one layer alone LoRA is read, zero in the others; DoRA would have to know lengths of the others."""
    some = {"task_type": CAUSAL, "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    theirs = adapted_by_peft(LLAMA, peft.LoraConfig(**some), tmp_path)
    model, params = load_peft(tmp_path / "adapter", *load_hf(tmp_path / "base"))
    assert relative(logits_of(model, params), torch_logits(theirs)) < 1e-5
    adapted_by_peft(LLAMA, peft.LoraConfig(use_dora=True, **some), tmp_path)
    with pytest.raises(InputError, match="DoRA changes blocks/0/mixer/query in all layers, but not model.layers.0"):
        load_peft(tmp_path / "adapter", *load_hf(tmp_path / "base"))


def test_factors_that_peft_left_out(tmp_path, monkeypatch):
    """Without a compiler for CUDA peft makes one factor of those that the config says: the tensors count."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    options = peft.BOFTConfig(task_type=CAUSAL, boft_block_size=2, boft_n_butterfly_factor=2, **SOME)
    theirs = adapted_by_peft(LLAMA, options, tmp_path, 0.3)
    model, params = load_peft(tmp_path / "adapter", *load_hf(tmp_path / "base"))
    assert model.adapters[0].factors == 1
    assert relative(logits_of(model, params), torch_logits(theirs)) < 1e-5


def test_ranks_that_adalora_has_cut(tmp_path):
    """Of a folder whose cut values are left out the scale is that of the rank before."""
    theirs = peft.get_peft_model(random_model(LLAMA, 0), CASES["adalora"][1])
    random_model(LLAMA, 0).save_pretrained(tmp_path / "base")
    kept = {}
    with torch.no_grad():
        for i, (name, parameter) in enumerate(p for p in theirs.named_parameters() if ".lora_E" in p[0]):
            mask = torch.tensor([True, i % 2 == 0, i % 3 == 0])
            parameter.copy_(torch.tensor([[0.7], [-0.9], [1.3]]) * mask[:, None])
            kept[name.removeprefix("base_model.model.")] = mask.tolist()
        for name, parameter in theirs.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                parameter.mul_(20)
    theirs.peft_config["default"].rank_pattern = kept
    expected = torch_logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "adapter")
    model, params = load_peft(tmp_path / "adapter", *load_hf(tmp_path / "base"))
    assert relative(logits_of(model, params), expected) < 1e-5
    save_peft(tmp_path / "again", model, params)
    again = peft.PeftModel.from_pretrained(random_model(LLAMA, 0), tmp_path / "again").eval()
    assert relative(torch_logits(again), expected) < 1e-5


def test_tensors_that_are_not_there_or_do_not_fit(tmp_path):
    """VeRA without its matrices, a layer's factor missing, prompts of another width, norms of another model."""
    random_model(LLAMA, 0).save_pretrained(tmp_path / "base")
    base, params = load_hf(tmp_path / "base")
    for name, change, reason in (
        ("vera", lambda x: x.pop("base_model.vera_A"), "tensor base_model.vera_A is missing"),
        ("loha", lambda x: x.pop(next(key for key in x if "hada_w1_b" in key)), "hada_w1_b is missing"),
        ("ia3", lambda x: x.pop(next(key for key in x if "ia3_l" in key)), "in all layers, but not"),
        ("prompt", lambda x: x.update(prompt_embeddings=np.ones((4, 5), np.float32)), r"shape \[4, 5\], not \[4, 24\]"),
        ("llama norms", lambda x: x.update(other=np.ones(3, np.float32)), "other is not one that the base has"),
    ):
        adapted_by_peft(*CASES[name], tmp_path)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(InputError, match=reason):
            load_peft(tmp_path / "adapter", base, params)


def test_modules_that_are_another_function_here_are_not_read(tmp_path):
    """Fused modules whose parts ours would see alone, inputs that peft rescales where ours are outputs, tables."""
    fused = {"task_type": CAUSAL, "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    llama = {"task_type": CAUSAL, "target_modules": ["down_proj"]}
    for base_config, options, reason in (
        (GPT2, peft.VeraConfig(**fused), "of such a module VeRA is another function"),
        (GPT2, peft.LoraConfig(init_lora_weights="olora", **fused), "of such a module OLoRA is another function"),
        (LLAMA, peft.IA3Config(feedforward_modules=[], **llama), r"down_proj.ia3_l has shape \[24, 1\], not \[1, 40\]"),
        (LLAMA, peft.OFTConfig(oft_block_size=4, coft=True, **llama), "coft is not read"),
        (LLAMA, peft.OFTConfig(r=2, oft_block_size=0, **llama), "r is not read without oft_block_size"),
        (LLAMA, peft.BOFTConfig(boft_dropout=0.1, **llama), "boft_dropout is not read"),
        (
            LLAMA,
            peft.BOFTConfig(boft_block_num=2, boft_block_size=0, **llama),
            "boft_block_num is not read without boft_block_size",
        ),
    ):
        adapted_by_peft(base_config, options, tmp_path)
        with pytest.raises(InputError, match=reason):
            load_peft(tmp_path / "adapter", *load_hf(tmp_path / "base"))
    base, params = load_hf(tmp_path / "base")
    model = Adapted(base=base, adapters=(LoHa(rank=2, targets="^embed"),))
    with pytest.raises(InputError, match="LOHA of the table model.embed_tokens is not what peft has"):
        save_peft(tmp_path, model, model.init(jax.random.key(0), params))


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
    for key, value in (
        ("use_qalora", "true"),
        ("init_lora_weights", '"pissa_niter_4"'),
        ("use_dora", 'true, "init_lora_weights": "olora"'),
    ):
        config.write_text(text.rstrip().removesuffix("}") + f', "{key}": {value}}}')
        with pytest.raises(InputError, match=f"{key}.* read"):
            load_peft(tmp_path / "adapter", base, params)
    config.write_text(text)
    model, loaded = load_peft(tmp_path / "adapter", base, params)
    with pytest.raises(InputError, match="no adapter 'other': there are default"):
        save_peft(tmp_path / "out", model, loaded, name="other")
    assert {path.split("/")[-1] for path in flat(loaded) if "adapters/" in path} == {"a", "b"}
