"""Activation sites: named points of the forward pass that can be read, replaced, shifted and cut, with data only.

Reading: make the collection `sites` mutable. Editing: pass the collection `interventions`, a tree of the same paths
whose leaves are dictionaries with any of `mask`, `value`, `add`, `stop` (arrays that broadcast against the activation):
    x <- where(mask, value, x);   x <- x + add;   x <- where(stop, stop_gradient(x), x)
Both collections are stacked over the repeats of a scanned stack like the parameters are, so one array edits all layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

CAPTURED = "sites"
INTERVENTIONS = "interventions"


def site(module: nn.Module, name: str, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return activation `x` after the edits given for `<module path>/<name>`, and record it where sites are read.

    The dtype of `x` is kept. Geiger et al. 2021 (2106.02997) call the replacement an interchange intervention.
    """
    if module.has_variable(INTERVENTIONS, name):
        x = intervene(x, module.get_variable(INTERVENTIONS, name))
    module.sow(CAPTURED, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x


def intervene(x: Shaped[Array, "..."], edit: dict[str, Shaped[Array, "..."]]) -> Shaped[Array, "..."]:
    """Apply one edit (keys `mask` with `value`, `add`, `stop`; absent keys do nothing) to an activation.

    Raises ValueError for an unknown key, or a mask without its value.
    """
    unknown = set(edit) - {"mask", "value", "add", "stop"}
    if unknown or ("mask" in edit) != ("value" in edit):
        raise ValueError(f"an intervention holds mask with value, add, stop; got {sorted(edit)}")
    if "mask" in edit:
        x = jnp.where(edit["mask"], edit["value"].astype(x.dtype), x)
    if "add" in edit:
        x = x + edit["add"].astype(x.dtype)
    if "stop" in edit:
        x = jnp.where(edit["stop"], jax.lax.stop_gradient(x), x)
    return x
