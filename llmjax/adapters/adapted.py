"""A model with adapters: what was there stays as it is, what is added trains."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Int, PRNGKeyArray

from llmjax.adapters.base import ADAPTERS, Adapter, Call, ProjectionAdapter
from llmjax.nn.model import Params, Wrapped, cast, flat, readout, unflat
from llmjax.nn.projections import projection_of, projections


@dataclass(frozen=True)
class Adapted(Wrapped):
    """The base model, changed by adapters one after another; only they train, and base parameters that `trained` finds.

    Parameters of the base keep their paths, so that they are read, written and looked at like those of the base.
    """

    adapters: tuple[Adapter, ...] = ()
    """methods in the order that they are applied in; each has a name of its own"""
    trained: str = ""
    """regular expression of base parameters that train too: `bias$` (BitFit: Ben Zaken et al. 2021, 2106.10199),
    `norm/scale$`; empty for none"""
    active: tuple[str, ...] | None = None
    """names of the adapters that are switched on; None for all of them"""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which base parameters that do not train are kept"""

    def build(self) -> nn.Module:
        """The Linen module: the base's, its calls intercepted."""
        return AdaptedModule(self)

    def init(self, key: PRNGKeyArray, given: Params | None = None) -> Params:
        """The base's parameters (drawn, or `given`), and those that the adapters draw for them."""
        keys = jax.random.split(key)
        return meta.unbox(self.completed(self.base.init(keys[0], given), keys[1]))

    def boxed(self) -> Params:
        """Abstract parameters, the base's among them, that carry the logical names of their axes."""
        return jax.eval_shape(self.completed, self.base.boxed(), jax.random.key(0))

    def loaded(self, shardings: Params) -> Params | None:
        """What the base loads."""
        here = flat(self.base.abstract()).keys()
        return self.base.loaded(unflat({path: x for path, x in flat(shardings).items() if path in here}))

    def completed(self, base: Params, key: PRNGKeyArray) -> Params:
        """The base's parameters in the dtypes that they are kept in, and those of the adapters, drawn for them."""
        module, rngs = self.build(), {"params": key}
        _, drawn = module.apply({"params": base}, **self.example(), mutable=["params"], rngs=rngs)
        dtype = jnp.dtype(self.frozen_dtype)
        return unflat({path: x if self.trains(path) else cast(x, dtype) for path, x in flat(drawn["params"]).items()})

    def trains(self, path: str) -> bool:
        """Parameters of adapters that are on and train, and base parameters that `trained` finds."""
        found = re.search(rf"(?:^|/){ADAPTERS}/([^/]+)/(.+)", path)
        if found is not None:
            return any(adapter.name == found[1] and adapter.trains(found[2]) for adapter in self.on)
        return bool(self.trained) and bool(re.search(self.trained, path)) and self.base.trains(path)

    @cached_property
    def on(self) -> tuple[Adapter, ...]:
        """The adapters that are switched on."""
        return tuple(a for a in self.adapters if self.active is None or a.name in self.active)

    def flops_per_token(self, length: int) -> float:
        """The base's less the gradients of weights that do not train (2 each), and 6 for each of the adapters'.

        Experts count as if their gradients were needed.
        """
        fixed = {path: p for path, p in projections(self.base).items() if p.experts is None and path != "embed"}
        leaves = flat(self.abstract())
        frozen = sum(
            leaves[f"{path}/{p.leaf}"].size for path, p in fixed.items() if not self.trains(f"{path}/{p.leaf}")
        )
        added = sum(x.size for path, x in leaves.items() if f"{ADAPTERS}/" in path)
        return self.base.flops_per_token(length) - 2 * frozen + 6 * added

    def problems(self) -> Iterator[tuple[str, str]]:
        """Names that clash or are not there, and what does not fit the base."""
        names = [adapter.name for adapter in self.adapters]
        for i, adapter in enumerate(self.adapters):
            if adapter.name in names[:i]:
                yield f"adapters.{i}.name", "is that of another adapter: give each its own"
            yield from ((f"adapters.{i}.{field}", why) for field, why in adapter.problems_in(self.base))
        for name in self.active or ():
            if name not in names:
                yield "active", f"names {name!r}, which no adapter has: there are {', '.join(names) or 'none'}"
        if self.trained and not any(re.search(self.trained, path) for path in flat(self.base.abstract())):
            yield "trained", "matches no parameter of the base: use for example 'bias$' or 'norm/scale$'"


