"""Prompts and prefixes as folders of peft: one tensor, `prompt_embeddings`, of the whole model."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmjax.adapters.adapted import Adapted
from llmjax.adapters.base import ADAPTERS, Adapter
from llmjax.adapters.peft.modules import innermost, modules_of
from llmjax.adapters.prefix import PrefixTuning, leaves_of
from llmjax.adapters.prompt import TABLE, PromptTuning
from llmjax.config import InputError
from llmjax.nn.model import Model, Params, flat, unflat

KINDS: dict[str, type[PromptTuning] | type[PrefixTuning]] = {
    "PROMPT_TUNING": PromptTuning,
    "P_TUNING": PromptTuning,
    "PREFIX_TUNING": PrefixTuning,
}
"""Of what a network writes peft keeps what it wrote, and so P-tuning is read and written as a prompt."""
TENSOR = "prompt_embeddings"


def place_of(adapter: Adapter) -> str:
    """Our path of a prompt or prefix."""
    if isinstance(adapter, PrefixTuning):
        return f"{ADAPTERS}/{adapter.name}/prefix"
    return f"{TABLE}/{ADAPTERS}/{adapter.name}/prompt"


def load_virtual(
    theirs: Mapping[str, Any], tensors: Mapping[str, np.ndarray], base: Model, params: Params, name: str
) -> tuple[Adapted, Params]:
    """The base with the prompt or prefix of a folder, and all parameters; raises InputError where it does not fit."""
    if tensors.keys() != {TENSOR}:
        raise InputError(f"holds the tensors {', '.join(sorted(tensors))}: a prompt is {TENSOR} alone")
    tensor = np.asarray(tensors[TENSOR], np.float32)
    adapter = KINDS[theirs["peft_type"]](name=name, count=len(tensor))
    for _, why in problems(adapter, base):
        raise InputError(f"the base cannot have it: {why}")
    model = Adapted(base=base, adapters=(adapter,))
    path = place_of(adapter)
    shape = flat(model.abstract())[path].shape
    if tensor.shape != shape:
        raise InputError(f"{TENSOR} has shape {list(tensor.shape)}, not {list(shape)}")
    return model, unflat({**flat(params), path: jnp.asarray(tensor)})


def written_virtual(adapter: Adapter, model: Adapted, params: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of a prompt or prefix; peft takes the model's sizes from the base.

    Raises InputError where peft has no such prefix, and for trained parameters of the base.
    """
    for _, why in problems(adapter, model.base):
        raise InputError(f"peft has no {type(adapter).__name__} for the base: {why}")
    if model.trained:
        raise InputError(f"peft keeps no parameters of the base beside {type(adapter).__name__}")
    tensor = np.asarray(flat(params)[place_of(adapter)], np.float32)
    kind = next(kind for kind, method in KINDS.items() if method is type(adapter))
    return {"peft_type": kind, "num_virtual_tokens": len(tensor)}, {TENSOR: tensor}


def problems(adapter: Adapter, base: Model) -> Iterator[tuple[str, str]]:
    """What does not fit the base, and of prefixes what a cache of transformers holds in another way."""
    yield from adapter.problems_in(base)
    if not isinstance(adapter, PrefixTuning):
        return
    kept = {leaf.name.rpartition("/")[2] for leaf in leaves_of(base, adapter.count)}
    if kept != {"key", "value"}:
        yield "count", f"its decode state holds {', '.join(sorted(kept))}, not keys and values"
    for module in modules_of(innermost(base)).values():
        if any(path.endswith("/key") for path in module.paths) and not module.ordered:
            yield "count", f"the features of its keys stand in another order than those of {module.name}"
            return
