"""What turns another library's tensors into our parameter trees and back: a table of names and patterns of axes.

One reader and one writer serve all families: `import_weights` fills the local shards of our stacked parameters straight
from views of the files, `exported` hands out their tensors one at a time.
"""

import functools
import itertools
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import InputError
from llmjax.models.packed import Packed
from llmjax.nn.model import Model, Params, flat, unflat
from llmjax.quant.tensor import Layout as Axes
from llmjax.quant.tensor import QTensor

Tensors = Mapping[str, np.ndarray | Packed]
Shape = tuple[int, ...]
Places = dict[str, Shape]

TILE = (256, 512)
"""rows and columns that are transposed at a time: what a core's cache holds"""
LARGE = 2**21
"""bytes of a large page"""


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs and the parameters of ours that it holds, the whole of each.

    `pattern` is einops' notation from theirs to ours of one layer (and one expert), `(h k) d -> d h k`. Where theirs
    holds several of ours, brackets stand around the axes along which these are joined: `[h k] d -> d h k` for one
    after another, `(h [k]) d -> d h k` for one after another within each head. Their lengths may differ.
    """

    paths: tuple[str, ...]
    """our parameters, `blocks/*/mixer/query/kernel`; `*` are all places of a pattern, a number is one of them"""
    name: str
    """their tensor; `{i}` is the layer of the stack that `paths` are in, `{r}` the repeat of its pattern (where theirs
    counts a pattern as one layer), `{e}` the expert"""
    pattern: str
    """axes of theirs, and of ours without those of layers and, where the name has one, of experts"""
    sizes: tuple[tuple[str, int], ...] = ()
    """lengths of axes that our shape does not tell"""

    def at(self, ours: str, theirs: str) -> "Entry":
        """The same, below another path of ours and with a longer name."""
        return replace(self, paths=tuple(ours + path for path in self.paths), name=theirs + self.name)

    def read(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Our parameters of these shapes, one a path: views wherever numpy can make them."""
        form = layout(self.pattern)
        lengths = [axis_lengths(form, shape, self.sizes) for shape in shapes]
        joined = [math.prod(known[axis] for axis in form.joined) for known in lengths]
        whole = theirs.reshape([*_lengths(form.before, lengths[0]), sum(joined), *_lengths(form.after, lengths[0])])
        parts = np.split(whole, list(itertools.accumulate(joined))[:-1], axis=len(form.before))
        order = [form.theirs.index(axis) for axis in form.ours]
        return [
            part.reshape(_lengths(form.theirs, known)).transpose(order).reshape(shape)
            for part, known, shape in zip(parts, lengths, shapes, strict=True)
        ]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor from our parameters, one a path: the inverse of `read`."""
        form = layout(self.pattern)
        lengths = [axis_lengths(form, part.shape, self.sizes) for part in ours]
        order = [form.ours.index(axis) for axis in form.theirs]
        parts = [
            part.reshape(_lengths(form.ours, known))
            .transpose(order)
            .reshape([*_lengths(form.before, known), -1, *_lengths(form.after, known)])
            for part, known in zip(ours, lengths, strict=True)
        ]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=len(form.before))
        return joined.reshape(self.shape([part.shape for part in ours]))

    def transposes(self, axes: Axes) -> bool:
        """Whether theirs is a matrix `[outputs, inputs]` of ours alone, both in our order."""
        form = layout(self.pattern)
        inputs = sum(map(len, form.merged[: len(axes.inputs)]))
        straight = form.theirs == form.ours[inputs:] + form.ours[:inputs]
        return straight and len(form.groups) == 2 and len(form.groups[1]) == inputs and len(self.paths) == 1

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of their tensor, from ours."""
        form = layout(self.pattern)
        lengths = [axis_lengths(form, shape, self.sizes) for shape in shapes]
        total = sum(math.prod(known[axis] for axis in form.joined) for known in lengths)

        def length(group: tuple[str, ...]) -> int:
            own = math.prod(lengths[0][axis] for axis in group if axis not in form.joined)
            return own * total if form.joined and form.joined[0] in group else own

        return tuple(map(length, form.groups))


