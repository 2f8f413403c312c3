"""PriorTR: image tokens ranked by what the question adds to the attention that they get without one."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.nn.token_reduction import Seen, visual_attention


def prior_tr(seen: Seen) -> Float[Array, "batch length"]:
    """`information` of P, the row's last token, over Q, the token right after the image. 2606.24156 (ECCV 2026).

    Causality hides the question from the token after the image: its attention is the prior that a question does not
    change. Zero at other tokens. The rows end with the question, and have something between image and end.
    """
    length = seen.image.shape[1]
    after = length - jnp.argmax(seen.image[:, ::-1], axis=1)
    posterior = visual_attention(seen, jnp.full_like(after, length - 1))
    return information(posterior, visual_attention(seen, after))


def information(
    posterior: Float[Array, "batch length"], prior: Float[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """P log(P / Q) of each token, 0 where P = 0: over a row they sum to KL(P || Q). Float32."""
    p, q = posterior.astype(jnp.float32), prior.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    return p * (jnp.log(jnp.maximum(p, tiny)) - jnp.log(jnp.maximum(q, tiny)))
