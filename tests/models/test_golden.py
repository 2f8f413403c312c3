"""Tiny random GPT-2 and LLaMA models against what transformers computed (files by `scripts/golden_models.py`)."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmjax.config import with_
from llmjax.models import llama
from llmjax.models.families import FAMILIES
from llmjax.models.hf import load_hf
from llmjax.models.mapping import export_weights, import_weights
from llmjax.nn.norms import RMSNorm
from tests.evidence import evidence
from tests.models.golden import FOLDER, TOLERANCE, expected, logits, loss, relative_error, worst_gradient_error

ORACLE = {
    "gpt2": "transformers GPT2LMHeadModel (golden)",
    "llama": "transformers LlamaForCausalLM, 2 of 4 heads (golden)",
}
ROWS = {
    "gpt2": {
        "A25": "llmjax.nn.positions",
        "A33": "llmjax.nn.mlp",
        "A41": "llmjax.nn.decoder",
        "D01": "llmjax.models.gpt2",
        "D16": "llmjax.models.mapping",
    },
    "llama": {
        "A29": "llmjax.nn.rope",
        "A31": "llmjax.nn.norms",
        "A34": "llmjax.nn.mlp",
        "A41": "llmjax.nn.decoder",
        "D05": "llmjax.models.llama",
        "D16": "llmjax.models.mapping",
    },
}
both = pytest.mark.parametrize("name", ["gpt2", "llama"])
both_as_evidence = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[evidence(row, oracle=ORACLE[name], code=code) for row, code in ROWS[name].items()])
        for name in ROWS
    ],
)


@both_as_evidence
def test_logits(name, evidence):
    config, params = load_hf(FOLDER / name)
    results = expected(name)
    ours = logits(config, params, results["tokens"])
    chex.assert_type(ours, jnp.float32)
    evidence.record(relative_error(ours, results["logits"]), TOLERANCE)


PARTS = {
    "gemma2": ["A31 llmjax.nn.norms", "D16 llmjax.models.gemma"],
    "olmo2": ["D16 llmjax.models.olmo2"],
    "gpt_neox": ["D09 llmjax.models.gpt_neox"],
    "gptj": ["D09 llmjax.models.gptj"],
    "deepseek_v3": ["A35 llmjax.nn.moe", "D16 llmjax.models.deepseek"],
    "gpt_oss": ["A23 llmjax.nn.attention", "A35 llmjax.nn.moe", "D16 llmjax.models.gpt_oss"],
}
"""families of other blocks, norms, embeddings, heads and experts: what each proves"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[evidence(r.split()[0], oracle=f"transformers {name} (golden)", code=r.split()[1]) for r in rows],
        )
        for name, rows in PARTS.items()
    ],
)
def test_logits_of_other_families(name, evidence):
    config, params = load_hf(FOLDER / name)
    results = expected(name)
    evidence.record(relative_error(logits(config, params, results["tokens"]), results["logits"]), TOLERANCE)


@both_as_evidence
def test_gradients(name, evidence):
    config, params = load_hf(FOLDER / name)
    evidence.record(worst_gradient_error(config, params, expected(name)), TOLERANCE)


@evidence(
    "E01", oracle="transformers ForCausalLMLoss with ignored labels (golden)", code="llmjax.objectives.next_token"
)
@both
def test_loss(name, evidence):
    config, params = load_hf(FOLDER / name)
    results = expected(name)
    ours = jax.jit(lambda p: loss(config, p, results["tokens"], results["labels"]))(params)
    evidence.record(abs(float(ours) - float(results["loss"])), TOLERANCE * float(results["loss"]))


@both
def test_bfloat16_logits(name):
    """Each of some twenty roundings on the way errs by up to 2^-9; tests/parity holds this against torch's error."""
    config, params = load_hf(FOLDER / name)
    results = expected(name)
    ours = logits(config, jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params), results["tokens"])
    chex.assert_type(ours, jnp.float32)
    assert 1e-4 < relative_error(ours, results["logits"]) < 0.05


@both
def test_export_inverts_import(name):
    config, params = load_hf(FOLDER / name)
    exported = export_weights(params, config, FAMILIES[name])
    original = load_file(FOLDER / name / "model.safetensors")
    assert exported.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(exported[key], value)
    chex.assert_trees_all_equal(import_weights(exported, config, FAMILIES[name]), params)


@both
def test_pattern_of_two_equal_blocks_is_the_same_model(name):
    """Layers are stacked by place in the pattern: 0, 2, ... in the first block, 1, 3, ... in the second."""
    config, _ = load_hf(FOLDER / name)
    results = expected(name)
    twice = replace(config, pattern=config.pattern * 2)
    params = import_weights(load_file(FOLDER / name / "model.safetensors"), twice, FAMILIES[name])
    assert params["blocks"].keys() == {"0", "1"}
    assert relative_error(logits(twice, params, results["tokens"]), results["logits"]) < TOLERANCE


@evidence("A29", oracle="transformers LlamaForCausalLM, weights permuted to interleaved planes", code="llmjax.nn.rope")
def test_interleaved_rotary_layout_is_the_same_model(evidence):
    config, _ = load_hf(FOLDER / "llama")
    results, tensors = expected("llama"), load_file(FOLDER / "llama" / "model.safetensors")
    config = with_(config, "pattern.0.mixer.rope.layout", "interleaved")
    params = import_weights(tensors, config, llama.FAMILY)
    evidence.record(relative_error(logits(config, params, results["tokens"]), results["logits"]), TOLERANCE)
    chex.assert_trees_all_equal(export_weights(params, config, llama.FAMILY), tensors)


WRONG = [
    ("llama", "pattern.0.mixer.rope.base", 9900.0),
    ("llama", "norm.eps", 1e-2),
    ("gemma2", "embedding_scale", 3.9),
    ("gemma2", "norm", RMSNorm()),
    ("gemma2", "pattern.0.mixer.mask.size", 6),
    ("gpt_neox", "pattern.0.order", "pre"),
    ("olmo2", "pattern.0.order", "post"),
    ("gptj", "head_bias", False),
]


@pytest.mark.parametrize(("name", "path", "value"), WRONG, ids=[f"{name} {path}" for name, path, _ in WRONG])
def test_golden_files_notice_a_wrong_model(name, path, value):
    """The comparison is only worth something if a slightly wrong model fails it."""
    config, params = load_hf(FOLDER / name)
    results = expected(name)
    wrong = with_(config, path, value)
    assert relative_error(logits(wrong, params, results["tokens"]), results["logits"]) > 5 * TOLERANCE