def moved(entries: Sequence[Entry], old: str, new: str) -> list[Entry]:
    """The entries, those of their tensors that stand below `old` standing below `new`."""
    return [replace(e, name=new + e.name.removeprefix(old)) if e.name.startswith(old) else e for e in entries]


class Layout(NamedTuple):
    """A pattern, read."""

    groups: tuple[tuple[str, ...], ...]
    """axes that make up each dimension of theirs"""
    before: tuple[str, ...]
    """their axes outside of those that are joined"""
    joined: tuple[str, ...]
    """axes along which several of ours are joined in theirs"""
    after: tuple[str, ...]
    """their axes inside of those that are joined"""
    ours: tuple[str, ...]
    """our axes"""
    merged: tuple[tuple[str, ...], ...]
    """axes that make up each dimension of ours"""

    @property
    def theirs(self) -> tuple[str, ...]:
        """All axes of theirs."""
        return self.before + self.joined + self.after


@functools.cache
def layout(pattern: str) -> Layout:
    """A pattern, read; `1` is an axis that the other side lacks. Raises ValueError where the two sides differ."""
    left, right = (side.strip() for side in pattern.split("->"))
    bracketed = re.search(r"\[(.*?)\]", left)
    joined = tuple(bracketed[1].split()) if bracketed else ()
    if bracketed and not re.search(r"\([^)]*\[", left):
        left = left.replace("[", "(").replace("]", ")")
    groups, merged = _groups(re.sub(r"[\[\]]", " ", left)), _groups(right)
    axes, ours = (tuple(itertools.chain(*side)) for side in (groups, merged))
    if sorted(axes) != sorted(ours) or len(set(axes)) < len(axes):
        raise ValueError(f"{pattern!r} has other axes on the one side than on the other")
    start = axes.index(joined[0]) if joined else len(axes)
    return Layout(groups, axes[:start], joined, axes[start + len(joined) :], ours, merged)


def _groups(side: str) -> tuple[tuple[str, ...], ...]:
    words = re.findall(r"\([^)]*\)|\S+", side)
    return tuple(tuple(axis for axis in word.strip("()").split() if axis != "1") for word in words)


def axis_lengths(form: Layout, shape: Shape, sizes: Sequence[tuple[str, int]]) -> dict[str, int]:
    """The length of every axis, from the shape of a parameter of ours; ValueError where one is left open."""
    known = {axis: size for axis, size in sizes if axis in form.ours}
    for group, size in zip(form.merged, shape, strict=True):
        unknown = [axis for axis in group if axis not in known]
        if len(unknown) > 1:
            raise ValueError(f"the lengths of the axes {', '.join(unknown)} are not told")
        if unknown:
            known[unknown[0]] = size // math.prod(known[axis] for axis in group if axis in known)
    return known


def _lengths(axes: tuple[str, ...], known: dict[str, int]) -> list[int]:
    return [known[axis] for axis in axes]


@dataclass(frozen=True)
class Family:
    """A model type of transformers: its config and its table."""

    model_type: str
    """`model_type` in config.json"""
    architecture: str
    """class that transformers loads it with"""
    prefix: str
    """start of the names of all tensors but the head; headless checkpoints are saved without it"""
    from_hf_config: Callable[[Mapping[str, Any]], Any]
    """our model's config from theirs"""
    to_hf_config: Callable[[Any], dict[str, Any]]
    """their config from ours; raises InputError for what it cannot say"""
    table: Callable[[Any], tuple[Entry, ...]]
    """the tensors of a model of that config"""
    ignored: str = r"rotary_emb\.inv_freq$"
    """regular expression of tensors that hold no weights (masks, rotary tables of old versions)"""
    copies: Mapping[str, str] = field(default_factory=dict)
    """tensors that may repeat another one, where a model ties them"""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """regular expressions of what other versions write in names, and what the table calls it"""
    extra: tuple[str, ...] = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    """keys of config.json that our config does not hold and a caller may add"""


