"""Attention masks against index sets written out in loops from the papers, and what they cost.

Every mask is run on whole rows and on packed documents and compared, document by document, with a softmax in float64
over the keys that the loops find. Tolerance 5e-6: float32 sums of at most 29 products of numbers of order 1.
"""

import contextlib
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import llmjax.nn.scores
from llmjax.config import ConfigError, validate
from llmjax.nn.alibi import ALiBi, alibi_slopes
from llmjax.nn.decoder import enter
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.longformer import LongformerAttention
from llmjax.nn.mask_bigbird import BigBird, table
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mask_longnet import LongNet
from llmjax.nn.mask_moba import MoBA
from llmjax.nn.mask_multiscale import MultiScale
from llmjax.nn.mask_sparse import SparseTransformer
from llmjax.nn.masks import Chunked, Full, Window
from llmjax.nn.mixer import Distance
from llmjax.nn.scores import Scores, Tokens
from pallas_kernels.attention.mask import Mask, Rule, block_map, seen
from tests.evidence import Recorder, evidence
from tests.mixers import cases

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 29, 4, 2, 8
TOLERANCE = 5e-6
LENGTHS = (1, 2, 7, 16, 29)
DOCUMENTS = (13, 9, 5)
ROW = np.r_[np.repeat(np.arange(3), DOCUMENTS), [-1, -1]]
PLACES = np.r_[np.concatenate([np.arange(n) for n in DOCUMENTS]), [-1, -1]]
RANDOM = np.random.default_rng(5)


