"""UniPELT: LoRA, prefix and bottleneck adapters behind learned gates. Mao et al. 2021 (2110.07577)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, Call, boxed
from llmjax.adapters.bottleneck import Bottleneck, first, with_first
from llmjax.adapters.lora import LoRA
from llmjax.adapters.prefix import PrefixTuning, leaves_of
from llmjax.nn.model import Model
from llmjax.nn.projections import projection_of


@dataclass(frozen=True)
class Gated(Adapter):
    """y' = y + g (f(y, x) - y), g = sigmoid(x u + c) for each token: another adapter's change behind a gate."""

    adapter: Adapter = Bottleneck(places=("mlp",))
    """what is gated, a method on calls of modules; its own name does not matter"""

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """What the other finds, where it reads activations of tokens."""
        return reads_tokens(module) and self.adapter.finds(module, path, method)

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """u and c, zero, and the other's parameters."""
        return {"gate": gate_of(module), "of": self.adapter.draw(key, module)}

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """The other's."""
        return self.adapter.draw_shared(key, model)

    def shares(self) -> bool:
        """Where the other does."""
        return self.adapter.shares()

    def around(self, call: Call) -> Any:
        """The call, and its gated change."""
        result = call.make()
        changed = self.adapter.around(known(call, result, call.params["of"]))
        y, g = first(result), gate(call)
        return with_first(result, y + g.reshape(*g.shape, *(1,) * (y.ndim - g.ndim)) * (first(changed) - y))

    def trains(self, leaf: str) -> bool:
        """The gate, and what trains of the other."""
        return leaf.startswith("gate/") or self.adapter.trains(leaf.removeprefix("of/"))

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Those of the other."""
        yield from ((f"adapter.{field}", why) for field, why in self.adapter.problems_in(model))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Methods that change the model's input, and not calls."""
        yield from super().problems()
        if self.adapter.slots():
            yield "adapter", "goes before the first token, where no call is: use GatedPrefix, or a method on modules"


@dataclass(frozen=True)
class GatedPrefix(PrefixTuning):
    """y' = y + g (y_P - y), y_P attention with the prefix and y without, g = sigmoid(x u + c) for each token.

    The paper scales P by one gate for each sequence, its mean over tokens; that looks ahead, and a key of zero still
    takes a share of the softmax. Here a closed gate leaves the base at positions after the prefix. It must be the first
    prefix of its model.
    """

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """The blocks' mixers."""
        return method == "__call__" and path.rpartition("/")[2] == "mixer"

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """u and c, zero."""
        return {"gate": gate_of(module)}

    def around(self, call: Call) -> Any:
        """Both mixed; the prefix is hidden by taking its positions from the cache."""
        x, context, state = call.args
        places = context.cache.positions.at[:, : self.count].set(-1)
        hidden = context.replace(cache=context.cache.replace(positions=places))
        y, _ = call.make(x, hidden, state)
        with_prefix, state = call.make()
        return y + gate(call)[..., None] * (with_prefix - y), state

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Recurrences, from whose state a prefix cannot be taken out again."""
        found = list(super().problems_in(model))
        yield from found
        if not found and not all(leaf.long for leaf in leaves_of(model, self.count)):
            yield "count", "cannot be hidden from a recurrence: use PrefixTuning, or a model of attention alone"


def unipelt(rank: int = 8, count: int = 10, size: int = 48) -> tuple[Adapter, ...]:
    """The three methods of the paper: LoRA on queries and values, a prefix, an adapter after feed-forward layers."""
    return (
        GatedPrefix("prefix", count=count),
        Gated("lora", LoRA(rank=rank, targets="qv")),
        Gated("adapter", Bottleneck(size=size, places=("mlp",))),
    )


def known(call: Call, result: Any, params: Any) -> Call:
    """The call of another adapter with `params`, its `result` computed already."""
    return replace(call, params=params, make=lambda *first: call.make(*first) if first else result)


def reads_tokens(module: nn.Module) -> bool:
    """Whether a module is called with activations, as tables and stacks of experts are not."""
    projection = projection_of(module)
    return projection is None or (projection.experts is None and not projection.table)


def width_of(module: nn.Module) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """The axes of a token's activation that a module reads, and their logical names."""
    projection, sizes = projection_of(module), cast(Any, module)
    return ((sizes.d_model,), ("d_model",)) if projection is None else (projection.inputs, projection.input_axes)


def gate_of(module: nn.Module) -> Boxes:
    """u and c, zero."""
    inputs, axes = width_of(module)
    return {"u": boxed(jnp.zeros(inputs), *axes), "c": boxed(jnp.zeros(()))}


def gate(call: Call) -> Float[Array, "batch length"]:
    """sigmoid(x u + c)."""
    p, x = call.params["gate"], call.args[0]
    return jax.nn.sigmoid(jnp.tensordot(x, p["u"], axes=p["u"].ndim) + p["c"])
