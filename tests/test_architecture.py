"""The shape of the house: what may import what, how long a function may be, and what no file may hold."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llmjax", "pallas_kernels")

# From the top of the house down: a module imports only modules below its own level, or of its own level. The key is the
# room (a folder or a module of llmjax); every room must be named here.
LEVELS = (
    ("cli", "serve", "__main__"),
    ("experiment", "plan", "launch"),
    ("eval", "report", "reason", "edit", "interpret", "uncertainty", "safety", "retrieval"),
    ("train", "objectives", "decode"),
    ("adapters", "quant", "models"),
    ("nn", "data", "parallel"),
    ("config", "fields", "compat"),
    ("__init__",),
    ("pallas_kernels",),
)
HEIGHT = {room: -level for level, rooms in enumerate(LEVELS) for room in rooms}
KERNEL_IMPORTS = {"jax", "numpy", "jaxtyping", "pallas_kernels"} | set(sys.stdlib_module_names)
HEAVY = {
    *("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "array_record", "pyarrow", "tokenizers"),
    *("safetensors", "rich", "matplotlib", "datasets", "huggingface_hub", "tensorboardX"),
}
MAX_FUNCTION_LINES = 60
MAX_CONFIG_LINES = 250
MAX_DEPENDENCIES = 15

SUPPRESSION = re.compile(
    r"#\s*(noqa|type:\s*ignore|pylint:|pyright:|mypy:|fmt:\s*(off|skip)|pragma: no cover|ruff:\s*noqa)"
)
# Brackets keep this file from matching its own pattern.
MACHINE_PATH = re.compile(
    r"(^|[^A-Za-z0-9_.])/(work|farm|root)/|/tmp/(ceo|team|bash_)|/home/(?!user\b)\w+/"
    r"|files[.]python[h]osted|py[p]i[.]org"
)


# ---- what the checks are made of -------------------------------------------------------------------------------------


def sources(*folders: str) -> list[Path]:
    """The Python files of the given folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    """The dotted name of the module in `path`."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The dotted names that `module` imports, anywhere in it; relative imports are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            # `from llmjax import nn` imports llmjax.nn: keep the longer name, a module or an attribute of one.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def hidden(tree: ast.Module, package: str, modules: Collection[str]) -> list[str]:
    """Names that a package takes from elsewhere while a module of its own bears them: imported, it replaces them."""
    taken = [
        (node.module, alias.name) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return [
        name
        for source, name in taken
        if f"{package}.{name}" in modules and source not in (package, f"{package}.{name}")
    ]


def room(name: str) -> str:
    """The room a dotted name lies in: the part after `llmjax`, or `pallas_kernels`."""
    parts = name.split(".")
    if parts[0] == "pallas_kernels":
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def uphill(tree: ast.AST, module: str) -> list[str]:
    """The imports of `module` that lead to a higher level; only the package's own face may show any of them."""
    wrong: list[str] = []
    if module == "llmjax.__init__":
        return wrong
    for name in imports(tree, module):
        if name.split(".")[0] in PACKAGES:
            target = room(name) if room(name) in HEIGHT else "__init__"
            if HEIGHT[target] > HEIGHT[room(module)]:
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycles that a depth-first walk of `graph` meets, each as the path back to its first node."""
    found: list[list[str]] = []
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def import_time(tree: ast.Module) -> list[ast.stmt]:
    """The statements of a module that run when it is imported: no function bodies, nothing for type checkers only."""
    skipped = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    typing_only = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return [
        node
        for node in tree.body
        if not isinstance(node, skipped) and not (isinstance(node, ast.If) and ast.unparse(node.test) in typing_only)
    ]


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which module of `trees` imports which while it is itself imported; names are cut back to their modules."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        graph[module] = set()
        for name in imports(ast.Module(import_time(tree), []), module):
            parts = name.split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            target = next((prefix for prefix in prefixes if prefix in trees), None)
            if target is not None and target != module:
                graph[module].add(target)
    return graph


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method in `tree`, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function: from `def` to its end, without its docstring and without the functions nested in it."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length - sum(_span(inner) for inner in _nested(function))


def _nested(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions directly inside `node`, not those inside these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _nested(child)


def _span(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return function.end_lineno - first + 1


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module's public functions and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
                    yield member


def missing_annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The arguments of `function` (and "return") that carry no annotation; `self` and `cls` need none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    missing = [
        argument.arg for argument in named if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    return missing + (["return"] if function.returns is None else [])


def parse(paths: list[Path]) -> dict[str, ast.Module]:
    """The syntax trees of `paths` by module name."""
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in paths}


@pytest.fixture(scope="module")
def library() -> dict[str, ast.Module]:
    """The syntax trees of both packages by module name."""
    trees = parse(sources(*PACKAGES))
    assert "llmjax.__init__" in trees, "the packages are not where the tests look for them"
    return trees


# ---- the checks ------------------------------------------------------------------------------------------------------


def test_every_room_has_its_place(library: dict[str, ast.Module]) -> None:
    """A new room must be given its level here before it may import anything."""
    assert {room(module) for module in library} <= set(HEIGHT)


def test_imports_run_downhill(library: dict[str, ast.Module]) -> None:
    """cli -> experiment -> eval -> train, objectives, decode -> models -> nn, data, parallel -> config -> kernels."""
    assert not [line for module, tree in library.items() for line in uphill(tree, module)]


def test_rooms_of_one_level_do_not_import_each_other_in_circles(library: dict[str, ast.Module]) -> None:
    """Two modules of one level may not need each other while they are imported."""
    trees = {module.removesuffix(".__init__"): tree for module, tree in library.items()}
    graph = import_graph(trees)
    assert not [" -> ".join(cycle) for cycle in cycles(graph)]


def test_kernels_import_only_jax(library: dict[str, ast.Module]) -> None:
    """pallas_kernels stands on jax, numpy, jaxtyping and the standard library."""
    kernels = {module: tree for module, tree in library.items() if module.startswith("pallas_kernels")}
    found = {name for module, tree in kernels.items() for name in imports(tree, module)}
    assert {name.split(".")[0] for name in found} <= KERNEL_IMPORTS


def test_no_module_replaces_what_its_package_exports(library: dict[str, ast.Module]) -> None:
    """Importing a submodule sets its name in the package: a function of that name from elsewhere would be gone."""
    modules = {module.removesuffix(".__init__") for module in library}
    packages = {
        module.removesuffix(".__init__"): tree for module, tree in library.items() if module.endswith("__init__")
    }
    assert not [name for package, tree in packages.items() for name in hidden(tree, package, modules)]


def test_functions_are_short(library: dict[str, ast.Module]) -> None:
    """At most 60 lines a function, docstring not counted, nested functions counted for themselves."""
    lengths = {
        f"{module}:{function.lineno} {function.name}": lines_of(function)
        for module, tree in library.items()
        for function in functions(tree)
    }
    assert not {where: length for where, length in lengths.items() if length > MAX_FUNCTION_LINES}


def test_the_config_system_is_small() -> None:
    """llmjax/config.py is read in one sitting."""
    path = ROOT / "llmjax" / "config.py"
    assert len(path.read_text().splitlines()) <= MAX_CONFIG_LINES


def test_nothing_is_suppressed() -> None:
    """No linter, type checker or formatter is told to look away, in the packages or beside them."""
    paths = [*sources(*PACKAGES, "scripts", "experiments", "tests")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if SUPPRESSION.search(line)
    ]
    assert not found


def test_public_functions_say_what_they_do(library: dict[str, ast.Module]) -> None:
    """Every public function and method has a docstring; every module says what it is."""
    silent = [
        f"{module}:{function.lineno} {function.name}"
        for module, tree in library.items()
        for function in public_functions(tree)
        if ast.get_docstring(function) is None
    ]
    silent += [module for module, tree in library.items() if tree.body and ast.get_docstring(tree) is None]
    assert not silent


def test_every_function_is_annotated(library: dict[str, ast.Module]) -> None:
    """Every argument and every result has a type."""
    bare = {
        f"{module}:{function.lineno} {function.name}": missing
        for module, tree in library.items()
        for function in functions(tree)
        if (missing := missing_annotations(function))
    }
    assert not bare


def test_no_machine_is_named() -> None:
    """No tracked file holds a path of somebody's machine or the address of a package host."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listing.stdout.splitlines():
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" in data:
            continue
        lines = data.decode(errors="replace").splitlines()
        found += [f"{name}:{number}" for number, line in enumerate(lines, start=1) if MACHINE_PATH.search(line)]
    assert not found


