"""What rounding costs: the noise model of a uniform grid, the ratio of signal to noise, and the error of a layer.

error uniform in [-step/2, step/2]:  E[error^2] = step^2 / 12
SQNR = E[x^2] / E[error^2];   of a uniform signal over the whole range 4^b, that is 6.02 b dB
y = x W, W off by independent errors:  E|x E|^2 = outputs step^2 / 12 |x|^2  <=  |E|_F^2 |x|^2 (always)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def noise_power(step: Float[Array, "..."] | float) -> Float[Array, "..."] | float:
    """step^2 / 12."""
    return step**2 / 12


def sqnr_db(signal: Float[Array, "..."], approximation: Float[Array, "..."]) -> Float[Array, ""]:
    """10 log10 of the signal's power over the error's, measured; infinite without error."""
    return 10 * jnp.log10(jnp.sum(jnp.square(signal)) / jnp.sum(jnp.square(signal - approximation)))


def relative_error(signal: Float[Array, "..."], approximation: Float[Array, "..."]) -> Float[Array, ""]:
    """|x - x'| / |x|."""
    return jnp.sqrt(jnp.sum(jnp.square(signal - approximation)) / jnp.sum(jnp.square(signal)))


def uniform_sqnr_db(bits: int, power: float = 1 / 3) -> float:
    """SQNR that the noise model gives a signal of that power on 2^bits levels of step 2 / 2^bits over [-1, 1].

    Power 1/3 is a uniform signal's (24.08 dB at 4 bits), 1/2 a full-scale sine's (1.76 dB more), sigma^2 a Gaussian's
    whose tails beyond the range are not counted.
    """
    return float(10 * jnp.log10(power / noise_power(2.0 / 2**bits)))


def expected_output_error(x: Float[Array, "... inputs"], step: float, outputs: int) -> Float[Array, "..."]:
    """E|x E|^2 of each row of x, for a matrix rounded with that step."""
    return outputs * noise_power(step) * jnp.sum(jnp.square(x), axis=-1)


def output_error(
    x: Float[Array, "... inputs"], w: Float[Array, "inputs outputs"], approximation: Float[Array, "inputs outputs"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """|x (W - W')|^2 of each row of x, and its bound |W - W'|_F^2 |x|^2."""
    error = w - approximation
    return (
        jnp.sum(jnp.square(x @ error), axis=-1),
        jnp.sum(jnp.square(error)) * jnp.sum(jnp.square(x), axis=-1),
    )
