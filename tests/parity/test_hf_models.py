"""GPT-2 and LLaMA models of transformers beside ours, live: logits, gradients, loss, saved folders, counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.models import (
    bloom,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    gptj,
    hf,
    llama,
    mapping,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
)
from llmjax.models.families import family_of
from scripts.golden_models import GPT2, LLAMA, inputs, random_model, run
from tests.evidence import evidence
from tests.models.golden import (
    FOLDER,
    TOLERANCE,
    expected,
    logits,
    loss,
    random_params,
    relative_error,
    worst_gradient_error,
)

pytestmark = pytest.mark.parity


def variant(config, **changes):
    """A transformers config with some fields changed."""
    return type(config)(**(config.to_dict() | changes))


GPT2_CODE = ["A25 llmjax.nn.positions", "A33 llmjax.nn.mlp", "A41 llmjax.nn.decoder", "D01 llmjax.models.gpt2"]
LLAMA_CODE = ["A29 llmjax.nn.rope", "A31 llmjax.nn.norms", "A34 llmjax.nn.mlp", "A41 llmjax.nn.decoder"]
LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
MODELS = {
    "gpt2": (GPT2, [*GPT2_CODE, "D16 llmjax.models.mapping"]),
    "gpt2 untied relu d_ff=40": (
        variant(GPT2, n_inner=40, activation_function="relu", tie_word_embeddings=False),
        ["D16 llmjax.models.mapping"],
    ),
    "llama 1": (variant(LLAMA, num_key_value_heads=4), [*LLAMA_CODE, "D04 llmjax.models.llama"]),
    "llama 2 grouped": (LLAMA, ["D05 llmjax.models.llama", "D16 llmjax.models.mapping"]),
    "llama 3 base": (variant(LLAMA, rope_parameters=LLAMA3_ROPE, num_key_value_heads=1), ["D05 llmjax.models.llama"]),
    "llama biases tied": (
        variant(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=8),
        ["D16 llmjax.models.mapping"],
    ),
}
models = pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(
            config,
            id=name,
            marks=[
                evidence(
                    code.split()[0], oracle=f"transformers {type(config).__name__[:-6]} {name}", code=code.split()[1]
                )
                for code in codes
            ],
        )
        for name, (config, codes) in MODELS.items()
    ],
)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: the machine's cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours_of(model, folder):
    """Our config and parameters of a transformers model, by way of a folder it saves."""
    model.save_pretrained(folder)
    return hf.load_hf(folder)


@models
def test_logits_and_gradients(theirs, tmp_path, evidence):
    model = random_model(theirs, seed=3)
    config, params = ours_of(model, tmp_path)
    tokens, labels = inputs(theirs.vocab_size, seed=3)
    results = run(model, tokens, labels)
    evidence.record(relative_error(logits(config, params, results["tokens"]), results["logits"]), TOLERANCE)
    evidence.record(worst_gradient_error(config, params, results), TOLERANCE)


@evidence("E01", oracle="transformers ForCausalLMLoss", code="llmjax.objectives.next_token")
@pytest.mark.parametrize("masked", [0, 5, 19])
def test_loss_with_ignored_labels(masked, tmp_path, evidence):
    model = random_model(GPT2, seed=4)
    config, params = ours_of(model, tmp_path)
    tokens, labels = inputs(GPT2.vocab_size, seed=4)
    labels[1, :masked] = -100
    theirs = model(input_ids=tokens, labels=labels).loss.item()
    evidence.record(abs(float(loss(config, params, tokens.numpy(), labels.numpy())) - theirs), TOLERANCE * theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_golden_files_are_what_this_transformers_computes(name):
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name, attn_implementation="eager").eval()
    results = expected(name)
    tokens, labels = (torch.from_numpy(results[key].astype(np.int64)) for key in ("tokens", "labels"))
    fresh = run(model, tokens, labels)
    assert fresh.keys() == results.keys()
    assert max(relative_error(fresh[key], results[key]) for key in results) < TOLERANCE


EXPORTED = {
    "gpt2": replace(gpt2.gpt2("18M", vocab=31), d_model=16, layers=2),
    "llama": replace(llama.llama3("8B", vocab=31), d_model=16, layers=4, pattern=llama.llama3("8B").pattern * 2),
}


@evidence("D17", oracle="transformers from_pretrained of the saved folder", code="llmjax.models.hf")
@pytest.mark.parametrize("name", list(EXPORTED))
def test_saved_folder_loads_in_transformers(name, tmp_path, evidence):
    config = EXPORTED[name]
    if name == "llama":
        mixer, mlp = config.pattern[0].mixer, config.pattern[0].mlp
        small = replace(config.pattern[0], mixer=replace(mixer, heads=4, kv_heads=2), mlp=replace(mlp, d_ff=24))
        config = replace(config, pattern=(small, small))
    params = random_params(config)
    hf.save_hf(tmp_path, config, params, {"eos_token_id": 7})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.dtype, model.config.eos_token_id) == (torch.float32, 7)
    tokens, _ = inputs(31, seed=5)
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens).logits.numpy()
    evidence.record(relative_error(logits(config, params, tokens.numpy()), theirs), TOLERANCE)


PRESETS = {
    "gpt2": ("D01", gpt2.gpt2, ["124M", "355M", "774M", "1558M"]),
    "llama1": ("D04", llama.llama1, llama.LLAMA1),
    "llama2": ("D05", llama.llama2, llama.LLAMA2),
    "llama3": ("D05", llama.llama3, llama.LLAMA3),
    "llama31": ("D05", llama.llama31, llama.LLAMA31),
    "llama32": ("D05", llama.llama32, llama.LLAMA32),
    "mistral": ("D06", mistral.mistral, mistral.SIZES),
    "qwen2": ("D08", qwen2.qwen2, qwen2.SIZES),
    "qwen3": ("D16", qwen3.qwen3, qwen3.SIZES),
    "gemma1": ("D16", gemma.gemma1, gemma.GEMMA1),
    "gemma2": ("D16", gemma.gemma2, gemma.GEMMA2),
    "gemma3": ("D16", gemma.gemma3, gemma.GEMMA3),
    "phi3": ("D16", phi3.phi3, phi3.SIZES),
    "olmo2": ("D16", olmo2.olmo2, olmo2.SIZES),
    "gpt-neox": ("D09", gpt_neox.gpt_neox, gpt_neox.SIZES),
    "gptj": ("D09", gptj.gptj, ["6B"]),
    "bloom": ("D16", bloom.bloom, bloom.SIZES),
    "falcon": ("D16", falcon.falcon, falcon.SIZES),
}
META = "transformers model on the meta device: names, shapes and their sum"


@evidence("D18", oracle=META, code="llmjax.nn.model.Model.num_params")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(preset(size), id=f"{name}-{size}", marks=evidence(row, oracle=META, code=preset.__module__))
        for name, (row, preset, sizes) in PRESETS.items()
        for size in sizes
    ],
)
def test_names_shapes_and_counts_of_the_presets(config, evidence):
    family = family_of(config)
    theirs = transformers.AutoConfig.for_model(**family.to_hf_config(config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    evidence.record(abs(model.num_parameters() - config.num_params()), 0)
    theirs = {mapping.table_name(name, family): tuple(p.shape) for name, p in model.named_parameters()}
    assert mapping.shapes(config, family) == theirs


@pytest.mark.parametrize("theirs", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_bfloat16_is_as_close_to_float32_as_torch_is(theirs, tmp_path):
    """Both round weights and activations to 8 bits, at other places: ours should not be twice as far off."""
    model = random_model(theirs, seed=6)
    config, params = ours_of(model, tmp_path)
    tokens, _ = inputs(theirs.vocab_size, seed=6)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits.double().numpy()
        rounded = model.to(torch.bfloat16)(input_ids=tokens).logits.double().numpy()
    ours = logits(config, jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params), tokens.numpy())
    errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)) for x in (ours, rounded)]
    assert 0 < errors[0] < 2 * errors[1]
