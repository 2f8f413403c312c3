"""Adapters written as folders that the library peft loads: adapter_config.json and adapter_model.safetensors."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, Adapter, ProjectionAdapter
from llmjax.adapters.fold import folded
from llmjax.adapters.ia3 import IA3, writes
from llmjax.adapters.lora import LoRA
from llmjax.adapters.peft.formats import CONFIG, NORMS, TUNED, WEIGHTS, Format, format_of
from llmjax.adapters.peft.modules import PREFIX, SHARED, TIED, Module, Part, innermost, modules_of
from llmjax.adapters.peft.virtual import KINDS, written_virtual
from llmjax.config import InputError
from llmjax.models import safetensors
from llmjax.models.families import family_of
from llmjax.models.mapping import Entry, Row, rows
from llmjax.nn.model import Params, flat


def save_peft(
    directory: str | Path, model: Adapted, params: Params, name: str = "default", base_model: str | None = None
) -> None:
    """Write the adapter `name` as a folder that peft loads on the base's export; `base_model` is where that stands.

    Raises InputError for methods that peft has not, projections that it has no module for, and trained parameters of
    the base that it cannot keep.
    """
    model, params = folded(model, params)
    adapter = next((a for a in model.adapters if a.name == name), None)
    if adapter is None and (model.adapters or not model.trained):
        raise InputError(
            f"there is no adapter {name!r}: there are {', '.join(a.name for a in model.adapters) or 'none'}"
        )
    moving = [a.name for a in model.adapters if a.name != name and isinstance(a, ProjectionAdapter) and a.moves]
    if moving:
        raise InputError(f"{moving[0]} has moved a part of the base into itself, which {name} would lack: merge it")
    if adapter is None:
        own, tensors = written_norms(model, flat(params))
    elif type(adapter) in KINDS.values():
        own, tensors = written_virtual(adapter, model, params)
    else:
        own, tensors = written(adapter, model, flat(params))
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **own,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {key: safetensors.Kind(x.shape, x.dtype) for key, x in tensors.items()}
    safetensors.write(folder / WEIGHTS, kinds, iter(tensors.items()))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def written(
    adapter: Adapter, model: Adapted, leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of an adapter of projections."""
    form = format_of(adapter)
    assert isinstance(adapter, ProjectionAdapter)
    base = innermost(model)
    every, found = modules_of(base), adapter.found(base)
    reached = {path for module in every.values() for path in module.paths}
    if any(found[path].experts is not None for path in found) or not reached >= set(found):
        missing = next(path for path in found if path not in reached or found[path].experts is not None)
        raise InputError(f"peft has no module of its own for {missing}: use other targets, or merge the adapter")
    chosen = [module for module in every.values() if set(module.paths) & set(found)]
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in chosen:
        form.check(module)
        own = Writer(module, adapter, form, leaves).tensors()
        tensors |= {f"{PREFIX}{module.name}.{key}": x for key, x in own.items()}
        if isinstance(adapter, LoRA) and (rank := rank_of(own)) != adapter.rank:
            ranks[module.name] = rank
    for part in form.shared:
        entry = Entry((part.leaf,), part.key, part.pattern)
        value = leaves[f"{ADAPTERS}/{adapter.name}/{part.leaf}"]
        tensors[SHARED + part.key] = entry.write([np.asarray(value, np.float32)])
    config = {
        "peft_type": form.kind,
        **target_names(form, chosen, every),
        **form.write(adapter),
        **patterns(ranks, adapter),
        **trained_config(model, form, leaves, tensors, chosen),
    }
    return config, tensors


class Writer(NamedTuple):
    """The tensors of one module of theirs, from ours."""

    module: Module
    adapter: ProjectionAdapter
    form: Format
    leaves: Mapping[str, Any]

    def tensors(self) -> dict[str, np.ndarray]:
        """By their key."""
        parts = self.form.parts(self.adapter, self.module.projections[0])
        found = {part: [self.value(path, part.leaf) for path in self.module.paths] for part in parts}
        values = {part: [x for x in own if x is not None] for part, own in found.items()}
        common = [part for part in parts if "O" not in part.pattern.split()]
        if all(len(values[p]) == len(found[p]) for p in parts) and all(_equal(values[p]) for p in common):
            values |= {part: values[part][:1] for part in common}
        elif self.form.joins:
            values = self.side_by_side({part.leaf: (part, own) for part, own in found.items()})
        else:
            raise InputError(
                f"{self.module.name} is one module of transformers: {self.form.kind} must change all of "
                f"{', '.join(self.module.paths)} alike"
            )
        return {part.key: part.sign * self.module.entry(part).write(own) for part, own in values.items()}

    def value(self, path: str, leaf: str) -> np.ndarray | None:
        """One parameter at the module's place in the stack; None where the projection is not adapted."""
        found = self.leaves.get(f"{path}/{ADAPTERS}/{self.adapter.name}/{leaf}")
        return None if found is None else np.asarray(found[self.module.row.place], np.float32)

    def side_by_side(self, parts: Mapping[str, tuple[Part, list[np.ndarray | None]]]) -> dict[Part, list[np.ndarray]]:
        """Ranks of all projections after one another: A joined, each B with zeros where the others' ranks are."""
        (down, a), (up, b) = parts["a"], parts["b"]
        others = {part: [x for x in own if x is not None] for leaf, (part, own) in parts.items() if leaf not in "ab"}
        if any(len(own) < len(a) for own in others.values()):
            raise InputError(
                f"{self.module.name} is one module of transformers: {type(self.adapter).__name__} must change all of "
                f"{', '.join(self.module.paths)}"
            )
        rank, count = next(x.shape[-1] for x in a if x is not None), len(a)
        inputs, outputs = self.module.projections[0].inputs, [p.outputs for p in self.module.projections]
        joined = np.concatenate([np.zeros((*inputs, rank), np.float32) if x is None else x for x in a], axis=-1)
        wide = [np.zeros((rank * count, *shape), np.float32) for shape in outputs]
        for i, x in enumerate(b):
            wide[i][i * rank : (i + 1) * rank] = 0 if x is None else x
        return {down: [joined], up: wide, **others}


