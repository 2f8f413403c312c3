"""What turns another library's tensors into our parameter trees and back: a table of names and einops patterns."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmjax.config import InputError, diff, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU, MLP, Activation, FeedForward
from llmjax.nn.model import Params

Tensors = Mapping[str, np.ndarray]
Kind = TypeVar("Kind", int, float, bool, str)

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of activations; where several mean the same function, the first is written."""


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs and the parameters of ours that it holds."""

    paths: tuple[str, ...]
    """our parameters, within a block where `name` has a layer; several where theirs are fused"""
    name: str
    """their tensor; `{i}` is the layer"""
    pattern: str
    """einops from theirs to ours of one layer; fused tensors put the axis `n` of `paths` first"""

    def sizes(self, head_dim: int) -> dict[str, int]:
        """Lengths of axes that a shape alone does not tell: n, k (head_dim), p (planes of a head) and two."""
        known = {"n": len(self.paths), "k": head_dim, "p": head_dim // 2, "two": 2}
        words = re.findall(r"\w+", self.pattern)
        return {axis: size for axis, size in known.items() if axis in words}

    def read(self, theirs: np.ndarray, head_dim: int) -> list[np.ndarray]:
        """Our parameters, one a path."""
        ours = einops.rearrange(theirs, self.pattern, **self.sizes(head_dim))
        return [ours] if len(self.paths) == 1 else list(ours)

    def write(self, ours: list[Any]) -> Any:
        """Their tensor from our parameters, one a path; runs on abstract values too."""
        left, right = self.pattern.split("->")
        sizes = {axis: size for axis, size in self.sizes(0).items() if axis == "two"}
        joined = ours[0] if len(ours) == 1 else (jnp if isinstance(ours[0], jax.Array) else np).stack(ours)
        return einops.rearrange(joined, f"{right}->{left}", **sizes)


@dataclass(frozen=True)
class Family:
    """A model type of transformers: its config and its table."""

    model_type: str
    """`model_type` in config.json"""
    architecture: str
    """class that transformers loads it with"""
    prefix: str
    """start of the names of all tensors but the head; headless checkpoints are saved without it"""
    ignored: str
    """regular expression of tensors that hold no weights (masks, rotary tables of old versions)"""
    extra: tuple[str, ...]
    """keys of config.json that our config does not hold and a caller may add"""
    from_hf_config: Callable[[Mapping[str, Any]], Decoder]
    """our config from theirs"""
    to_hf_config: Callable[[Decoder], dict[str, Any]]
    """their config from ours; raises InputError for what it cannot say"""
    table: Callable[[Decoder], tuple[Entry, ...]]
    """the tensors of a model of that config"""


def import_weights(tensors: Tensors, config: Decoder, family: Family) -> Params:
    """Float32 host arrays in our layout, stacked over layers, from transformers' names and layouts.

    `tensors` may be lazy: each is read once. Raises InputError for a missing, unexpected, misshapen or non-float
    tensor, for a separate head where the config ties it, and for a config that the family cannot express.
    """
    family.to_hf_config(config)
    found = {_full_name(name, tensors, family): name for name in tensors}
    rows, expected = list(_rows(config, family)), shapes(config, family)
    missing = [name for name, *_ in rows if name not in found]
    if missing:
        raise InputError(f"tensor {missing[0]} is missing ({len(missing)} of {len(rows)} are)")
    _check_unexpected(found, {name for name, *_ in rows}, config, tensors, family)
    ours = {path: np.empty(shape, np.float32) for path, shape in _our_shapes(config).items()}
    for name, entry, paths, repeat in rows:
        theirs = tensors[found[name]]
        if tuple(theirs.shape) != expected[name]:
            raise InputError(
                f"tensor {name} has shape {list(theirs.shape)}: the config asks for {list(expected[name])}"
            )
        if not jnp.issubdtype(theirs.dtype, jnp.floating):
            raise InputError(f"tensor {name} is of {theirs.dtype}: only floating-point weights are read")
        for path, value in zip(paths, entry.read(theirs, _head_dim(config)), strict=True):
            ours[path][... if repeat is None else repeat] = value
    return unflatten_dict(ours, sep="/")


def export_weights(params: Params, config: Decoder, family: Family) -> dict[str, np.ndarray]:
    """Host arrays under transformers' names and in its layouts, dtypes kept: the inverse of `import_weights`.

    Any tree shaped like the parameters will do (gradients, moments). Raises InputError where the tree does not have the
    config's paths and shapes, and for a config that the family cannot express.
    """
    family.to_hf_config(config)
    ours, expected = flatten_dict(params, sep="/"), _our_shapes(config)
    for path in sorted(expected.keys() | ours.keys()):
        if path not in ours:
            raise InputError(f"parameter {path} is missing")
        if path not in expected:
            raise InputError(f"parameter {path} is not one of the config's")
        if tuple(ours[path].shape) != expected[path]:
            raise InputError(
                f"parameter {path} has shape {list(ours[path].shape)}: the config asks for {list(expected[path])}"
            )
    host = {path: np.asarray(value) for path, value in ours.items()}
    return {
        name: np.ascontiguousarray(
            entry.write([host[path] if repeat is None else host[path][repeat] for path in paths])
        )
        for name, entry, paths, repeat in _rows(config, family)
    }


def shapes(config: Decoder, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of each of transformers' tensors of a model of that config; no memory is used."""
    ours, found, known = _our_shapes(config), {}, {}
    for name, entry, paths, repeat in _rows(config, family):
        key = (entry, *(ours[path] for path in paths))
        if key not in known:
            abstract = [jax.ShapeDtypeStruct(ours[path][0 if repeat is None else 1 :], jnp.float32) for path in paths]
            known[key] = jax.eval_shape(lambda *leaves, entry=entry: entry.write(list(leaves)), *abstract).shape
        found[name] = known[key]
    return found


