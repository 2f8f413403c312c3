"""A metric is a sum and a count; its mean is made once, at the end: right over hosts, microbatches and masks."""

from collections.abc import Mapping

import jax
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Metric:
    """Sum of a quantity and the weight it was summed over; both float32 scalars."""

    total: Float[Array, ""] | float
    count: Float[Array, ""] | float

    def mean(self) -> float:
        """total / count on the host; NaN where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


def add(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
    """Metrics of the union of two disjoint sets of examples: sums and counts add."""
    return jax.tree.map(lambda a, b: a + b, dict(left), dict(right))
