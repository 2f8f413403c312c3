"""Hugging Face model folders: config.json, *.safetensors and what stands beside them, without torch and pickle."""

import difflib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from llmjax.config import InputError
from llmjax.models import mapping, safetensors
from llmjax.models.families import FAMILIES, family_of
from llmjax.models.mapping import Family
from llmjax.models.packed import Packed, Scheme, packed, scheme_of
from llmjax.models.safetensors import Kind
from llmjax.nn.model import Model, Params
from llmjax.nn.projections import projections
from llmjax.quant.quantised import Quantised

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""files that belong to a model and that we hand on as they are"""
SHARD_BYTES = 5_000_000_000
"""weights beyond this are written as several files"""
MAX_JSON = 200_000_000
"""bytes of a JSON file beyond which nobody wrote it in earnest"""


class Folder(NamedTuple):
    """A model folder, understood: its family, our config of it, and its tensors, none of them read yet."""

    path: Path
    theirs: dict[str, Any]
    family: Family
    config: Model
    tensors: Mapping[str, np.ndarray | Packed]

    def params(self, abstract: Params | None = None) -> Params:
        """Our parameters, or those that `abstract` holds; see `llmjax.models.mapping.import_weights`."""
        wanted = self.config.abstract() if abstract is None else abstract
        plain = self.config.base if isinstance(self.config, Quantised) else self.config
        try:
            return mapping.import_weights(self.tensors, plain, self.family, wanted)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None


def open_hf(directory: str | Path) -> Folder:
    """A model folder, its family told by `model_type`; tensors are views of its files.

    Raises InputError for a missing or unreadable file, a file that is not what it says, an unknown model type, a config
    that the family has no model for, and a tokenizer that has more ids than there are embeddings.
    """
    directory = Path(directory)
    theirs, family, config = open_config(directory)
    check_tokenizer(directory, config)
    scheme = scheme_of(theirs)
    tensors = tensors_of(directory)
    return Folder(directory, theirs, family, config, tensors if scheme is None else packed(tensors, scheme))


def open_config(directory: Path) -> tuple[dict[str, Any], Family, Model]:
    """A folder's config.json, its family, and our config of it: of quantised weights a Quantised one.

    Which these are is told by the names of the tensors.
    """
    theirs = read_json(directory / CONFIG)
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{directory / CONFIG}: model_type={name!r} is not supported{nearest(str(name))}")
    family = FAMILIES[name]
    try:
        config, scheme = family.from_hf_config(theirs), scheme_of(theirs)
        if scheme is not None:
            config = quantised(config, family, packed(tensors_of(directory), scheme), scheme)
        return theirs, family, config
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def quantised(config: Model, family: Family, tensors: Mapping[str, np.ndarray | Packed], scheme: Scheme) -> Quantised:
    """The model with those projections quantised whose tensors are.

    Raises InputError where one is in some layers and not in others.
    """
    table = {row.name: row for row in mapping.rows(config, family)}
    found: dict[str, set[bool]] = {}
    for name, tensor in tensors.items():
        row = table.get(mapping.named(name, table, family))
        for path in row.paths if row else ():
            found.setdefault(path, set()).add(isinstance(tensor, Packed))
    mixed = [path for path, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise InputError(f"{mixed[0]} is quantised in some layers and dense in others: it is read as one of both")
    left = [path for path, p in projections(config).items() if not p.table and True not in found[f"{path}/{p.leaf}"]]
    exclude = f"^({'|'.join(map(re.escape, left))})$" if left else None
    return Quantised(config, quantize=replace(scheme.quantize, exclude=exclude))


def nearest(name: str) -> str:
    """Which families there are, the most similar name first, and how to add one."""
    ranked = sorted(FAMILIES, key=lambda known: -difflib.SequenceMatcher(None, name, known).ratio())
    rest = ", ".join(ranked[1:])
    return f": {ranked[0]} is the nearest that is ({rest} are too); docs/adding_a_family.md says how to add it"


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """Views of all tensors of a folder's safetensors files."""
    index, single = directory / INDEX, directory / WEIGHTS
    if single.exists():
        return safetensors.read(single)
    if not index.exists():
        pickled = next(directory.glob("*.bin"), None) or next(directory.glob("*.pt*"), None)
        why = f" ({pickled.name} is pickled and never read: save the model as safetensors)" if pickled else ""
        raise InputError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there{why}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: weight_map must be an object of file names")
    for file in weight_map.values():
        if file in ("", "..") or Path(file).name != file:
            raise InputError(f"{index}: {file!r} is no file of this folder")
        if not file.endswith(".safetensors"):
            raise InputError(f"{index}: {file!r} is no safetensors file, and nothing else is read")
    shards = {file: safetensors.read(directory / file) for file in dict.fromkeys(weight_map.values())}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise InputError(f"{directory / file}: tensor {name} is missing, which {INDEX} says it holds")
    return {name: shards[file][name] for name, file in weight_map.items()}


