"""What an optimizer knows of a parameter beyond its numbers: its path, and which axes are layers, inputs and outputs.

A parameter is named by its path with slashes, `blocks/0/mixer/query/kernel`. Every leaf under a `blocks` component is
stacked: its first axis runs over the repeats of the layer pattern. A weight matrix is a leaf named `kernel`; its axes
are read off the table `MATRICES`, where a new module whose kernels are not plain `[inputs, outputs]` adds one row.
Biases, scales and any leaf with another name are no matrices, whatever their rank.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from llmjax.config import ConfigError

MATRICES = (
    (r"(^|/)(query|key|value)/kernel$", "in out out"),
    (r"(^|/)out/kernel$", "in in out"),
    (r"(^|/)experts/\w+/kernel$", "expert in out"),
    (r"(^|/)kernel$", "in out"),
)
"""(path pattern, role of each axis after the layers axis); the first row with the right pattern and rank is used."""


STEPS = r"(^|/)router/bias$"
"""Paths of parameters whose gradient is itself the step to take: biases that even the load of experts."""


class Axes(NamedTuple):
    """Axes of a weight matrix within its (stacked) leaf."""

    inputs: tuple[int, ...]
    """Axes that are contracted with the activations; several are fused in order."""
    outputs: tuple[int, ...]
    """Axes of the result; several (heads, head_dim) are fused in order."""


def is_matrix(path: str) -> bool:
    """Whether the leaf at `path` holds weight matrices: it is named `kernel`."""
    return path.split("/")[-1] == "kernel"


def matrix_axes(path: str, rank: int) -> Axes:
    """Axes of the weight matrices in the kernel at `path` with `rank` axes.

    Axes that are neither (layers, experts) count single matrices. Raises ConfigError for a kernel of a rank that no
    row of MATRICES describes: guessing would fuse the wrong axes without a word.
    """
    first = int(is_stacked(path))
    for pattern, roles in MATRICES:
        words = roles.split()
        if re.search(pattern, path) and len(words) == rank - first:
            named = list(enumerate(words, start=first))
            return Axes(tuple(i for i, w in named if w == "in"), tuple(i for i, w in named if w == "out"))
    raise ConfigError(f"optimizer: which of the {rank} axes of {path!r} are inputs? Add a row to {__name__}.MATRICES")


def is_stacked(path: str) -> bool:
    """Whether the first axis of the leaf runs over the repeats of the layer pattern."""
    return "blocks" in path.split("/")[:-1]


def map_paths(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`function(path, leaf, *other leaves)` over a tree, the path written with slashes."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(jax.tree_util.keystr(keys, simple=True, separator="/"), *leaves), tree, *rest
    )


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves of a tree keyed by path, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def matching(pattern: str, paths: Iterable[str], field: str = "") -> set[str]:
    """Paths in which the regular expression is found; when there is none and `field` is given, raises ConfigError."""
    found = {path for path in paths if re.search(pattern, path)}
    if field and not found:
        nearest = difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0.0)
        raise ConfigError(f"{field}={pattern!r} matches no parameter: nearest are {', '.join(nearest)}")
    return found


def regex_problem(pattern: str) -> str | None:
    """Why `pattern` is no regular expression, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no regular expression ({error}): use for example 'mlp/.*kernel'"
    return None
