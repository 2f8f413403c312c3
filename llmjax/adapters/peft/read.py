"""Adapters read from folders that the library peft wrote."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, PRESETS
from llmjax.adapters.lora import LoRA
from llmjax.adapters.peft.formats import CONFIG, FORMATS, WEIGHTS, Format
from llmjax.adapters.peft.modules import PREFIX, Module, Part, innermost, modules_of
from llmjax.config import InputError
from llmjax.models import safetensors
from llmjax.models.families import family_of
from llmjax.models.hf import read_json
from llmjax.models.mapping import our_shapes, rows
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
    form = next((f for f in FORMATS if f.kind == theirs.get("peft_type")), None)
    if form is None:
        known = ", ".join(f.kind for f in FORMATS)
        raise InputError(f"{folder / CONFIG}: peft_type={theirs.get('peft_type')!r} is not read: {known} are")
    tensors = safetensors.read(folder / WEIGHTS)
    try:
        return Reader(base, form, theirs, tensors, name).result(params)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


class Reader:
    """The parameters of an adapter from the tensors of a folder."""

    def __init__(
        self, base: Model, form: Format, theirs: Mapping[str, Any], tensors: Mapping[str, np.ndarray], name: str
    ) -> None:
        """Sort the tensors by the module that they are of; raises InputError for one of no module."""
        self.base, self.form, self.theirs, self.name = base, form, theirs, name
        self.method = replace(form.read(theirs), name=name)
        core = innermost(base)
        self.rows = {row.name: row for row in rows(core, family_of(core))}
        modules = modules_of(core)
        self.own: dict[str, np.ndarray] = {}
        self.modules: dict[str, tuple[Module, dict[Part, np.ndarray]]] = {}
        for full, tensor in tensors.items():
            key = full.removeprefix(PREFIX)
            if (plain := key.replace(".base_layer.", ".")) in self.rows:
                self.own[plain] = tensor
                continue
            owners = self.owners(key, modules)
            if not owners:
                raise InputError(f"tensor {full} is of no module that the base has, or not one of {form.kind}")
            module, part = owners[0]
            self.modules.setdefault(module.name, (module, {}))[1][part] = np.asarray(tensor, np.float32)

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
        rank = max(
            (x.shape[0] for _, parts in self.modules.values() for p, x in parts.items() if p.leaf == "a"), default=0
        )
        changes: dict[str, Any] = {"targets": targets_of(paths, self.base)}
        if rank:
            changes |= {
                "rank": rank,
                "alpha": self.method.scale * (math.sqrt(rank) if self.method.stabilised else rank),
            }
        return self.filled(replace(self.method, **changes), params)

    def filled(self, adapter: Any, params: Params) -> tuple[Adapted, Params]:
        """The parameters of an adapter that has the right rank and targets."""
        trained = "|".join(f"^{re.escape(path)}$" for path in sorted({p for n in self.own for p in self.rows[n].paths}))
        model = Adapted(base=self.base, adapters=(adapter,), trained=trained)
        leaves = {path: np.asarray(x) for path, x in flat(params).items()}
        mark = f"/{ADAPTERS}/{self.name}/"
        sizes = {path: leaf.shape for path, leaf in flat(model.abstract()).items() if mark in path}
        leaves |= {path: np.zeros(shape, np.float32) for path, shape in sizes.items()}
        for module, parts in self.modules.values():
            for part, value in self.scaled(module, parts, adapter):
                shapes = [sizes[f"{path}{mark}{part.leaf}"][len(module.row.place) :] for path in module.paths]
                for path, shape, x in zip(module.paths, shapes, self.read(module, part, value, shapes), strict=True):
                    leaves[f"{path}{mark}{part.leaf}"][module.row.place] = x.reshape(shape)
        for key, value in self.own.items():
            row = self.rows[key]
            shapes = [our_shapes(innermost(self.base))[path][len(row.place) :] for path in row.paths]
            for path, x in zip(row.paths, row.entry.read(np.asarray(value), shapes), strict=True):
                leaves[path] = np.array(leaves[path])
                leaves[path][row.place] = x
        return model, unflat({path: jnp.asarray(x) for path, x in leaves.items()})

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
        if entry.shape(mine) != value.shape:
            raise InputError(f"{module.name}.{part.key} has shape {list(value.shape)}, not {list(entry.shape(mine))}")
        found = entry.read(value, mine)
        return found if len(found) == len(shapes) else found * len(shapes)

    def scaled(
        self, module: Module, parts: Mapping[Part, np.ndarray], adapter: Any
    ) -> Iterator[tuple[Part, np.ndarray]]:
        """The tensors of a module, of a LoRA of lower rank or another scale as one of the adapter's."""
        if not isinstance(adapter, LoRA):
            yield from parts.items()
            return
        for part, value in parts.items():
            if part.leaf not in "ab":
                yield part, value
                continue
            axis = part.pattern.split("->")[0].split().index("r")
            rank = value.shape[axis]
            if part.leaf == "b":
                value = value * np.float32(self.scale_of(module.name, rank) / adapter.scale)
            yield part, np.pad(value, [(0, (adapter.rank - rank) * (i == axis)) for i in range(value.ndim)])

    def scale_of(self, module: str, rank: int) -> float:
        """The scale that the folder's config gives a module."""
        given: Mapping[str, float] = self.theirs.get("alpha_pattern") or {}
        matching = (v for k, v in given.items() if re.match(rf"(.*\.)?({k})$", module))
        alpha = next(matching, self.theirs.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.theirs.get("use_rslora") else rank)


def targets_of(paths: set[str], base: Model) -> str:
    """A preset that finds these projections and no others, or the expression that lists them."""
    every = projections(base)
    for preset, pattern in PRESETS.items():
        if {path for path in every if re.search(pattern, path)} == paths:
            return preset
    return f"^({'|'.join(re.escape(path) for path in sorted(paths))})$"
