"""Hugging Face model folders: config.json and *.safetensors, read and written without torch and without pickle."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.config import InputError
from llmjax.models import gpt2, llama, mapping
from llmjax.models.mapping import Family
from llmjax.nn.decoder import Decoder
from llmjax.nn.model import Params

FAMILIES: dict[str, Family] = {family.model_type: family for family in (gpt2.FAMILY, llama.FAMILY)}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards(Mapping[str, np.ndarray]):
    """The tensors of a folder's safetensors files, each read when asked for."""

    def __init__(self, directory: Path) -> None:
        """List the tensors; raises InputError where there are no safetensors, or a file of the index is missing."""
        self.files: dict[str, Path] = {}
        index, single = directory / INDEX, directory / WEIGHTS
        if single.exists():
            self.files = dict.fromkeys(_names(single), single)
        elif index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise InputError(f"{index}: weight_map must be an object of file names")
            shards = {shard: directory / Path(shard).name for shard in weight_map.values()}
            held = {shard: set(_names(path)) for shard, path in shards.items()}
            for name, shard in weight_map.items():
                if name not in held[shard]:
                    raise InputError(f"{shards[shard]}: tensor {name} is missing, which {INDEX} says it holds")
                self.files[name] = shards[shard]
        else:
            pickled = next(directory.glob("*.bin"), None) or next(directory.glob("*.pt*"), None)
            why = f" ({pickled.name} is pickled and never read: save the model as safetensors)" if pickled else ""
            raise InputError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there{why}")

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor; bfloat16 becomes ml_dtypes.bfloat16."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="numpy") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def load_hf(directory: str | Path) -> tuple[Decoder, Params]:
    """The config and the float32 parameters (host arrays) of a model folder, its family told by `model_type`.

    Raises InputError for a missing or unreadable file, an unknown model type, and what `import_weights` refuses.
    """
    directory = Path(directory)
    theirs = _read_json(directory / "config.json")
    model_type = theirs.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{directory / 'config.json'}: model_type={model_type!r} is not supported: {', '.join(FAMILIES)} are"
        )
    family = FAMILIES[model_type]
    tensors = Shards(directory)
    try:
        config = family.from_hf_config(theirs)
        return config, mapping.import_weights(tensors, config, family)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def save_hf(directory: str | Path, config: Decoder, params: Params, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors that transformers loads; the folder is made where it is missing.

    `extra` holds further keys of config.json (`Family.extra`: special tokens, LLaMA's context length). Raises
    InputError for other keys, where no family can say what the config holds, and for parameters of another config.
    """
    from safetensors.numpy import save_file

    family = family_of(config)
    for key in (extra or {}).keys() - set(family.extra):
        raise InputError(f"extra: {key} cannot be set: only {', '.join(family.extra)} can")
    tensors = mapping.export_weights(params, config, family)
    dtype = next(iter(tensors.values())).dtype.name
    theirs = family.to_hf_config(config) | {"dtype": dtype} | dict(extra or {})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")


def family_of(config: Decoder) -> Family:
    """The first family whose config.json can say what `config` holds; else InputError with each family's reason."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.to_hf_config(config)
            return family
        except InputError as error:
            reasons.append(str(error))
    raise InputError("no family of transformers that is written fits: " + "; ".join(reasons))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors: {error}") from None
