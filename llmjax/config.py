"""Configs as values: frozen dataclass trees that are overridden, validated, saved, reloaded and compared.

A node is a frozen dataclass or a tuple of them, a leaf is anything else (`llmjax.fields` has the types), and each has a
path (`model.pattern.0.mixer.heads`). Every error is a ConfigError of one line.
"""

import ast
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from llmjax.fields import (
    ConfigError,
    InputError,
    checked,
    convert,
    did_you_mean,
    docs,
    entry,
    hints,
    is_config,
    known,
    make,
    parse,
    subclasses,
)

__all__ = [
    "ConfigError",
    "InputError",
    "did_you_mean",
    "diff",
    "docs",
    "from_dict",
    "is_config",
    "leaves",
    "override",
    "subclasses",
    "to_dict",
    "validate",
    "with_",
]

Config = TypeVar("Config")


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Copy of `config` with each `--a.b.0.c=value` applied in turn, read by the field's type; the last writer wins."""
    for item in overrides:
        path, equals, text = item.removeprefix("--").partition("=")
        if not (item.startswith("--") and path and equals):
            raise ConfigError(f"cannot read {item!r}: write --path.to.field=value")
        config = _set(config, Any, "", path.split("."), functools.partial(parse, text, path), config)
    return config


def with_(config: Config, path: str, value: Any) -> Config:
    """Copy of `config` with the Python `value` at `path`, type-checked like an override."""
    return _set(config, Any, "", path.split("."), functools.partial(checked, value, path), config)


def _set(value: Any, hint: Any, path: str, todo: list[str], new: Callable[[Any], Any], root: Any) -> Any:
    if not todo:
        return new(hint)
    name, parts, full = todo[0], _parts(value, hint), ".".join(filter(None, (path, *todo)))
    if isinstance(value, tuple):
        parts = {str(i): (part, entry(hint, i)) for i, part in enumerate(value)}
    if isinstance(value, tuple) and name.isdecimal() and name not in parts:
        raise ConfigError(f"unknown field {full}: {path} has {len(value)} entries, counted from 0")
    if name not in parts and value is None and known(hint):
        raise ConfigError(f"unknown field {full}: {path} is None, so set --{path} first")
    if name not in parts:
        raise ConfigError(f"unknown field {full}{did_you_mean(full, [p for p, _, _ in _walk(root)])}")
    child = _set(*parts[name], _join(path, name), todo[1:], new, root)
    if isinstance(value, tuple):
        return tuple(child if key == name else part for key, (part, _) in parts.items())
    return make(functools.partial(dataclasses.replace, value), {name: child}, path)


def validate(config: Any) -> None:
    """Raise ConfigError for every ill-typed value, else for all that the nodes' `problems()` yield, children first."""
    nodes = list(_walk(config))
    for path, value, hint in nodes:
        checked(value, path, hint)
        if is_config(value) and not type(value).__dataclass_params__.frozen:
            raise ConfigError(f"{path}: {type(value).__name__} must be a frozen dataclass")
    found: list[tuple[str, str]] = []
    for path, node, _ in reversed(nodes):
        if hasattr(node, "problems") and not any(f".{p}.".startswith(f".{path}." if path else ".") for p, _ in found):
            found.extend((_join(path, field), why) for field, why in node.problems())
    if found:
        values = leaves(config)
        raise ConfigError("; ".join(f"{p}={values[p]} {why}" if p in values else f"{p} {why}" for p, why in found))


def leaves(config: Any) -> dict[str, Any]:
    """The value of every leaf by its path."""
    return {path: value for path, value, _ in _walk(config) if not _parts(value) and not is_config(value)}


def diff(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value in `a`, value in `b`) where the trees differ; nodes of another class or length differ as a whole."""
    mine, theirs = _parts(a), _parts(b)
    if type(a) is type(b) and mine and mine.keys() == theirs.keys():
        return [d for name in mine for d in diff(mine[name][0], theirs[name][0], _join(path, name))]
    return [] if a == b or (a != a and b != b) else [(path, a, b)]


def to_dict(config: Any) -> Any:
    """JSON-able form: every field, defaults included, and `_type` ("module:Class") for each node."""
    if is_config(config):
        kind = f"{type(config).__module__}:{type(config).__qualname__}"
        return {"_type": kind} | {name: to_dict(getattr(config, name)) for name in hints(config.__class__)}
    if isinstance(config, tuple):
        return [to_dict(part) for part in config]
    return config.name if isinstance(config, enum.Enum) else config


def from_dict(data: Any, hint: Any = Any, path: str = "") -> Any:
    """The config that `to_dict` wrote. Unknown and missing fields are errors; only known config classes are made."""
    if isinstance(data, list):
        return checked(tuple(from_dict(v, entry(hint, i), _join(path, str(i))) for i, v in enumerate(data)), path, hint)
    if not isinstance(data, dict):
        return convert(ast.Constant(data), str(data), hint, path)
    cls, values = _saved_class(str(data.get("_type")), path, hint), {}
    for key in sorted(data.keys() - hints(cls).keys() - {"_type"}):
        raise ConfigError(f"unknown field {_join(path, key)} of {cls.__name__}{did_you_mean(key, hints(cls))}")
    for name, field_hint in hints(cls).items():
        if name not in data:
            raise ConfigError(f"missing field {_join(path, name)} of {cls.__name__}: it was saved without it")
        values[name] = from_dict(data[name], field_hint, _join(path, name))
    return checked(make(cls, values, path), path, hint)


def _saved_class(kind: str, path: str, hint: Any) -> Any:
    module, _, name = kind.partition(":")
    candidates = [f"{cls.__module__}:{cls.__qualname__}" for cls in known(hint).values()]
    if module.startswith("llmjax.") and "__" not in module and module not in sys.modules:
        with contextlib.suppress(ImportError):  # nothing outside this package is imported because a file says so
            importlib.import_module(module)
    found = functools.reduce(lambda scope, part: getattr(scope, part, None), name.split("."), sys.modules.get(module))
    if not (inspect.isclass(found) and dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen):
        raise ConfigError(f"{path or 'config'}: no config class {kind} here{did_you_mean(kind, candidates)}")
    return found


def _parts(value: Any, hint: Any = Any) -> dict[str, tuple[Any, Any]]:
    """Named parts of a node with their types: fields of a config, entries of a tuple of configs; a leaf has none."""
    if is_config(value):
        return {name: (getattr(value, name), field_hint) for name, field_hint in hints(value.__class__).items()}
    if isinstance(value, tuple) and any(map(is_config, value)):
        return {str(i): (part, entry(hint, i)) for i, part in enumerate(value)}
    return {}


def _walk(value: Any, hint: Any = Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    yield path, value, hint
    for name, (part, part_hint) in _parts(value, hint).items():
        yield from _walk(part, part_hint, _join(path, name))


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))
