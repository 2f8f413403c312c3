"""Rotary embedding beyond the trained length: rules that slow planes down, by s = target length / trained length.

A head's plane i, of `planes`, turns by theta_i = base^(-i / planes) a token; a rule gives other frequencies, and a
magnitude for the turned queries and keys. Constant frequencies are made in float64 and rounded to float32 once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Frequencies = Float[np.ndarray, " planes"] | Float[Array, "batch planes"]


@dataclass(frozen=True)
class RopeScaling:
    """Base of the rules."""

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """Radians a token of every plane (of each row, where `positions` matter), and the magnitude of q and k."""
        raise NotImplementedError

    def problems_at(self, planes: int) -> Iterator[tuple[str, str]]:
        """Field and reason for each value that does not fit heads with so many planes."""
        return iter(())


def plain_frequencies(base: float, planes: int) -> Float[np.ndarray, " planes"]:
    """base^(-i / planes), float64. Su et al. 2021 (2104.09864)."""
    return base ** (-np.arange(planes) / planes)


def too_small(config: RopeScaling, *fields: str) -> Iterator[tuple[str, str]]:
    """Fields below 1."""
    return ((field, "must be at least 1") for field in fields if getattr(config, field) < 1)


@dataclass(frozen=True)
class PositionInterpolation(RopeScaling):
    """theta_i / s: positions are squeezed into the trained range. Chen et al. 2023 (2306.15595)."""

    factor: float = 4.0
    """s (the paper: 4 to 16 for LLaMA's 2,048 tokens)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A factor that squeezes nothing."""
        return too_small(self, "factor")

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """All planes slowed alike."""
        return plain_frequencies(base, planes) / self.factor, 1.0


@dataclass(frozen=True)
class NTK(RopeScaling):
    """Base b s^(d / (d - 2)), d features: theta_0 stays, the slowest plane is slowed by s. bloc97 2023 (LocalLLaMA)."""

    factor: float = 4.0
    """s"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A factor that would shrink the base."""
        return too_small(self, "factor")

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """theta_i s^(-i / (planes - 1)), which is the same."""
        return plain_frequencies(base, planes) * self.factor ** -ntk_exponents(planes), 1.0


def ntk_exponents(planes: int) -> Float[np.ndarray, " planes"]:
    """From 0 for the fastest plane to 1 for the slowest."""
    return np.arange(planes) / max(planes - 1, 1)


@dataclass(frozen=True)
class DynamicNTK(RopeScaling):
    """NTK with s = max(1, factor n / L - factor + 1), n the current length, L the trained one. emozilla 2023.

    n is a row's largest position in the call, plus 1. Keys in a cache keep the frequencies of their own call.
    """

    factor: float = 2.0
    """how steeply s grows beyond the trained length"""
    original_length: int = 4096
    """tokens L the model was trained on; shorter sequences are not scaled"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values below 1."""
        return too_small(self, "factor", "original_length")

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """One set of frequencies for each row."""
        beyond = lengths(positions) / self.original_length - 1
        s = 1 + self.factor * jnp.maximum(beyond, 0)
        return plain_frequencies(base, planes).astype(np.float32) * s[:, None] ** -ntk_exponents(planes), 1.0


def lengths(positions: Int[Array, "batch length *axes"]) -> Float[Array, " batch"]:
    """Each row's largest position + 1; padding (-1) counts for nothing."""
    return (positions.reshape(positions.shape[0], -1).max(axis=1) + 1).astype(jnp.float32)


@dataclass(frozen=True)
class YaRN(RopeScaling):
    """gamma theta_i + (1 - gamma) theta_i / s, q and k times 0.1 ln s + 1. Peng et al. 2023 (2309.00071).

    gamma is 1 for planes of more than `beta_fast` turns in L tokens and 0 for those of fewer than `beta_slow`. Scores
    grow by the square of the magnitude: attention gets sharper (early preprints had that the wrong way round).
    """

    factor: float = 16.0
    """s (the paper: 16 and 32 for Llama 2)"""
    original_length: int = 4096
    """tokens L the model was trained on"""
    beta_fast: float = 32.0
    """turns in L tokens above which a plane is left alone (the paper: 32)"""
    beta_slow: float = 1.0
    """turns in L tokens below which a plane is fully interpolated (the paper: 1)"""
    ramp: Literal["code", "exact", "paper"] = "code"
    """gamma between the two: linear in the plane's index, between whole indices (the authors' code) or exact ones
    (gpt-oss), or linear in turns"""
    magnitude: float | None = None
    """what turned queries and keys are multiplied by; None is 0.1 ln s + 1"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values below 1; a ramp that falls."""
        yield from too_small(self, "factor", "original_length")
        if not self.beta_fast > self.beta_slow > 0:
            yield "beta_slow", f"must be above 0 and below beta_fast={self.beta_fast}"

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """NTK by parts."""
        if self.ramp == "paper":
            gamma = turns_ramp(base, planes, self.original_length, self.beta_slow, self.beta_fast)
        else:
            gamma = self.index_ramp(base, planes)
        magnitude = 0.1 * math.log(self.factor) + 1 if self.magnitude is None else self.magnitude
        return by_parts(base, planes, self.factor, gamma), magnitude

    def index_ramp(self, base: float, planes: int) -> Float[np.ndarray, " planes"]:
        """gamma that falls from 1 to 0 between the planes of beta_fast and beta_slow turns, in code whole ones."""
        fast, slow = (
            planes * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.ramp == "code":
            fast, slow = math.floor(fast), math.ceil(slow)
        low = max(fast, 0)
        high = max(min(slow, 2 * planes - 1), low + 1e-3)  # the authors' code bounds it by features
        return 1 - np.clip((np.arange(planes) - low) / (high - low), 0, 1)


def turns_ramp(base: float, planes: int, length: int, low: float, high: float) -> Float[np.ndarray, " planes"]:
    """0 for planes that make at most `low` turns in `length` tokens, 1 from `high` turns on, linear between."""
    turns = length * plain_frequencies(base, planes) / (2 * math.pi)
    return np.clip((turns - low) / (high - low), 0, 1)


def by_parts(
    base: float, planes: int, factor: float, gamma: Float[np.ndarray, " planes"]
) -> Float[np.ndarray, " planes"]:
    """gamma theta_i + (1 - gamma) theta_i / factor."""
    return plain_frequencies(base, planes) * (gamma + (1 - gamma) / factor)


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """By parts like YaRN, linear in turns between `low` and `high`, no magnitude. Llama 3.1 (2407.21783), its code."""

    factor: float = 8.0
    """s (Llama 3.1: 8; Llama 3.2: 32)"""
    low: float = 1.0
    """turns in the trained length below which a plane is fully interpolated (Llama 3.1: 1)"""
    high: float = 4.0
    """turns in the trained length above which a plane is left alone (Llama 3.1: 4)"""
    original_length: int = 8192
    """tokens the model was trained on (Llama 3: 8,192)"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values below 1; a ramp that falls."""
        yield from too_small(self, "factor", "original_length")
        if not self.high > self.low > 0:
            yield "low", f"must be above 0 and below high={self.high}"

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """By parts."""
        gamma = turns_ramp(base, planes, self.original_length, self.low, self.high)
        return by_parts(base, planes, self.factor, gamma), 1.0


@dataclass(frozen=True)
class LongRoPE(RopeScaling):
    """theta_i / lambda_i with searched lambda, q and k times sqrt(1 + ln s / ln L). Ding et al. 2024 (2402.13753).

    A row longer than L takes the long factors, others the short ones, by its largest position in the call; keys in a
    cache keep those of their own call. The paper's unscaled first tokens are left out, as in Phi-3.
    """

    short: tuple[float, ...]
    """lambda of every plane up to L tokens"""
    long: tuple[float, ...]
    """lambda of every plane beyond L tokens"""
    factor: float = 32.0
    """s (Phi-3 mini 128k: 131,072 / 4,096)"""
    original_length: int = 4096
    """tokens L the model was trained on"""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values below 1 (2 for a logarithm that divides); factors that would stop a plane."""
        yield from too_small(self, "factor")
        if self.original_length < 2:
            yield "original_length", "must be at least 2"
        for field in ("short", "long"):
            if min(getattr(self, field), default=0) <= 0:
                yield field, "must be positive, one factor a plane"

    def problems_at(self, planes: int) -> Iterator[tuple[str, str]]:
        """Another number of factors than planes."""
        for field in ("short", "long"):
            if len(getattr(self, field)) != planes:
                yield field, f"has {len(getattr(self, field))} factors for {planes} planes"

    def frequencies(
        self, base: float, planes: int, positions: Int[Array, "batch length *axes"]
    ) -> tuple[Frequencies, float]:
        """One set of frequencies for each row."""
        theta = plain_frequencies(base, planes)
        short, long = ((theta / np.asarray(factors)).astype(np.float32) for factors in (self.short, self.long))
        chosen = jnp.where(lengths(positions)[:, None] > self.original_length, long, short)
        return chosen, math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
