"""Families of encoders, recurrent and joint models without transformers: counts, tensors there and back, refusals."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from llmjax.config import InputError, with_
from llmjax.models import bamba, bert, clip, mamba, mamba2, recurrent_gemma, rwkv, t5, vit
from llmjax.models.families import FAMILIES, family_of
from llmjax.models.gpt2 import gpt2
from llmjax.models.mapping import export_weights, import_weights, shapes
from llmjax.nn.block import Block
from llmjax.nn.encoder import MaskedHead
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.mlstm import MLSTM
from tests.evidence import evidence
from tests.models.golden import random_params

PUBLISHED = {
    "bert-base": (bert.bert, ("base",), 109_482_240),
    "bert-base-cased": (bert.bert, ("base", 28_996), 108_310_272),
    "bert-large": (bert.bert, ("large",), 335_141_888),
    "bert-base-masked": (bert.bert, ("base", 30_522, "BertForMaskedLM"), 109_514_298),
    "bert-base-pretraining": (bert.bert, ("base", 30_522, "BertForPreTraining"), 110_106_428),
    "t5-small": (t5.t5, ("small",), 60_506_624),
    "t5-base": (t5.t5, ("base",), 222_903_552),
    "t5-large": (t5.t5, ("large",), 737_668_096),
    "t5-11B": (t5.t5, ("11B",), 11_307_321_344),
    "t5_v11-small": (t5.t5_v11, ("small",), 76_961_152),
    "t5_v11-XL": (t5.t5_v11, ("XL",), 2_849_757_184),
    "t5_v11-XXL": (t5.t5_v11, ("XXL",), 11_135_332_352),
    "vit-B/16": (vit.vit, ("B/16",), 86_567_656),
    "vit-L/16": (vit.vit, ("L/16",), 304_326_632),
    "clip-ViT-B/32": (clip.clip, ("ViT-B/32",), 151_277_313),
    "clip-ViT-L/14@336": (clip.clip, ("ViT-L/14@336",), 427_944_193),
    "mamba-130M": (mamba.mamba, ("130M",), 129_135_360),
    "mamba-1.4B": (mamba.mamba, ("1.4B",), 1_372_178_432),
    "mamba2-Codestral 7B": (mamba2.mamba2, ("Codestral 7B",), 7_285_403_648),
}
matrix = pytest.mark.matrix
ROWS = {"bert": "D10", "t5": "D11", "mamba": "D12", "mamba2": "D13"}
"""rows of the catalogue, of the families that have one"""


def marks(name, preset):
    """The row of its family; of each preset function the first size is in the quick suite."""
    module, first = preset.__module__.rpartition(".")[2], next(n for n in PUBLISHED if PUBLISHED[n][0] is preset)
    found = [] if name == first else [pytest.mark.matrix]
    if module in ROWS:
        found.append(evidence(ROWS[module], oracle="published parameter counts", code=f"llmjax.models.{module}"))
    return found


@evidence("D18", oracle="published parameter counts", code="llmjax.nn.model.Model.num_params")
@pytest.mark.parametrize(
    ("preset", "arguments", "count"),
    [pytest.param(*case, id=name, marks=marks(name, case[0])) for name, case in PUBLISHED.items()],
)
def test_published_counts(preset, arguments, count, evidence):
    evidence.record(abs(preset(*arguments).num_params() - count), 0)


@pytest.mark.parametrize("size", [next(iter(rwkv.SIZES)), *(pytest.param(n, marks=matrix) for n in [*rwkv.SIZES][1:])])
def test_counts_of_rwkv_are_the_formula_of_the_paper(size):
    """Its appendix: 2 V D + 13 D^2 L + D (11 L + 4)."""
    layers, d = rwkv.SIZES[size]
    assert rwkv.rwkv(size).num_params() == 2 * 50277 * d + 13 * d**2 * layers + d * (11 * layers + 4)


WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
STACK = WIDTHS | {"vocab_size": 11, "max_position_embeddings": 8}
T5 = {"vocab_size": 11, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
PICTURE = WIDTHS | {"image_size": 8, "patch_size": 4}
GRIFFIN = STACK | {"num_hidden_layers": 3, "lru_width": 12}
SMALL = {
    "mamba": mamba.from_hf_config({"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 11}),
    "mamba2": mamba2.from_hf_config(STACK | {"head_dim": 8, "n_groups": 2, "state_size": 3}),
    "bamba": bamba.from_hf_config(STACK | {"mamba_n_heads": 4, "num_key_value_heads": 1, "attn_layer_indices": [1]}),
    "recurrent_gemma": recurrent_gemma.from_hf_config(GRIFFIN),
    "rwkv": rwkv.from_hf_config(STACK | {"attention_hidden_size": 12}),
    "bert": bert.from_hf_config(STACK | {"architectures": ["BertForPreTraining"]}),
    "t5": t5.from_hf_config(T5 | {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "vit": vit.from_hf_config(PICTURE | {"num_labels": 3}),
    "clip": clip.from_hf_config({"text_config": STACK | {"eos_token_id": 2}, "vision_config": PICTURE}),
}


@evidence("D16", oracle="x = import(export(x)), random parameters", code="llmjax.models.mapping")
@evidence("D17", oracle="x = import(export(x)), random parameters", code="llmjax.models.mapping")
@pytest.mark.parametrize("name", SMALL)
def test_tensors_go_there_and_back(name, evidence):
    config, family = SMALL[name], FAMILIES[name]
    assert family_of(config) is family
    params = random_params(config)
    tensors = export_weights(params, config, family)
    assert {key: x.shape for key, x in tensors.items()} == shapes(config, family)
    back = import_weights(tensors, config, family)
    wrong = sum((a != b).sum() for a, b in zip(*map(jax.tree.leaves, (params, back)), strict=True))
    evidence.record(int(wrong), 0)


def test_a_layer_of_rwkv_is_two_blocks():
    names = shapes(SMALL["rwkv"], rwkv.FAMILY)
    assert names["rwkv.blocks.1.attention.key.weight"] == (12, 16)
    assert names["rwkv.blocks.1.feed_forward.key.weight"] == (24, 16)
    assert not any(name.startswith("rwkv.blocks.2.") for name in names)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_says_what_it_cannot_express(name):
    """No config of another model brings one of them down."""
    config = SMALL[name]
    for other, family in FAMILIES.items():
        if other == name:
            continue
        with pytest.raises(InputError) as caught:
            family.to_hf_config(config)
        assert "\n" not in str(caught.value)


FILLED = {
    "mamba": ("pattern.0.mixer.dt_rank",),
    "rwkv": ("pattern.1.mixer.d_ff",),
    "recurrent_gemma": ("pattern.0.mixer.d_inner", "pattern.1.mixer.d_inner"),
}


@pytest.mark.parametrize("name", FILLED)
def test_defaults_that_depend_on_the_width_are_written_out(name):
    config, family = SMALL[name], FAMILIES[name]
    for path in FILLED[name]:
        config = with_(config, path, None)
    assert family.from_hf_config(family.to_hf_config(config)).num_params() == config.num_params()


def test_old_names_of_norms_and_unused_heads():
    """The files of 2018 say gamma and beta, and hold heads that their config.json does not name."""
    config = bert.from_hf_config(STACK | {"architectures": ["BertForMaskedLM"]})
    params = random_params(SMALL["bert"])
    tensors = export_weights(params, SMALL["bert"], bert.FAMILY)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): x for key, x in tensors.items()}
    tensors["bert.embeddings.position_ids"] = np.arange(8)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    found = import_weights(tensors, config, bert.FAMILY)
    chex.assert_trees_all_equal(found, {key: params[key] for key in found})
    tensors["cls.predictions.decoder.weight"] += 1
    with pytest.raises(InputError, match=r"cls.predictions.decoder.weight differs from bert.embeddings"):
        import_weights(tensors, config, bert.FAMILY)


REFUSED = {
    "steps": ("mamba2", {"time_step_limit": [0.001, 0.1]}, r"time_step_limit=\[0.001, 0.1\] is not supported"),
    "width": ("mamba", {"hidden_size": 16, "intermediate_size": 40}, "intermediate_size=40 is not supported: only 32"),
    "heads": ("mamba2", {"num_heads": 3}, "num_heads=3 is not supported: only 128 is"),
    "layers": ("bamba", {"attn_layer_indices": [40]}, r"attn_layer_indices=\[40\]: expected a list of layers"),
    "kind": (
        "recurrent_gemma",
        {"block_types": ["mamba"]},
        r"block_types=\['mamba'\] is not supported: only recurrent",
    ),
    "no layers": ("recurrent_gemma", {"num_hidden_layers": 0}, "there is no layer"),
    "width of a word": ("recurrent_gemma", {"hidden_size": "16"}, "hidden_size='16': expected int"),
    "decoder": ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
    "task": (
        "bert",
        {"architectures": ["BertForTokenClassification"]},
        r"architectures=\['BertForTokenClassification'\] is not",
    ),
    "picture task": (
        "vit",
        {"architectures": ["ViTForMaskedImageModeling"]},
        "ViTForImageClassification, ViTModel are",
    ),
    "activation": ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj='gated-mish' is not supported"),
    "text": ("clip", {"text_config": [1]}, r"text_config=\[1\]: expected an object"),
}


@pytest.mark.parametrize(("name", "theirs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_we_cannot_compute_is_refused(name, theirs, message):
    with pytest.raises(InputError, match=message):
        FAMILIES[name].from_hf_config(theirs)


LOST = {
    "scale": ("t5", "encoder.pattern.0.mixer.scale", None, "encoder.pattern.0.mixer.scale=0.40"),
    "two heads": ("bert", "pooler", False, "head, pooler and row_classes cannot be said"),
    "own table": ("bert", "head", MaskedHead(tied=False), r"head.norm.eps|head.tied=False cannot be said in a bert"),
    "mixer": ("mamba", "pattern", (Block(MLSTM(), None),), "MLSTM cannot be said in a mamba config.json"),
    "feed-forward": ("mamba", "pattern.0.mlp", GLU(), "GLU cannot be said in a mamba config.json: it has NoneType"),
    "no gate": ("bamba", "pattern.0.mlp", MLP(), r"tells of Block\(Attention, GLU\) and Block\(Mamba2, GLU\)"),
    "scale of the head": ("clip", "max_scale", 10.0, "max_scale=10.0 cannot be said in a clip config.json"),
}


@pytest.mark.parametrize(("name", "path", "value", "message"), LOST.values(), ids=LOST.keys())
def test_what_a_config_json_cannot_say_is_refused(name, path, value, message):
    with pytest.raises(InputError, match=message):
        FAMILIES[name].to_hf_config(with_(SMALL[name], path, value))


@pytest.mark.parametrize("module", [mamba, mamba2, recurrent_gemma, rwkv, bert, t5, vit, clip, bamba])
def test_unknown_size_names_the_known(module):
    preset = getattr(module, module.__name__.rpartition(".")[2])
    with pytest.raises(InputError, match="unknown .* size 'huge': use "):
        preset("huge")


def test_old_name_of_the_embeddings_of_mamba():
    config, params = SMALL["mamba"], random_params(SMALL["mamba"])
    tensors = export_weights(params, config, mamba.FAMILY)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    chex.assert_trees_all_equal(import_weights(tensors, config, mamba.FAMILY), params)


def test_pattern_may_be_written_twice():
    config = replace(SMALL["mamba"], pattern=SMALL["mamba"].pattern * 2)
    assert shapes(config, mamba.FAMILY) == shapes(SMALL["mamba"], mamba.FAMILY)


def test_a_decoder_is_no_encoder():
    with pytest.raises(InputError, match="Decoder cannot be said in a bert config.json: only Encoder can"):
        bert.FAMILY.to_hf_config(gpt2())
