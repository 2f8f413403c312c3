"""`llmjax list`: the components a config can name, by the type of the field that takes them, and the experiments."""

import ast
import dataclasses
import inspect
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from llmjax.config import ConfigError, did_you_mean, docs, subclasses
from llmjax.experiment import Experiment
from llmjax.fields import hints

FOLDER = "experiments"


def run(arguments: Namespace) -> dict[str, Any]:
    """Print kinds, components and experiments, or the fields of one component; returns the same."""
    kinds = components()
    if arguments.component:
        return one(arguments.component, kinds)
    for kind, classes in kinds.items():
        print(f"{kind}: {summary(kind_class(kind, classes))}")
        width = max(map(len, classes)) + 2
        for name, cls in classes.items() if [*classes] != [kind] else ():
            print(f"  {name:<{width}}{summary(cls)}")
    found = experiments(Path(FOLDER))
    print(f"Experiments below {FOLDER}/:" if found else f"There is no experiment below {FOLDER}/ here.")
    for spec, text in found.items():
        print(f"  {spec}  {text}")
    components_json = {kind: {name: summary(cls) for name, cls in classes.items()} for kind, classes in kinds.items()}
    return {"components": components_json, "experiments": found}


def components() -> dict[str, dict[str, type]]:
    """Every class that a field of an experiment may hold, by the name of the field's type, in the order of the tree."""
    kinds: dict[type, dict[str, type]] = {}
    todo: list[type] = [Experiment]
    for cls in todo:
        for base in (base for hint in hints(cls).values() for base in bases(hint)):
            if base not in kinds:
                kinds[base] = subclasses(base)
                todo.extend(kinds[base].values())
    return {base.__name__: classes for base, classes in kinds.items() if classes}


def bases(hint: Any) -> Iterator[type]:
    """The config classes that stand in a field's type, inside unions and tuples too."""
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from bases(part)


def kind_class(kind: str, classes: dict[str, type]) -> type:
    """The base class called `kind` of some classes."""
    return next(base for cls in classes.values() for base in cls.__mro__ if base.__name__ == kind)


def summary(cls: type) -> str:
    """First line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def one(name: str, kinds: dict[str, dict[str, type]]) -> dict[str, Any]:
    """Print and return the fields of the component `name`, or the members of the kind `name`."""
    known = {label: cls for classes in kinds.values() for label, cls in classes.items()}
    if name not in known and name not in kinds:
        raise ConfigError(f"no component or kind is called {name}{did_you_mean(name, [*known, *kinds])}")
    if name not in known:
        for label, cls in kinds[name].items():
            print(f"{label}  {summary(cls)}")
        return {"components": {name: {label: summary(cls) for label, cls in kinds[name].items()}}}
    cls, meaning = known[name], docs(known[name])
    print(f"{name}: {summary(cls)}")
    fields = {field.name: {"default": default(field), "doc": meaning.get(field.name, "")} for field in visible(cls)}
    for label, entry in fields.items():
        print(f"  {label} = {entry['default']}\n      {entry['doc']}")
    return {"component": name, "fields": fields}


def visible(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields that a config can set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it would be written."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def experiments(folder: Path) -> dict[str, str]:
    """`file.py` and `file.py:variant` of every experiment file, with the first line of its docstring; none is run."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            if "Experiment" in ast.unparse(function.returns or ast.Constant("")) and not function.name.startswith("_"):
                whole = function.name == "experiment"
                text = (ast.get_docstring(tree) if whole else None) or ast.get_docstring(function) or ""
                found[f"{path}" if whole else f"{path}:{function.name}"] = text.partition("\n")[0]
    return found
