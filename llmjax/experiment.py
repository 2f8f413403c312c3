"""The one value that a run is made from: loaded from a Python file or a run directory, overridden, saved, compared.

An experiment file defines `experiment() -> Experiment`; its other functions are variants (`experiments/foo.py:tiny`).
"""

import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llmjax.config import ConfigError, did_you_mean, diff, from_dict, override, to_dict, validate
from llmjax.data import BPE, Data, Dataset, Padded
from llmjax.decode.config import Generate
from llmjax.nn.decoder import Decoder
from llmjax.nn.model import Model
from llmjax.objectives.base import Objective
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.fitting import misfits
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW, Optimizer
from llmjax.train.process import versions

MAY_CHANGE = (
    r"train\.steps",
    r"train\.\w+_every",
    r"train\.(keep_last|keep_best|tensorboard)",
    r"data\.cache_dir",
    r"mesh(\..+)?",
)
"""Paths (whole-path regular expressions) that may differ when a run directory is resumed."""


@dataclass(frozen=True)
class Experiment:
    """A run, whole: what is trained on what, how, where, and what is sampled from it."""

    name: str = "experiment"
    """name of the run in reports and of its default run directory"""
    model: Model = Decoder(vocab=BPE().vocab_size)
    """the network"""
    data: Dataset = Data()
    """what is read, and the shape of a batch"""
    objective: Objective = NextToken()
    """the loss"""
    optimizer: Optimizer = AdamW()
    """update rule, learning-rate schedule and weight decay"""
    train: Train = Train()
    """the loop: steps, precision, checkpoints, evaluation"""
    mesh: MeshConfig = MeshConfig()
    """devices along each axis"""
    generate: Generate = Generate()
    """how text is sampled from the trained model"""
    seed: int = 0
    """root of every random draw: initial weights, order of the data, dropout, sampling"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values of one room that do not fit another's."""
        positions = getattr(getattr(self.model, "positions", None), "length", None)
        if positions is not None and self.data.length > positions:
            yield "data.length", f"exceeds the {positions} learned positions: raise model.positions.length"
        vocab, wanted = getattr(self.model, "vocab", None), self.data.vocab()
        if vocab is not None and wanted is not None and vocab < wanted:
            yield "model.vocab", f"is below the {wanted} token ids of data: raise it, or make fewer ids"
        packing = getattr(self.data, "packing", None)
        if getattr(self.model, "slots", 0) and packing is not None and not isinstance(packing, Padded):
            yield "data.packing", "puts several documents in a row, where model.adapters have a place: use Padded()"
        if self.train.ramp is not None and self.train.ramp.start > self.data.batch_size:
            yield "train.ramp.start", f"exceeds data.batch_size={self.data.batch_size}, which batches grow to"
        yield from self.mesh_problems()
        if not 0 <= self.seed < 2**63:
            yield "seed", "must be at least 0 and below 2**63"

    def mesh_problems(self) -> Iterator[tuple[str, str]]:
        """Batches and parameters that the mesh cannot split."""
        mesh, rows = self.mesh, {"train.accumulate": self.train.accumulate}
        rows |= {f"mesh.{axis}": n for axis, n in mesh.over("batch").items()}
        rows |= {"mesh.microbatches": mesh.microbatches} if mesh.stage > 1 else {}
        tokens = {f"mesh.{axis}": n for axis, n in mesh.over("length").items()}
        for name, size, over in (("batch_size", self.data.batch_size, rows), ("length", self.data.length, tokens)):
            parts = math.prod(over.values())
            if size % parts:
                yield f"data.{name}", f"does not split over {' x '.join(over)}: use a multiple of {parts}"
        remat, adapters = getattr(self.model, "remat", None), getattr(self.model, "adapters", ())
        if mesh.stage > 1 and remat == "reversible":
            yield "model.remat", "does not run in stages: use full, or mesh.stage=1"
        if mesh.stage > 1 and adapters:
            yield "mesh.stage", "splits the layers, where adapters do not find them: use fsdp"
        if remat == "reversible" and adapters:
            yield "model.remat", "leaves no layers that adapters find: use full"
        if mesh.fsdp * mesh.stage * mesh.expert * mesh.tensor > 1:
            found = misfits(mesh, self.model.logical_axes(), self.model.abstract())
            yield from ((f"mesh.{axis}", why) for axis, why in found)


def load_experiment(spec: str, overrides: Sequence[str] = ()) -> Experiment:
    """The checked experiment of `file.py`, `file.py:variant` or a run directory, with `--path=value` overrides applied.

    Raises ConfigError (one line) where the file, the function or a field is missing or wrong.
    """
    experiment = load(spec) if Path(spec).is_dir() else _from_file(spec)
    experiment = override(experiment, overrides)
    validate(experiment)
    return experiment


