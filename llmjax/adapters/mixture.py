"""Mixtures of adapters: several of one kind on the same call, weighted by a gate for each token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.adapters.base import Adapter, Boxes, Call, boxed
from llmjax.adapters.bottleneck import Bottleneck, first, with_first
from llmjax.adapters.unipelt import known, reads_tokens, width_of
from llmjax.nn.model import Model


@dataclass(frozen=True)
class Mixture(Adapter):
    """y' = sum_i p_i f_i(x), p = softmax(x G) for each token, over all or the `active` largest; f_i adapted calls.

    Of LoRA it is a mixture of experts of low rank (Zadouri et al. 2023, 2309.05444). All f_i are computed, whatever
    their weight.
    """

    adapter: Adapter = Bottleneck()
    """what each expert is, a method on calls of modules; its own name does not matter"""
    experts: int = 4
    """how many there are"""
    active: int | None = None
    """experts whose weights are not zero, for each token the largest; None for all of them"""

    def finds(self, module: nn.Module, path: str, method: str) -> bool:
        """What the other finds, where it reads activations of tokens."""
        return reads_tokens(module) and self.adapter.finds(module, path, method)

    def draw(self, key: PRNGKeyArray, module: nn.Module) -> Boxes:
        """Each expert's parameters, drawn apart, and G, zero: at first all count the same, or the first `active`."""
        inputs, axes = width_of(module)
        drawn = {str(i): self.adapter.draw(jax.random.fold_in(key, i), module) for i in range(self.experts)}
        return drawn | {"gate": boxed(jnp.zeros((*inputs, self.experts)), *axes, None)}

    def draw_shared(self, key: PRNGKeyArray, model: Model) -> Boxes:
        """What the experts share."""
        return self.adapter.draw_shared(key, model)

    def shares(self) -> bool:
        """Where the other does."""
        return self.adapter.shares()

    def around(self, call: Call) -> Any:
        """The experts' outputs, mixed."""
        result, weights = call.make(), self.weights(call)
        outputs = [first(self.adapter.around(known(call, result, call.params[str(i)]))) for i in range(self.experts)]
        return with_first(result, jnp.einsum("bte,ebt...->bt...", weights, jnp.stack(outputs)))

    def weights(self, call: Call) -> Float[Array, "batch length experts"]:
        """p of each token; its sum is 1."""
        gate, x = call.params["gate"], call.args[0]
        logits = jnp.tensordot(x, gate, axes=gate.ndim - 1).astype(jnp.float32)
        if self.active is not None:
            _, best = jax.lax.top_k(logits, self.active)
            chosen = jnp.any(jax.nn.one_hot(best, self.experts, dtype=bool), axis=-2)
            logits = jnp.where(chosen, logits, -jnp.inf)
        return jax.nn.softmax(logits).astype(x.dtype)

    def trains(self, leaf: str) -> bool:
        """The gate, and what trains of an expert."""
        return leaf == "gate" or self.adapter.trains(leaf.partition("/")[2] or leaf)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Those of an expert."""
        yield from ((f"adapter.{field}", why) for field, why in self.adapter.problems_in(model))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range, and methods that change the model's input."""
        yield from super().problems()
        if self.experts < 1:
            yield "experts", "must be at least 1"
        if self.active is not None and not 1 <= self.active <= self.experts:
            yield "active", f"must be from 1 to experts={self.experts}, or None for all"
        if self.adapter.slots():
            yield "adapter", "goes before the first token, where no call is: use a method on modules"
