"""Adapters read from folders that the library peft wrote."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, PRESETS, ProjectionAdapter
from llmjax.adapters.boft import BOFT
from llmjax.adapters.lora import LoRA
from llmjax.adapters.peft.formats import CONFIG, FORMATS, NORMS, TUNED, WEIGHTS, read_config
from llmjax.adapters.peft.modules import PREFIX, SHARED, Module, Part, innermost, modules_of
from llmjax.adapters.peft.virtual import KINDS, load_virtual
from llmjax.config import InputError
from llmjax.models import safetensors
from llmjax.models.families import family_of
from llmjax.models.hf import read_json
from llmjax.models.mapping import Entry, Row, our_shapes, rows
from llmjax.nn.model import Model, Params, flat, unflat
from llmjax.nn.projections import projections


def load_peft(directory: str | Path, base: Model, params: Params, name: str = "default") -> tuple[Adapted, Params]:
    """The base with the adapter of a folder that peft wrote, and the parameters of both.

    `params` are the base's; those that the folder has of its own (biases, modules_to_save) take their place. Raises
    InputError for a bad file, a method that is not there, tensors of modules that the base has not, and shapes that do
    not fit.
    """
    folder = Path(directory)
    theirs = read_json(folder / CONFIG)
    kind, known = theirs.get("peft_type"), dict.fromkeys([*(f.kind for f in FORMATS), *KINDS, NORMS])
    if kind not in known:
        raise InputError(f"{folder / CONFIG}: peft_type={kind!r} is not read: {', '.join(known)} are")
    tensors = safetensors.read(folder / WEIGHTS)
    try:
        if kind in KINDS:
            return load_virtual(theirs, tensors, base, params, name)
        if kind == NORMS:
            return load_norms(tensors, base, params)
        return Reader(base, theirs, tensors, name).result(params)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


class Reader:
    """The parameters of an adapter from the tensors of a folder."""

    def __init__(self, base: Model, theirs: Mapping[str, Any], tensors: Mapping[str, np.ndarray], name: str) -> None:
        """Sort the tensors by the module that they are of; raises InputError for one of no module."""
        self.form, method = read_config(theirs)
        self.base, self.theirs, self.name, self.method = base, theirs, name, replace(method, name=name)
        self.rows = rows_of(base)
        modules = modules_of(innermost(base))
        self.own: dict[str, np.ndarray] = {}
        self.shared: dict[Part, np.ndarray] = {}
        self.modules: dict[str, tuple[Module, dict[Part, np.ndarray]]] = {}
        common = {SHARED + part.key: part for part in self.form.shared}
        for full, tensor in tensors.items():
            key = full.removeprefix(PREFIX)
            if (plain := key.replace(".base_layer.", ".")) in self.rows:
                self.own[plain] = tensor
                continue
            value = np.asarray(tensor, np.float32)
            if full in common:
                self.shared[common[full]] = value
                continue
            owners = self.owners(key, modules)
            if not owners:
                raise InputError(f"tensor {full} is of no module that the base has, or not one of {self.form.kind}")
            module, part = owners[0]
            self.modules.setdefault(module.name, (module, {}))[1][part] = value
        self.check(modules)

    def check(self, modules: Mapping[str, Module]) -> None:
        """Raise InputError for modules that are no such adapter's, and for tensors that are missing."""
        for part in self.form.shared:
            if part not in self.shared:
                raise InputError(f"tensor {SHARED}{part.key} is missing: save it with the adapter")
        for module, found in self.modules.values():
            self.form.check(module)
            for part in self.form.parts(self.method, module.projections[0]):
                if part not in found:
                    raise InputError(f"tensor {PREFIX}{module.name}.{part.key} is missing")
        if not self.form.idle:
            adapted = {path for module, _ in self.modules.values() for path in module.paths}
            for name, module in modules.items():
                if name not in self.modules and adapted & set(module.paths):
                    raise InputError(
                        f"{self.form.method.__name__} changes {', '.join(module.paths)} in all layers, but not {name}"
                    )

    def owners(self, key: str, modules: Mapping[str, Module]) -> list[tuple[Module, Part]]:
        """The module and the part that a tensor's name says, if any."""
        dots = [i for i, letter in enumerate(key) if letter == "."]
        found = [(modules[key[:dot]], key[dot + 1 :]) for dot in dots if key[:dot] in modules]
        every = ((module, rest, self.form.parts(self.method, module.projections[0])) for module, rest in found)
        return [(module, part) for module, rest, parts in every for part in parts if part.key == rest]

    def result(self, params: Params) -> tuple[Adapted, Params]:
        """The model and all parameters."""
        self.own = {key: x for key, x in self.own.items() if not np.array_equal(self.given(key, params), x)}
        paths = {path for module, _ in self.modules.values() for path in module.paths}
        changes: dict[str, Any] = {"targets": targets_of(paths, self.base)}
        if isinstance(self.method, LoRA):
            rank = self.length("a", self.method.rank)
            root = math.sqrt(rank) if self.method.stabilised else rank
            changes |= {"rank": rank, "alpha": self.method.scale * root}
        if isinstance(self.method, BOFT):
            # Where peft has no CUDA compiler it makes one factor, and its config keeps the number that was asked for.
            changes["factors"] = self.length("skew", self.method.factors)
        return self.filled(replace(self.method, **changes), params)

    def length(self, leaf: str, default: int) -> int:
        """The longest first axis of the tensors of one parameter."""
        found = (x.shape[0] for _, parts in self.modules.values() for part, x in parts.items() if part.leaf == leaf)
        return max(found, default=default)

    def filled(self, adapter: Any, params: Params) -> tuple[Adapted, Params]:
        """The parameters of an adapter that has the right rank and targets."""
        model = Adapted(base=self.base, adapters=(adapter,), trained=trained_by(self.own, self.rows))
        if adapter.moves:
            params = moved(model, adapter, params)
        mark = f"{ADAPTERS}/{self.name}/"
        sizes = {path: leaf.shape for path, leaf in flat(model.abstract()).items() if mark in path}
        leaves = {path: np.zeros(shape, np.float32) for path, shape in sizes.items()}
        for module, parts in self.modules.values():
            for part, value in self.scaled(module, parts, adapter):
                paths = [f"{path}/{mark}{part.leaf}" for path in module.paths]
                shapes = [sizes[path][len(module.row.place) :] for path in paths]
                for path, shape, x in zip(paths, shapes, self.read(module, part, value, shapes), strict=True):
                    leaves[path][module.row.place] = part.sign * x.reshape(shape)
        for part, value in self.shared.items():
            path = mark + part.leaf
            entry = Entry((path,), SHARED + part.key, part.pattern)
            leaves[path] = checked(entry, value, [sizes[path]])[0]
        leaves |= replaced(params, self.own, self.rows, self.base)
        return model, with_leaves(params, leaves)

    def given(self, key: str, params: Params) -> np.ndarray:
        """A tensor of the base as it is without the adapter."""
        row, leaves = self.rows[key], flat(params)
        return row.entry.write([np.asarray(leaves[path][row.place]) for path in row.paths])

    def read(
        self, module: Module, part: Part, value: np.ndarray, shapes: Sequence[tuple[int, ...]]
    ) -> list[np.ndarray]:
        """Our parameters of one tensor of theirs; what a fused module shares is the same for all."""
        entry = module.entry(part)
        mine = shapes if "O" in part.pattern.split() else shapes[:1]
        found = checked(replace(entry, name=f"{module.name}.{part.key}"), value, mine)
        return found if len(found) == len(shapes) else found * len(shapes)

    def scaled(
        self, module: Module, parts: Mapping[Part, np.ndarray], adapter: Any
    ) -> Iterator[tuple[Part, np.ndarray]]:
        """The tensors of a module, of a LoRA of lower rank or another scale as one of the adapter's."""
        if not isinstance(adapter, LoRA):
            yield from parts.items()
            return
        for part, value in parts.items():
            axes = part.pattern.split("->")[0].split()
            if "r" not in axes:
                yield part, value
                continue
            axis = axes.index("r")
            rank = value.shape[axis]
            if part.leaf == "b":
                value = value * np.float32(self.scale_of(module.name, rank) / adapter.scale)
            yield part, np.pad(value, [(0, (adapter.rank - rank) * (i == axis)) for i in range(value.ndim)])

    def scale_of(self, module: str, rank: int) -> float:
        """The scale that the folder's config gives a module; AdaLoRA's stays when ranks are cut."""
        if self.form.kind != "LORA":
            return float(self.method.scale)
        given: Mapping[str, float] = self.theirs.get("alpha_pattern") or {}
        matching = (v for k, v in given.items() if re.match(rf"(.*\.)?({k})$", module))
        alpha = next(matching, self.theirs.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.theirs.get("use_rslora") else rank)


