"""The core of all families: patterns of axes, layers of several kinds, experts, shards on devices, hostile files."""

import json
from dataclasses import dataclass, replace

import chex
import einops
import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from llmjax.config import InputError
from llmjax.models import llama, mapping, safetensors
from llmjax.models.hf import load_hf, open_hf, save_hf, write_weights
from llmjax.models.mapping import Entry, Family
from llmjax.nn.model import Model, unflat
from llmjax.parallel.mesh import MeshConfig, shardings
from tests.evidence import evidence
from tests.models.golden import FOLDER, random_params

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# ---- patterns ------------------------------------------------------------------------------------------------------

PATTERNS = {
    "matrix": ("o i -> i o", (), [(3, 5)], lambda x: [einops.rearrange(x, "o i -> i o")]),
    "heads": ("(h k) d -> d h k", (), [(5, 3, 4)], lambda x: [einops.rearrange(x, "(h k) d -> d h k", h=3)]),
    "planes": (
        "(h two p) -> h (p two)",
        (("two", 2),),
        [(3, 4)],
        lambda x: [einops.rearrange(x, "(h two p) -> h (p two)", h=3, two=2)],
    ),
    "left out": ("1 1 d -> d", (), [(4,)], lambda x: [x[0, 0]]),
    "one after another": (
        "[h k] d -> d h k",
        (),
        [(5, 3, 2), (5, 1, 2), (5, 1, 2)],
        lambda x: [einops.rearrange(part, "(h k) d -> d h k", k=2) for part in np.split(x, [6, 8])],
    ),
    "within each head": (
        "(h [k]) d -> d h k",
        (),
        [(5, 3, 2)] * 3,
        lambda x: list(einops.rearrange(x, "(h n k) d -> n d h k", h=3, n=3)),
    ),
    "within each group": (
        "(g [q k]) d -> d (g q) k",
        (("g", 2),),
        [(5, 6, 2), (5, 2, 2), (5, 2, 2)],
        lambda x: [
            einops.rearrange(einops.rearrange(x, "(g n k) d -> g n k d", g=2, k=2)[:, part], "g q k d -> d (g q) k")
            for part in (slice(0, 3), slice(3, 4), slice(4, 5))
        ],
    ),
    "in turns": ("e i (o [z]) -> e i (o z)", (("z", 1),), [(2, 3, 4)] * 2, lambda x: [x[..., ::2], x[..., 1::2]]),
}


