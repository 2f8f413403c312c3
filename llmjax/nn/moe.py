"""Mixture of experts: of several feed-forward layers each token passes through a few."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llmjax.nn.auxiliary import LOSSES, METRICS, hand_out
from llmjax.nn.dispatch import Params, buffered, dropless, fill
from llmjax.nn.initializers import Init
from llmjax.nn.linear import parameter
from llmjax.nn.mixer import Context
from llmjax.nn.mlp import GLU, DenseFeedForward, FeedForward, Projection
from llmjax.nn.router import (
    Choice,
    ExpertChoice,
    Router,
    Slots,
    TopK,
    balance_loss,
    bias_surrogate,
    dropped,
    left_out,
    load_of,
    router_z_loss,
    slots_of,
)
from llmjax.nn.sites import site
from llmjax.parallel.mesh import constrained


@dataclass(frozen=True)
class MoE(FeedForward):
    """y = shared(x) + sum over the experts e that x meets of w_e expert_e(x). Shazeer et al. 2017 (1701.06538)."""

    experts: int = 8
    """number of experts to route to (Mixtral)"""
    expert: DenseFeedForward = GLU()
    """what each expert is"""
    router: Router = TopK()
    """which experts a token meets, and with what weight"""
    capacity: float | None = None
    """room of an expert in a sequence, as a multiple of the mean load; tokens beyond it pass it by (Switch: 1.25). None
    drops nothing, and neither does decoding"""
    shared: int = 0
    """experts that every token meets, with weight 1 (DeepSeekMoE, 2401.06066)"""
    balance_loss: float = 0.01
    """weight of experts sum_e f_e P_e, which is 1 for an even load, summed over layers (Switch: 0.01)"""
    z_loss: float = 0.0
    """weight of the router's mean squared log-normaliser, summed over layers (ST-MoE, 2202.08906: 0.001)"""
    bias_rate: float | None = None
    """step of the biases that even the load without a loss (DeepSeek-V3, 2412.19437: 0.001); None for no biases"""
    logit_bias: bool = False
    """whether the router's logits have a bias, which weights see too (gpt-oss, 2508.10925)"""

    def build(self, d_model: int, layers: int, init: Init, name: str | None = None) -> nn.Module:
        """The Linen module of this config."""
        return MoEModule(self, d_model, layers, init, name=name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range, and those that the router leaves without effect."""
        if self.experts < 1:
            yield "experts", "must be at least 1"
        for field, why in self.router.problems_among(self.experts):
            yield f"router.{field}", why
        for name in ("shared", "balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                yield name, "must not be negative"
        for name in ("capacity", "bias_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                yield name, "must be positive, or None"
        if isinstance(self.router, ExpertChoice):
            for name, off in {"capacity": None, "balance_loss": 0.0, "bias_rate": None}.items():
                if getattr(self, name) != off:
                    yield name, f"has no effect on ExpertChoice, whose load is always even: use {off}"

    def sees_future(self) -> bool:
        """Experts that choose among the tokens of a sequence see all of it."""
        return isinstance(self.router, ExpertChoice)

    def any_order(self) -> bool:
        """Where no token has to come early to find room."""
        return self.capacity is None and not self.sees_future()

    def matmul_params(self, d_model: int) -> int:
        """Weights of the router, of the shared experts and of as many others as a token meets on average."""
        met = self.router.active(self.experts) + self.shared
        return d_model * self.experts + math.ceil(met * self.expert.matmul_params(d_model))

    def all_shared(self, d_model: int) -> DenseFeedForward:
        """The shared experts as one layer: a sum of dense layers is one that is as wide as all of them."""
        return dataclasses.replace(self.expert, d_ff=self.shared * self.expert.width(d_model))


class MoEModule(nn.Module):
    """Owns `router`, `experts` (stacked) and `shared`; site `router_logits`."""

    config: MoE
    d_model: int
    layers: int
    initializer: Init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], context: Context
    ) -> Float[Array, "batch length d_model"]:
        """Apply the layer to the tokens that are present (position >= 0); experts give the others 0, and count none.

        Hands out the losses `balance_loss` and `router_z_loss`, weighted, and the metrics `max_load` (largest load over
        the mean) and `dropped` (the fraction of (token, expert) pairs without room; of expert choice, of tokens that no
        expert takes).
        """
        c, present = self.config, context.positions >= 0
        extra = c.bias_rate is not None, c.logit_bias
        logits, bias = Logits(self.d_model, c.experts, self.initializer, *extra, name="router")(x)
        logits = site(self, "router_logits", logits)
        chosen = c.router.route(logits, present, bias)
        run: Choice | Slots = chosen
        if isinstance(chosen, Choice) and c.capacity is not None and context.cache is None:
            share = c.capacity * c.router.active(c.experts)
            run = fill(chosen, c.experts, slots_of(x.shape[1], share, c.experts))
        if self.is_mutable_collection(LOSSES):
            self.add_losses(logits, bias, present, chosen)
        if self.is_mutable_collection(METRICS):
            self.measure(present, chosen, run)
        table = c.expert.projections(self.d_model, self.layers, self.initializer)
        params = Experts(c.experts, table, name="experts")()
        if isinstance(run, Choice):
            y = dropless(c.expert, table, params, x, run)
        else:
            y = buffered(c.expert, table, params, x, run)
        if c.shared:
            y = y + c.all_shared(self.d_model).build(self.d_model, self.layers, self.initializer, "shared")(x, context)
        return y

    def add_losses(
        self,
        logits: Float[Array, "batch length experts"],
        bias: Float[Array, " experts"] | None,
        present: Bool[Array, "batch length"],
        chosen: Choice | Slots,
    ) -> None:
        """Hand out the losses that have a weight."""
        c = self.config
        if c.z_loss:
            hand_out(self, LOSSES, "router_z_loss", c.z_loss * router_z_loss(logits, present))
        if isinstance(chosen, Choice) and (c.balance_loss or bias is not None):
            load = load_of(chosen, c.experts)
            loss = c.balance_loss * balance_loss(c.router.affinity(logits), load, present)
            if bias is not None and c.bias_rate is not None:
                loss = loss + bias_surrogate(bias, load, c.bias_rate)
            hand_out(self, LOSSES, "balance_loss", loss)

    def measure(self, present: Bool[Array, "batch length"], chosen: Choice | Slots, run: Choice | Slots) -> None:
        """Hand out how even the load is, and what is dropped where something can be."""
        if isinstance(chosen, Choice):
            load = load_of(chosen, self.config.experts)
            hand_out(self, METRICS, "max_load", load.size * jnp.max(load))
        if isinstance(run, Slots):
            lost = dropped(chosen, run) if isinstance(chosen, Choice) else left_out(run, present)
            hand_out(self, METRICS, "dropped", lost)


class Logits(nn.Module):
    """Owns the router's `kernel`, where `biased` the `bias` that only the choice sees, and perhaps a `logit_bias`."""

    d_model: int
    experts: int
    initializer: Init
    biased: bool
    logit_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"]
    ) -> tuple[Float[Array, "batch length experts"], Float[Array, " experts"] | None]:
        """x W (+ b) and the bias of the choice, both float32 whatever x is (2101.03961, section 2.4)."""
        kernel = parameter(
            self, "kernel", self.initializer.kernel(self.d_model), (self.d_model, self.experts), ("d_model", "experts")
        )
        logits = jnp.einsum(
            "bld,de->ble", x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        zeros = jax.nn.initializers.zeros
        if self.logit_bias:
            logits = logits + parameter(self, "logit_bias", zeros, (self.experts,), ("experts",)).astype(jnp.float32)
        logits = constrained(logits, ("batch", "length", None))  # a token's choice is among all experts
        if not self.biased:
            return logits, None
        bias = parameter(self, "bias", zeros, (self.experts,), ("experts",))
        return logits, bias.astype(jnp.float32)


class Experts(nn.Module):
    """Owns the projections of all experts, stacked."""

    experts: int
    table: dict[str, Projection]

    @nn.compact
    def __call__(self) -> Params:
        """`{projection: {kernel: [experts, inputs, outputs], bias: [experts, outputs]}}`."""
        return {name: Stacked(self.experts, p, name=name)() for name, p in self.table.items()}


class Stacked(nn.Module):
    """Owns one projection of all experts."""

    experts: int
    projection: Projection

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, "experts ..."]]:
        """`kernel` and, where there is one, `bias`."""
        p = self.projection
        shape, axes = (self.experts, p.inputs, p.outputs), ("experts", *p.axes)
        params = {"kernel": parameter(self, "kernel", p.initial, shape, axes)}
        if p.bias:
            zeros = jax.nn.initializers.zeros
            params["bias"] = parameter(self, "bias", zeros, shape[::2], axes[::2])
        return params
