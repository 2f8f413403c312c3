"""What the families share in reading and writing a config.json."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from llmjax.config import InputError, diff, validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.channel_mixing import ChannelMixing
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.mixer import Mixer
from llmjax.nn.mla import MLA
from llmjax.nn.mlp import Activation, DenseFeedForward, FeedForward
from llmjax.nn.moe import MoE
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.router import TopK
from llmjax.nn.rwkv4 import RWKV4
from llmjax.nn.stack import Stack

Kind = TypeVar("Kind", int, float, bool, str)
Part = TypeVar("Part")
Their = dict[str, Any]

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
INITIAL = ("initializer", "dt_min", "dt_max", "a_min", "a_max")
"""fields that only the initial parameters depend on"""
NEUTRAL = (*INITIAL, "dropout", "remat", "unroll", "implementation", "form")
"""fields that no evaluation depends on"""


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


def optional(theirs: Mapping[str, Any], key: str, default: Kind) -> Kind | None:
    """As `setting`, a null that is written out meaning None."""
    return None if key in theirs and theirs[key] is None else setting(theirs, key, default)


def mapping_of(theirs: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, null and absent meaning an empty one."""
    value = theirs.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: {key}={value!r}: expected an object")
    return value


def require(theirs: Mapping[str, Any], **usual: Any) -> None:
    """Raise InputError for a key that has another than its usual value: there is nothing here that would compute it."""
    for key, value in usual.items():
        found = theirs.get(key)
        if found is not None and found != value:
            raise InputError(f"config.json: {key}={found} is not supported: only {value} is")


