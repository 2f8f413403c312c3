"""Decode attention on TPUs: one loop over the blocks of all sequences, whose pages are copied ahead of the work."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import chips
from pallas_kernels.decode_attention.cache import Blocks, Cache, Config, Rule, key_range

LANES = 128
TILE = 16
"""Rows of a tile of bfloat16: copies begin and end at multiples of it."""
BUFFER_BYTES, SCORES = 2**20, 2**18
"""At most so many bytes of keys in a block, and so many scores."""
ENTRIES = 2**17
"""At most so many of the page table, which lies in scalar memory (1 MB)."""
NOT_MINE = 2**30
"""Distance of a query from a key of another kv head."""
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def refusal(query: Array, cache: Cache, config: Config) -> str | None:
    """Why the kernel cannot do it, or None."""
    if query.dtype not in DTYPES:
        return f"takes bfloat16 and float32, not {query.dtype}"
    _, page_size, kv_heads, head_dim = cache.key_pages.shape
    if config.stages == 1:
        return "takes at least 2 stages: a block is copied while another is in work"
    if cache.page_table.size > ENTRIES:
        return f"takes page tables of at most {ENTRIES} entries, not {cache.page_table.shape}"
    if page_size * kv_heads % TILE:
        return f"takes pages of a multiple of {TILE} rows, not {page_size} tokens of {kv_heads} kv heads"
    if kv_heads % 8 and max(head_dim, cache.value_pages.shape[3]) > LANES:
        return f"takes head dims above {LANES} with a multiple of 8 kv heads, not {kv_heads}: the cache would be copied"
    return None


def cores(device: str) -> int:
    """TensorCores that one device of this kind has."""
    return 2 if device in ("TPU v5", "TPU v5p") else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of one kernel."""

    queries: int
    heads: int
    kv_heads: int
    max_pages: int
    batch: int
    blocks: Blocks
    splits: int
    stages: int
    rule: Rule

    @property
    def rows(self) -> int:
        """Queries times heads: the rows of the products."""
        return self.queries * self.heads

    @property
    def capacity(self) -> int:
        """The most tokens of one sequence."""
        return self.max_pages * self.blocks.page_size

    def keys(self, length: Array) -> tuple[Array, Array]:
        """(first, stop) of the positions that a sequence of this length sees."""
        return key_range(length, self.capacity, self.rule, self.queries)


