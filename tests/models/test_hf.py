"""Model folders: what is written is read back, in every form found in the wild, and bad folders get one line."""

import json
import shutil
from dataclasses import replace

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.config import InputError, with_
from llmjax.models import gpt2, llama
from llmjax.models.families import family_of
from llmjax.models.hf import load_hf, save_hf
from llmjax.models.mapping import export_weights, import_weights
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.masks import Chunked, Window
from llmjax.nn.mlp import GLU
from llmjax.nn.positions import SinusoidalPositions
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import PositionInterpolation
from tests.evidence import evidence
from tests.models.golden import FOLDER, logits, random_params

both = pytest.mark.parametrize("name", ["gpt2", "llama"])


@pytest.fixture
def folder(tmp_path):
    """A function that copies a golden folder, with changes to its config and its tensors."""

    def copy(name, config=None, tensors=None):
        theirs = json.loads((FOLDER / name / "config.json").read_text()) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps(theirs))
        weights = load_file(FOLDER / name / "model.safetensors")
        save_file(tensors(weights) if tensors else weights, tmp_path / "model.safetensors")
        return tmp_path

    return copy


@evidence("D17", oracle="import(export(x)) = x on files that transformers wrote", code="llmjax.models.hf")
@both
def test_saved_folder_is_read_back_bit_for_bit(name, tmp_path, evidence):
    config, params = load_hf(FOLDER / name)
    save_hf(tmp_path / "new", config, params, {"eos_token_id": None})
    again, read = load_hf(tmp_path / "new")
    assert again == config
    chex.assert_trees_all_equal(read, params)
    original, written = (
        load_file(FOLDER / name / "model.safetensors"),
        load_file(tmp_path / "new" / "model.safetensors"),
    )
    assert original.keys() == written.keys()
    evidence.record(max(np.abs(original[key] - written[key]).max() for key in original), 0)
    theirs = json.loads((FOLDER / name / "config.json").read_text())
    ours = json.loads((tmp_path / "new" / "config.json").read_text())
    same = ours.keys() & theirs.keys() - {"n_inner"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["config.json", "model.safetensors"]


def test_every_option_of_llama_survives_the_way_there_and_back(tmp_path):
    block = Block(
        mixer=Attention(heads=4, kv_heads=1, head_dim=10, rope=Rope(base=1234.5), bias=True, out_bias=True),
        mlp=GLU(d_ff=20, activation="gelu_tanh", bias=True),
    )
    config = Decoder(vocab=11, d_model=12, layers=4, pattern=(block,) * 2, tied=True)
    params = random_params(config)
    save_hf(tmp_path, config, params)
    again, read = load_hf(tmp_path)
    assert (again.pattern[0].mixer, again.pattern[0].mlp, again.tied) == (block.mixer, block.mlp, True)
    written = load_file(tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(import_weights(written, config, llama.FAMILY), params)
    tokens = np.arange(8).reshape(1, 8)
    ours = [logits(config, params, tokens), logits(again, read, tokens)]
    chex.assert_trees_all_close(*ours, atol=1e-6)


def test_gpt2_of_another_shape_survives_the_way_there_and_back(tmp_path):
    config = with_(gpt2.gpt2("18M", vocab=17), "d_model", 16)
    config = with_(with_(config, "tied", False), "pattern.0.mlp.d_ff", 24)
    config = with_(with_(config, "layers", 2), "pattern.0.mlp.activation", "gelu_quick")
    params = random_params(config)
    save_hf(tmp_path, config, params)
    again, read = load_hf(tmp_path)
    assert again.pattern[0].mlp == config.pattern[0].mlp
    assert (again.positions, again.tied) == (config.positions, False)
    chex.assert_trees_all_equal(read, params)


@both
def test_sharded_folder(name, tmp_path):
    shutil.copy(FOLDER / name / "config.json", tmp_path)
    tensors = load_file(FOLDER / name / "model.safetensors")
    shard = {key: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for file in set(shard.values()):
        save_file({key: tensors[key] for key in tensors if shard[key] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    chex.assert_trees_all_equal(load_hf(tmp_path)[1], load_hf(FOLDER / name)[1])

    index.write_text(json.dumps({"weight_map": shard | {"extra": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: tensor extra is missing"):
        load_hf(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: there is no such file"):
        load_hf(tmp_path)


@both
def test_bfloat16_folder_is_read_as_its_float32_values(name, folder):
    config, params = load_hf(FOLDER / name)
    directory = folder(name, tensors=lambda w: {key: v.astype(ml_dtypes.bfloat16) for key, v in w.items()})
    rounded = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    chex.assert_trees_all_equal(load_hf(directory)[1], rounded)
    save_hf(directory / "half", config, jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), params))
    assert json.loads((directory / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    chex.assert_trees_all_equal(load_hf(directory / "half")[1], rounded)


def test_old_forms_of_gpt2_files(folder):
    """The files of 2019 have no prefix, and hold the causal masks; others repeat the tied head."""

    def old(weights):
        masks = {
            f"transformer.h.{i}.attn.{n}": np.ones((1, 1, 4, 4), np.float32)
            for i in (0, 1)
            for n in ("bias", "masked_bias")
        }
        return {key.removeprefix("transformer."): value for key, value in (weights | masks).items()}

    params = load_hf(FOLDER / "gpt2")[1]
    chex.assert_trees_all_equal(load_hf(folder("gpt2", tensors=old))[1], params)
    repeated = folder("gpt2", tensors=lambda w: w | {"lm_head.weight": w["transformer.wte.weight"].copy()})
    chex.assert_trees_all_equal(load_hf(repeated)[1], params)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        load_hf(folder("gpt2", tensors=lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1}))


def test_old_forms_of_llama_configs(folder):
    """Until transformers 5 the rotary base stood in rope_theta, and scaling in rope_scaling."""
    old = {"rope_parameters": None, "rope_theta": 500000, "head_dim": None, "num_key_value_heads": 2}
    config, _ = load_hf(
        folder("llama", old, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)})
    )
    assert config.pattern[0].mixer.rope == Rope(base=500000.0)
    config, _ = load_hf(folder("llama", old | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert config.pattern[0].mixer.rope == Rope(base=500000.0, scaling=PositionInterpolation(2.0))


def without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


BAD = {
    "unknown type": (
        "gpt2",
        {"model_type": "gpt3"},
        None,
        "model_type='gpt3' is not supported: gpt2 is the nearest .*adding_a_family",
    ),
    "no type": ("gpt2", {"model_type": None}, None, "model_type=None is not supported"),
    "missing": ("gpt2", {}, without("transformer.wpe.weight"), r"transformer.wpe.weight is missing \(1 of 28 are\)"),
    "unexpected": (
        "llama",
        {},
        lambda w: w | {"model.extra": np.ones(2, np.float32)},
        "tensor model.extra is unexpected",
    ),
    "bias of a config without": (
        "llama",
        {},
        lambda w: w | {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)},
        "q_proj.bias is unexpected",
    ),
    "shape": (
        "llama",
        {"vocab_size": 60},
        None,
        r"embed_tokens.weight has shape \[61, 24\]: the config asks for \[60, 24\]",
    ),
    "fused shape": (
        "gpt2",
        {},
        lambda w: w | {"transformer.h.1.attn.c_attn.weight": np.ones((24, 71), np.float32)},
        r"transformer.h.1.attn.c_attn.weight has shape \[24, 71\]: the config asks for \[24, 72\]",
    ),
    "integers": (
        "llama",
        {},
        lambda w: w | {"model.norm.weight": np.ones(24, np.int8)},
        "model.norm.weight is of int8: only floating-point weights",
    ),
    "type": ("gpt2", {"n_embd": "24"}, None, "n_embd='24': expected int"),
    "bool": ("gpt2", {"tie_word_embeddings": 1}, None, "tie_word_embeddings=1: expected bool"),
    "activation": (
        "gpt2",
        {"activation_function": "tanh"},
        None,
        "activation_function='tanh' is not supported: gelu_new",
    ),
    "variant": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None, "scale_attn_by_inverse_layer_idx=True is not"),
    "rope": ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, None, "rope_type='dynamic' is not supported"),
    "no factor": ("llama", {"rope_parameters": {"rope_type": "yarn"}}, None, "rope_type='yarn' lacks its factor"),
    "rope type": ("llama", {"rope_parameters": "yarn"}, None, "rope_parameters='yarn': expected an object"),
    "heads": ("llama", {"num_key_value_heads": 3}, None, "kv_heads=3 does not divide heads=4"),
}


@pytest.mark.parametrize(("name", "config", "tensors", "message"), BAD.values(), ids=BAD.keys())
def test_bad_folder_gets_one_line(name, config, tensors, message, folder):
    directory = folder(name, config, tensors)
    with pytest.raises(InputError, match=message) as caught:
        load_hf(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: there is no such file"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        load_hf(tmp_path)
    shutil.copy(FOLDER / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"pytorch_model\.bin is pickled and never read"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "llama" / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors"):
        load_hf(tmp_path)


INEXPRESSIBLE = {
    "mask": (llama.llama1("7B"), "pattern.0.mixer.mask", Chunked(128), r"pattern.0.mixer.mask=Chunked"),
    "cap": (gpt2.gpt2(), "soft_cap", 30.0, "soft_cap=30.0"),
    "order": (gpt2.gpt2(), "pattern.0.order", "parallel", "pattern.0.order=parallel"),
    "positions": (gpt2.gpt2(), "positions", SinusoidalPositions(), "positions=SinusoidalPositions"),
    "no rope": (llama.llama1("7B"), "pattern.0.mixer.rope", None, "pattern.0.mixer.rope=None"),
    "no mlp": (llama.llama1("7B"), "pattern.0.mlp", None, "NoneType cannot be said"),
}


@pytest.mark.parametrize(("config", "path", "value", "message"), INEXPRESSIBLE.values(), ids=INEXPRESSIBLE.keys())
def test_what_no_config_json_can_say_is_refused(config, path, value, message):
    with pytest.raises(InputError, match=message) as caught:
        family_of(with_(config, path, value))
    assert "\n" not in str(caught.value)


def test_blocks_that_differ_are_refused():
    config = llama.llama1("7B")
    block = config.pattern[0]
    mixed = replace(config, pattern=(block, replace(block, mixer=replace(block.mixer, mask=Window(4)))))
    with pytest.raises(InputError, match=r"cannot be said in a llama config\.json"):
        llama.FAMILY.to_hf_config(mixed)


def test_extra_keys_cannot_contradict_the_weights(tmp_path):
    config, params = load_hf(FOLDER / "gpt2")
    with pytest.raises(InputError, match=r"extra: n_embd cannot be set: only bos_token_id, .* can"):
        save_hf(tmp_path / "new", config, params, {"n_embd": 7})
    assert not (tmp_path / "new").exists()


def test_export_refuses_another_tree():
    config, params = load_hf(FOLDER / "llama")
    with pytest.raises(InputError, match=r"parameter head/kernel is missing"):
        export_weights({key: value for key, value in params.items() if key != "head"}, config, llama.FAMILY)
    with pytest.raises(InputError, match=r"parameter extra is not one of the config's"):
        export_weights(params | {"extra": np.ones(1)}, config, llama.FAMILY)
    with pytest.raises(InputError, match=r"parameter norm/scale has shape \[23\]: the config asks for \[24\]"):
        export_weights(params | {"norm": {"scale": np.ones(23)}}, config, llama.FAMILY)
