"""Codes of a few bits side by side in bytes: the first code in the highest bits, as bitsandbytes packs two a byte.

    byte stream = bits of code 0 (highest first), bits of code 1, ...

Widths that do not divide a byte run across byte boundaries: eight codes of 3 bits are three bytes. The last byte of a
row is filled up.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def pack(
    codes: UInt8[Array, "*rows count"], bits: int, fill: UInt8[Array, ""] | int = 0
) -> UInt8[Array, "*rows bytes"]:
    """Codes below 2^bits (1 to 8 bits) as bytes; a last byte with room left takes copies of the code `fill`.

    Of a fill that does not fit whole, only its high bits are written.
    """
    count = codes.shape[-1]
    spare = -(-(packed_size(count, bits) * 8 - count * bits) // bits)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, spare)], constant_values=fill)
    stream = codes[..., None] >> jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8) & 1
    flat = stream.reshape(*codes.shape[:-1], -1)
    return jnp.packbits(flat[..., : 8 * packed_size(count, bits)], axis=-1)


def unpack(data: UInt8[Array, "*rows bytes"], bits: int, count: int) -> UInt8[Array, "*rows count"]:
    """The first `count` codes of each row."""
    if 8 % bits == 0:
        shifts = jnp.arange(8 - bits, -1, -bits, dtype=jnp.uint8)
        codes = data[..., None] >> shifts & (2**bits - 1)
    else:
        stream = jnp.unpackbits(data, axis=-1)[..., : count * bits]
        weights = 1 << jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
        codes = jnp.sum(stream.reshape(*data.shape[:-1], count, bits) * weights, axis=-1, dtype=jnp.uint8)
    return codes.astype(jnp.uint8).reshape(*data.shape[:-1], -1)[..., :count]