def test_few_direct_dependencies() -> None:
    """At most 15 direct runtime dependencies; what else there is, is an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= MAX_DEPENDENCIES
    assert set(project["optional-dependencies"]) >= {"hf", "tpu", "cuda", "track", "test", "docs"}


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter from the repository's root; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_llmjax_starts_no_backend() -> None:
    """`import llmjax` alone, and the import of every module, leaves jax's backends untouched."""
    modules = [module.removesuffix(".__init__") for module in parse(sources(*PACKAGES))]
    code = f"""
import importlib
import llmjax
for name in {modules!r}:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import jax
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run_python(code) == "False"


def test_importing_llmjax_and_asking_for_help_is_light() -> None:
    """`import llmjax` and `llmjax --help` import none of the heavy libraries, jax included."""
    code = f"""
import sys
import llmjax
print(sorted({HEAVY!r} & set(sys.modules)))
from llmjax.cli import main
sys.argv = ["llmjax", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    lines = run_python(code).splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")


def test_heavy_libraries_wait_until_they_are_used(library: dict[str, ast.Module]) -> None:
    """Libraries that cost import time are imported inside the functions that use them, in every room."""
    early = [
        f"{module} imports {name}"
        for module, tree in library.items()
        for name in imports(ast.Module(import_time(tree), []), module)
        if name.split(".")[0] in HEAVY - {"jax", "flax", "optax"}
    ]
    assert not early


# ---- the checks can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("llmjax.nn.block", "from llmjax.train import loop", True),
        ("llmjax.nn.block", "from ..train.loop import fit", True),
        ("llmjax.nn.block", "from llmjax import experiment", True),
        ("llmjax.nn.block", "def f():\n    import llmjax.cli", True),
        ("llmjax.config", "from llmjax.nn import decoder", True),
        ("llmjax.train.loop", "from llmjax import experiment", True),
        ("pallas_kernels.attention.api", "from llmjax.config import ConfigError", True),
        (
            "llmjax.nn.block",
            "from llmjax.nn.mlp import MLP\nfrom llmjax import config\nimport pallas_kernels.attention",
            False,
        ),
        ("llmjax.cli", "from llmjax import experiment, nn\nimport os.path", False),
        ("llmjax.__init__", "from llmjax.experiment import Experiment", False),
    ],
)
def test_uphill_imports_are_seen(module: str, source: str, wrong: bool) -> None:
    """Absolute, relative, submodule and function-local imports that lead uphill are all found; others are not."""
    assert bool(uphill(ast.parse(source), module)) is wrong