def expressible(config: Decoder, theirs: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """`theirs`, once reading it back gives a model that computes what `config` does; else InputError."""
    lost = diff(canonical(config), canonical(family.from_hf_config(theirs)))
    if lost:
        path, value, other = lost[0]
        raise InputError(f"{path}={value} cannot be said in a {family.model_type} config.json (it would read {other})")
    return dict(theirs)


def canonical(config: Decoder) -> Decoder:
    """The config with defaults filled in, equal blocks merged, and without what no evaluation depends on.

    Left out are initialisation, dropout, rematerialisation, unrolling, kernel choice and the rotary layout (which the
    tables undo in the weights).
    """
    blocks = tuple(_canonical_block(block, config.d_model) for block in config.pattern)
    same = blocks[:1] if all(block == blocks[0] for block in blocks) else blocks
    plain = Decoder()
    return replace(
        config,
        pattern=same,
        dropout=0.0,
        initializer=plain.initializer,
        remat=plain.remat,
        unroll=plain.unroll,
    )


def _canonical_block(block: Block, d_model: int) -> Block:
    mixer, mlp = block.mixer, block.mlp
    if isinstance(mixer, Attention):
        heads, kv_heads, head_dim = mixer.sizes(d_model)
        rope = mixer.rope and replace(mixer.rope, layout="half")
        mixer = replace(mixer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, implementation=None)
    if isinstance(mlp, GLU):
        mlp = replace(mlp, d_ff=mlp.width(d_model))
    elif isinstance(mlp, MLP):
        mlp = replace(mlp, d_ff=mlp.d_ff or 4 * d_model)
    return replace(block, mixer=mixer, mlp=mlp, dropout=0.0)


def parts(config: Decoder, model_type: str, mlp: type[FeedForward]) -> tuple[Block, Attention, Any]:
    """The first block of a canonical config, its attention and its feed-forward layer, which must be an `mlp`."""
    block = canonical(config).pattern[0]
    if not isinstance(block.mixer, Attention):
        raise InputError(
            f"{type(block.mixer).__name__} cannot be said in a {model_type} config.json: it has Attention only"
        )
    if not isinstance(block.mlp, mlp):
        raise InputError(
            f"{type(block.mlp).__name__} cannot be said in a {model_type} config.json: it has {mlp.__name__}"
        )
    return block, block.mixer, block.mlp


def setting(theirs: Mapping[str, Any], key: str, default: Kind) -> Kind:
    """The value of `key` in a config.json, null and absent meaning `default`; InputError where it has another type."""
    value = theirs.get(key)
    if value is None:
        return default
    kind = type(default)
    if kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind:
        raise InputError(f"config.json: {key}={value!r}: expected {kind.__name__}")
    return value


def activation_of(theirs: Mapping[str, Any], key: str, default: str) -> Activation:
    """Our name of the activation under `key`."""
    name = setting(theirs, key, default)
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: {key}={name!r} is not supported: {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def activation_name(ours: Activation) -> str:
    """transformers' name of our activation."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def checked(config: Decoder) -> Decoder:
    """`config`, validated; raises ConfigError where its values contradict each other."""
    validate(config)
    return config


def _rows(config: Decoder, family: Family) -> Iterator[tuple[str, Entry, list[str], int | None]]:
    """(their name, entry, our full paths, index in the stack or None) of every tensor of theirs."""
    length = len(config.pattern)
    for entry in family.table(config):
        if "{i}" not in entry.name:
            yield entry.name, entry, list(entry.paths), None
            continue
        for i in range(config.layers):
            paths = [f"blocks/{i % length}/{path}" for path in entry.paths]
            yield entry.name.format(i=i), entry, paths, i // length


def _full_name(name: str, tensors: Tensors, family: Family) -> str:
    headless = not any(other.startswith(family.prefix) for other in tensors)
    return family.prefix + name if headless and name != "lm_head.weight" else name


def _check_unexpected(
    found: dict[str, str], wanted: set[str], config: Decoder, tensors: Tensors, family: Family
) -> None:
    for name in sorted(found.keys() - wanted):
        if re.search(family.ignored, name):
            continue
        if name == "lm_head.weight" and config.tied:
            embedding = next(e.name for e in family.table(config) if e.paths == ("embed/embedding",))
            if np.array_equal(tensors[found[name]], tensors[found[embedding]]):
                continue
            raise InputError(f"lm_head.weight differs from {embedding} although the config ties them")
        raise InputError(
            f"tensor {name} is unexpected: a {family.model_type} model of this config has none of that name"
        )


def _our_shapes(config: Decoder) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(config.abstract(), sep="/").items()}


def _head_dim(config: Decoder) -> int:
    mixer = config.pattern[0].mixer
    return mixer.sizes(config.d_model)[2] if isinstance(mixer, Attention) else 0