def _equal(values: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(values[0], value) for value in values[1:])


def rank_of(tensors: Mapping[str, np.ndarray]) -> int:
    """The rank of a module's LoRA."""
    return next(x.shape[0] for key, x in tensors.items() if key.startswith(("lora_A", "lora_embedding_A")))


def patterns(ranks: Mapping[str, int], adapter: Any) -> dict[str, Any]:
    """Modules whose rank is a multiple of the adapter's, and the numerator that leaves its scale as it is."""
    if not ranks:
        return {}
    root = math.sqrt if adapter.stabilised else float
    alphas = {name: adapter.scale * root(rank) for name, rank in ranks.items()}
    return {"rank_pattern": dict(ranks), "alpha_pattern": alphas}


def target_names(form: Format, chosen: Sequence[Module], every: Mapping[str, Module]) -> dict[str, list[str]]:
    """The keys that name the modules; of IA3 also those whose inputs are rescaled."""
    if form.method is not IA3:
        return {"target_modules": short_names([module.name for module in chosen], every)}
    inward = [module.name for module in chosen if writes(module.projections[0])]
    outward = [module.name for module in chosen if not writes(module.projections[0])]
    names = short_names(inward, every)
    return {"target_modules": sorted({*names, *short_names(outward, every)}), "feedforward_modules": names}


def short_names(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """The last words of the modules' names where all modules of that word are chosen; else whole names."""
    names, others = set(chosen), set(every) - set(chosen)
    last = {name.rpartition(".")[2] for name in names} - {name.rpartition(".")[2] for name in others}
    return sorted(last | {name for name in names if name.rpartition(".")[2] not in last})


def trained_config(
    model: Adapted, form: Format, leaves: Mapping[str, Any], tensors: dict[str, np.ndarray], chosen: Sequence[Module]
) -> dict[str, Any]:
    """Put trained parameters of the base into `tensors`; returns the keys that tell peft of them."""
    mine = trained_rows(model)
    if not mine:
        return {}
    wrapped = {module.name for module in chosen}
    for row in mine:
        module, _, leaf = row.name.rpartition(".")
        name = f"{module}.base_layer.{leaf}" if module in wrapped else row.name
        tensors[PREFIX + name] = tensor_of(row, leaves)
    names = {row.name.rpartition(".")[0] for row in mine}
    if form.bias and all(row.name.endswith(".bias") for row in mine):
        return {"bias": form.bias if names <= wrapped else "all"}
    clash = names & wrapped
    if clash:
        raise InputError(f"peft cannot both adapt and keep {min(clash)}: choose other targets, or trained")
    return {"modules_to_save": sorted(names)}


def written_norms(model: Adapted, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of the base's modules that train, all parameters of each."""
    base = innermost(model)
    table = rows(base, family_of(base))
    modules = {row.name.rpartition(".")[0] for row in trained_rows(model)}
    every = {row.name.rpartition(".")[0] for row in table}
    tensors = {}
    for row in table:
        module, _, leaf = row.name.rpartition(".")
        if module in modules:
            tensors[f"{PREFIX}{module}.{TUNED}.{leaf}"] = tensor_of(row, leaves)
    return {"peft_type": NORMS, "target_modules": short_names(modules, every)}, tensors


def trained_rows(model: Adapted) -> list[Row]:
    """The tensors of the base that train; InputError where peft would train a table without the head that is tied."""
    base = innermost(model)
    mine = [row for row in rows(base, family_of(base)) if any(model.trains(path) for path in row.paths)]
    if getattr(base, "tied", False) and any(row.paths == (TIED,) for row in mine):
        raise InputError(f"{TIED} is the head too: peft would train the look-ups alone")
    return mine


def tensor_of(row: Row, leaves: Mapping[str, Any]) -> np.ndarray:
    """A tensor of the base."""
    return np.asarray(row.entry.write([np.asarray(leaves[path][row.place]) for path in row.paths]))