def arrays():
    """Queries, keys and values of two rows, and sinks."""
    shapes = [(2, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return *(RANDOM.standard_normal(shape).astype(np.float32) for shape in shapes), np.linspace(-1, 1, HEADS)


def tokens(packed=False):
    """Two rows of one document, or of three and two tokens of padding."""
    if packed:
        return Tokens(*(jnp.asarray(np.tile(x, (2, 1))) for x in (PLACES, ROW)))
    return Tokens(jnp.tile(jnp.arange(LENGTH), (2, 1)))


def scores(q, k, v, sinks, where, causal=True):
    options = {"scale": 1 / math.sqrt(q.shape[-1]), "implementation": "reference"}
    return Scores(q, k, v, where, where, sinks=sinks, causal=causal, **options)


attend = jax.jit(lambda mask, value: mask.attend(value), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def visible(mask, length, heads):
    """The mask written out for one document, `[heads | 1, length, length]`."""
    where = jnp.arange(length)[None]
    return mask.visible(where, where, heads)[0]


# The oracles: how often the query i of head h sees the key j in a document of n tokens, causality aside.


def strided(stride, i, j):
    return j in range(i - stride, i + 1), (i - j) % stride == 0


def fixed(stride, c, i, j):
    return i // stride == j // stride, j % stride in range(stride - c, stride)


def longformer(mask, i, j, h):
    d = mask.dilations[h % len(mask.dilations)]
    near = j in {i + d * t for t in range(-mask.window, mask.window + 1)}
    return near or i < mask.globals or j < mask.globals


def bigbird(mask, i, j):
    m, n = i // mask.block, j // mask.block
    near = abs(m - n) <= mask.window // 2
    drawn = set(table(mask)[m]) - set(range(mask.globals))
    return near or n < mask.globals or m < mask.globals or n in drawn


def longnet(mask, i, j, h):
    count = 0
    for w, r in zip(mask.segments, mask.dilations, strict=True):
        start = i // w * w
        kept = range(start + h % r, start + w, r)
        count += i in kept and j in kept
    return count


SEPARATE = {"heads": "separate"}
CASES = {
    "A06 full": (Full(), lambda i, j, h: True),
    "A08 window": (Window(5), lambda i, j, h: abs(i - j) < 5),
    "A08 window of everything": (Window(LENGTH), lambda i, j, h: True),
    "A13 segments": (Chunked(6), lambda i, j, h: i // 6 == j // 6),
    "A13 one segment": (Chunked(LENGTH), lambda i, j, h: True),
    "A10 strided": (SparseTransformer(stride=5), lambda i, j, h: any(strided(5, i, j))),
    "A10 strided, apart": (SparseTransformer(stride=5, **SEPARATE), lambda i, j, h: strided(5, i, j)[h % 2]),
    "A10 fixed": (SparseTransformer("fixed", 6, 2), lambda i, j, h: any(fixed(6, 2, i, j))),
    "A10 fixed, apart": (SparseTransformer("fixed", 6, 2, **SEPARATE), lambda i, j, h: fixed(6, 2, i, j)[h % 2]),
    "A10 fixed, first": (SparseTransformer("fixed", 6, 2, "first"), lambda i, j, h: fixed(6, 2, i, j)[0]),
    "A10 strided, second": (SparseTransformer("strided", 5, heads="second"), lambda i, j, h: strided(5, i, j)[1]),
    "A11 window": (Longformer(3, 0), lambda i, j, h: abs(i - j) <= 3),
    "A11 dilated": (x := Longformer(2, 3, (1, 2, 1, 4)), lambda i, j, h, x=x: longformer(x, i, j, h)),
    "A11 all global": (Longformer(1, LENGTH), lambda i, j, h: True),
    "A12 blocks": (x := BigBird(3, 1, 3, 2, 40), lambda i, j, h, x=x: bigbird(x, i, j)),
    "A14 one pattern": (x := LongNet((9,), (3,)), lambda i, j, h, x=x: longnet(x, i, j, h)),
    "A15 mixture": (x := LongNet((4, 8, 16), (1, 2, 4)), lambda i, j, h, x=x: longnet(x, i, j, h)),
    "A15 uneven": (x := LongNet((5, 11), (1, 3)), lambda i, j, h, x=x: longnet(x, i, j, h)),
}
FUTURE = ["A08 window", "A13 segments", "A11 dilated", "A11 all global", "A12 blocks", "A15 uneven"]


def counts(name, n, causal):
    """[heads, n, n]: how often each pair of a document of n tokens counts."""
    sees = CASES[name][1]
    table = [[[int(sees(i, j, h)) for j in range(n)] for i in range(n)] for h in range(HEADS)]
    return np.asarray(table) * (np.tri(n, dtype=int) if causal else 1)


def softmax(q, k, v, sinks, counts, distance=0.0):
    """sum_j c_ij exp(s_ij) v_j / (sum_j c_ij exp(s_ij) + exp(sink)) in float64, for one row; `[n, heads, head_dim]`."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    weights = counts * np.exp(np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + distance)
    total = weights.sum(-1) + np.exp(sinks)[:, None]
    return np.einsum("hij,jhd->ihd", weights / total[..., None], v)


def compare(evidence, mask, causal, expected):
    """Whole and packed rows of the mask against `expected(q, k, v, sinks)` of each document."""
    given = arrays()
    for packed in (False, True):
        out = np.asarray(attend(mask, scores(*given, tokens(packed), causal)))
        sizes = DOCUMENTS if packed else (LENGTH,)
        for row, (start, n) in itertools.product(range(2), zip(np.cumsum((0, *sizes)), sizes)):
            here = (row, slice(start, start + n))
            wanted = expected(*(x[here] for x in given[:3]), given[3])
            evidence.record(np.abs(out[here] - wanted).max(), TOLERANCE)


def marked(names):
    """Each case with the evidence mark of its row."""
    for name in names:
        module = type(CASES[name][0]).__module__
        oracle = "softmax in float64 over index sets in loops from the paper"
        yield pytest.param(name, marks=evidence(name[:3], oracle=oracle, code=module))


@pytest.mark.parametrize("name", [*marked(CASES)])
def test_causal_attention(name, evidence):
    mask = CASES[name][0]
    compare(evidence, mask, True, lambda *x: softmax(*x, counts(name, len(x[0]), True)))


@pytest.mark.parametrize("name", [*marked(FUTURE)])
def test_attention_both_ways(name, evidence):
    mask = CASES[name][0]
    compare(evidence, mask, False, lambda *x: softmax(*x, counts(name, len(x[0]), False)))


@pytest.mark.parametrize("name", CASES)
def test_the_mask_written_out(name):
    shown = np.broadcast_to(visible(CASES[name][0], LENGTH, HEADS), (HEADS, LENGTH, LENGTH))
    causal = np.tri(LENGTH, dtype=bool) if name.startswith("A10") else True
    np.testing.assert_array_equal(shown & causal, counts(name, LENGTH, name.startswith("A10")) > 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_keys_seen_is_the_mean_count(name, causal):
    """Four heads hold each dilation and each offset equally often; of offsets modulo 3, three heads do."""
    if name.startswith("A10") and not causal:
        return
    heads = 3 if 3 in getattr(CASES[name][0], "dilations", ()) else HEADS
    for n in LENGTHS:
        mean = counts(name, n, causal)[:heads].sum() / heads / n
        assert CASES[name][0].keys_seen(n, causal) == pytest.approx(mean, rel=1e-12)


@evidence("A06", oracle="attention without a mask, and the causal one", code="llmjax.nn.scores")
def test_prefixes(evidence):
    """A prefix of nothing is causal, a prefix of all tokens is full attention."""
    given, where = arrays(), tokens()
    for prefix, causal in ((False, True), (True, False)):
        held = dataclasses.replace(where, prefix=jnp.full((2, LENGTH), prefix))
        out = attend(Full(), scores(*given, held))
        expected = softmax(*(x[0] for x in given[:3]), given[3], counts("A06 full", LENGTH, causal))
        evidence.record(np.abs(out[0] - expected).max(), TOLERANCE)


@pytest.mark.parametrize(
    "mask", [Window(3), Chunked(3), SparseTransformer(), Longformer(), LongNet(), BigBird(), MoBA(), MultiScale()]
)
def test_what_a_mask_cannot_do_is_refused(mask):
    given, where = arrays(), tokens()
    held = dataclasses.replace(where, prefix=jnp.ones((2, LENGTH), bool))
    with pytest.raises(ValueError, match="prefix"):
        mask.attend(scores(*given, held))
    if isinstance(mask, SparseTransformer | MoBA | MultiScale):
        with pytest.raises(ValueError, match="causal=True"):
            mask.attend(scores(*given, where, causal=False))


def test_rows_beyond_the_length_of_bigbird_are_refused():
    with pytest.raises(ValueError, match="length=8, a row has 29 tokens"):
        BigBird(length=8).attend(scores(*arrays(), tokens()))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SparseTransformer(stride=1), "stride=1 must be at least 2"),
        (SparseTransformer("fixed", 8, 8), "summary=8 must be at least 1 and below stride=8"),
        (Longformer(window=-1), "window=-1 must not be negative"),
        (Longformer(dilations=(1, 0)), "dilations"),
        (LongNet((4, 8), (1,)), "dilations.* must be as many as segments, 2"),
        (LongNet((4,), (8,)), "at most their segments"),
        (BigBird(window=2), "window=2 must be odd"),
        (BigBird(random=-1), "random=-1 must not be negative"),
        (MoBA(top_k=0), "top_k=0 must be at least 1"),
        (MultiScale(block=3), "block=3 must be an even number"),
    ],
)
def test_problems(mask, message):
    with pytest.raises(ConfigError, match=message):
        validate(mask)


MASKED = {name: mixer for name, mixer in cases.CASES.items() if name.startswith("mask-")}


@pytest.mark.parametrize("name", MASKED)
def test_what_cannot_see_the_future_is_refused_by_its_config(name):
    """Exactly the masks that raise without `causal`."""
    mixer, x = dataclasses.replace(MASKED[name], causal=False), jax.ShapeDtypeStruct((1, 12, cases.D_MODEL), np.float32)
    refused, params = [field for field, _ in mixer.problems()], cases.params_of(MASKED[name])
    assert refused in ([], ["mask"])
    with pytest.raises(ValueError, match="causal=True") if refused else contextlib.nullcontext():
        jax.eval_shape(lambda x: cases.apply(mixer, params, x), x)


@evidence("A10", oracle="the paper's worked positions for stride 128 and c = 8", code="llmjax.nn.mask_sparse")
def test_summary_columns(evidence):
    shown = np.asarray(visible(SparseTransformer("fixed", heads="second"), 260, 1)[0]) & np.tri(260, dtype=bool)
    for i, expected in ((127, {*range(120, 128)}), (259, {*range(120, 128), *range(248, 256)})):
        evidence.record(len(set(np.flatnonzero(shown[i]).tolist()) ^ expected), 0)


@evidence("A10", oracle="the causal set, by a product of the two sets' matrices", code="llmjax.nn.mask_sparse")
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_two_hops_reach_every_earlier_token(pattern, evidence):
    causal = np.tri(40, dtype=bool)
    first, second = (
        np.asarray(visible(SparseTransformer(pattern, 8, 2, which), 40, 1)[0]) & causal for which in ("first", "second")
    )
    reached = (second.astype(int) @ first > 0) | first
    evidence.record((reached != causal).sum(), 0)
    assert (second | first).sum() < causal.sum() / 2


@evidence("A14", oracle="the counts of 16 tokens worked by hand", code="llmjax.nn.mask_longnet")
def test_scores_of_the_patterns(evidence):
    for causal, expected in ((False, (64, 32, 16)), (True, (40, 20, 10))):
        for (w, r), pairs in zip(((4, 1), (8, 2), (16, 4)), expected, strict=True):
            evidence.record(abs(LongNet((w,), (r,)).keys_seen(16, causal) * 16 - pairs), 0)
    evidence.record(abs(int(visible(LongNet((4, 8, 16), (1, 2, 4)), 16, 1).sum()) - 88), 0)


def with_gradients(function, *arrays):
    """Output and gradients of sum(out^2 / 2)."""

    def run(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(out)

    return jax.jit(run)(*arrays)


@evidence("A15", oracle="gradients of one dense softmax with log-count bias", code="llmjax.nn.mask_longnet")
def test_gradients_of_the_mixture(evidence):
    mask, (q, k, v, sinks) = CASES["A15 mixture"][0], arrays()
    c = counts("A15 mixture", LENGTH, True)

    def dense(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        s = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM) + jnp.log(c)
        weights = jax.nn.softmax(
            jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (2, 4, LENGTH, 1))], -1), -1
        )
        return jnp.einsum("bhij,bjhd->bihd", weights[..., :-1], v)

    ours = with_gradients(lambda q, k, v: mask.attend(scores(q, k, v, jnp.asarray(sinks), tokens())), q, k, v)
    for one, other in zip(ours, with_gradients(dense, q, k, v), strict=True):
        evidence.record(np.abs(one - other).max(), 2e-5)


@evidence("A11", oracle="gradients of dense attention under the boolean mask", code="llmjax.nn.mask_longformer")
def test_gradients_of_merged_parts(evidence):
    mask, (q, k, v, sinks) = CASES["A11 dilated"][0], arrays()
    both = [
        with_gradients(lambda q, k, v, s, f=f: f(scores(q, k, v, s, tokens(), False)), q, k, v, np.float32(sinks))
        for f in (mask.attend, super(Longformer, mask).attend)
    ]
    for one, other in zip(*both, strict=True):
        evidence.record(np.abs(one - other).max(), 2e-5)


@evidence("A11", oracle="the definition in numpy", code="llmjax.nn.longformer")
def test_global_tokens_have_projections_of_their_own(evidence):
    """Row of a global token: its own q, k, v over everything; other rows: window and global keys."""
    mask, x = Longformer(2, 3), RANDOM.standard_normal((1, LENGTH, 16)).astype(np.float32)
    context, _ = enter(jnp.zeros((1, LENGTH), jnp.int32), None, None, None)
    module = LongformerAttention(heads=2, mask=mask).build(16, 2, GPT2Init(0.5))
    params = jax.device_get(meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))["params"])

    def project(name):
        return np.einsum("td,dhe->the", x[0], params[name]["kernel"]) + params[name]["bias"]

    local, own = (
        softmax(*(project(prefix + name) for name in ("query", "key", "value")), np.full(2, -np.inf), seen)
        for prefix, seen in (("", np.asarray(visible(mask, LENGTH, 1))), ("global_", 1))
    )
    z = np.concatenate([own[:3], local[3:]])
    expected = np.einsum("the,hed->td", z, params["out"]["kernel"]) + params["out"]["bias"]
    out, _ = jax.jit(module.apply)({"params": params}, x, context)
    evidence.record(np.abs(out[0] - expected).max(), 2e-5)


@evidence("A12", oracle="sets of blocks in loops", code="llmjax.nn.mask_bigbird")
def test_active_blocks(evidence):
    """g + w + r blocks, fewer where the window leaves the document or meets the global blocks; no block twice."""
    mask = BigBird()
    for m, line in enumerate(table(mask)):
        seen = line[line >= 0].tolist()
        near = {0, 1} | ({m - 1, m, m + 1} & set(range(64)))
        assert near <= set(seen)
        evidence.record(abs(len(set(seen)) - len(near) - 3) + len(seen) - len(set(seen)), 0)
    assert len(table(mask)[40]) == 2 + 3 + 3
    drawn = table(mask)[3:, 5:]
    assert not np.array_equal(drawn, table(BigBird(seed=1))[3:, 5:])
    assert len(np.unique(drawn)) > 50  # drawn from everywhere


def moba(mask, q, k):
    """Which keys each head's queries choose, [heads, n, n], in loops."""
    n, heads, _ = q.shape
    shown = np.zeros((heads, n, n), int)
    for h in range(heads):
        keys = k[:, h // (heads // k.shape[1])].astype(np.float64)
        for i in range(n):
            own = i // mask.size
            gates = [q[i, h] @ keys[m * mask.size : (m + 1) * mask.size].mean(0) for m in range(own)]
            for m in [*np.argsort(gates)[::-1][: mask.top_k - 1], own]:
                shown[h, i, m * mask.size : (m + 1) * mask.size] = 1
    return shown * np.tri(n, dtype=int)


@pytest.mark.parametrize(("size", "top_k"), [(4, 3), (3, 1), (4, 9)])
def test_moba_sees_the_blocks_of_the_greatest_mean_scores(size, top_k):
    mask, recorder = MoBA(size, top_k), Recorder()
    compare(recorder, mask, True, lambda q, k, v, sinks: softmax(q, k, v, sinks, moba(mask, q, k)))
    i = np.arange(LENGTH)
    q = RANDOM.standard_normal((LENGTH, 1, 4))
    assert mask.keys_seen(LENGTH, True) == pytest.approx(moba(mask, q, q).sum() / len(i))


def groups_of(mask, i):
    """The groups of past tokens that token i sees: its block and the one before one by one, then ever larger ones."""
    b, level = mask.block, 1
    stop = max(i // b - 1, 0) * b
    groups = [range(j, j + 1) for j in range(stop, i + 1)]
    while stop > 0:
        parent, size = b * 2**level, mask.pooling**level
        start = max(i // parent - 1, 0) * parent
        groups += [range(j, j + size) for j in range(start, stop, size)]
        stop, level = start, level + 1
    return groups


def multiscale(mask, q, k, v, sinks):
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i in range(len(q)):
        groups = groups_of(mask, i)
        means = [np.stack([x[list(g)].astype(np.float64).mean(0) for g in groups]) for x in (k, v)]
        sizes = np.asarray([len(g) for g in groups])
        out[i] = softmax(q[i : i + 1], *means, sinks, sizes)[0]
    return out


@evidence("A16", oracle="means over groups in loops, weighted by their sizes", code="llmjax.nn.mask_multiscale")
@pytest.mark.parametrize(("block", "pooling"), [(2, 2), (4, 2), (2, 1)])
def test_multiscale(block, pooling, evidence):
    mask = MultiScale(block, pooling)
    compare(evidence, mask, True, lambda *x: multiscale(mask, *x))
    for n in LENGTHS:
        mean = np.mean([len(groups_of(mask, i)) for i in range(n)])
        assert mask.keys_seen(n, True) == pytest.approx(mean)


@evidence("A16", oracle="the uniform mean of the past, and full attention", code="llmjax.nn.mask_multiscale")
def test_every_past_token_counts_once(evidence):
    """Equal scores weigh all past tokens equally, however they are pooled; groups of one are exact."""
    n = LENGTH
    zero, ones = np.zeros((2, n, 1, 4), np.float32), np.tile(np.eye(n, dtype=np.float32)[:, None], (2, 1, 1, 1))
    out = attend(MultiScale(2), scores(zero, zero, ones, None, tokens()))
    evidence.record(np.abs(out[:, :, 0] - np.tri(n) / np.arange(1, n + 1)[:, None]).max(), 1e-6)
    given = scores(*arrays(), tokens())
    evidence.record(np.abs(attend(MultiScale(2, 1), given) - attend(Full(), given)).max(), TOLERANCE)


@pytest.mark.parametrize("name", ["longnet", "moba"])
def test_distance_biases_follow_the_heads(name):
    """Parts of heads and rows of pairs keep each head's slope and each pair's distance."""
    i, slopes = np.arange(LENGTH), alibi_slopes(HEADS)
    bias = -slopes[:, None, None] * np.abs(i[:, None] - i)
    given = arrays()
    held = dataclasses.replace(
        scores(*given, tokens()), distance=Distance(jnp.asarray(slopes[:, None], jnp.float32), ALiBi())
    )
    mask = {"longnet": CASES["A15 uneven"][0], "moba": MoBA(4, 3)}[name]
    q, k, v = (x[0] for x in given[:3])
    seen = counts("A15 uneven", LENGTH, True) if name == "longnet" else moba(mask, q, k)
    out = attend(mask, held)
    np.testing.assert_allclose(out[0], softmax(q, k, v, given[3], seen, bias), atol=2e-5)


def scored(mask, length, packed, monkeypatch):
    """Scores that a kernel computes which skips tiles of 32 x 32 where nothing is seen."""
    totals = []

    def count(query, key, value, bias, mask, *, return_residual, segment_ids, positions, **options):
        assert mask is None
        lengths = (query.shape[1], key.shape[1])
        tile = tuple(min(32, n) for n in lengths)
        rule = Rule(1.0, options["is_causal"], options["local_window_size"], None)
        where = seen(Mask(segment_ids=segment_ids, positions=positions), lengths)
        active = block_map(where, rule, *lengths, *tile) > 0
        totals.append(active.sum() * (query.shape[0] // active.shape[0]) * query.shape[2] * math.prod(tile))
        out = jnp.zeros((*query.shape[:3], value.shape[3]))
        return (out, out[..., 0]) if return_residual else out

    monkeypatch.setattr(llmjax.nn.scores, "attention", count)
    where = Tokens(jnp.arange(length)[None])
    if packed:
        second = jnp.arange(length) >= length // 3
        where = Tokens((jnp.arange(length) - second * (length // 3))[None], second[None].astype(jnp.int32))

    @jax.jit
    def run(x):
        mask.attend(scores(x, x, x, None, where))
        return sum(totals)

    return int(run(jnp.ones((1, length, 4, 2))))


LENGTHS_OF_COST = (512, 1024, 2048)
COSTS = {
    "A08 window": (Window(64),) * 3,
    "A11 window and global tokens": (Longformer(32, 2, (1, 1, 1, 2)),) * 3,
    "A11 packed": (Longformer(32, 2),) * 3,
    "A12 blocks": [BigBird(32, 2, 3, 3, n) for n in LENGTHS_OF_COST],
    "A13 segments": (Chunked(64),) * 3,
    "A14 one pattern": (LongNet((64,), (2,)),) * 3,
    "A15 mixture": (LongNet((64, 128), (1, 2)),) * 3,
}


def costs():
    """Each case with the evidence mark of its row."""
    for name, masks in COSTS.items():
        oracle = "twice the length is twice the work: scores in tiles that are not skipped"
        yield pytest.param(name, marks=evidence(name[:3], oracle=oracle, code=type(masks[0]).__module__))


@pytest.mark.parametrize("name", [*costs()])
def test_the_cost_is_linear(name, evidence, monkeypatch):
    """Growth of the work from 512 to 1024 and 2048 tokens; 2.15 leaves room for the ends of rows. Dense is 4."""
    cases = zip(COSTS[name], LENGTHS_OF_COST, strict=True)
    work = [scored(mask, n, name.endswith("packed"), monkeypatch) for mask, n in cases]
    for one, two in itertools.pairwise(work):
        evidence.record(two / one, 2.15)


@evidence("A10", oracle="length^1.5: four times the length is eight times the work", code="llmjax.nn.mask_sparse")
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_the_cost_of_factorised_attention(pattern, evidence, monkeypatch):
    """The stride is the root of the length; dense attention grows by 16."""
    work = [scored(SparseTransformer(pattern, n), n * n, False, monkeypatch) for n in (16, 32, 64)]
    for one, two in itertools.pairwise(work):
        evidence.record(two / one, 9)


@evidence("A16", oracle="n log n", code="llmjax.nn.mask_multiscale")
def test_the_cost_of_multiscale_attention(evidence, monkeypatch):
    """Blocks of 32 double 4 times in 512 tokens and 6 times in 2048: 4 x 6 / 4 is 6 times the work; dense is 16."""
    one, two = (scored(MultiScale(32), n, False, monkeypatch) for n in (512, 2048))
    evidence.record(two / one, 7)


@pytest.mark.parametrize(
    "mask",
    [
        SparseTransformer("fixed", 64, 8),
        SparseTransformer("strided", 64),
        Longformer(64, 2),
        LongNet((64, 128), (1, 2)),
        BigBird(32),
        MoBA(256),
        MultiScale(256),
    ],
)
def test_no_array_of_all_pairs_exists(mask):
    """All temporaries of one head together are smaller than one byte a pair."""
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    where = Tokens(jax.ShapeDtypeStruct((1, length), jnp.int32))
    given = dataclasses.replace(scores(x, x, x, None, where), implementation=None)
    compiled = jax.jit(mask.attend).lower(given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2