def activation_of(theirs: Mapping[str, Any], key: str, default: str) -> Activation:
    """Our name of the activation under `key`."""
    name = setting(theirs, key, default)
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: {key}={name!r} is not supported: {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def activation_name(ours: Activation) -> str:
    """transformers' name of our activation."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def architecture_of(theirs: Mapping[str, Any], *known: str) -> str:
    """The class that `architectures` names, the first of the known where it names none."""
    names = theirs.get("architectures") or known[:1]
    if not isinstance(names, list | tuple) or names[0] not in known:
        raise InputError(f"config.json: architectures={names} is not supported: {', '.join(known)} are")
    return names[0]


def checked(config: Part) -> Part:
    """`config`, validated; raises ConfigError where its values contradict each other."""
    validate(config)
    return config


def period(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The shortest beginning of which `parts` is a repetition."""
    whole = tuple(parts)
    if not whole:
        raise InputError("config.json: there is no layer")
    lengths = (n for n in range(1, len(whole) + 1) if len(whole) % n == 0)
    return next((whole[:n] for n in lengths if whole[:n] * (len(whole) // n) == whole), whole)


def by_layer(theirs: Mapping[str, Any], layers: int, default: Callable[[int], str], **parts: Part) -> tuple[Part, ...]:
    """The pattern of a stack whose layers are of the kinds that `layer_types` names, or else `default` of the layer."""
    names = theirs.get("layer_types") or [default(i) for i in range(layers)]
    if not isinstance(names, list) or len(names) != layers:
        raise InputError(f"config.json: layer_types={names!r}: expected one for each of the {layers} layers")
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise InputError(f"config.json: layer_types holds {unknown[0]!r}: only {', '.join(parts)} are supported")
    return period([parts[name] for name in names])


def kinds_of(config: Stack, kind: Callable[[Block], str]) -> list[str]:
    """`layer_types` of a stack."""
    return [kind(block) for block in config.pattern] * config.repeats


def first(
    config: Any,
    family: str,
    mixer: type[Mixer],
    mlp: type[FeedForward] | type[None],
    model: type[Stack] = Decoder,
) -> tuple[Block, Any, Any]:
    """The first block of a canonical config, its mixer and its feed-forward layer, which must be of these types."""
    if not isinstance(config, model):
        raise InputError(f"{type(config).__name__} cannot be said in a {family} config.json: only {model.__name__} can")
    block = canonical(config).pattern[0]
    for part, wanted in ((block.mixer, mixer), (block.mlp, mlp)):
        if not isinstance(part, wanted):
            raise InputError(
                f"{type(part).__name__} cannot be said in a {family} config.json: it has {wanted.__name__} there"
            )
    return block, block.mixer, block.mlp


def each(
    config: Any, family: str, mlp: type[FeedForward] | type[None], *mixers: type[Mixer]
) -> list[tuple[Block, Any, Any]]:
    """As `first`, of the first block with each of these mixers; InputError where one is missing or there is another."""
    blocks = canonical(config).pattern if isinstance(config, Decoder) else ()
    found = {type(block.mixer): block for block in reversed(blocks) if isinstance(block.mlp, mlp)}
    if found.keys() != set(mixers):
        names = " and ".join(f"Block({mixer.__name__}, {mlp.__name__})" for mixer in mixers)
        raise InputError(f"a {family} config.json tells of {names} in a Decoder, and of no others")
    return [(found[mixer], found[mixer].mixer, found[mixer].mlp) for mixer in mixers]


def expressible(config: Any, theirs: Their, family: str, read: Callable[[Their], Any]) -> Their:
    """`theirs`, once reading it back gives a model that computes what `config` does; else InputError."""
    lost = diff(canonical(config), canonical(read(theirs)))
    if lost:
        path, value, other = lost[0]
        raise InputError(f"{path}={value} cannot be said in a {family} config.json (it would read {other})")
    return theirs


def canonical(config: Any, d_model: int = 0) -> Any:
    """The config with defaults filled in, patterns as short as can be, and without what no evaluation depends on.

    The latter are initialisation, dropout, rematerialisation, choice of kernel or form, what balances experts in
    training, and which features a rotation over a whole head pairs (which the tables undo in the weights).
    """
    if isinstance(config, tuple):
        return tuple(canonical(part, d_model) for part in config)
    if not is_dataclass(config) or isinstance(config, type):
        return config
    d_model = getattr(config, "d_model", d_model)
    plain = {f.name: f.default for f in fields(config) if f.name in NEUTRAL}
    others = {f.name: canonical(getattr(config, f.name), d_model) for f in fields(config) if f.name not in NEUTRAL}
    return filled(replace(config, **others, **plain), d_model)


@functools.singledispatch
def filled(config: Any, d_model: int) -> Any:
    """A node with what it leaves to defaults or to the model's width written out; one rule a class."""
    del d_model
    return config


@filled.register
def _(config: Attention, d_model: int) -> Attention:
    heads, kv_heads, head_dim = config.sizes(d_model)
    rope = config.rope
    if rope is not None and rope.fraction == 1:
        rope = replace(rope, layout="half")
    scale = 1 / math.sqrt(head_dim) if config.scale is None else config.scale
    return replace(config, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, scale=scale)


@filled.register
def _(config: MLA, d_model: int) -> MLA:
    del d_model
    return replace(config, scale=1 / math.sqrt(config.nope_dim + config.rope_dim)) if config.scale is None else config


@filled.register
def _(config: DenseFeedForward, d_model: int) -> DenseFeedForward:
    return replace(config, d_ff=config.width(d_model))


@filled.register
def _(config: MoE, d_model: int) -> MoE:
    del d_model
    return replace(config, balance_loss=0.0, z_loss=0.0, bias_rate=None if config.bias_rate is None else 0.001)


@filled.register
def _(config: TopK, d_model: int) -> TopK:
    del d_model
    same = config.groups == config.top_groups
    return replace(config, groups=1, top_groups=1, group_best=1) if same else config


@filled.register
def _(config: Mamba, d_model: int) -> Mamba:
    return replace(config, dt_rank=config.sizes(d_model)[1])


@filled.register
def _(config: RWKV4 | RGLRU, d_model: int) -> RWKV4 | RGLRU:
    return replace(config, d_inner=config.d_inner or d_model)


@filled.register
def _(config: ChannelMixing, d_model: int) -> ChannelMixing:
    return replace(config, d_ff=config.d_ff or 4 * d_model)


@filled.register
def _(config: Stack, d_model: int) -> Stack:
    del d_model
    return replace(config, pattern=period(config.pattern))