class Row(NamedTuple):
    """One tensor of theirs in one model."""

    name: str
    entry: Entry
    paths: tuple[str, ...]
    """our full paths"""
    place: Shape
    """where in our stacked parameters: (), (repeat,), (repeat, expert) or (expert,)"""


def import_weights(tensors: Tensors, config: Model, family: Family, abstract: Params | None = None) -> Params:
    """Our parameters, stacked over layers, from transformers' names and layouts.

    Of the dtypes that `abstract` (shape structs) says, float32 without it; where it holds a part of the tree, that part
    alone. Host arrays where the structs have no sharding; else arrays on their devices, for which a host reads what its
    own devices hold. `tensors` are views of files: beside the parameters themselves there is at most one of them (of
    all layers) in memory. Raises InputError for a missing, unexpected, misshapen or non-float tensor, for a separate
    head where the config ties it, for a quantised tensor that is not the parameter as it stands, and for a config that
    the family cannot express.
    """
    family.to_hf_config(config)
    ours = our_shapes(config)
    table = rows(config, family)
    found = _found(tensors, table, family, ours)
    wanted = flat(config.abstract() if abstract is None else abstract)
    made: dict[str, Any] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = (row for row in table if any(path in wanted for path in row.paths))
        for _, group in itertools.groupby(asked, key=lambda row: id(row.entry)):
            own = list(group)
            paths = [path for path in dict.fromkeys(path for row in own for path in row.paths) if path in wanted]
            parts = {path: jax.tree.map(Parts, wanted[path]) for path in paths}

            def fill(row: Row, parts: "dict[str, Any]" = parts) -> None:
                for path, value in _values(row, tensors[found[row.name]], wanted, ours):
                    for part, x in zip(jax.tree.leaves(parts.get(path)), jax.tree.leaves(value), strict=False):
                        part.fill(row.place, np.asarray(x))

            list(pool.map(fill, own))
            made |= {path: jax.tree.map(Parts.array, part) for path, part in parts.items()}
    return unflat(made)


def _values(
    row: Row, theirs: np.ndarray | Packed, wanted: Mapping[str, Any], ours: Places
) -> Iterator[tuple[str, Any]]:
    """Our parameters, unstacked, in one tensor of theirs, by path."""
    form = wanted.get(row.paths[0])
    if isinstance(theirs, np.ndarray):
        if isinstance(form, QTensor):
            raise InputError(f"tensor {row.name} is dense in the file and quantised in the model")
        shapes = [ours[path][len(row.place) :] for path in row.paths]
        yield from zip(row.paths, row.entry.read(theirs, shapes), strict=True)
        return
    if not isinstance(form, QTensor):
        raise InputError(f"tensor {row.name} is quantised in the file and dense in the model")
    if not row.entry.transposes(form.layout):
        ours_are = ", ".join(row.paths)
        raise InputError(f"tensor {row.name} is quantised and holds {ours_are} in another order: this is not read")
    try:
        yield row.paths[0], theirs.read(form)
    except InputError as error:
        raise InputError(f"tensor {row.name}: {error}") from None


