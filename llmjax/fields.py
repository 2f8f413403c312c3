"""Fields of configs: what their types admit, how text is read as a value of a type, and which classes a name may mean.

A leaf is int, float, bool, str, None, Literal, Enum, a union or a tuple of such. A field typed by a base class takes
any subclass of it by name, so the type is the registry. Text is read with `ast` and never evaluated.
"""

import ast
import contextlib
import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import itertools
import math
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}
_SCALARS = (int, float, str, type(None), tuple, enum.Enum)


class InputError(ValueError):
    """Bad input from the user (a file, data, a flag): shown as one line, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ConfigError(InputError):
    """A config that cannot be read or cannot be right: names the path, the value and what would be right."""


def is_config(value: Any) -> bool:
    """Whether `value` is a config node (an instance of a dataclass)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """Type of each field of a config class, in order."""
    found = get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def docs(cls: type) -> dict[str, str]:
    """The docstring (as one line) that follows each field of a config class, inherited fields included."""
    found: dict[str, str] = {}
    for base in (c for c in reversed(cls.__mro__) if "__dataclass_params__" in vars(c)):
        tree = ast.walk(ast.parse(inspect.getsource(sys.modules[base.__module__])))
        for body in (node.body for node in tree if isinstance(node, ast.ClassDef) and node.name == base.__name__):
            for field, text in itertools.pairwise(body):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def subclasses(base: type) -> dict[str, type]:
    """The concrete config classes of `base` by name, after importing every module of the package it is defined in.

    So are the packages that `base.rooms` names, where it has that attribute.
    Abstract are: what is no dataclass itself, ABCs, `_Private` names, and a class without fields that has subclasses.
    """
    for module in (base.__module__, *getattr(base, "rooms", ())):
        _import_room(module)
    found: dict[str, type] = {}
    todo = [base]
    for cls in todo:
        children: list[type] = cls.__subclasses__()
        todo.extend(children)
        if "__dataclass_params__" in vars(cls) and not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.update({} if children and not hints(cls) else {cls.__name__: cls})
    return dict(sorted(found.items()))


