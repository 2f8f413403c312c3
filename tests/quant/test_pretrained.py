"""Model folders with quantised weights, packed here by the published layouts; and dense ones, quantised while read."""

import gc
import json
import weakref
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.adapters import Adapted, LoRA
from llmjax.config import ConfigError, InputError, from_dict, to_dict, validate, with_
from llmjax.models import mapping
from llmjax.models.families import family_of
from llmjax.models.gpt2 import gpt2
from llmjax.models.hf import load_hf, save_hf
from llmjax.models.llama import llama2
from llmjax.models.mixtral import mixtral
from llmjax.models.pretrained import FromPretrained
from llmjax.nn.decoder import Decoder
from llmjax.nn.model import flat, merged, split
from llmjax.parallel.mesh import MeshConfig
from llmjax.quant.quantised import Quantised
from llmjax.quant.quantize import Quantize, quantise
from llmjax.quant.tensor import QTensor
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.state import plan
from tests.models.golden import TOLERANCE, logits, loss, random_params, relative_error
from tests.quant.test_files import awq_words, words

pytestmark = pytest.mark.adapters

pytestmark = pytest.mark.devices(4)

LLAMA = replace(llama2(vocab=29), d_model=32, layers=2)
LLAMA = with_(with_(with_(LLAMA, "pattern.0.mixer.heads", 4), "pattern.0.mixer.kv_heads", 2), "pattern.0.mlp.d_ff", 64)
MIXTRAL = with_(with_(replace(mixtral(), vocab=29, d_model=16, layers=1), "pattern.0.mlp.experts", 2), "tied", True)
MIXTRAL = with_(with_(MIXTRAL, "pattern.0.mixer.heads", 2), "pattern.0.mixer.kv_heads", 1)
MIXTRAL = with_(MIXTRAL, "pattern.0.mlp.expert.d_ff", 16)
TOKENS = np.random.default_rng(1).integers(0, 29, (2, 8))
PROJECTIONS = ("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def gptq(rng, shape, group, bits=4, ordered=False, version="gptq"):
    """Tensors of a matrix `[out, in]`, and its values."""
    outputs, inputs = shape
    groups = 1 if group == -1 else inputs // group
    codes, zeros = rng.integers(0, 2**bits, (inputs, outputs)), rng.integers(1, 2**bits, (groups, outputs))
    scales = (0.02 + 0.02 * rng.random((groups, outputs))).astype(np.float16)
    own = np.arange(inputs) * groups // inputs
    own = rng.permutation(own) if ordered else own
    tensors = {
        "qweight": words(codes, bits),
        "qzeros": words((zeros - (version == "gptq")).T, bits).T,
        "scales": scales,
        "g_idx": own.astype(np.int32),
    }
    return tensors, (codes - zeros[own]).T * scales[own].T.astype(np.float32)


def awq(rng, shape, group):
    """As `gptq`."""
    outputs, inputs = shape
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // group, outputs))
    scales = (0.02 + 0.02 * rng.random(zeros.shape)).astype(np.float16)
    own = np.arange(inputs) // group
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    return tensors, (codes - zeros[own]).T * scales[own].T.astype(np.float32)


def folders(path, config, pack, settings, left="no such"):
    """A folder with projections packed, and one with their values, dense; `left` are left dense in both."""
    rng, family = np.random.default_rng(0), family_of(config)
    dense = mapping.export_weights(random_params(config), config, family)
    packed = {}
    for name, tensor in dense.items():
        if not name.endswith(PROJECTIONS) or left in name:
            packed[name] = tensor
            continue
        parts, dense[name] = pack(rng, tensor.shape)
        packed |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
    theirs = family.to_hf_config(config)
    for folder, tensors, more in ((path / "dense", dense, {}), (path / "packed", packed, settings)):
        folder.mkdir()
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(theirs | more))
    return path / "packed", path / "dense"


def saying(**settings):
    return {"quantization_config": settings}


CASES = {
    "gptq, act-order": (
        LLAMA,
        partial(gptq, group=16, ordered=True),
        saying(quant_method="gptq", bits=4, group_size=16, desc_act=True, sym=False),
        "down_proj",
    ),
    "gptq v2, 8 bits, one group": (
        LLAMA,
        partial(gptq, group=-1, bits=8, version="gptq_v2"),
        saying(quant_method="gptq", bits=8, group_size=-1, checkpoint_format="gptq_v2"),
        "no such",
    ),
    "awq, experts": (
        MIXTRAL,
        partial(awq, group=8),
        saying(quant_method="awq", bits=4, group_size=8, zero_point=True, version="GEMM"),
        "self_attn",
    ),
}