def _from_file(spec: str) -> Experiment:
    file, _, variant = spec.partition(":")
    module, name = _run_file(Path(file)), variant or "experiment"
    functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    if name not in functions:
        public = [n for n in functions if not n.startswith("_")]
        listed = f": it has {', '.join(public)}" if public else ": it defines no function"
        raise ConfigError(f"{file} has no function {name}{did_you_mean(name, public) or listed}")
    with _one_line(Path(file)):
        result = getattr(module, name)()
    if not isinstance(result, Experiment):
        raise ConfigError(f"{file}: {name}() returned {type(result).__name__}, not an Experiment")
    return result


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the file as it stands: a cached compilation may be of an earlier text with the same second and size."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run_file(path: Path) -> ModuleType:
    """The module of an experiment file; run again only if its text has changed, so that its classes stay the same."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the experiment file {path}: {reason}") from None
    name = _module_name(path)
    if getattr(sys.modules.get(name), "__text__", None) == text:
        return sys.modules[name]
    loader = _Source(name, str(path.resolve()))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=loader.path))
    module.__dict__.update(__file__=loader.path, __text__=text)
    sys.modules[name] = module  # dataclasses and from_dict look their module up by name
    try:
        with _one_line(path), _importable(path.resolve().parent, Path.cwd()):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    return f"llmjax_experiment_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn an exception of the experiment file's own code into a ConfigError that names the line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {text}") from error


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Let an experiment file import its neighbours, and `experiments.other` from the working directory."""
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        sys.path[:] = [entry for entry in sys.path if entry not in added]


def save(experiment: Any, run_dir: str | Path, argv: Sequence[str] = (), spec: str | None = None) -> Path:
    """Write `run_dir/config.json` atomically: every leaf, and where it came from. Returns the file's path.

    `argv` is the command, `spec` what `load_experiment` was given. Raises OSError where the disk refuses.
    """
    source = Path((spec or "").partition(":")[0])
    folder = source.resolve().parent if source.is_file() else Path.cwd()
    record = {
        "config": to_dict(experiment),
        "packages": versions(),
        "python": platform.python_version(),
        "git": _git(folder),
        "argv": list(argv),
        "source": _source(source, spec) if source.is_file() else None,
    }
    target = Path(run_dir) / "config.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(target, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return target


def _source(path: Path, spec: str | None) -> dict[str, Any]:
    return {"path": str(path.resolve()), "spec": spec, "text": path.read_text(encoding="utf-8")}


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether tracked files differ from it; None outside of one."""

    def run(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _write_atomically(target: Path, text: str) -> None:
    """Write so that at any moment `target` is the old file or the new one, also after a loss of power."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_record(run_dir: str | Path) -> dict[str, Any]:
    """All that `save` wrote. Raises ConfigError where there is no such file or it holds something else."""
    path = Path(run_dir) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{run_dir} is no run directory: {path.name}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{path} holds no experiment: expected an object with the key config")
    return record


def load(run_dir: str | Path) -> Experiment:
    """The experiment saved in a run directory; its own classes come from the experiment file, run again if need be.

    Raises ConfigError where the file is damaged, or a field or class of it is unknown or missing today.
    """
    record = load_record(run_dir)
    source = Path((record.get("source") or {}).get("path") or "")
    if not _modules(record["config"]) <= sys.modules.keys() and source.is_absolute() and source.suffix == ".py":
        _run_file(source)
    try:
        experiment = from_dict(record["config"])
    except ConfigError as error:
        raise ConfigError(f"{Path(run_dir) / 'config.json'}: {error}") from None
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{Path(run_dir) / 'config.json'} holds {type(experiment).__name__}, not an Experiment")
    return experiment


def _modules(data: Any) -> set[str]:
    """Modules outside llmjax that the classes of a saved config are in."""
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    kind = str(data.get("_type", "")) if isinstance(data, dict) else ""
    own = {kind.partition(":")[0]} if kind and not kind.startswith("llmjax.") else set()
    return own.union(*map(_modules, children))


def differences(a: Any, b: Any) -> list[str]:
    """One line, `path: value in a -> value in b`, for each place where two experiments differ."""
    return [f"{path}: {mine} -> {theirs}" for path, mine, theirs in diff(a, b)]


def compatible(saved: Any, new: Any) -> list[str]:
    """The differences that forbid to resume the run of `saved` with `new`; empty where there are none."""
    allowed = re.compile("|".join(MAY_CHANGE))
    return [line for line in differences(saved, new) if not allowed.fullmatch(line.partition(": ")[0])]