class Parts:
    """A parameter while it is read: a host buffer for each part of it that a device of this process holds."""

    def __init__(self, wanted: jax.ShapeDtypeStruct) -> None:
        """Empty buffers."""
        self.shape, self.sharding = wanted.shape, wanted.sharding
        sharded = self.sharding is not None
        indices = self.sharding.addressable_devices_indices_map(self.shape).values() if sharded else [None]
        bounds = {self.bounds(index) for index in indices}
        self.buffers = {bound: empty(tuple(b - a for a, b in bound), np.dtype(wanted.dtype)) for bound in bounds}

    def bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        """First index and end along every axis; None is the whole."""
        slices = (slice(None),) * len(self.shape) if index is None else index
        return tuple(s.indices(n)[:2] for s, n in zip(slices, self.shape, strict=True))

    def fill(self, place: Shape, value: np.ndarray) -> None:
        """Copy what the buffers hold of `value`, which stands at `place` along the leading axes."""
        for bound, buffer in self.buffers.items():
            if all(a <= i < b for i, (a, b) in zip(place, bound, strict=False)):
                own: tuple[Any, ...] = tuple(i - a for i, (a, _) in zip(place, bound, strict=False))
                copy(buffer[(*own, ...)], value[tuple(slice(a, b) for a, b in bound[len(place) :])])

    def array(self) -> Any:
        """The array, on its devices where it has a sharding."""
        if self.sharding is None:
            return next(iter(self.buffers.values()))
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.buffers[self.bounds(index)])