@pytest.mark.adapters
@pytest.mark.parametrize("case", CASES)
def test_packed_folders(case, tmp_path):
    """The values of the published layout, exactly; the logits of the dense model, but for the order of sums."""
    left = CASES[case][-1]
    packed, dense = folders(tmp_path, *CASES[case])
    model, (plain, want) = FromPretrained(str(packed)), load_hf(dense)
    assert model.base.base == plain
    assert from_dict(json.loads(json.dumps(to_dict(model)))) == model
    params = model.init(jax.random.key(0))
    stored = {path: x for path, x in flat(params).items() if isinstance(x, QTensor)}
    whole = flat(want)
    values_of = jax.jit(lambda tensors: {name: x.dense() for name, x in tensors.items()})
    for path, values in values_of(stored).items():
        np.testing.assert_array_equal(values, whole.pop(path))
    assert len(stored) == {"down_proj": 6, "self_attn": 3}.get(left, 7)
    chex.assert_trees_all_equal({path: flat(params)[path] for path in whole}, whole)
    assert relative_error(logits(model, params, TOKENS), logits(plain, want, TOKENS)) < TOLERANCE


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The folder of act-order."""
    return folders(tmp_path_factory.mktemp("packed"), *CASES["gptq, act-order"])[0]


@pytest.mark.adapters
def test_lora_trains_on_a_packed_folder_over_devices(packed):
    """Each device holds its part of the file's codes, and the loss falls by the adapters alone."""
    base = FromPretrained(str(packed))
    model, mesh = Adapted(base=base, adapters=(LoRA(rank=2),)), MeshConfig(fsdp=2, tensor=2)
    with mesh.in_force():
        state = plan(model, AdamW(), Train(), mesh.build()).init(0)
    up = flat(state.frozen)["blocks/0/mlp/up/kernel"]
    assert not up.codes.sharding.is_fully_replicated
    whole = flat(base.init(jax.random.key(0)))
    chex.assert_trees_all_equal(
        {path: jax.tree.map(np.asarray, x) for path, x in flat(state.frozen).items()},
        {path: jax.tree.map(np.asarray, x) for path, x in whole.items()},
    )
    trained, frozen = jax.tree.map(np.asarray, (state.params, state.frozen))
    labels = np.asarray(TOKENS)
    value = jax.jit(jax.value_and_grad(lambda t: loss(model, merged(t, frozen), TOKENS, labels)))
    first, gradient = value(trained)
    norm = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient))
    rate = 0.05 * float(first) / norm
    later, _ = value(jax.tree.map(lambda x, g: x - rate * g, trained, gradient))
    assert first - later > 0.01 * first


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    save_hf(path, LLAMA, random_params(LLAMA))
    return path


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.adapters)], ids=["one device", "four"]
)
def test_quantised_while_it_is_read(dense, sizes, monkeypatch):
    """The tree is that of quantising the whole, and on the way there is at most one dense matrix beside it."""
    model, mesh = Quantised(base=FromPretrained(str(dense))), MeshConfig(**sizes)
    want = quantise(LLAMA, load_hf(dense)[1], Quantize())
    read, held, seen = FromPretrained.loaded, [], []

    def watched(self, abstract):
        gc.collect()  # jax lets go of host arrays that it borrowed when Python collects
        held.append(sum(leaf() is not None for leaf in seen))
        found = read(self, abstract)
        matrices = {path: x for path, x in flat(found).items() if path in model.fixed}
        assert len(matrices) <= 1
        seen.extend(weakref.ref(x) for x in matrices.values())
        return found

    with mesh.in_force():
        target = plan(model, AdamW(), Train(), mesh.build()).abstract.model_params if sizes else model.abstract()
        monkeypatch.setattr(FromPretrained, "loaded", watched)
        params = model.loaded(target) if sizes else model.init(jax.random.key(0))
    for path, leaf in flat(params).items():  # means over devices are other sums
        chex.assert_trees_all_close(leaf, flat(want)[path], rtol=1e-6 if sizes else 0, atol=0)
    assert (len(seen), max(held)) == (len(model.fixed), 0)
    if sizes:
        assert all(jax.tree.leaves(jax.tree.map(lambda x, t: x.sharding == t.sharding, params, target)))