def partials(
    query: Float[Array, "batch queries heads head_dim"], cache: Cache, rule: Rule, config: Config
) -> tuple[Float[Array, "splits batch queries heads value_dim"], Float[Array, "splits batch queries heads"]]:
    """Attention over `config.splits` shares of the keys of each sequence, one TPU core each (a v5p has two).

    All heads are the rows of one product with the keys of all kv heads, as these lie in the page; scores of a query
    with another group's keys are masked. Decode waits for memory: the columns that this wastes cost less than taking
    the heads of a page apart. Keys and values of the pages that are seen are read once. A head dim of 64 is stored in
    lanes of 128: a cache whose layout in memory has no such gaps is copied first.
    """
    batch, queries, heads, head_dim = query.shape
    page_size, kv_heads, value_dim = cache.value_pages.shape[1:]
    whole = TILE // math.gcd(kv_heads, TILE)
    columns = min(BUFFER_BYTES // (head_dim * query.dtype.itemsize), SCORES // (queries * heads))
    size = max(min(config.block_k or columns // kv_heads, cache.capacity) // whole, 1) * whole
    plan = Plan(
        *(queries, heads, kv_heads, cache.page_table.shape[1], batch),
        *(Blocks.of(page_size, size), config.splits or cores(chips.target()[1]), config.stages or 2, rule),
    )
    table = jnp.clip(cache.page_table.reshape(-1), 0, cache.key_pages.shape[0] - 1)
    pages = (x.reshape(x.shape[0], page_size * kv_heads, x.shape[3]) for x in cache[:2])
    tokens, itemsize = batch * plan.capacity, query.dtype.itemsize
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    found = pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=jax.ShapeDtypeStruct((plan.splits, batch, plan.rows, LANES + value_dim), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.splits,),
            in_specs=[anywhere] * 3,
            out_specs=anywhere,
            scratch_shapes=scratch(plan, head_dim, value_dim, query.dtype),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.rows * tokens * (head_dim + value_dim),
            bytes_accessed=tokens * kv_heads * (head_dim + value_dim) * itemsize,
            transcendentals=plan.rows * tokens,
        ),
        name="decode_attention",
    )(cache.lengths, table, query.reshape(batch, plan.rows, head_dim), *pages)
    found = found.reshape(plan.splits, batch, queries, heads, LANES + value_dim)
    return found[..., LANES:], found[..., 0]


def scratch(plan: Plan, head_dim: int, value_dim: int, dtype: jnp.dtype) -> list[Any]:
    """Buffers of queries, keys, values and results, the running softmax, distances, and what the copies signal."""
    pages = (plan.stages, plan.blocks.copies, plan.blocks.rows * plan.kv_heads)
    return [
        pltpu.VMEM((plan.stages, plan.rows, head_dim), dtype),
        pltpu.VMEM((*pages, head_dim), dtype),
        pltpu.VMEM((*pages, value_dim), dtype),
        pltpu.VMEM((2, plan.rows, LANES + value_dim), jnp.float32),
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, value_dim), jnp.float32),
        pltpu.VMEM((plan.rows, plan.blocks.size * plan.kv_heads), jnp.int32),
        pltpu.SemaphoreType.DMA((plan.stages,)),
        pltpu.SemaphoreType.DMA((plan.stages, 2)),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def kernel(plan: Plan, lengths: Any, table: Any, *refs: Any) -> None:
    """One core: its share of the blocks of every sequence in turn, copied `stages - 1` blocks ahead of the work."""
    buffers = Buffers(*refs)
    measure(plan, buffers.distance)

    def share(b: Array) -> tuple[Array, Array]:
        """At least one block, so that a sequence without keys has a result too."""
        begin, end = plan.blocks.share(*plan.keys(lengths[b]), pl.program_id(0), plan.splits)
        return begin, jnp.maximum(end, begin + 1)

    def advance(b: Array, block: Array, count: Array) -> tuple[Array, Array, Array]:
        """Begin the copies of this block; the next one, which may be the next sequence's first."""

        def start() -> None:
            for_each_copy(plan, buffers, lengths[b], table, b, block, jax.lax.rem(count, plan.stages), "start")
            pl.when(block == share(b)[0])(lambda: copy_query(plan, buffers, b).start())

        pl.when(b < plan.batch)(start)
        here = jnp.minimum(b, plan.batch - 1)
        more = block + 1 < share(here)[1]
        following = jnp.minimum(b + 1, plan.batch - 1)
        return jnp.where(more, b, b + 1), jnp.where(more, block + 1, share(following)[0]), count + 1

    def sequence(b: Array, ahead: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        begin, end = share(b)
        buffers.top[...] = jnp.full_like(buffers.top, -jnp.inf)
        buffers.total[...] = jnp.zeros_like(buffers.total)
        buffers.acc[...] = jnp.zeros_like(buffers.acc)
        copy_query(plan, buffers, b).wait()

        def one(block: Array, ahead: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            slot = jax.lax.rem(ahead[2] - (plan.stages - 1), plan.stages)
            ahead = advance(*ahead)
            for_each_copy(plan, buffers, lengths[b], table, b, block, slot, "wait")
            attend(plan, buffers, lengths[b], block, b, slot)
            return ahead

        ahead = jax.lax.fori_loop(begin, end, one, ahead)
        finish(plan, buffers, b)
        return ahead

    ahead = (jnp.int32(0), share(jnp.int32(0))[0], jnp.int32(0))
    for _ in range(plan.stages - 1):
        ahead = advance(*ahead)
    jax.lax.fori_loop(0, plan.batch, sequence, ahead)
    for b in range(max(0, plan.batch - 2), plan.batch):
        copy_result(plan, buffers, b).wait()


class Buffers(NamedTuple):
    """The arrays in HBM, their buffers in VMEM, and the semaphores of the copies between them."""

    query: Any
    key: Any
    value: Any
    out: Any
    q: Any
    k: Any
    v: Any
    o: Any
    top: Any
    total: Any
    acc: Any
    distance: Any
    q_signal: Any
    kv_signal: Any
    o_signal: Any


def copy_query(plan: Plan, buffers: Buffers, b: Array) -> Any:
    """The copy of one sequence's queries; at most `stages` sequences are under way."""
    slot = jax.lax.rem(b, plan.stages)
    return pltpu.make_async_copy(buffers.query.at[b], buffers.q.at[slot], buffers.q_signal.at[slot])


def copy_result(plan: Plan, buffers: Buffers, b: Array | int) -> Any:
    """The copy of one sequence's lse and output."""
    slot = b % 2 if isinstance(b, int) else jax.lax.rem(b, 2)
    return pltpu.make_async_copy(buffers.o.at[slot], buffers.out.at[pl.program_id(0), b], buffers.o_signal.at[slot])


def for_each_copy(
    plan: Plan, buffers: Buffers, length: Array, table: Any, b: Array, block: Array, slot: Array, what: str
) -> None:
    """Start or wait for the copies of a block; pieces of pages that no query sees are left out."""
    blocks = plan.blocks
    first, stop = plan.keys(length)
    row0, _ = blocks.span(block)

    def one(i: Array, _: None) -> None:
        at = row0 + i * blocks.rows

        def copy() -> None:
            page = table[b * plan.max_pages + at // blocks.page_size]
            start = pl.multiple_of(at % blocks.page_size * plan.kv_heads, TILE)
            for j, (pages, buffer) in enumerate(((buffers.key, buffers.k), (buffers.value, buffers.v))):
                piece = pages.at[page, pl.ds(start, blocks.rows * plan.kv_heads)]
                getattr(pltpu.make_async_copy(piece, buffer.at[slot, i], buffers.kv_signal.at[slot, j]), what)()

        pl.when((at < stop) & (at + blocks.rows > first))(copy)

    jax.lax.fori_loop(0, blocks.copies, one, None)


def measure(plan: Plan, distance: Any) -> None:
    """Key's offset in the block less the query's offset; `NOT_MINE` where the key's head is another group's."""
    row = jax.lax.broadcasted_iota(jnp.int32, distance.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, distance.shape, 1)
    mine = row % plan.heads // (plan.heads // plan.kv_heads) == column % plan.kv_heads
    distance[...] = jnp.where(mine, column // plan.kv_heads - row // plan.heads, NOT_MINE)


def attend(plan: Plan, buffers: Buffers, length: Array, block: Array, b: Array, slot: Array) -> None:
    """One block of keys and values added to the running softmax."""
    columns = plan.blocks.size * plan.kv_heads
    first, stop = plan.keys(length)
    row0, own = plan.blocks.span(block)
    _, end = plan.blocks.share(first, stop, pl.program_id(0), plan.splits)

    def erase() -> None:
        """Zeros for the values that no query sees: their weight is 0, and they may be NaN."""
        shape = buffers.v.shape[1:]
        piece, row, _ = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
        at = row0 + piece * plan.blocks.rows + row // plan.kv_heads
        buffers.v[slot] = jnp.where((at >= first) & (at < stop), buffers.v[slot], jnp.zeros(shape, buffers.v.dtype))

    pl.when((row0 < first) | (row0 + plan.blocks.size > stop))(erase)
    query = buffers.q[jax.lax.rem(b, plan.stages)]
    key, value = (x[slot].reshape(columns, x.shape[-1]) for x in (buffers.k, buffers.v))
    scores = product(query, key, 1) * plan.rule.scale
    if plan.rule.soft_cap is not None:
        scores = plan.rule.soft_cap * jnp.tanh(scores / plan.rule.soft_cap)
    distance = buffers.distance[...]
    last = length - plan.queries - row0
    seen = distance <= jnp.where(block < end, last, -NOT_MINE)
    if plan.rule.left is not None:
        seen &= distance >= last - plan.rule.left
    if plan.capacity % plan.blocks.size or plan.blocks.page_size % plan.blocks.rows:
        at = row0 + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1) // plan.kv_heads
        seen &= (at >= own) & (at < plan.capacity)
    scores = jnp.where(seen, scores, -jnp.inf)
    old = buffers.top[:, :1]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    weights, decay = jnp.exp(scores - base), jnp.exp(old - base)
    buffers.top[...] = jnp.broadcast_to(new, buffers.top.shape)
    buffers.total[...] = buffers.total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
    buffers.acc[...] = buffers.acc[...] * decay + product(weights.astype(value.dtype), value, 0)


def product(left: Float[Array, "m c"], right: Float[Array, "..."], axis: int) -> Float[Array, "m n"]:
    """left times right over axis 1 and `axis`, sums in float32; float32 arrays in full precision."""
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def finish(plan: Plan, buffers: Buffers, b: Array) -> None:
    """Normalise, and send lse and output on their way."""
    pl.when(b >= 2)(lambda: copy_result(plan, buffers, b - 2).wait())
    slot = jax.lax.rem(b, 2)
    total = buffers.total[...]
    some = total != 0
    lse = jnp.where(some, buffers.top[...] + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    buffers.o[slot, :, :LANES] = lse
    buffers.o[slot, :, LANES:] = buffers.acc[...] / jnp.where(some, total, 1.0)[:, :1]
    copy_result(plan, buffers, b).start()