@pytest.mark.parametrize(("pattern", "sizes", "shapes", "oracle"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_are_einops_and_their_writing_inverts_their_reading(pattern, sizes, shapes, oracle):
    entry = Entry(tuple("abc"[: len(shapes)]), "t", pattern, sizes)
    theirs = drawn(*entry.shape(shapes))
    ours = entry.read(theirs, shapes)
    for mine, wanted in zip(ours, oracle(theirs), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    np.testing.assert_array_equal(entry.write(ours), theirs)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("shape", [(300, 700), (7, 600, 130), (3, 2, 5), (1, 9, 1)])
def test_copies_of_any_shape_and_order(shape, order):
    source = np.moveaxis(drawn(*shape).astype(ml_dtypes.bfloat16), *order)
    target = np.empty(source.shape, np.float32)
    mapping.copy(target, source)
    np.testing.assert_array_equal(target, source.astype(np.float32))


# ---- stacks of several kinds of layers, and experts ------------------------------------------------------------------


@dataclass(frozen=True)
class Made(Model):
    """A model of two stacks whose parameters are only shapes: an encoder, and layers in turns, one with experts."""

    def abstract(self):
        shapes = {
            "encoder/blocks/0/mlp/up/kernel": (3, 4, 5),
            "decoder/blocks/0/mixer/query/kernel": (2, 4, 2, 3),
            "decoder/blocks/1/mlp/experts/up/kernel": (2, 6, 4, 5),
            "scale": (),
        }
        return unflat({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


MADE = Family(
    model_type="made",
    architecture="Made",
    prefix="",
    from_hf_config=lambda theirs: Made(),
    to_hf_config=lambda config: {},
    table=lambda config: (
        Entry(("encoder/blocks/*/mlp/up/kernel",), "enc.{i}.up", "o i -> i o"),
        Entry(("decoder/blocks/0/mixer/query/kernel",), "dec.{i}.q", "(h k) d -> d h k"),
        Entry(("decoder/blocks/1/mlp/experts/up/kernel",), "dec.{i}.experts.{e}.up", "o i -> i o"),
        Entry(("scale",), "scale", "->"),
    ),
)


def test_layers_of_several_kinds_and_experts():
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), Made().abstract())
    theirs = mapping.export_weights(params, Made(), MADE)
    experts = {f"dec.{i}.experts.{e}.up" for i in (1, 3) for e in range(6)}
    assert theirs.keys() == {"enc.0.up", "enc.1.up", "enc.2.up", "dec.0.q", "dec.2.q", "scale"} | experts
    np.testing.assert_array_equal(
        theirs["dec.3.experts.4.up"], params["decoder"]["blocks"]["1"]["mlp"]["experts"]["up"]["kernel"][1, 4].T
    )
    chex.assert_trees_all_equal(mapping.import_weights(theirs, Made(), MADE), params)


# ---- straight onto devices -------------------------------------------------------------------------------------------


def typed(shapes, placed, dtype="float32"):
    """What is wanted: shapes, a dtype, and places."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, placed)


@pytest.mark.devices(8)
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"stage": 2, "fsdp": 2}, {}])
def test_shards_are_read_where_they_belong(sizes):
    folder = open_hf(FOLDER / "llama")
    boxed = folder.config.boxed()
    placed = shardings(nn.get_partition_spec(boxed), meta.unbox(boxed), MeshConfig(**sizes).build())
    params = folder.params(typed(meta.unbox(boxed), placed))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), folder.params())
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, placed))


@pytest.mark.devices(8)
def test_experts_are_split_too():
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), Made().abstract())
    theirs = mapping.export_weights(params, Made(), MADE)
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2).build()
    placed = jax.tree.map(lambda leaf: NamedSharding(mesh, P()), Made().abstract())
    placed["decoder"]["blocks"]["1"]["mlp"]["experts"]["up"]["kernel"] = NamedSharding(mesh, P(None, "expert", "fsdp"))
    read = mapping.import_weights(theirs, Made(), MADE, typed(params, placed, "bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, read), rounded)


# ---- files -----------------------------------------------------------------------------------------------------------


@evidence("D17", oracle="the safetensors library, both ways", code="llmjax.models.safetensors")
def test_files_are_those_of_the_library(tmp_path, evidence):
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
    tensors = {f"t{i}": (10 * drawn(3, i)).astype(kind) for i, kind in enumerate(kinds)} | {
        "s": np.array(2, np.float32)
    }
    save_file(tensors, tmp_path / "theirs")
    described = {name: safetensors.Kind(x.shape, x.dtype) for name, x in tensors.items()}
    safetensors.write(tmp_path / "ours", described, tensors.items())
    error = 0.0
    for read in (
        safetensors.read(tmp_path / "theirs"),
        load_file(tmp_path / "ours"),
        safetensors.read(tmp_path / "ours"),
    ):
        assert read.keys() == tensors.keys()
        chex.assert_trees_all_equal(dict(read), tensors)
        assert all(read[name].dtype == x.dtype for name, x in tensors.items())
        error = max(error, *(np.abs(read[name].astype(float) - x).max(initial=0) for name, x in tensors.items()))
    evidence.record(error, 0.0)


def test_large_models_are_written_as_several_files(tmp_path):
    config, params = load_hf(FOLDER / "llama")
    save_hf(tmp_path, config, params, shard_bytes=10_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 12_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    original = load_file(FOLDER / "llama" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())
    assert index["weight_map"].keys() == original.keys()
    chex.assert_trees_all_equal(load_hf(tmp_path)[1], params)


def test_parameters_are_written_in_another_dtype(tmp_path):
    config, params = load_hf(FOLDER / "llama")
    save_hf(tmp_path, config, params, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    original = load_file(FOLDER / "llama" / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(written, {name: x.astype(ml_dtypes.bfloat16) for name, x in original.items()})


def header(text, body=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "huge header": ((2**60).to_bytes(8, "little") + b"{}", "a header of 1152921504606846976 bytes"),
    "no JSON": (header(b"{" * 40), "Expecting property name"),
    "deep JSON": (header(b"[" * 100_000), "recursion|nested|Expecting value"),
    "no object": (header([1]), "its header is no JSON object"),
    "twice": (header(b'{"a":1,"a":2}'), "a name stands twice"),
    "unknown dtype": (header({"a": ONE | {"dtype": "PICKLE"}}, bytes(8)), "tensor a is described as"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor a is described as"),
    "too long": (header({"a": ONE | {"shape": [3]}}, bytes(8)), "cannot take bytes 0 to 8"),
    "negative": (header({"a": ONE | {"shape": [-2], "data_offsets": [8, 0]}}, bytes(8)), "cannot take bytes"),
    "overflow": (header({"a": ONE | {"shape": [2**62, 4]}}, bytes(8)), "cannot take bytes 0 to 8"),
    "fraction": (header({"a": ONE | {"shape": [2.0]}}, bytes(8)), "cannot take bytes"),
    "cut off": (header({"a": ONE}, bytes(7)), "its tensors take 8 bytes and 7 are there"),
    "overlap": (header({"a": ONE, "b": ONE}, bytes(8)), "begins at byte 0, not 8"),
    "gap": (header({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12)), "begins at byte 4, not 0"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_get_one_line(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        safetensors.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "is no file of this folder"),
        ("/etc/passwd", "is no file of this folder"),
        ("..", "is no file of this folder"),
        ("pytorch_model.bin", "is no safetensors file"),
        ("other.safetensors", "there is no such file"),
    ],
)
def test_an_index_names_files_of_its_folder_only(file, message, tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDER / "llama" / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match=message):
        open_hf(tmp_path)


def test_a_tokenizer_has_no_more_ids_than_there_are_embeddings(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / "llama" / name).read_bytes())
    tokenizer = {"model": {"vocab": {f"w{i}": i for i in range(61)}}, "added_tokens": [{"id": 60, "content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    open_hf(tmp_path)
    tokenizer["added_tokens"] = [{"id": 61, "content": "<new>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        InputError, match=r"tokenizer\.json: id 61 has no embedding: config\.json has a vocabulary of 61"
    ):
        open_hf(tmp_path)


def test_a_misshapen_tensor_is_told_with_both_sides(tmp_path):
    config = replace(load_hf(FOLDER / "llama")[0], tied=True)
    tensors = mapping.export_weights(random_params(config), config, llama.FAMILY)
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(
        InputError, match=rf"{name} has shape \[24, 23\].* for blocks/0/mixer/query/kernel \[24, 4, 6\]"
    ):
        mapping.import_weights(tensors | {name: tensors[name][:, 1:]}, config, llama.FAMILY)
    missing = {key: x for key, x in tensors.items() if key != name}
    with pytest.raises(InputError, match=rf"{name} is missing .*: it would hold blocks/0/mixer/query/kernel"):
        mapping.import_weights(missing, config, llama.FAMILY)


def test_a_half_written_file_has_no_name(tmp_path):
    kinds = {"a": safetensors.Kind((2,), np.dtype(np.float32)), "b": safetensors.Kind((2,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="b float32"):
        write_weights(tmp_path, kinds, iter({"a": drawn(2), "b": drawn(3)}.items()), 10**9)
    assert not list(tmp_path.iterdir())
