"""Parameters drawn from the shapes alone: nothing is compiled."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from llmjax.nn.mixer import Mixer
from llmjax.nn.stack import enter
from tests.mixers.cases import D_MODEL, INIT


def normals(shapes: Any, std: float = 0.3) -> Any:
    """A tree of float32 normals, of these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [random.normal(0, std, a.shape).astype(np.float32) for a in leaves])


@cache
def drawn(mixer: Mixer) -> Any:
    """The parameters of a mixer of `D_MODEL` features."""
    module, x = mixer.build(D_MODEL, 2, INIT), jnp.zeros((1, 8, D_MODEL))
    context, _ = enter(x[..., 0], None, None, None)
    return normals(meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), x, context)["params"])))
