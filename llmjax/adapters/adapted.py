"""A model with adapters: what was there stays as it is, what is added trains."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PRNGKeyArray

from llmjax.adapters.base import ADAPTERS, FRESH, Adapter, Call, ProjectionAdapter, kernel_of, unpacked
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
    frozen_dtype: Literal["float32", "bfloat16"] | None = None
    """dtype in which base parameters that do not train are kept; None for the base's own"""

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

    def loaded(self, abstract: Params) -> Params | None:
        """What the base loads."""
        here = flat(self.base.abstract()).keys()
        return self.base.loaded(unflat({path: x for path, x in flat(abstract).items() if path in here}))

    def completed(self, base: Params, key: PRNGKeyArray) -> Params:
        """The base's parameters in the dtypes that they are kept in, and those of the adapters, drawn for them.

        They are drawn in a pass in float32 that the compiler drops: what it leaves of the base as it was is not taken
        from there.
        """
        module, rngs, wide = self.build(), {"params": key}, cast(base, jnp.float32)
        _, drawn = module.apply({"params": wide}, **self.example(), mutable=["params"], rngs=rngs)
        moving = (a for a in self.adapters if isinstance(a, ProjectionAdapter) and a.moves)
        moved = {f"{path}/{p.leaf}" for adapter in moving for path, p in adapter.found(self.base).items()}
        leaves, new = flat(base), flat(drawn["params"])
        leaves |= {path: x for path, x in new.items() if path not in leaves or path in moved}
        return unflat({path: self.kept(path, x) for path, x in leaves.items()})

    def kept(self, path: str, x: Any) -> Any:
        """A parameter in the dtype that it is kept in: those that train in float32."""
        if self.trains(path):
            return cast(x, jnp.float32)
        return x if self.frozen_dtype is None else cast(x, self.frozen_dtype)

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

    def init_state(self, batch: int, length: int, dtype: DTypeLike) -> Any:
        """The base's, with room for what adapters put before the first token."""
        state = self.base.init_state(batch, length + self.slots, dtype)
        return {**state, FRESH: {}} if self.slots else state

    @property
    def slots(self) -> int:
        """Places before the first token that adapters take up."""
        return sum(adapter.slots() for adapter in self.on)

    @property
    def positions(self) -> Any:
        """The base's absolute positions, of a table those that are left for tokens."""
        base: Any = self.base
        positions = base.positions
        length = getattr(positions, "length", None)
        return positions if length is None else replace(positions, length=length - self.slots)

    def flops_per_token(self, length: int) -> float:
        """The base's less the gradients of weights that do not train (2 each), and 6 for each of the adapters'.

        Experts count as if their gradients were needed.
        """
        fixed = {path: p for path, p in projections(self.base).items() if p.experts is None and path != "embed"}
        leaves = flat(self.abstract())
        frozen = sum(
            math.prod(leaves[f"{path}/{p.leaf}"].shape)
            for path, p in fixed.items()
            if not self.trains(f"{path}/{p.leaf}")
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
        having = [a for a in self.config.adapters if a.shares()]
        self.shared = declared(self, having, lambda a, key: a.draw_shared(key, self.config.base))

    def features(self, *args: Any, rows: Int[Array, " batch"] | None = None, **named: Any) -> Any:
        """The base's features; where `rows` is given, each row has one adapter of those that are on, or none (-1)."""
        base: Any = self.base
        inputs = given = dict(inspect.signature(base.features).bind(*args, **named).arguments)
        if inputs.get("state") is None and any(adapter.stateful() for adapter in self.config.on):
            inputs, (batch, length) = unpacked(inputs), inputs["tokens"].shape
            dtype = jax.tree.leaves(self.shared)[0].dtype
            inputs = {**inputs, "state": self.config.init_state(batch, length, dtype)}
        for adapter in self.config.on:
            inputs = adapter.enter(self.config.base, inputs, self.shared.get(adapter.name))
        if inputs.get("state") is not None:
            inputs = {**inputs, "state": {key: x for key, x in inputs["state"].items() if key != FRESH}}
        with nn.intercept_methods(self.interceptor(rows)):
            features, state = base.features(**inputs)
        for adapter in reversed(self.config.on):
            features = adapter.leave(self.config.base, features, given)
        return features, None if given.get("state") is None else state

    def __call__(self, *args: Any, rows: Int[Array, " batch"] | None = None, **named: Any) -> Any:
        """The base's logits and state."""
        features, state = self.features(*args, rows=rows, **named)
        return readout(features), state

    def interceptor(self, rows: Int[Array, " batch"] | None) -> Callable[..., Any]:
        """What stands around each call of the base's modules."""
        config, shared = self.config, self.shared
        inside: list[nn.Module] = []

        def intercept(
            make: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            module, path = context.module, "/".join(context.module.path)
            if inside and inside[-1] is module:
                return make(*args, **kwargs)
            found = [a for a in config.adapters if a.finds(module, path, context.method_name)]
            if not found:
                return make(*args, **kwargs)

            having = [a for a in found if type(a).draw is not Adapter.draw]
            own = declared(module, having, lambda a, key: a.draw(key, module))

            def whole(*first: Any) -> Any:
                inside.append(module)  # called by its name, so that it may be called again
                try:
                    return getattr(module, context.method_name)(*first, *args[len(first) :], **kwargs)
                finally:
                    inside.pop()

            call = Call(module, args, kwargs, whole, None, None)
            on, common = [a for a in found if a in config.on], shared
            if args and isinstance(args[0], jax.Array) and jnp.issubdtype(args[0].dtype, jnp.floating):
                own, common = cast(own, args[0].dtype), cast(shared, args[0].dtype)  # a frozen base may be narrower
            if rows is not None:
                return by_row(on, [own.get(a.name) for a in on], common, rows, call)
            for adapter in on:
                call = wrapped(adapter, replace(call, params=own.get(adapter.name), shared=common.get(adapter.name)))
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

    def make(*first: Any) -> Any:
        args = (*first, *call.args[len(first) :])
        return adapter.around(replace(call, args=args, make=lambda *first: call.make(*first, *args[len(first) :])))

    return replace(call, make=make)


def by_row(adapters: list[Adapter], params: list[Any], shared: Any, rows: Int[Array, " batch"], call: Call) -> Any:
    """The call, each row of the batch changed by the adapter of its number: its parameters are gathered.

    Raises ValueError where the adapters are not of one kind and shape, or change something else than a product.
    """
    first = adapters[0] if adapters else None
    projection = projection_of(call.module)
    alike = all(replace(a, name="") == replace(adapters[0], name="") for a in adapters)
    if not isinstance(first, ProjectionAdapter) or not alike or projection is None or projection.handed:
        raise ValueError(
            "rows can have adapters of their own where all are the same method on projections, but for name"
        )
    if projection.experts is not None:
        raise ValueError("rows of one batch share their experts: adapters by row take other targets")
    y, x = call.make(), call.args[0]
    mine = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.maximum(rows, 0)], *params)

    common = [shared[adapter.name] for adapter in adapters if adapter.name in shared]
    theirs = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.maximum(rows, 0)], *common) if common else None

    def one(x: Array, y: Array, params: Any, shared: Any) -> Array:
        def make(*changed: Array) -> Array:
            if not changed:
                return y
            kernel = kernel_of(call.module, projection)
            return y + jnp.tensordot(changed[0] - x, kernel.astype(x.dtype), axes=len(projection.inputs))

        return first.output(replace(call, make=make, params=params, shared=shared), x, projection)

    changed = jax.vmap(one)(x, y, mine, theirs)
    return jnp.where((rows < 0).reshape(-1, *(1,) * (y.ndim - 1)), y, changed)