def empty(shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array; a large one lies on large pages, at an address that jax on CPU takes over uncopied."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target = source, cast in the order in which the source lies in memory, then transposed, tile by tile."""
    target, source = target.squeeze(), source.squeeze()
    order = sorted(range(source.ndim), key=lambda axis: -abs(source.strides[axis]))
    if order == list(range(source.ndim)):
        target[...] = source
        return
    outer, inner = order[0], order[-1]
    slabs = np.moveaxis(target, outer, 0), np.moveaxis(source, outer, 0)
    rows = source.size // (source.shape[outer] * source.shape[inner])
    if rows >= TILE[0]:
        for part, whole in zip(*slabs, strict=True):
            copy(part, whole)
        return
    for i, j in itertools.product(
        range(0, source.shape[outer], TILE[0] // rows), range(0, source.shape[inner], TILE[1])
    ):
        tile = [slice(None)] * source.ndim
        tile[outer], tile[inner] = slice(i, i + TILE[0] // rows), slice(j, j + TILE[1])
        straight = source[tuple(tile)].transpose(order).astype(target.dtype)
        target[tuple(tile)] = straight.transpose(np.argsort(order))


def export_weights(params: Params, config: Model, family: Family) -> dict[str, np.ndarray]:
    """Host arrays under transformers' names and in its layouts, dtypes kept: the inverse of `import_weights`.

    Any tree shaped like the parameters will do (gradients, moments). Raises InputError where the tree does not have the
    config's paths and shapes, and for a config that the family cannot express.
    """
    return {name: np.asarray(array, order="C") for name, array in exported(params, config, family)}


def exported(params: Params, config: Model, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """`export_weights` one tensor at a time, in the order of `shapes`."""
    family.to_hf_config(config)
    ours, expected = flat(params), our_shapes(config)
    for path in sorted(expected.keys() | ours.keys()):
        if path not in ours:
            raise InputError(f"parameter {path} is missing")
        if path not in expected:
            raise InputError(f"parameter {path} is not one of the config's")
        if tuple(ours[path].shape) != expected[path]:
            raise InputError(
                f"parameter {path} has shape {list(ours[path].shape)}: the config asks for {list(expected[path])}"
            )
        if not isinstance(ours[path], np.ndarray | jax.Array):
            raise InputError(f"parameter {path} is kept as {type(ours[path]).__name__}: make it dense, then export it")
    return (
        (row.name, row.entry.write([np.asarray(ours[path][row.place]) for path in row.paths]))
        for row in rows(config, family)
    )


def shapes(config: Model, family: Family) -> dict[str, Shape]:
    """The shape of each of transformers' tensors of a model of that config; no memory is used."""
    ours = our_shapes(config)
    return {row.name: their_shape(row, ours) for row in rows(config, family)}


def their_shape(row: Row, ours: Places) -> Shape:
    """The shape of their tensor."""
    return row.entry.shape([ours[path][len(row.place) :] for path in row.paths])


def rows(config: Model, family: Family) -> list[Row]:
    """Every tensor of theirs, those of one entry side by side."""
    ours = our_shapes(config)
    return [row for entry in family.table(config) for row in _rows(entry, ours)]


def _rows(entry: Entry, ours: Places) -> Iterator[Row]:
    """The tensors of one entry: one, or one for each layer and expert."""
    stack = re.match(r"(.*\bblocks/)(\d+|\*)/", entry.paths[0])
    places: list[tuple[int, Shape, tuple[str, ...]]] = [(0, (), entry.paths)]
    if stack:
        length = len({path[len(stack[1]) :].split("/")[0] for path in ours if path.startswith(stack[1])})
        chosen = range(length) if stack[2] == "*" else [int(stack[2])]
        own = {at: tuple(path.replace("blocks/*", f"blocks/{at}") for path in entry.paths) for at in chosen}
        repeats = range(ours[own[chosen[0]][0]][0])
        places = [(r * length + at, (r,), own[at]) for r in repeats for at in chosen]
    for layer, index, paths in places:
        experts = range(ours[paths[0]][len(index)]) if "{e}" in entry.name else (None,)
        for e in experts:
            yield Row(
                entry.name.format(i=layer, r=next(iter(index), None), e=e),
                entry,
                paths,
                index if e is None else (*index, e),
            )


@functools.lru_cache(maxsize=64)
def our_shapes(config: Model) -> Places:
    """The shape of every parameter by its path; no memory is used."""
    return {path: leaf.shape for path, leaf in flat(config.abstract()).items()}


def _found(tensors: Tensors, table: Sequence[Row], family: Family, ours: Places) -> dict[str, str]:
    """For each tensor that the table asks for its name in the file; InputError where files and table differ."""
    wanted = {row.name: row for row in table}
    found = {named(name, wanted, family): name for name in tensors}
    missing = [name for name in wanted if name not in found]
    if missing:
        holds = ", ".join(wanted[missing[0]].paths)
        raise InputError(f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are): it would hold {holds}")
    for name in sorted(found.keys() - wanted.keys()):
        _check_unexpected(name, found, tensors, family)
    for name, row in wanted.items():
        theirs, expected = tensors[found[name]], their_shape(row, ours)
        if theirs.shape != expected:
            mine = " and ".join(f"{path} {list(ours[path][len(row.place) :])}" for path in row.paths)
            raise InputError(
                f"tensor {name} has shape {list(theirs.shape)}: the config asks for {list(expected)}, for {mine}"
            )
        if not jnp.issubdtype(theirs.dtype, jnp.floating):
            raise InputError(f"tensor {name} is of {theirs.dtype}: only floating-point weights are read")
    return found


def named(name: str, wanted: Mapping[str, Row], family: Family) -> str:
    """What the family's table calls a tensor of a file, which may have another version's name or lack the prefix."""
    new = table_name(name, family)
    return new if new in wanted or family.prefix + new not in wanted else family.prefix + new


def table_name(name: str, family: Family) -> str:
    """What the family's table calls a tensor that another version may have named."""
    for old, new in family.renamed.items():
        name = re.sub(old, new, name)
    return name


def _check_unexpected(name: str, found: Mapping[str, str], tensors: Tensors, family: Family) -> None:
    """Raise InputError for a tensor that nobody asked for, unless it holds no weights or repeats another.

    A bias of zeros beside a quantised weight is what some writers add to every layer.
    """
    original, tensor = family.copies.get(name), tensors[found[name]]
    weight = tensors.get(found.get(name.removesuffix("bias") + "weight", ""))
    spare = isinstance(weight, Packed) and isinstance(tensor, np.ndarray) and not tensor.any()
    if spare or re.search(family.ignored, name):
        return
    if original is None or original not in found:
        raise InputError(
            f"tensor {name} is unexpected: a {family.model_type} model of this config has none of that name"
        )
    if not np.array_equal(np.asarray(tensor), np.asarray(tensors[found[original]])):
        raise InputError(f"{name} differs from {original} although the config ties them")
