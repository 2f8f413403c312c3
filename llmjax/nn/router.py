"""Routers of a mixture of experts: which tokens meet which experts, with what weight, and what keeps the load even."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Choice:
    """The k experts of every token and their weights; an absent token has the expert that is one past the last."""

    experts: Int[Array, "batch length k"]
    weights: Float[Array, "batch length k"]


@flax.struct.dataclass
class Slots:
    """The tokens of every expert, as indices into their sequence, and their weights; `length` is an empty slot."""

    tokens: Int[Array, "batch experts capacity"]
    weights: Float[Array, "batch experts capacity"]


def slots_of(length: int, share: float, experts: int) -> int:
    """Slots an expert has for a sequence: ceil(share length / experts), at most one a token.

    Rounded up, so that a single token always finds room.
    """
    return min(length, math.ceil(share * length / experts))


@dataclass(frozen=True)
class Router(ABC):
    """Base of the routers, functions of float32 logits `[batch, length, experts]`."""

    def problems_among(self, experts: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit that many experts."""
        return iter(())

    @abstractmethod
    def active(self, experts: int) -> float:
        """Experts that a token meets, on average."""

    @abstractmethod
    def affinity(self, logits: Float[Array, "batch length experts"]) -> Float[Array, "batch length experts"]:
        """The scores s of tokens and experts, not negative."""

    @abstractmethod
    def route(
        self,
        logits: Float[Array, "batch length experts"],
        present: Bool[Array, "batch length"],
        bias: Float[Array, " experts"] | None,
    ) -> Choice | Slots:
        """Who meets whom; `bias` is added to the scores for the choice alone, never to the weights."""


@dataclass(frozen=True)
class TopK(Router):
    """Each token takes the k experts with the highest scores s: weight s_e, or s_e / sum of the k.

    Shazeer et al. 2017 (1701.06538) and Mixtral (2401.04088) take the softmax of the k highest logits, which is
    `softmax`, normalised; Switch (2101.03961) is k=1, not normalised; DeepSeek-V3 (2412.19437) is `sigmoid`,
    normalised, times 2.5.
    """

    k: int = 2
    """experts a token (Mixtral: 2 of 8)"""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """function of the logits: softmax over all experts, or sigmoid of each"""
    normalise: bool = True
    """whether the weights of a token's experts are divided by their sum"""
    scale: float = 1.0
    """factor of the weights (DeepSeek-V3: 2.5)"""
    groups: int = 1
    """groups of experts side by side, of which a token takes only the best (DeepSeek-V2, 2405.04434, and V3: 8)"""
    top_groups: int = 1
    """groups that a token takes its experts from (DeepSeek-V2: 3; V3: 4)"""
    group_best: int = 1
    """how many of a group's highest s + bias are summed to judge it (DeepSeek-V2: 1; V3: 2)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values out of range."""
        if self.k == 1 and self.normalise:
            yield "normalise", "makes the weight of k=1 always 1, and the router learns nothing: use False (Switch)"
        if not self.scale > 0:
            yield "scale", "must be positive"
        if not 1 <= self.top_groups <= self.groups:
            yield "top_groups", f"must be from 1 to groups={self.groups}"

    def problems_among(self, experts: int) -> Iterator[tuple[str, str]]:
        """A token cannot take an expert twice, nor one of a group that it does not take."""
        if self.groups < 1 or experts % self.groups:
            yield "groups", f"must divide experts={experts}"
            return
        size = experts // self.groups
        if not 1 <= self.k <= self.top_groups * size:
            among = "" if self.groups == 1 else f", those of {self.top_groups} groups"
            yield "k", f"must be from 1 to experts={self.top_groups * size}{among}"
        if not 1 <= self.group_best <= size:
            yield "group_best", f"must be from 1 to the {size} experts of a group"

    def active(self, experts: int) -> float:
        """k."""
        return self.k

    def affinity(self, logits: Float[Array, "batch length experts"]) -> Float[Array, "batch length experts"]:
        """Softmax over all experts, or the sigmoid of each."""
        return jax.nn.softmax(logits) if self.scores == "softmax" else jax.nn.sigmoid(logits)

    def route(
        self,
        logits: Float[Array, "batch length experts"],
        present: Bool[Array, "batch length"],
        bias: Float[Array, " experts"] | None,
    ) -> Choice:
        """The k experts with the highest s + bias, of the groups taken, weighted by s."""
        scores = self.affinity(logits)
        _, experts = jax.lax.top_k(self.among_groups(scores if bias is None else scores + bias), self.k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalise:
            weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)
        return Choice(jnp.where(present[..., None], experts, logits.shape[-1]), self.scale * weights)

    def among_groups(self, scores: Float[Array, "batch length experts"]) -> Float[Array, "batch length experts"]:
        """The scores, -inf for experts outside the groups whose best have the highest sum."""
        if self.groups == self.top_groups:
            return scores
        apart = scores.reshape(*scores.shape[:2], self.groups, -1)
        best = jnp.sum(jax.lax.top_k(apart, self.group_best)[0], axis=-1)
        _, taken = jax.lax.top_k(best, self.top_groups)
        inside = jnp.any(taken[..., None] == jnp.arange(self.groups), axis=-2)
        return jnp.where(inside[..., None], apart, -jnp.inf).reshape(scores.shape)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Each expert takes the tokens of a sequence that score highest with it, s = softmax over experts; weight s.

    Zhou et al. 2022 (2202.09368), who choose among all tokens of a batch. The load is even by construction; a token may
    meet any number of experts, and which ones depends on later tokens and on other documents packed beside its own.
    """

    capacity: float = 2.0
    """experts that a token meets on average (the paper's capacity factor)"""

    def problems_among(self, experts: int) -> Iterator[tuple[str, str]]:
        """An expert cannot take a token twice."""
        if not 0 < self.capacity <= experts:
            yield "capacity", f"must be above 0 and at most experts={experts}"

    def active(self, experts: int) -> float:
        """The capacity factor."""
        return self.capacity

    def affinity(self, logits: Float[Array, "batch length experts"]) -> Float[Array, "batch length experts"]:
        """Softmax over the experts."""
        return jax.nn.softmax(logits)

    def route(
        self,
        logits: Float[Array, "batch length experts"],
        present: Bool[Array, "batch length"],
        bias: Float[Array, " experts"] | None,
    ) -> Slots:
        """The ceil(capacity length / experts) tokens of each expert; fewer where fewer are present."""
        _, length, experts = logits.shape
        scores = jnp.where(present[..., None], self.affinity(logits), -1.0).swapaxes(1, 2)
        weights, tokens = jax.lax.top_k(scores, slots_of(length, self.capacity, experts))
        return Slots(jnp.where(weights < 0, length, tokens), jnp.maximum(weights, 0.0))


def load_of(choice: Choice, experts: int) -> Float[Array, " experts"]:
    """The fraction of all (token, expert) pairs that falls to each expert, before any is dropped."""
    counts = jnp.bincount(choice.experts.reshape(-1), length=experts)
    return counts / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)