def test_a_part_is_read_alone(dense):
    """What nobody asks for is not read; the rest of the checks stay."""
    model = FromPretrained(str(dense))
    asked = split(model.abstract(), lambda path: path.endswith("key/kernel"))[0]
    chex.assert_trees_all_equal(model.loaded(asked), split(load_hf(dense)[1], lambda p: p.endswith("key/kernel"))[0])


def test_the_planes_of_rotations_may_be_paired_otherwise(dense):
    """The table of the config that is asked for counts, not that of the folder."""
    other = FromPretrained(str(dense), base=with_(LLAMA, "pattern.0.mixer.rope.layout", "interleaved"))
    params = other.init(jax.random.key(0))
    assert relative_error(logits(other, params, TOKENS), logits(LLAMA, load_hf(dense)[1], TOKENS)) < TOLERANCE


def test_what_is_not_read_gets_one_line(packed, dense, tmp_path):
    good = json.loads((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")

    def folder(theirs=good, drop=(), **more):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        kept = {name: x for name, x in tensors.items() if name not in drop} | more
        save_file(kept, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(theirs))
        return FromPretrained(str(path)).init(jax.random.key(0))

    first = "model.layers.0.mlp.up_proj."
    folder(**{f"{first}bias": np.zeros(64, np.float16)})
    for message, more in {
        f"tensor {first}bias is unexpected": {f"{first}bias": np.ones(64, np.float16)},
        "up/kernel is quantised in some layers and dense in others": {
            f"{first}weight": np.zeros((64, 32), np.float32),
            "drop": [f"{first}{part}" for part in ("qweight", "qzeros", "scales", "g_idx")],
        },
        f"tensor {first}weight: qweight is missing": {"drop": [f"{first}qweight"]},
        f"tensor {first}weight: tensor qzeros is missing": {"drop": [f"{first}qzeros"]},
    }.items():
        with pytest.raises(InputError, match=message):
            folder(**more)
    said = good["quantization_config"]
    for message, settings in {
        "quant_method='fp8' is not supported: gptq, awq, bitsandbytes are": {"quant_method": "fp8"},
        "load_in_8bit=True is not supported": {"load_in_8bit": True},
        "checkpoint_format='marlin' is not": said | {"checkpoint_format": "marlin"},
        "dynamic is not supported": said | {"dynamic": {"-:.*down": {}}},
        "group_size=0: must be": said | {"group_size": 0},
        "holds Integer.block=16.*where the config says Integer.block=32": said | {"group_size": 32},
        "holds .* in an order of their own, where": said | {"desc_act": False},
        "version=marlin is not supported: only gemm is": {"quant_method": "awq", "version": "marlin"},
        "bnb_4bit_quant_type='af4' is not": {"load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
    }.items():
        with pytest.raises(InputError, match=message):
            folder(good | {"quantization_config": settings})
    turned = with_(FromPretrained(str(packed)), "base.base.pattern.0.mixer.rope.layout", "interleaved")
    with pytest.raises(InputError, match=r"q_proj.weight is quantised and holds .*query/kernel in another order"):
        turned.init(jax.random.key(0))
    with pytest.raises(ConfigError, match="base is quantised already"):
        validate(Quantised(base=FromPretrained(str(packed))))


def test_fused_projections_get_one_line(tmp_path):
    """Their codes would have to be cut apart."""
    config = with_(replace(gpt2(), vocab=29, d_model=32, layers=1), "pattern.0.mixer.heads", 2)
    assert isinstance(config, Decoder)
    family = family_of(config)
    dense = mapping.export_weights(random_params(config), config, family)
    name = next(name for name in dense if name.endswith("attn.c_attn.weight"))
    parts, _ = gptq(np.random.default_rng(0), dense.pop(name).shape, group=16)
    save_file(
        dense | {f"{name.removesuffix('weight')}{part}": np.ascontiguousarray(x) for part, x in parts.items()},
        tmp_path / "model.safetensors",
    )
    said = saying(quant_method="gptq", bits=4, group_size=16)
    (tmp_path / "config.json").write_text(json.dumps(family.to_hf_config(config) | said))
    with pytest.raises(InputError, match=r"c_attn.weight is quantised and holds .*query/kernel.*in another order"):
        FromPretrained(str(tmp_path)).init(jax.random.key(0))
