"""How fast a chip can decode at most (roofline; Williams et al. 2009, Pope et al. 2022, 2211.05102)."""

from typing import NamedTuple

from llmjax.plan.chips import Chip


class DecodeBound(NamedTuple):
    """The least seconds of a decoding step, and what they are bound by."""

    compute: float
    """Seconds of arithmetic at the chip's peak."""
    memory: float
    """Seconds to read the weights and the cache once."""
    tokens_per_second: float
    """Of all rows together."""


def decode_bound(chip: Chip, weight_bytes: float, cache_bytes: float, flops_per_token: float, rows: int) -> DecodeBound:
    """The bound of decoding one token for each of `rows` sequences.

        seconds = max(rows x FLOPs / peak, (weights + rows x cache) / bandwidth)

    Weights are read once for all rows; `cache_bytes` is what one row keeps of its past (`model.kv_bytes_per_token()`
    times its length), `flops_per_token` that of a forward pass.
    """
    compute = rows * flops_per_token / chip.flops
    memory = (weight_bytes + rows * cache_bytes) / chip.hbm_bandwidth
    return DecodeBound(compute, memory, rows / max(compute, memory))