def test_hidden_names_are_seen() -> None:
    """A function beside a module of its name is seen; one that comes from that module is the same at every time."""
    modules = {"llmjax.plan.memory", "llmjax.plan.one_device"}
    beside = ast.parse("from llmjax.plan.one_device import memory, nbytes")
    assert hidden(beside, "llmjax.plan", modules) == ["memory"]
    assert hidden(ast.parse("from llmjax.plan.memory import memory"), "llmjax.plan", modules) == []


def test_cycles_are_seen() -> None:
    """Top-level imports make a cycle; imports inside functions or for type checkers do not."""
    early = {"llmjax.nn.a": ast.parse("from llmjax.nn import b"), "llmjax.nn.b": ast.parse("import llmjax.nn.a")}
    assert cycles(import_graph(early)) == [["llmjax.nn.a", "llmjax.nn.b", "llmjax.nn.a"]]
    late = early | {
        "llmjax.nn.b": ast.parse("def f():\n    import llmjax.nn.a\nif TYPE_CHECKING:\n    import llmjax.nn.a")
    }
    assert cycles(import_graph(late)) == []


def test_lines_are_counted_without_docstring_and_nested_functions() -> None:
    """The definition of the size budget, on a function of known length."""
    source = 'def f(x):\n    """One.\n\n    Three.\n    """\n    @g\n    def h(y):\n        return y\n    return h(x)\n'
    outer, inner = functions(ast.parse(source))
    assert (outer.name, lines_of(outer), inner.name, lines_of(inner)) == ("f", 2, "h", 2)


@pytest.mark.parametrize(
    "line",
    ["x = 1  # " + "noqa", "x = 1  # " + "type: ignore[arg-type]", "# " + "pragma: no cover", "# " + "fmt: off"],
)
def test_suppressions_are_seen(line: str) -> None:
    """Each way of silencing a tool is recognised (written in two pieces here, so that this file holds none)."""
    assert SUPPRESSION.search(line)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("open('/wo" + "rk/data')", True),
        ("see /ro" + "ot/x", True),
        ("/home/some" + "body/x", True),
        ("https://py" + "pi.org/simple", True),
        ("net/work/x and a/root/b", False),
        ("/home/user/data", False),
    ],
)
def test_machine_paths_are_seen(line: str, wrong: bool) -> None:
    """Absolute paths of a machine and package hosts are recognised; words that merely contain them are not."""
    assert bool(MACHINE_PATH.search(line)) is wrong


def test_missing_annotations_are_seen() -> None:
    """Arguments of every kind and the result are looked at; `self` needs none."""
    (function,) = functions(ast.parse("def f(self, a, b: int, *c, d=1, **e): ..."))
    assert missing_annotations(function) == ["a", "d", "c", "e", "return"]