def rows_of(base: Model) -> dict[str, Row]:
    """The tensors of the base's family by name."""
    core = innermost(base)
    return {row.name: row for row in rows(core, family_of(core))}


def trained_by(own: Iterable[str], table: Mapping[str, Row]) -> str:
    """The expression of our parameters that stand in these tensors of the base."""
    return "|".join(f"^{re.escape(path)}$" for path in sorted({path for name in own for path in table[name].paths}))


def replaced(
    params: Params, own: Mapping[str, np.ndarray], table: Mapping[str, Row], base: Model
) -> dict[str, np.ndarray]:
    """Parameters of the base with the tensors of a folder in them."""
    shapes, leaves = our_shapes(innermost(base)), flat(params)
    result: dict[str, np.ndarray] = {}
    for name, value in own.items():
        row = table[name]
        mine = [shapes[path][len(row.place) :] for path in row.paths]
        for path, x in zip(row.paths, checked(row.entry, np.asarray(value), mine), strict=True):
            result.setdefault(path, np.array(leaves[path]))[row.place] = x
    return result


def with_leaves(params: Params, leaves: Mapping[str, np.ndarray]) -> Params:
    """The parameters, some put in the place of what was there."""
    return unflat({**flat(params), **{path: jnp.asarray(x) for path, x in leaves.items()}})


