"""Which tokens of a sequence each shard holds.

| layout | shard r of P |
| --- | --- |
| contiguous | the r-th of P equal parts |
| striped | tokens r, r + P, r + 2P, ... (Brandon et al. 2023, 2311.09431) |
| zigzag | parts r and 2P - 1 - r of 2P equal parts, in this order (Llama 3, 2407.21783, section 3.3.2) |

Under a causal mask the last contiguous shard sees everything and the first almost nothing; with the other two all do
the same work: exactly so with zigzag, up to the diagonal blocks with striped.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

Layout = Literal["contiguous", "striped", "zigzag"]
LAYOUTS = ("contiguous", "striped", "zigzag")


def positions_of(
    shard: Int[jax.Array, ""] | int, shards: int, local_length: int, layout: Layout
) -> Int[jax.Array | np.ndarray, " local_length"]:
    """The positions of the tokens that `shard` holds, in the order in which it holds them, int32.

    A numpy array where `shard` is an int, so that a loader needs no device. Raises ValueError for an unknown layout and
    for an odd length of a zigzag shard, which is two equal parts.
    """
    check_layout(local_length, layout)
    index = np.arange(local_length, dtype=np.int32)
    if layout == "contiguous":
        return shard * local_length + index
    if layout == "striped":
        return shard + shards * index
    half = local_length // 2
    part = shard + index // half * (2 * shards - 1 - 2 * shard)
    return part * half + index % half


def check_layout(local_length: int, layout: str) -> None:
    """Raise ValueError unless shards of this length can be laid out so."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
    if layout == "zigzag" and local_length % 2:
        raise ValueError(f"a zigzag shard is two equal parts: its length must be even, not {local_length}")


def order(length: int, shards: int, layout: Layout) -> Int[np.ndarray, " length"]:
    """The positions of all shards, one shard after the other: place k of a sequence laid out so holds token order[k].

    Raises ValueError where `shards` does not divide the length.
    """
    if length % shards:
        raise ValueError(f"{shards} shards do not divide the length {length}")
    parts = [positions_of(shard, shards, length // shards, layout) for shard in range(shards)]
    return np.concatenate([np.asarray(part) for part in parts])


def to_layout(x: Any, shards: int, layout: Layout = "zigzag", axis: int = 1) -> Any:
    """`x` (numpy or jax) with its tokens along `axis` rearranged so that equal parts are the shards of the layout.

    Raises ValueError where the axis cannot be split so.
    """
    return x.take(order(x.shape[axis], shards, layout), axis)


def from_layout(x: Any, shards: int, layout: Layout = "zigzag", axis: int = 1) -> Any:
    """The inverse of `to_layout`."""
    return x.take(np.argsort(order(x.shape[axis], shards, layout)), axis)


def exchanged(
    x: Shaped[Array, "batch local_length ..."], axis_name: str, back: bool = False
) -> Shaped[Array, "batch local_length ..."]:
    """Contiguous shards over `axis_name` made zigzag, or `back`, inside `jax.shard_map`: two permutes of half shards.

    Of the parts 2r and 2r + 1 of shard r, and of r and 2P - 1 - r, one is even and one odd, and all even parts are on
    different shards before and after. Raises ValueError for an odd length.
    """
    check_layout(x.shape[1], "zigzag")
    shards, first_is_even = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name) % 2 == 0

    def sent(half: Array, odd: int) -> Array:
        steps = [(r, min(2 * r + odd, 2 * (shards - r) - 1 - odd)) for r in range(shards)]
        return jax.lax.ppermute(half, axis_name, [(b, a) for a, b in steps] if back else steps)

    one, two = jnp.split(x, 2, axis=1)
    if back:
        even, odd = jnp.where(first_is_even, one, two), jnp.where(first_is_even, two, one)
        return jnp.concatenate([sent(even, 0), sent(odd, 1)], axis=1)
    even, odd = sent(one, 0), sent(two, 1)
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)