@functools.cache
def _import_room(module: str) -> None:
    room = module if hasattr(importlib.import_module(module), "__path__") else module.rpartition(".")[0]
    if "." in room:  # a top-level package is not one room
        for info in pkgutil.walk_packages(sys.modules[room].__path__, room + "."):
            importlib.import_module(info.name)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`: did you mean a, b?` with at most three near paths (by last component, its initials, the whole), or ``."""

    def nearness(path: str) -> float:
        last, wanted = path.rpartition(".")[2], word.rpartition(".")[2]
        same = 1.0 if last == wanted else 0.9 * (len(wanted) > 1 and wanted == "".join(w[:1] for w in last.split("_")))
        same = same or difflib.SequenceMatcher(None, wanted, last).ratio()
        return 0.7 * same + 0.3 * difflib.SequenceMatcher(None, word, path).ratio()

    ranked = sorted(((-nearness(path), path) for path in candidates), key=lambda pair: pair[0])[:3]
    near = [path for score, path in ranked if -score > max(0.6, -ranked[0][0] - 0.15)]
    return f": did you mean {', '.join(near)}?" if near else ""


def make(call: Callable[..., Any], arguments: dict[str, Any], path: str) -> Any:
    """`call(**arguments)`; what its checks raise becomes a ConfigError at `path`."""
    try:
        return call(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def parse(text: str, path: str, hint: Any) -> Any:
    """Value of an override: a str field takes the text as it stands, all else is a literal or else bare words."""
    if hint is str:
        return text
    text, words = text.strip(), text.strip(" ()").split(",")
    try:
        node: ast.expr = ast.parse(text, mode="eval").body
        whole = ast.get_source_segment(text, node) == text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        whole = False
    if not whole:
        split = len(words) > 1 and any(get_origin(member) is tuple for member in _members(hint))
        node = ast.Tuple([ast.Constant(word.strip()) for word in words]) if split else ast.Constant(text)
    return convert(node, text, hint, path)


def convert(node: ast.expr, text: str, hint: Any, path: str) -> Any:
    """Value of a literal, or of a `Class(field=literal)`, for a field of type `hint`."""
    value, shown, origin = _literal(node, text), _shown(node, text), get_origin(hint)
    if _configs(hint) and (isinstance(node, ast.Call) or (isinstance(node, ast.Name) and isinstance(value, str))):
        return _construct(node, text, hint, path)
    if len(_members(hint)) > 1:  # the member of the literal's own type first, str (which takes anything) last
        for member in sorted(_members(hint), key=lambda m: (m is str, type(value) is not m)):
            with contextlib.suppress(ConfigError):
                return convert(node, text, member, path)
    elif origin is Literal and shown in get_args(hint):
        value = shown  # the word `none` may be an option
    elif origin is tuple:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
        value = tuple(convert(part, text, entry(hint, i), f"{path}.{i}") for i, part in enumerate(parts))
    elif inspect.isclass(hint) and issubclass(hint, enum.Enum):
        value = next((option for option in hint if value in (option.name, option.value)), value)
    elif hint is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif hint is float and type(value) is int and abs(value) < sys.float_info.max:
        value = float(value)
    elif hint is str and isinstance(value, int | float) and hasattr(node, "end_lineno"):  # typed, not from JSON
        value = shown
    return checked(value, path, hint, shown)


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    return _WORDS.get(_shown(node, text), _shown(node, text))


def _shown(node: ast.expr, text: str) -> str:
    return (ast.get_source_segment(text, node) if hasattr(node, "end_lineno") else None) or text


def _construct(node: ast.expr, text: str, hint: Any, path: str) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    classes, name, shown, arguments = known(hint), _shown(call.func, text), _shown(node, text), {}
    if name not in classes:
        raise ConfigError(f"{path}={shown}: expected {_expected(hint)}{did_you_mean(name, classes)}")
    for key, value in [*[(None, value) for value in call.args], *[(k.arg, k.value) for k in call.keywords]]:
        if key is None:
            raise ConfigError(f"{path}={shown}: name every argument, as in {name}(field=value)")
        if key not in hints(classes[name]):
            raise ConfigError(f"unknown field {path}.{key} of {name}{did_you_mean(key, hints(classes[name]))}")
        arguments[key] = convert(value, text, hints(classes[name])[key], f"{path}.{key}")
    return make(classes[name], arguments, path)


def checked(value: Any, path: str, hint: Any, shown: str | None = None) -> Any:
    """`value` if it fits the type `hint`, else ConfigError with path, value (or its text `shown`) and type."""
    if not _fits(value, hint):
        raise ConfigError(f"{path}={repr(value) if shown is None else shown}: expected {_expected(hint)}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if get_origin(hint) is tuple:
        sized = isinstance(value, tuple) and (Ellipsis in args or len(value) == len(args))
        return sized and all(_fits(part, entry(hint, i)) for i, part in enumerate(value))
    if args:
        return any(_fits(value, member) for member in args)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is Any or (inspect.isclass(hint) and isinstance(value, hint))


def _expected(hint: Any) -> str:
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return f"tuple of {_expected(args[0])}" if Ellipsis in args else f"({', '.join(map(_expected, args))})"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, args))
    if args:
        return " or ".join(map(_expected, args))
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return " or ".join(option.name for option in hint)
    names = ", ".join(known(hint))
    return "None" if hint is type(None) else hint.__name__ + (f" ({names})" if names not in ("", hint.__name__) else "")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _configs(hint: Any) -> list[type]:
    classes = [member for member in _members(hint) if inspect.isclass(member) and not get_origin(member)]
    return [cls for cls in classes if cls is not Any and not issubclass(cls, _SCALARS)]


def known(hint: Any) -> dict[str, type]:
    """The config classes that a field of type `hint` takes, by name."""
    return {name: cls for base in _configs(hint) for name, cls in subclasses(base).items()}


def entry(hint: Any, index: int) -> Any:
    """Type of the entry at `index` of a tuple of type `hint`."""
    args = next((get_args(member) for member in _members(hint) if get_origin(member) is tuple), (Any, ...))
    return args[0] if Ellipsis in args else args[index] if index < len(args) else Any