class AdaptedModule(nn.Module):
    """The base's module under its own paths, and the adapters around its calls."""

    config: Adapted

    def setup(self) -> None:
        """The base, and the parameters that adapters have for the whole of it."""
        self.base = self.config.base.build()
        nn.share_scope(self, self.base)
        having = [a for a in self.config.adapters if type(a).draw_shared is not Adapter.draw_shared]
        self.shared = declared(self, having, lambda a, key: a.draw_shared(key, self.config.base))

    def features(self, *args: Any, rows: Int[Array, " batch"] | None = None, **named: Any) -> Any:
        """The base's features; where `rows` is given, each row has one adapter of those that are on, or none (-1)."""
        base: Any = self.base
        inputs = given = dict(inspect.signature(base.features).bind(*args, **named).arguments)
        for adapter in self.config.on:
            inputs = adapter.enter(self.config.base, inputs, self.shared.get(adapter.name))
        with nn.intercept_methods(self.interceptor(rows)):
            features, state = base.features(**inputs)
        for adapter in reversed(self.config.on):
            features = adapter.leave(self.config.base, features, given)
        return features, state

    def __call__(self, *args: Any, rows: Int[Array, " batch"] | None = None, **named: Any) -> Any:
        """The base's logits and state."""
        features, state = self.features(*args, rows=rows, **named)
        return readout(features), state

    def interceptor(self, rows: Int[Array, " batch"] | None) -> Callable[..., Any]:
        """What stands around each call of the base's modules."""
        config, shared = self.config, self.shared

        def intercept(
            make: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            module, path = context.module, "/".join(context.module.path)
            found = [a for a in config.adapters if a.finds(module, path, context.method_name)]
            if not found:
                return make(*args, **kwargs)

            having = [a for a in found if type(a).draw is not Adapter.draw]
            own = declared(module, having, lambda a, key: a.draw(key, module))
            call = Call(module, args, kwargs, lambda: make(*args, **kwargs), None, None)
            on = [a for a in found if a in config.on]
            if rows is not None:
                return by_row(on, [own.get(a.name) for a in on], shared, rows, call)
            for adapter in on:
                call = wrapped(adapter, replace(call, params=own.get(adapter.name), shared=shared.get(adapter.name)))
            return call.make()

        return intercept


def declared(
    module: nn.Module, adapters: list[Adapter], draw: Callable[[Adapter, PRNGKeyArray], dict[str, Any]]
) -> dict[str, Any]:
    """The adapters' parameters in a module, by adapter: those it was given, or drawn."""
    if not adapters:
        return {}
    each = [(adapter.name, partial(draw, adapter)) for adapter in adapters]
    return module.param(ADAPTERS, lambda key: {n: f(jax.random.fold_in(key, i)) for i, (n, f) in enumerate(each)})


def wrapped(adapter: Adapter, call: Call) -> Call:
    """The call as the adapter makes it."""
    return replace(call, make=lambda: adapter.around(call))


def by_row(adapters: list[Adapter], params: list[Any], shared: Any, rows: Int[Array, " batch"], call: Call) -> Any:
    """The call, each row of the batch changed by the adapter of its number: its parameters are gathered.

    Raises ValueError where the adapters are not of one kind and shape, or change something else than a product.
    """
    first = adapters[0] if adapters else None
    projection = projection_of(call.module)
    alike = all(replace(a, name="") == replace(adapters[0], name="") for a in adapters)
    if not isinstance(first, ProjectionAdapter) or not alike or projection is None or projection.table:
        raise ValueError(
            "rows can have adapters of their own where all are the same method on projections, but for name"
        )
    if projection.experts is not None:
        raise ValueError("rows of one batch share their experts: adapters by row take other targets")
    y, x = call.make(), call.args[0]
    mine = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.maximum(rows, 0)], *params)

    def one(x: Array, y: Array, params: Any) -> Array:
        return first.output(replace(call, make=lambda: y, params=params, shared=shared.get(first.name)), x, projection)

    changed = jax.vmap(one)(x, y, mine)
    return jnp.where((rows < 0).reshape(-1, *(1,) * (y.ndim - 1)), y, changed)