def check_tokenizer(directory: Path, config: Model) -> None:
    """Raise InputError where the folder's tokenizer has ids that the model has no embedding of."""
    path, vocab = directory / "tokenizer.json", getattr(config, "vocab", None)
    if vocab is None or not path.exists():
        return
    ids = list(_ids(read_json(path)))
    if ids and max(ids) >= vocab:
        raise InputError(f"{path}: id {max(ids)} has no embedding: {CONFIG} has a vocabulary of {vocab}")


def _ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """Ids of a tokenizer.json: of its vocabulary (an object, or pairs in order) and of the tokens added to it."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from (i for i in vocabulary.values() if type(i) is int)
    elif isinstance(vocabulary, list):
        yield from range(len(vocabulary))
    added = tokenizer.get("added_tokens")
    yield from (t["id"] for t in added if type(t.get("id")) is int) if isinstance(added, list) else ()


def load_hf(directory: str | Path) -> tuple[Any, Params]:
    """Our config and the float32 parameters (host arrays) of a model folder; raises InputError as `open_hf` does."""
    folder = open_hf(directory)
    return folder.config, folder.params()


def save_hf(
    directory: str | Path,
    config: Model,
    params: Params,
    extra: Mapping[str, Any] | None = None,
    *,
    family: Family | None = None,
    dtype: DTypeLike | None = None,
    companions: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder that transformers loads, one tensor in memory at a time.

    Args:
        directory: made where it is missing.
        config: of the model.
        params: of the model, host or device arrays.
        extra: further keys of config.json (`Family.extra`: special tokens, the context length).
        family: what it is written as; None takes the first that can express it.
        dtype: of the tensors; None keeps the parameters' own.
        companions: a folder whose tokenizer, generation config and chat template are copied.
        shard_bytes: several files of at most this much (or one tensor) are written where it is not enough for all.

    Raises:
        InputError: other keys in `extra`, no family that can say what the config holds, parameters of another config.
    """
    family = family or family_of(config)
    for key in (extra or {}).keys() - set(family.extra):
        raise InputError(f"extra: {key} cannot be set: only {', '.join(family.extra)} can")
    theirs = family.to_hf_config(config)
    kinds = kinds_of(params, config, family, dtype)
    tensors = mapping.exported(params, config, family)
    written = next(iter(kinds.values())).dtype.name
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, kinds, tensors, shard_bytes)
    (directory / CONFIG).write_text(json.dumps(theirs | {"dtype": written} | dict(extra or {}), indent=2) + "\n")
    if companions is not None:
        copy_companions(Path(companions), directory)


def kinds_of(params: Params, config: Model, family: Family, dtype: DTypeLike | None) -> dict[str, Kind]:
    """Shape and dtype of every tensor of theirs."""
    dtypes = {path: np.dtype(dtype or leaf.dtype) for path, leaf in mapping.flat(params).items()}
    ours = mapping.our_shapes(config)
    found = mapping.rows(config, family)
    return {
        row.name: Kind(mapping.their_shape(row, ours), dtypes.get(row.paths[0], np.dtype(np.float32))) for row in found
    }


def write_weights(
    directory: Path, kinds: Mapping[str, Kind], tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Write the tensors as one file, or as several and their index."""
    shards: list[dict[str, Kind]] = [{}]
    for name, kind in kinds.items():
        if shards[-1] and sum(k.nbytes for k in shards[-1].values()) + kind.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = kind
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        cast = ((name, array.astype(kinds[name].dtype, copy=False)) for name, array in _take(tensors, len(shard)))
        safetensors.write(directory / file, shard, cast)
    (directory / INDEX).unlink(missing_ok=True)
    if count > 1:
        (directory / WEIGHTS).unlink(missing_ok=True)
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(kind.nbytes for kind in kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _take(tensors: Iterator[tuple[str, np.ndarray]], count: int) -> Iterator[tuple[str, np.ndarray]]:
    return (next(tensors) for _ in range(count))


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, generation config and chat template that there are; returns their names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError where there is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data