def checked(entry: Entry, value: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Our parameters of these shapes from a tensor of theirs; InputError where it has another shape."""
    expected = entry.shape(shapes)
    if expected != value.shape:
        raise InputError(f"tensor {entry.name} has shape {list(value.shape)}, not {list(expected)}")
    return entry.read(value, shapes)


def moved(model: Adapted, adapter: ProjectionAdapter, params: Params) -> Params:
    """The base's parameters without what the adapter moves out of them when it is drawn."""
    moving = {f"{path}/{p.leaf}" for path, p in adapter.found(model.base).items()}

    def rest(params: Params) -> dict[str, Any]:
        return {path: x for path, x in flat(model.init(jax.random.key(0), params)).items() if path in moving}

    return unflat({**flat(params), **jax.jit(rest)(params)})


def load_norms(tensors: Mapping[str, np.ndarray], base: Model, params: Params) -> tuple[Adapted, Params]:
    """The base with trained modules of its own in it; raises InputError for tensors that it has not."""
    table = rows_of(base)
    own = {full.removeprefix(PREFIX).replace(f".{TUNED}.", "."): x for full, x in tensors.items()}
    for name in own:
        if name not in table:
            raise InputError(f"tensor {name} is not one that the base has")
    return Adapted(base=base, trained=trained_by(own, table)), with_leaves(params, replaced(params, own, table, base))


def targets_of(paths: set[str], base: Model) -> str:
    """A preset that finds these projections and no others, or the expression that lists them."""
    every = projections(base)
    for preset, pattern in PRESETS.items():
        if {path for path in every if re.search(pattern, path)} == paths:
            return preset
    return f"^({'|'.join(re.escape(path) for path in sorted(paths))})$"
