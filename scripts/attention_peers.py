"""Attention as other libraries offer it, each behind one form: f(case) -> function of (query, key, value).

A peer that cannot do a case raises NotImplementedError with the reason; one that is not installed is left out.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Case(Protocol):
    """What a peer asks of a benchmark's case; queries and keys are equally long."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None
    """tokens that a query sees, its own included; causal"""
    documents: int
    """equal documents that a sequence is packed from"""


Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def segments(case: Case, batch: int) -> jax.Array:
    """The document of every token, `[batch, length]`."""
    ids = np.arange(case.length) // (case.length // case.documents)
    return jnp.asarray(np.broadcast_to(ids, (batch, case.length)), jnp.int32)


def jax_nn(implementation: str) -> Callable[[Case], Attention]:
    """`jax.nn.dot_product_attention`; packing as a dense mask and a smaller value head padded, the only ways it has."""

    def build(case: Case) -> Attention:
        window = None if case.window is None else (case.window - 1, 0)

        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            ids = segments(case, 1)
            mask = ids[:, None, :, None] == ids[:, None, None, :] if case.documents > 1 else None
            options = dict(is_causal=case.causal, local_window_size=window, implementation=implementation)
            value = jnp.pad(value, [(0, 0)] * 3 + [(0, case.head_dim - case.value_dim)])
            return jax.nn.dot_product_attention(query, key, value, mask=mask, **options)[..., : case.value_dim]

        return attention

    return build


def refuse(case: Case, what: str, *, grouped: bool, documents: bool) -> None:
    """Raise NotImplementedError for what the examples of jax.experimental do not do."""
    if case.window is not None or case.head_dim != case.value_dim:
        raise NotImplementedError(f"{what} has no window and one head dim")
    if not grouped and case.heads != case.kv_heads:
        raise NotImplementedError(f"{what} has no grouped heads")
    if not documents and case.documents > 1:
        raise NotImplementedError(f"{what} has no segments")


def pallas_triton(case: Case) -> Attention:
    """`jax.experimental.pallas.ops.gpu.attention.mha`: Triton."""
    from jax.experimental.pallas.ops.gpu import attention as ops

    refuse(case, "pallas_triton", grouped=False, documents=True)
    scale = case.head_dim**-0.5

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        ids = segments(case, query.shape[0]) if case.documents > 1 else None
        return ops.mha(query, key, value, ids, sm_scale=scale, causal=case.causal)

    return attention


def pallas_mgpu(case: Case) -> Attention:
    """`jax.experimental.pallas.ops.gpu.attention_mgpu`: Mosaic GPU; float16 alone, and scores that are not scaled."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as ops

    refuse(case, "pallas_mgpu", grouped=True, documents=False)
    block = 64 if case.head_dim > 128 else 128
    sizes = dict(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
    config = ops.TuningConfig(block_q=64, block_kv=block, max_concurrent_steps=2, causal=case.causal, **sizes)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        halves = (x.astype(jnp.float16) for x in (query * case.head_dim**-0.5, key, value))
        return ops.attention(*halves, config).astype(query.dtype)

    return attention


def pallas_splash(case: Case) -> Attention:
    """`jax.experimental.pallas.ops.tpu.splash_attention`, blocks of at most 1024."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (case.length, case.length)
    mask = splash.CausalMask(shape) if case.causal else splash.FullMask(shape)
    if case.window is not None:
        mask = splash.LocalMask(shape, (case.window - 1, 0), 0)
    block = min(1024, case.length)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
    many = splash.MultiHeadMask([mask] * case.heads)
    kernel = splash.make_splash_mha(many, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        ids = segments(case, 1)[0]
        pair = splash.SegmentIds(ids, ids) if case.documents > 1 else None
        turned = (jnp.swapaxes(x, 1, 2) for x in (query * case.head_dim**-0.5, key, value))
        out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=pair))(*turned)
        return jnp.swapaxes(out, 1, 2)

    return attention


def tokamax(implementation: str) -> Callable[[Case], Attention]:
    """`tokamax.dot_product_attention`."""

    def build(case: Case) -> Attention:
        import tokamax as library

        if case.documents > 1:
            raise NotImplementedError("tokamax has no segments")
        window = None if case.window is None else (case.window - 1, 0)
        options = dict(is_causal=case.causal, local_window_size=window, implementation=implementation)
        return lambda query, key, value: library.dot_product_attention(query, key, value, **options)

    return build


def peers(platform: str) -> dict[str, Callable[[Case], Attention]]:
    """What there is to compare with on a platform, by name."""
    found: dict[str, Any] = {"jax.nn xla": jax_nn("xla")}
    if platform == "gpu":
        found |= {"jax.nn cudnn": jax_nn("cudnn"), "jax pallas_triton": pallas_triton, "jax pallas_mgpu": pallas_mgpu}
    if platform == "tpu":
        found |= {"jax pallas_splash": pallas_splash}
    if importlib.util.find_spec("tokamax") is not None and platform != "cpu":
        found |= {f"tokamax {name}": tokamax(name) for name in ("mosaic", *(["triton"] if platform == "gpu" else []))}
    return found
