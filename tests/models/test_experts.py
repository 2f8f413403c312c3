"""Families with mixtures of experts: published names, sizes and counts, there and back, and what they cannot say."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmjax.config import InputError, validate
from llmjax.models import mapping
from llmjax.models.deepseek import deepseek_v2, deepseek_v3
from llmjax.models.families import FAMILIES, family_of
from llmjax.models.gpt_oss import gpt_oss
from llmjax.models.hf import load_hf
from llmjax.models.mixtral import mixtral
from llmjax.models.qwen3_moe import qwen3_moe
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mla import MLA
from llmjax.nn.mlp import GLU
from llmjax.nn.model import flat
from llmjax.nn.moe import MoE
from llmjax.nn.norms import RMSNorm
from llmjax.nn.rope_scaling import YaRN
from llmjax.nn.router import ExpertChoice, TopK
from tests.evidence import evidence
from tests.models.golden import FOLDER, random_params

PUBLISHED = {
    "mixtral-8x7B": (mixtral("8x7B"), 46_702_792_704, "D07 mixtral"),
    "mixtral-8x22B": (mixtral("8x22B"), 140_630_071_296, "D07 mixtral"),
    "qwen3-30B-A3B": (qwen3_moe("30B-A3B"), 30_532_122_624, "D18 qwen3_moe"),
    "qwen3-235B-A22B": (qwen3_moe("235B-A22B"), 235_093_634_560, "D18 qwen3_moe"),
    "gpt-oss-20B": (gpt_oss("20B"), 20_914_757_184, "D18 gpt_oss"),
    "gpt-oss-120B": (gpt_oss("120B"), 116_829_156_672, "D18 gpt_oss"),
    "deepseek-v2-16B-Lite": (deepseek_v2("16B-Lite"), 15_706_484_224, "D18 deepseek"),
    "deepseek-v2-236B": (deepseek_v2("236B"), 235_741_434_880, "D18 deepseek"),
    "deepseek-v3": (deepseek_v3(), 671_026_419_200, "D18 deepseek"),
}
"""config, parameters of the published model (DeepSeek-V3: 58 x 256 biases of its router among them), row and module"""


def count(config):
    """Parameters; of layers of two kinds, which would all be traced, by what each kind adds to a model of few."""
    dense, sparse = config.pattern[0], config.pattern[-1]
    if len(config.pattern) < 3:
        return config.num_params()
    few = lambda *blocks: replace(config, layers=len(blocks), pattern=blocks).num_params()
    both, without_dense, without_sparse = few(dense, sparse), few(sparse), few(dense)
    outside = without_dense + without_sparse - both
    each = {dense: without_sparse - outside, sparse: without_dense - outside}
    return outside + sum(each[block] for block in config.pattern)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        pytest.param(config, n, id=name, marks=evidence(row, oracle="published parameter counts", code=code))
        for name, (config, n, known) in PUBLISHED.items()
        for row, code in [known.replace(" ", " llmjax.models.").split()]
    ],
)
def test_published_counts(config, published, evidence):
    validate(config)
    evidence.record(abs(count(config) - published), 0)


@pytest.mark.slow
def test_all_layers_of_a_long_pattern_are_counted():
    config, published, _ = PUBLISHED["deepseek-v2-16B-Lite"]
    assert config.num_params() == published


@pytest.mark.parametrize("preset", [mixtral, qwen3_moe, deepseek_v2, gpt_oss])
def test_unknown_size_names_the_known(preset):
    with pytest.raises(InputError, match=r"unknown .* size '3B': use .*B"):
        preset("3B")


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_preset_is_said_and_read_again(name):
    """By its own family alone (which refuses where what it reads computes something else), its balancing included."""
    config, _, known = PUBLISHED[name]
    family = family_of(config)
    assert family.model_type.startswith(known.split()[1])
    again = family.from_hf_config(family.to_hf_config(config))
    assert again.pattern[-1].mlp.balance_loss == config.pattern[-1].mlp.balance_loss


@evidence("D17", oracle="the bytes that transformers saved (golden)", code="llmjax.models.mapping")
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_export_inverts_import(name, evidence):
    config, params = load_hf(FOLDER / name)
    exported = mapping.export_weights(params, config, FAMILIES[name])
    original = load_file(FOLDER / name / "model.safetensors")
    assert exported.keys() == original.keys()
    evidence.record(sum(exported[key].tobytes() != value.tobytes() for key, value in original.items()), 0)


NORM = RMSNorm(eps=1e-5)
MIXTURE = MoE(experts=3, expert=GLU(d_ff=6), router=TopK(2))
SPARSE = Block(mixer=Attention(heads=2, kv_heads=1), mlp=MIXTURE, norm=NORM)
DENSE = replace(SPARSE, mlp=GLU(d_ff=10))
SMALL = Decoder(vocab=11, d_model=8, layers=2, pattern=(SPARSE,), norm=NORM)
IN_TURN = replace(SMALL, layers=4, pattern=(DENSE, SPARSE))
NAMES = {
    "mixtral": (SMALL, "model.layers.1.block_sparse_moe.experts.2.w2.weight", "blocks/0/mlp/experts/down/kernel"),
    "qwen3_moe": (
        replace(IN_TURN, pattern=tuple(replace(b, mixer=replace(b.mixer, qk_norm=NORM)) for b in IN_TURN.pattern)),
        "model.layers.3.mlp.experts.2.down_proj.weight",
        "blocks/1/mlp/experts/down/kernel",
    ),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_a_tensor_an_expert(name):
    """The names of the published files, the last expert of the last layer, and all of them there and back."""
    config, tensor, path = NAMES[name]
    params = random_params(config)
    exported = mapping.export_weights(params, config, FAMILIES[name])
    np.testing.assert_array_equal(exported[tensor], flat(params)[path][1, 2].T)
    again = flat(mapping.import_weights(exported, config, FAMILIES[name]))
    assert all(np.array_equal(again[path], value) for path, value in flat(params).items())


def mla(**fields):
    mixer = MLA(heads=2, kv_rank=4, q_rank=None, nope_dim=2, rope_dim=2, value_dim=2, **fields)
    return replace(SMALL, pattern=(replace(SPARSE, mixer=mixer, mlp=replace(MIXTURE, shared=1)),))


def with_mixture(**fields):
    return replace(SMALL, pattern=(replace(SPARSE, mlp=replace(MIXTURE, **fields)),))


REFUSED = {
    "no experts": (
        "mixtral",
        replace(SMALL, pattern=(DENSE,)),
        r"Decoder cannot be said .*: it has MoE\(router=TopK\(\)\)",
    ),
    "a dense layer": ("mixtral", IN_TURN, r"cannot be said in a mixtral"),
    "shared": ("mixtral", with_mixture(shared=1), r"pattern.0.mlp.shared=1 cannot be said in a mixtral"),
    "capacity": ("mixtral", with_mixture(capacity=1.0), r"pattern.0.mlp.capacity=1.0 cannot be said"),
    "their choice": ("qwen3_moe", with_mixture(router=ExpertChoice(), balance_loss=0.0), r"it has MoE\(router=TopK"),
    "attention": ("deepseek_v3", SMALL, r"Attention cannot be said in a deepseek_v3 config.json: it has MLA there"),
    "a dense layer between": (
        "deepseek_v2",
        replace(mla(), layers=2, pattern=(mla().pattern[0], replace(mla().pattern[0], mlp=GLU(d_ff=10)))),
        r"cannot be said in a deepseek_v2",
    ),
    "softmax": ("deepseek_v3", mla(), r"cannot be said in a deepseek_v3"),
    "scale": ("deepseek_v2", mla(scale=0.3), r"pattern.0.mixer.scale=0.3 cannot be said in a deepseek_v2"),
    "no sinks": ("gpt_oss", SMALL, r"cannot be said in a gpt_oss"),
}


@pytest.mark.parametrize(("name", "config", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_a_family_cannot_say_is_named(name, config, message):
    with pytest.raises(InputError, match=message):
        FAMILIES[name].to_hf_config(config)


UNREAD = {
    "deepseek fp8": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8"}},
        r"FP8 weights are not read: save",
    ),
    "gpt-oss mxfp4": (
        "gpt_oss",
        {"quantization_config": {"quant_method": "mxfp4"}},
        r"MXFP4 weights are not read: save",
    ),
    "gate": ("gpt_oss", {"swiglu_alpha": 1.5}, r"swiglu_alpha=1.5 is not supported: only 1.702 is"),
    "method": ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc' is not supported: greedy and"),
    "groups": ("deepseek_v3", {"n_group": 7}, r"router.groups=7 must divide experts=256"),
    "step": ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step=0 .* name no layers"),
}


@pytest.mark.parametrize(("name", "theirs", "message"), UNREAD.values(), ids=list(UNREAD))
def test_what_is_not_read_is_named(name, theirs, message):
    with pytest.raises(InputError, match=message):
        FAMILIES[name].from_hf_config({"num_hidden_layers": 4, **theirs})


@pytest.mark.parametrize("factor", [4.0, 40.0])
@pytest.mark.parametrize("all_dim", [0.707, 1.0, 1.3])
def test_the_scale_of_latent_attention_survives(factor, all_dim):
    """mscale_all_dim is read into the scale and found again from it, to the last bit."""
    given = {"rope_type": "yarn", "factor": factor, "mscale": 1.0, "mscale_all_dim": all_dim}
    given |= {"original_max_position_embeddings": 64}
    config = FAMILIES["deepseek_v2"].from_hf_config({"num_hidden_layers": 1, "rope_scaling": given})
    written = FAMILIES["deepseek_v2"].to_hf_config(config)["rope_parameters"]
    assert written["mscale_all_dim"] == all_dim
    assert written["mscale"] == pytest.approx(1.0, abs=1e-9)
    mixer = config.pattern[0].mixer
    assert isinstance(mixer.rope.scaling, YaRN)
    grown = (0.1 * all_dim * np.log(factor) + 1) ** 2
    assert mixer.scale * np.sqrt(mixer.nope_dim + mixer.rope_dim) == pytest.approx(grown, rel=1e-12)