def dropped(choice: Choice, slots: Slots) -> Float[Array, ""]:
    """The fraction of the (token, expert) pairs that found no slot."""
    length = choice.experts.shape[1]
    pairs = jnp.sum(choice.experts < slots.tokens.shape[1])
    return 1 - jnp.sum(slots.tokens < length) / jnp.maximum(pairs, 1)


def left_out(slots: Slots, present: Bool[Array, "batch length"]) -> Float[Array, ""]:
    """The fraction of the tokens that are present which no expert has."""
    held = jax.vmap(lambda row, index: row.at[index].set(True, mode="drop"))(jnp.zeros_like(present), slots.tokens)
    return jnp.sum(present & ~held) / jnp.maximum(jnp.sum(present), 1)


def balance_loss(
    scores: Float[Array, "batch length experts"], load: Float[Array, " experts"], present: Bool[Array, "batch length"]
) -> Float[Array, ""]:
    """experts sum_e f_e P_e: f the load, P the mean over tokens of scores that are made to sum to 1.

    It is 1 where either is uniform. Fedus et al. 2021 (2101.03961, equation 4), with f_e over k for k > 1.
    """
    share = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-20)
    return load.size * jnp.dot(load, mean_over(share, present))


def router_z_loss(
    logits: Float[Array, "batch length experts"], present: Bool[Array, "batch length"]
) -> Float[Array, ""]:
    """The mean over tokens of logsumexp(logits)^2. Zoph et al. 2022 (2202.08906, equation 5)."""
    return mean_over(jnp.square(jax.nn.logsumexp(logits, axis=-1)), present)


def mean_over(x: Float[Array, "batch length *rest"], present: Bool[Array, "batch length"]) -> Float[Array, "*rest"]:
    """Mean over the tokens that are present, 0 where none is."""
    mask = present.reshape(present.shape + (1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(mask, x, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(present), 1)


def bias_surrogate(bias: Float[Array, " experts"], load: Float[Array, " experts"], rate: float) -> Float[Array, ""]:
    """Zero, with gradient rate sign(load - mean load): b - gradient is the update that balances without a loss.

    b_e grows by `rate` where expert e had less than the mean load and falls by it where it had more. Wang et al. 2024
    (2408.15664); DeepSeek-V3 (2412.19437, section 2.1.2). As a term of the loss it is summed over hosts and
    microbatches like any other.
    """
    step = rate * jnp.sign(load - jnp.mean(load))
    return jnp.dot(bias - jax.lax.stop_gradient(bias), step)
